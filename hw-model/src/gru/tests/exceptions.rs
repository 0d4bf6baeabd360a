//! What is wrong with an instruction is an exception with the right cause, and nothing else is disturbed.

use shootdown::{PageSize, Rights};

use super::rig::{Instr, Misses, Rig, set, until};
use crate::gru::layout::{CALL_OS, EXCEPTION, IDLE, STATUS, cb, cbe, cch, tfh};
use crate::gru::{ChipletConfig, FaultPlan};

#[test]
fn every_exception_has_its_cause() {
    let (rig, base) = Rig::started(ChipletConfig::default());
    let read_only = rig.map(0x2_0000, 4096, PageSize::FourKiB, Rights::READ);
    let load = Instr {
        opcode: 2,
        element: 3,
        base0: base,
        count: 1,
        stride: 1,
        ..Instr::default()
    };
    let wrong = |detail| (cbe::INVALID_INSTRUCTION, detail);
    let plain = |cause| (cause, 0);
    let of = |opcode| Instr { opcode, ..load };
    // Negative strides and indices count down.
    let below = (base / 8) as i64 + 1;
    let above = ((u64::MAX - base) / 8) as i64 + 1;
    let cases = [
        (
            wrong(cbe::WRONG_OPCODE),
            Instr {
                extended: 0x33,
                ..of(0xa)
            },
        ),
        (
            wrong(cbe::WRONG_OPCODE),
            Instr {
                extended: 0xf,
                ..of(0xc)
            },
        ),
        (
            plain(cbe::UNMAPPED_MODE_FORBIDDEN),
            Instr {
                modifiers: cb::UNMAPPED,
                ..load
            },
        ),
        (wrong(cbe::WRONG_ELEMENT), Instr { element: 5, ..load }),
        (
            wrong(cbe::WRONG_ELEMENT),
            Instr {
                element: 7,
                ..of(1)
            },
        ),
        (
            wrong(cbe::WRONG_ELEMENT),
            Instr {
                extended: 1,
                element: 6,
                ..of(0xa)
            },
        ),
        (wrong(cbe::WRONG_ELEMENT), of(8)),
        (
            wrong(cbe::WRONG_ALIGNMENT),
            Instr {
                base0: base + 4,
                ..load
            },
        ),
        (wrong(cbe::WRONG_ALIGNMENT), Instr { tri0: 4, ..load }),
        (wrong(cbe::WRONG_ALIGNMENT), Instr { tri1: 4, ..of(3) }),
        (
            wrong(cbe::WRONG_ALIGNMENT),
            Instr {
                base1: base + 0x1001,
                ..of(1)
            },
        ),
        (
            wrong(cbe::WRONG_ALIGNMENT),
            Instr {
                base0: base + 8,
                element: 6,
                ..of(8)
            },
        ),
        (
            wrong(cbe::WRONG_STRIDE),
            Instr {
                count: 2,
                stride: -below,
                ..load
            },
        ),
        (
            wrong(cbe::WRONG_STRIDE),
            Instr {
                count: 2,
                stride: above,
                ..load
            },
        ),
        (
            wrong(cbe::WRONG_STRIDE),
            Instr {
                count: 3,
                stride: i64::MIN,
                ..of(6)
            },
        ),
        (plain(cbe::DATA_SEGMENT_LIMIT), Instr { count: 257, ..load }),
        (plain(cbe::DATA_SEGMENT_LIMIT), Instr { tri0: 2048, ..load }),
        (
            plain(cbe::DATA_SEGMENT_LIMIT),
            Instr {
                tri1: 2048,
                ..of(3)
            },
        ),
        (
            plain(cbe::DATA_SEGMENT_LIMIT),
            Instr {
                count: 0xffff_ffff,
                ..load
            },
        ),
        (
            plain(cbe::DATA_SEGMENT_LIMIT),
            Instr {
                count: 33,
                element: 6,
                ..of(8)
            },
        ),
        (wrong(cbe::WRONG_COUNT), Instr { count: 0, ..load }),
        (
            wrong(cbe::WRONG_COUNT),
            Instr {
                count: 0,
                element: 6,
                ..of(8)
            },
        ),
        (
            plain(cbe::ADDRESS_KIND_MISMATCH),
            Instr {
                kinds: [cb::MMIO, cb::RAM],
                ..load
            },
        ),
        (
            plain(cbe::ADDRESS_KIND_MISMATCH),
            Instr {
                kinds: [cb::RAM, cb::NCRAM],
                base1: base + 0x1000,
                ..of(1)
            },
        ),
        (
            plain(cbe::ADDRESS_KIND_MISMATCH),
            Instr {
                kinds: [cb::REG, cb::RAM],
                extended: 1,
                ..of(0xa)
            },
        ),
        // A queue whose limit is 0 has no lines.
        (
            wrong(cbe::WRONG_QUEUE),
            Instr {
                base0: base + 0x4000,
                element: 6,
                ..of(8)
            },
        ),
        (
            (cbe::TLB_FATAL, u64::from(tfh::CAUSE_MISS)),
            Instr {
                base0: 0x1000,
                ..load
            },
        ),
        (
            (cbe::TLB_FATAL, u64::from(tfh::CAUSE_MISS)),
            Instr {
                base0: u64::MAX - 63,
                ..load
            },
        ),
        (
            (cbe::TLB_FATAL, u64::from(tfh::CAUSE_MOD)),
            Instr {
                base0: read_only,
                ..of(6)
            },
        ),
    ];
    rig.write(Rig::dsr(0, 0), 0x5555);
    let memory = rig.peek(base, 16 * 4096);
    rig.run(
        0,
        &Instr {
            base0: read_only,
            ..load
        },
    )
    .unwrap();
    for (cause, instr) in cases {
        assert_eq!(rig.run(0, &instr), Err(cause), "{instr:x?}");
        assert_eq!(rig.status(0, 0), EXCEPTION);
        let status = cbe::STATUS.get(rig.read(Rig::cbe(Rig::slot(0, 0), cbe::STATE)));
        assert_eq!(status, cbe::HAS_EXCEPTION);
        assert!(rig.peek(base, 16 * 4096) == memory, "memory: {instr:x?}");
        assert_eq!(rig.status(0, 1), IDLE);
        rig.run(0, &load).unwrap();
    }
    assert_eq!(rig.chiplet.counts().exceptions, cases.len() as u64);
    rig.assert_no_stale_access();
}

