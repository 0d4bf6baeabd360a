//! One range, two worlds: a GRU of the model and a device behind VFIO hold the same memory.

use shootdown::{Map, Range};
use shootdown_gru::{ChipletPorts, Config, Element, Gru, GruError, Instruction};
use shootdown_hw_model::gru::{ChipletConfig, Model};
use shootdown_hw_model::{Bus, ModelMemory};
use shootdown_vfio::Reuse;

use super::rig::{BEFORE, DMA, Rig, SECOND, SIZE, page, race, unmapping};
use crate::check::{Check, Outcome, check, demand, demand_eq};
use crate::memory::PAGE;

pub(crate) const CHECKS: &[Check] = &[check(
    "two-worlds:one-unmap-one-start-both-devices-flushed",
    two_worlds,
)];

fn two_worlds() -> Outcome {
    let bus = Bus::new(16 << 10)?;
    let model = Model::new(&bus, 1, ChipletConfig::default());
    let chiplet = &model.chiplets()[0];
    let ports = ChipletPorts {
        name: "gru0".into(),
        blade: 0,
        registers: chiplet.clone(),
        interrupts: chiplet.clone(),
    };
    let gru = Gru::attach(vec![ports], Config::default());
    let rig = Rig::over(
        ModelMemory::new(&bus, 64 << 20)?,
        Reuse::Late,
        |container| container,
    )?;
    let segment = gru.segment(&rig.space)?;
    race(|| {
        let memory = rig.pages(4)?;
        let window = rig.window(memory, SIZE)?;
        let both = page(memory, 2);
        let set = |part: Range| {
            let fill = Instruction::vset(
                part.start(),
                u64::from_ne_bytes([0x3c; 8]),
                Element::Double,
                512,
            );
            segment.run(0, &fill, SECOND)
        };
        set(both)?;
        demand_eq!(
            rig.view(both).differs(0, PAGE, 0x3c),
            None,
            "what the GRU wrote"
        );
        demand_eq!(chiplet.tlb_entries().len(), 1, "entries in the GRU's TLB");
        rig.load(DMA)?;
        let at = rig.arm(&window, both)?;
        let before = rig.space.stats();
        unmapping(&[at], || rig.space.unmap(both))?;
        if !rig.in_flight(at)? {
            return Ok(None);
        }
        let after = rig.space.stats();
        demand_eq!(after.invalidations - before.invalidations, 1, "starts");
        demand_eq!(after.hits - before.hits, 2, "handlers called");
        demand_eq!(
            chiplet.tlb_entries().len(),
            0,
            "entries in the GRU's TLB after it"
        );
        rig.edu.finish()?;
        let refused = set(both);
        demand!(
            matches!(refused, Err(GruError::Exception { .. })),
            "the GRU on unmapped memory: {refused:?}"
        );
        // Whoever gets the frame next keeps what is written there.
        let next = rig.space.map(Map::anonymous(SIZE))?;
        demand_eq!(
            rig.view(next).differs(0, PAGE, 0),
            None,
            "the frame's next owner"
        );
        for other in [0, 1, 3] {
            demand_eq!(
                rig.view(page(memory, other)).differs(0, PAGE, BEFORE),
                None,
                "memory beside it"
            );
        }
        demand_eq!(
            bus.oracle().stale_accesses(),
            0,
            "stale accesses of the GRU"
        );
        Ok(Some(()))
    })
}
