//! The life of a context.

use shootdown::{DeviceError, PageSize, Registers, Rights};

use super::rig::{Instr, Misses, Rig, SIZES, until};
use crate::gru::ChipletConfig;
use crate::gru::layout::{ACTIVE, CALL_OS, IDLE, MANAGEMENT, WINDOW_BYTES, cb, cbe, cch};

const CAUSE_STATE: Result<(), u64> = Err(cch::CAUSE_STATE as u64);

#[test]
fn each_state_allows_its_operations_and_no_others() {
    let rig = Rig::new(ChipletConfig::default());
    rig.configure(0, 8, Misses::FaultMap);
    let refuse = |opcodes: &[u64]| {
        let before = rig.state(0);
        for opcode in opcodes {
            assert_eq!(
                rig.context(0, *opcode),
                CAUSE_STATE,
                "{opcode} in state {before}"
            );
        }
        assert_eq!(rig.context(0, 7), Err(1));
        assert_eq!(rig.state(0), before);
    };
    refuse(&[
        cch::START,
        cch::DEALLOCATE,
        cch::INTERRUPT,
        cch::INTERRUPT_SYNC,
    ]);
    rig.context(0, cch::ALLOCATE).unwrap();
    assert_eq!(rig.state(0), 1);
    refuse(&[cch::ALLOCATE, cch::INTERRUPT, cch::INTERRUPT_SYNC]);
    rig.context(0, cch::START).unwrap();
    assert_eq!(rig.state(0), 2);
    refuse(&[cch::ALLOCATE, cch::START, cch::DEALLOCATE]);
    rig.context(0, cch::INTERRUPT).unwrap();
    assert_eq!(rig.state(0), 3);
    rig.context(0, cch::INTERRUPT_SYNC).unwrap();
    refuse(&[cch::ALLOCATE]);
    rig.context(0, cch::DEALLOCATE).unwrap();
    assert_eq!(rig.state(0), 0);
}

#[test]
fn maps_that_are_empty_or_taken_are_refused() {
    let rig = Rig::new(ChipletConfig::default());
    assert_eq!(
        rig.context(3, cch::ALLOCATE),
        Err(cch::CAUSE_ZERO_MAP.into())
    );
    rig.start(0, 8, Misses::FaultMap);
    rig.configure(1, 8, Misses::FaultMap);
    for (word, map) in [(cch::CB_MAP, 0b100), (cch::DSR_MAP, 0b1)] {
        let own = rig.read(Rig::cch(1, word));
        rig.write(Rig::cch(1, word), map);
        assert_eq!(
            rig.context(1, cch::ALLOCATE),
            Err(cch::CAUSE_RESOURCES.into())
        );
        rig.write(Rig::cch(1, word), own);
    }
    rig.context(1, cch::ALLOCATE).unwrap();
}

#[test]
fn a_segment_is_there_only_while_its_context_is_allocated() {
    let rig = Rig::new(ChipletConfig::default());
    rig.write(Rig::dsr(0, 8), 5);
    rig.start(0, 8, Misses::FaultMap);
    rig.write(Rig::dsr(0, 8), 6);
    rig.write(Rig::dsr(0, 2048), 7);
    assert_eq!(
        (rig.read(Rig::dsr(0, 8)), rig.read(Rig::dsr(0, 2048))),
        (6, 0)
    );
    rig.context(0, cch::INTERRUPT_SYNC).unwrap();
    rig.context(0, cch::DEALLOCATE).unwrap();
    assert_eq!(rig.read(Rig::dsr(0, 8)), 0);
    for offset in [4, 0x1_0000, 0x4_0000, MANAGEMENT + 0x4_0000, WINDOW_BYTES] {
        let refused = Err(DeviceError::NoRegister { offset, width: 8 });
        assert_eq!(rig.chiplet.read(offset), refused);
    }
}