#[test]
fn an_instruction_that_ends_in_the_middle_says_so() {
    let (rig, base) = Rig::started(ChipletConfig::default());
    let over = Instr {
        count: 1024,
        ..set(base + 15 * 4096, 7)
    };
    let miss = u64::from(tfh::CAUSE_MISS);
    assert_eq!(rig.run(0, &over), Err((cbe::TLB_FATAL, miss)));
    let slot = Rig::slot(0, 0);
    let status = cbe::STATUS.get(rig.read(Rig::cbe(slot, cbe::STATE)));
    assert_eq!(status, cbe::HAS_EXCEPTION | cbe::ABORTED);
    assert_eq!(rig.read(Rig::cbe(slot, cbe::VADDR)), base + 16 * 4096);
    assert_eq!(
        rig.peek(base + 15 * 4096, 4096),
        7_u64.to_le_bytes().repeat(512)
    );
}

#[test]
fn the_state_of_a_control_block_is_one_of_the_data_sheets() {
    let rig = Rig::new(ChipletConfig::default());
    let base = rig.map(0, 4096, PageSize::FourKiB, Rights::READ_WRITE);
    let slot = Rig::slot(0, 0);
    let state = || cbe::CBR_STATE.get(rig.read(Rig::cbe(slot, cbe::STATE)));
    assert_eq!(state(), cbe::INACTIVE);
    rig.start(0, 8, Misses::FaultMap);
    assert_eq!(state(), cbe::IDLE);
    rig.issue(0, 0, &set(base, 1));
    rig.await_miss(slot);
    assert_eq!(state(), cbe::INTERRUPTED_MISS_FMM);
    rig.operate(Rig::tfh(slot, 0), 0, tfh::USER_POLLING)
        .unwrap();
    assert_eq!(state(), cbe::INTERRUPTED_MISS_UPM);
    rig.purge(0, 8, base, PageSize::FourKiB, 1);
    rig.await_purge(0);
    let status = cbe::STATUS.get(rig.read(Rig::cbe(slot, cbe::STATE)));
    assert_eq!(status, cbe::TLB_INVALIDATED);
    assert_eq!(rig.finish(0, 0), IDLE);
    // A poll that never fits, on a context that is stopped.
    let poll = Instr {
        opcode: 0xd,
        extended: 9,
        element: 3,
        base0: base,
        operand1: 9,
        ..Instr::default()
    };
    rig.issue(0, 0, &poll);
    until("an access", || {
        matches!(state(), cbe::QUEUED | cbe::WAIT_RESPONSE)
    });
    rig.context(0, cch::INTERRUPT_SYNC).unwrap();
    assert_eq!(state(), cbe::INTERRUPTED);
    let status = cbe::STATUS.get(rig.read(Rig::cbe(slot, cbe::STATE)));
    assert_eq!(status, cbe::WAS_INTERRUPTED);
}

