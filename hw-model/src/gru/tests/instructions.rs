//! Instructions do what the data sheet says, or end with the right cause.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use shootdown::{Interrupts, PageSize, Rights};

use super::interpreter::Plain;
use super::rig::{Instr, Misses, Rig, until};
use crate::gru::ChipletConfig;
use crate::gru::layout::{ACTIVE, CALL_OS, IDLE, cb};

/// Bytes that the random instructions work on: 16 pages of 4 KiB, one of 64 KiB, one of 2 MiB.
const BYTES: u64 = 0x1_0000 + 0x1_0000 + 0x20_0000;
const DSR: u64 = 2048;

/// A rig with memory of all page sizes in one piece: its first address.
fn mixed(config: ChipletConfig) -> (Rig, u64) {
    let rig = Rig::new(config);
    let rw = Rights::READ_WRITE;
    let base = rig.map(0x1e_0000, 0x1_0000, PageSize::FourKiB, rw);
    rig.map(0x1f_0000, 0x1_0000, PageSize::SixtyFourKiB, rw);
    rig.map(0x20_0000, 0x20_0000, PageSize::TwoMiB, rw);
    (rig, base)
}

/// A correct instruction with addresses in [base, base + BYTES), and the index vector that it wants at `tri1`.
fn random(rng: &mut SmallRng, base: u64) -> (Instr, Vec<i64>) {
    let atomics = [
        (9, 0xb),
        (0xa, 1),
        (0xa, 2),
        (0xa, 5),
        (0xa, 7),
        (0xb, 0xf),
        (0xc, 0),
        (0xc, 1),
        (0xc, 2),
        (0xc, 3),
        (0xc, 4),
        (0xc, 8),
        (0xc, 0xc),
    ];
    let element = [0, 1, 2, 3, 6][rng.random_range(0..5)];
    let size: u64 = if element == 6 { 64 } else { 1 << element };
    // Addresses near page borders half of the time.
    let mut address = |span: u64| {
        let at = if rng.random() {
            rng.random_range(0..(BYTES - span) / 4096) * 4096 + rng.random_range(0..8) * size
        } else {
            rng.random_range(0..BYTES - span)
        };
        base + at.min(BYTES - span) / size * size
    };
    let (one, two) = (address(0x8000), address(0x8000));
    let mut instr = Instr {
        element,
        base0: one,
        count: rng.random_range(1..=(1024 / size).max(1)),
        operand1: rng.random_range(0..4),
        operand2: rng.random_range(0..4),
        ..Instr::default()
    };
    let room = 1024 / size;
    match rng.random_range(0..5) {
        0 => {
            instr.opcode = 1;
            instr.base1 = two;
            instr.count = rng.random_range(1..0x4000 / size);
            // Overlapping copies are undefined.
            if one.abs_diff(two) < 0x4000 {
                instr.base1 = if one - base > 0x10_0000 {
                    one - 0x4000
                } else {
                    one + 0x4000
                };
            }
        }
        1 => {
            let stride = rng.random_range(-9..=9);
            instr.opcode = [2, 4, 6, 0xe][rng.random_range(0..4)];
            instr.base1 = rng.random();
            instr.stride = if rng.random() { 1 } else { stride };
            let span = instr.count * size * instr.stride.unsigned_abs();
            if instr.stride < 0 && one - base < span {
                instr.base0 = one + span;
            }
            instr.tri0 = rng.random_range(0..=room - instr.count.min(room)) * size;
        }
        2 => {
            instr.opcode = [3, 5, 7][rng.random_range(0..3)];
            instr.base1 = rng.random();
            instr.count = instr.count.min(64);
            instr.tri1 = 1024 + rng.random_range(0..64) * 8;
            let last = (0x8000 / size) as i64 - 1;
            let index = (0..instr.count)
                .map(|_| rng.random_range(0..last))
                .collect();
            return (instr, index);
        }
        3 => instr.opcode = 0xf,
        _ => {
            (instr.opcode, instr.extended) = atomics[rng.random_range(0..atomics.len())];
            if element == 6 {
                instr.element = 3;
            }
        }
    }
    if instr.opcode == 0xf {
        instr.stride = 1;
    }
    (instr, Vec::new())
}

/// Runs `rounds` random instructions on a chiplet and on the interpreter, and compares everything.
fn agree(seed: u64, config: ChipletConfig, rounds: usize) {
    let (rig, base) = mixed(config);
    rig.start(0, 8, Misses::FaultMap);
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut plain = Plain {
        base,
        memory: (0..BYTES).map(|_| rng.random::<u8>() & 3).collect(),
        dsr: vec![0; DSR as usize],
    };
    rig.poke(base, &plain.memory);
    for round in 0..rounds {
        let (instr, index) = random(&mut rng, base);
        for (i, index) in index.iter().enumerate() {
            let at = instr.tri1 + i as u64 * 8;
            rig.write(Rig::dsr(0, at), *index as u64);
            plain.dsr[at as usize..][..8].copy_from_slice(&index.to_le_bytes());
        }
        let result = rig.run(0, &instr).unwrap();
        if let Some(old) = plain.run(&instr) {
            assert_eq!(result, old, "round {round}: {instr:x?}");
        }
        assert!(
            rig.dsr_bytes(0, DSR) == plain.dsr,
            "data segment, round {round}: {instr:x?}"
        );
        if round % 16 == 0 || round + 1 == rounds {
            let memory = rig.peek(base, BYTES as usize);
            assert!(
                memory == plain.memory,
                "memory by round {round}: {instr:x?}"
            );
        }
    }
    assert_eq!(rig.chiplet.counts().instructions, rounds as u64);
    rig.assert_no_stale_access();
}