#[test]
fn a_context_locked_by_a_fault_is_not_stopped_until_the_fault_is_forced_to_user_polling() {
    let (rig, base) = Rig::started(ChipletConfig::default());
    let slot = Rig::slot(0, 2);
    let set = Instr {
        opcode: 6,
        element: 3,
        base0: base,
        count: 1,
        stride: 1,
        ..Instr::default()
    };
    rig.issue(0, 2, &set);
    rig.await_miss(slot);
    assert_eq!(rig.read(Rig::tfm(0, 0)), 1 << slot);
    assert_eq!(
        rig.context(0, cch::INTERRUPT_SYNC),
        Err(cch::CAUSE_LOCKED.into())
    );
    assert_eq!(rig.state(0), 2);
    rig.operate(Rig::tfh(slot, 0), 0, 7).unwrap();
    assert_eq!((rig.status(0, 2), rig.read(Rig::tfm(0, 0))), (CALL_OS, 0));
    rig.context(0, cch::INTERRUPT_SYNC).unwrap();
    // The block is unfinished, so START has it try again.
    rig.context(0, cch::START).unwrap();
    assert_eq!(rig.finish(0, 2), IDLE);
}

#[test]
fn start_takes_the_asids_of_the_handle() {
    let (rig, base) = Rig::started(ChipletConfig::default());
    let set = Instr {
        opcode: 6,
        base0: base,
        count: 1,
        stride: 1,
        ..Instr::default()
    };
    rig.run(0, &set).unwrap();
    rig.context(0, cch::INTERRUPT_SYNC).unwrap();
    for region in 0..cch::REGIONS {
        rig.write(Rig::cch(0, cch::REGION + region), cch::SIZES.put(24, SIZES));
    }
    rig.run_not_started(&set);
    rig.context(0, cch::START).unwrap();
    assert_eq!(rig.finish(0, 0), IDLE);
    assert!(rig.holds(8, base) && rig.holds(24, base));
    rig.assert_no_stale_access();
}

impl Rig {
    /// Issues an instruction to a context that does not run: it stays ACTIVE.
    fn run_not_started(&self, instr: &Instr) {
        self.issue(0, 0, instr);
        assert_eq!(self.status(0, 0), ACTIVE);
    }
}

#[test]
fn a_region_is_chosen_by_the_address_and_allows_its_page_sizes_only() {
    let rig = Rig::new(ChipletConfig::default());
    let large = rig.map(0, 0x20_0000, PageSize::TwoMiB, Rights::READ_WRITE);
    rig.configure(0, 8, Misses::UserPolling);
    rig.write(Rig::cch(0, cch::REGION), cch::SIZES.put(8, 1));
    rig.write(Rig::cch(0, cch::REGION + 2), cch::SIZES.put(40, 1));
    rig.context(0, cch::ALLOCATE).unwrap();
    rig.context(0, cch::START).unwrap();
    let set = Instr {
        opcode: 6,
        base0: large,
        count: 1,
        stride: 1,
        ..Instr::default()
    };
    rig.issue(0, 0, &set);
    until("a miss", || rig.status(0, 0) == CALL_OS);
    rig.resolve(0);
    // The 2 MiB entry is there, and never found.
    until("another miss", || {
        rig.status(0, 0) == CALL_OS && rig.chiplet.counts().misses == 2
    });
    assert!(rig.holds(8, large));
    rig.issue(
        0,
        1,
        &Instr {
            base0: 2 << 61,
            ..set
        },
    );
    until("a miss", || rig.status(0, 1) == CALL_OS);
    assert_eq!(rig.read(Rig::tfh(1, 2)), 40);
}

/// Saves control blocks and data segment of context 0, as software does.
fn save(rig: &Rig) -> (Vec<u64>, Vec<u64>) {
    let cbs = (0..4).flat_map(|n| (0..8).map(move |word| Rig::cb(0, n, word)));
    let dsr = (0..256).map(|word| Rig::dsr(0, word * 8));
    (
        cbs.map(|at| rig.read(at)).collect(),
        dsr.map(|at| rig.read(at)).collect(),
    )
}