#[test]
fn an_injected_error_has_a_cause_that_is_worth_another_try_and_comes_before_the_access() {
    let config = ChipletConfig {
        faults: FaultPlan {
            error: 0.5,
            ..FaultPlan::default()
        },
        ..ChipletConfig::default()
    };
    let (rig, base) = Rig::started(config);
    let add = Instr {
        opcode: 0xc,
        extended: 4,
        element: 3,
        base0: base,
        operand1: 1,
        ..Instr::default()
    };
    let (mut done, mut seen) = (0, 0);
    for _ in 0..200 {
        match rig.run(0, &add) {
            Ok(_) => done += 1,
            Err((cause, _)) => {
                assert!(cbe::RETRYABLE.contains(&cause), "{cause:#x}");
                seen |= cause;
            }
        }
    }
    assert_eq!(rig.peek(base, 8), u64::to_le_bytes(done));
    assert_eq!(rig.chiplet.counts().errors, 200 - done);
    assert_eq!(seen, cbe::RETRYABLE.iter().sum());
}

#[test]
fn misses_of_a_polled_context_are_in_the_fault_map_and_do_not_interrupt() {
    use shootdown::Interrupts;
    let rig = Rig::new(ChipletConfig::default());
    let base = rig.map(0, 4096, PageSize::FourKiB, Rights::READ_WRITE);
    rig.start(1, 8, Misses::FaultMapPolled);
    rig.issue(1, 0, &set(base, 1));
    let slot = Rig::slot(1, 0);
    rig.await_miss(slot);
    assert_eq!(rig.fault_state(slot), tfh::STATE_MISS_FMM);
    assert_eq!(rig.read(Rig::tfm(1, 0)), 1 << slot);
    assert_eq!(
        rig.chiplet.wait(1, std::time::Duration::from_millis(20)),
        Ok(0)
    );
    assert_ne!(rig.status(1, 0), CALL_OS);
    assert_eq!(rig.finish(1, 0), IDLE);
}

#[test]
fn unmapped_addresses_name_memory_itself_where_the_context_may_have_them() {
    let rig = Rig::new(ChipletConfig::default());
    let base = rig.map(0, 4096, PageSize::FourKiB, Rights::READ_WRITE);
    let frame = shootdown::Memory::translate(&*rig.memory, base.into())
        .unwrap()
        .frame
        .0;
    rig.configure(0, 8, Misses::FaultMap);
    let dw0 = rig.read(Rig::cch(0, 0));
    rig.write(Rig::cch(0, 0), cch::UNMAP_ENABLE.put(dw0, 1));
    rig.context(0, cch::ALLOCATE).unwrap();
    rig.context(0, cch::START).unwrap();
    let store = Instr {
        modifiers: cb::UNMAPPED,
        ..set(frame * 4096 + 8, 0x77)
    };
    rig.run(0, &store).unwrap();
    assert_eq!(rig.peek(base + 8, 8), 0x77_u64.to_le_bytes());
    assert_eq!(rig.chiplet.counts().misses, 0);
    let nowhere = Instr {
        base0: rig.bus.physical().total() * 4096,
        ..store
    };
    assert_eq!(rig.run(0, &nowhere), Err((cbe::ADDRESS_DECODE, 0)));
    assert_eq!(STATUS.get(rig.read(Rig::cb(0, 1, 0))), IDLE);
    rig.assert_no_stale_access();
}