#[test]
fn random_instructions_agree_with_a_plain_interpreter() {
    for seed in 0..4 {
        agree(seed, ChipletConfig::default(), 250);
    }
}

#[test]
fn random_instructions_agree_when_the_tlb_holds_two_entries() {
    let config = ChipletConfig {
        tlb_entries: 2,
        ..ChipletConfig::default()
    };
    agree(9, config, 120);
}

#[test]
fn a_value_that_was_stored_is_loaded_again() {
    let (rig, base) = Rig::started(ChipletConfig::default());
    rig.write(Rig::dsr(0, 0), 0x1234_5678_9abc_def0);
    let store = Instr {
        opcode: 4,
        element: 3,
        base0: base,
        count: 1,
        stride: 1,
        ..Instr::default()
    };
    rig.run(0, &store).unwrap();
    rig.run(
        0,
        &Instr {
            opcode: 2,
            tri0: 1032,
            ..store
        },
    )
    .unwrap();
    assert_eq!(rig.read(Rig::dsr(0, 1032)), 0x1234_5678_9abc_def0);
    rig.assert_no_stale_access();
}

#[test]
fn four_instructions_at_a_time_all_complete() {
    let (rig, base) = Rig::started(ChipletConfig::default());
    for number in 0..4 {
        let at = base + number * 0x3000;
        let set = Instr {
            opcode: 6,
            element: 3,
            base0: at,
            base1: number + 1,
            count: 1024,
            stride: 1,
            ..Instr::default()
        };
        rig.issue(0, number, &set);
    }
    for number in 0..4 {
        assert_eq!(rig.finish(0, number), IDLE);
        assert_eq!(
            rig.peek(base + number * 0x3000, 8192),
            (number + 1).to_le_bytes().repeat(1024)
        );
    }
}

#[test]
fn a_poll_stays_active_until_the_value_fits() {
    let (rig, base) = Rig::started(ChipletConfig::default());
    let poll = Instr {
        opcode: 0xd,
        extended: 9,
        element: 2,
        base0: base + 4,
        operand1: 7,
        ..Instr::default()
    };
    rig.issue(0, 0, &poll);
    let slot = Rig::slot(0, 0);
    rig.await_miss(slot);
    rig.resolve(slot);
    let set = Instr {
        opcode: 0xc,
        extended: 4,
        element: 2,
        base0: base + 4,
        operand1: 6,
        ..Instr::default()
    };
    rig.issue(0, 1, &set);
    assert_eq!(rig.finish(0, 1), IDLE);
    assert_eq!(rig.status(0, 0), ACTIVE);
    rig.issue(0, 1, &Instr { operand1: 1, ..set });
    assert_eq!(rig.finish(0, 0), IDLE);
    assert_eq!(rig.read(Rig::cb(0, 0, cb::RESULT)), 7);
}

#[test]
fn a_store_through_a_clean_entry_faults_and_goes_on_with_a_writable_one() {
    let rig = Rig::new(ChipletConfig::default());
    let base = rig.map(0, 4096, PageSize::FourKiB, Rights::READ);
    rig.start(0, 8, Misses::UserPolling);
    let load = Instr {
        opcode: 2,
        element: 3,
        base0: base,
        count: 1,
        stride: 1,
        ..Instr::default()
    };
    rig.run(0, &load).unwrap();
    rig.issue(
        0,
        0,
        &Instr {
            opcode: 6,
            base1: 5,
            ..load
        },
    );
    until("a call of the system", || rig.status(0, 0) == CALL_OS);
    let page = shootdown::Range::new(base, 4096).unwrap();
    shootdown::Memory::protect(&*rig.memory, page, Rights::READ_WRITE).unwrap();
    assert_eq!(rig.finish(0, 0), IDLE);
    assert_eq!(rig.peek(base, 8), 5_u64.to_le_bytes());
    assert_eq!(rig.chiplet.counts().modify_misses, 1);
    rig.assert_no_stale_access();
}

#[test]
fn completion_sets_the_done_bit_and_interrupts_if_asked_to() {
    let (rig, base) = Rig::started(ChipletConfig::default());
    rig.start(1, 8, Misses::UserPolling);
    let set = Instr {
        opcode: 6,
        base0: base,
        count: 1,
        stride: 1,
        ..Instr::default()
    };
    rig.run(1, &set).unwrap();
    assert_eq!(rig.read(Rig::tfm(1, 2)), 0);
    rig.run(
        1,
        &Instr {
            modifiers: cb::INTERRUPT,
            ..set
        },
    )
    .unwrap();
    assert_eq!(rig.chiplet.wait(1, Duration::from_secs(60)), Ok(1));
    assert_eq!(rig.read(Rig::tfm(1, 2)), 1 << Rig::slot(1, 0));
    rig.write(Rig::tfm(1, 2), 1 << Rig::slot(1, 0));
    assert_eq!(rig.read(Rig::tfm(1, 2)), 0);
    assert_eq!(rig.chiplet.wait(1, Duration::ZERO), Ok(0));
    assert!(rig.chiplet.wait(16, Duration::ZERO).is_err());
}