#[test]
fn an_unloaded_context_goes_on_with_its_unfinished_instructions_after_it_was_loaded_again() {
    let (rig, base) = Rig::started(ChipletConfig::default());
    let load = Instr {
        opcode: 2,
        element: 3,
        base0: base,
        count: 128,
        tri0: 1024,
        stride: 64,
        ..Instr::default()
    };
    let add = Instr {
        opcode: 0xc,
        extended: 4,
        element: 3,
        base0: base + 8,
        operand1: 5,
        ..Instr::default()
    };
    for i in 0..128 {
        rig.poke(base + i * 512, &(1000 + i).to_le_bytes());
    }
    rig.run(0, &add).unwrap();
    rig.issue(0, 1, &load);
    rig.resolve_until_fault_at(Rig::slot(0, 1), base + 4096);
    rig.operate(Rig::tfh(Rig::slot(0, 1), 0), 0, 7).unwrap();
    rig.context(0, cch::INTERRUPT_SYNC).unwrap();
    let (cbs, dsr) = save(&rig);
    rig.context(0, cch::DEALLOCATE).unwrap();
    // Somebody else has the same control blocks meanwhile.
    rig.start(0, 800, Misses::FaultMap);
    rig.run(
        0,
        &Instr {
            opcode: 6,
            base0: base + 0x1_0000 - 8,
            base1: 1,
            count: 8,
            stride: 1,
            ..Instr::default()
        },
    )
    .unwrap();
    rig.context(0, cch::INTERRUPT_SYNC).unwrap();
    rig.context(0, cch::DEALLOCATE).unwrap();

    rig.configure(0, 8, Misses::FaultMap);
    rig.context(0, cch::ALLOCATE).unwrap();
    for (i, value) in cbs.iter().enumerate() {
        rig.write(Rig::cb(0, i as u64 / 8, i % 8), *value);
    }
    for (i, value) in dsr.iter().enumerate() {
        rig.write(Rig::dsr(0, i as u64 * 8), *value);
    }
    rig.context(0, cch::START).unwrap();
    assert_eq!(rig.finish(0, 1), IDLE);
    for i in 0..128 {
        assert_eq!(rig.read(Rig::dsr(0, 1024 + i * 8)), 1000 + i);
    }
    // The atomic had been done, and was not done again.
    assert_eq!(rig.peek(base + 8, 8), 5_u64.to_le_bytes());
    assert_eq!(rig.read(Rig::cb(0, 0, cb::RESULT)), 0);
    rig.assert_no_stale_access();
}

impl Rig {
    fn resolve_until_fault_at(&self, slot: u64, vaddr: u64) {
        until("the fault", || {
            self.await_miss(slot);
            let there = self.read(Rig::tfh(slot, 1)) == vaddr;
            if !there {
                self.resolve(slot);
            }
            there
        });
    }
}

#[test]
fn an_interrupted_instruction_goes_on_where_it_was() {
    let (rig, base) = Rig::started(ChipletConfig::default());
    let set = Instr {
        opcode: 6,
        element: 3,
        base0: base,
        base1: 3,
        count: 1024,
        stride: 1,
        ..Instr::default()
    };
    rig.issue(0, 0, &set);
    rig.resolve_until_fault_at(0, base + 4096);
    rig.operate(Rig::tfh(0, 0), 0, 7).unwrap();
    rig.context(0, cch::INTERRUPT_SYNC).unwrap();
    assert_eq!(rig.read(Rig::cbe(0, cbe::ELEMENT)), 512);
    // What was done already is not done again.
    rig.poke(base, &9_u64.to_le_bytes());
    rig.context(0, cch::START).unwrap();
    assert_eq!(rig.finish(0, 0), IDLE);
    assert_eq!(rig.peek(base, 8), 9_u64.to_le_bytes());
    assert_eq!(rig.peek(base + 8192 - 8, 8), 3_u64.to_le_bytes());
}
