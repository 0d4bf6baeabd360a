//! Polling users and executors get on with each other on few processors.

use std::thread;
use std::time::Instant;

use shootdown::{Memory, PageSize, Range, Registers, Rights};

use super::rig::{Instr, Misses, Rig, until};
use crate::bus::Bus;
use crate::gru::layout::IDLE;
use crate::gru::{ChipletConfig, Model};
use crate::memory::ModelMemory;

#[test]
fn four_chiplets_serve_four_polling_threads() {
    const ROUNDS: u64 = 5000;
    let bus = Bus::new(1024).unwrap();
    let memory = ModelMemory::new(&bus, 2 << 20).unwrap();
    let model = Model::new(&bus, 4, ChipletConfig::default());
    let base = memory.arena().start().get();
    let range = Range::new(base, 4 * 4096).unwrap();
    memory
        .map(range, PageSize::FourKiB, Rights::READ_WRITE)
        .unwrap();
    let rigs = model.chiplets().iter().map(|chiplet| Rig {
        chiplet: chiplet.clone(),
        memory: memory.clone(),
        bus: bus.clone(),
    });
    let start = Instant::now();
    thread::scope(|scope| {
        for (i, rig) in rigs.enumerate() {
            scope.spawn(move || {
                rig.start(0, 8, Misses::FaultMap);
                let base0 = base + i as u64 * 4096;
                let add = Instr {
                    opcode: 0xc,
                    extended: 4,
                    element: 3,
                    base0,
                    operand1: 1,
                    ..Instr::default()
                };
                rig.run(0, &add).unwrap();
                for _ in 1..ROUNDS {
                    rig.issue(0, 0, &add);
                    until("an instruction ends", || rig.status(0, 0) == IDLE);
                }
                assert_eq!(rig.peek(base0, 8), ROUNDS.to_le_bytes());
            });
        }
    });
    let rate = 4.0 * ROUNDS as f64 / start.elapsed().as_secs_f64();
    println!("{rate:.0} instructions a second");
    assert_eq!(bus.oracle().accesses(), 4 * ROUNDS);
    assert_eq!(bus.oracle().stale_accesses(), 0);
    for (i, chiplet) in model.chiplets().iter().enumerate() {
        assert_eq!(chiplet.config().device, i as u32);
        assert_eq!(chiplet.counts().instructions, ROUNDS);
        chiplet.shutdown();
        assert!(chiplet.read(Rig::cch(0, 0)).is_ok());
    }
}
