//! Fault handles and fault maps.

use std::time::Duration;

use shootdown::{Interrupts, Memory, PageSize, Registers};

use super::rig::{Instr, Misses, Rig, calls_os, until};
use crate::gru::layout::{ACTIVE, CAUSE, EXCEPTION, IDLE, STATUS, cb, cbe, tfh};
use crate::gru::{ChipletConfig, Latency};

fn set(base0: u64) -> Instr {
    Instr {
        opcode: 6,
        element: 3,
        base0,
        base1: 5,
        count: 1,
        stride: 1,
        ..Instr::default()
    }
}

#[test]
fn a_miss_sets_its_bit_interrupts_and_says_where() {
    let (rig, base) = Rig::started(ChipletConfig::default());
    rig.start(2, 16, Misses::FaultMap);
    rig.issue(2, 3, &set(base + 4096 + 8));
    assert_eq!(rig.chiplet.wait(2, Duration::from_secs(60)), Ok(1));
    let slot = Rig::slot(2, 3);
    assert_eq!(rig.read(Rig::tfm(2, 0)), 1 << slot);
    assert_eq!(rig.fault_state(slot), tfh::STATE_MISS_FMM);
    assert_eq!(
        CAUSE.get(rig.read(Rig::tfh(slot, 0))),
        tfh::CAUSE_MISS.into()
    );
    assert_eq!(rig.read(Rig::tfh(slot, 1)), base + 4096 + 8);
    assert_eq!(rig.read(Rig::tfh(slot, 2)), 16);
    assert_eq!(rig.status(2, 3), ACTIVE);
    // Software may clear the bit; the fault stays.
    rig.write(Rig::tfm(2, 0), u64::MAX);
    assert_eq!(rig.read(Rig::tfm(2, 0)), 0);
    assert_eq!(rig.fault_state(slot), tfh::STATE_MISS_FMM);
    assert_eq!(rig.finish(2, 3), IDLE);
    assert_eq!(rig.fault_state(slot), tfh::STATE_IDLE);
}

#[test]
fn slots_above_64_have_their_bit_in_the_second_word() {
    let (rig, base) = Rig::started(ChipletConfig::default());
    rig.configure(1, 8, Misses::FaultMap);
    rig.write(Rig::cch(1, 2), 1 << 40);
    rig.context(1, 2).unwrap();
    rig.context(1, 1).unwrap();
    rig.issue(1, 1, &set(base));
    rig.await_miss(81);
    assert_eq!(
        (rig.read(Rig::tfm(1, 0)), rig.read(Rig::tfm(1, 1))),
        (0, 1 << 17)
    );
}

#[test]
fn without_tlb_interrupts_a_miss_waits_for_its_user() {
    let (rig, base) = Rig::started(ChipletConfig::default());
    rig.start(1, 8, Misses::UserPolling);
    rig.issue(1, 0, &set(base));
    until("a call of the system", || calls_os(&rig, 1, 0));
    assert_eq!(rig.fault_state(Rig::slot(1, 0)), tfh::STATE_MISS_UPM);
    assert_eq!(rig.read(Rig::tfm(1, 0)), 0);
    assert_eq!(rig.chiplet.wait(1, Duration::ZERO), Ok(0));
    assert_eq!(rig.finish(1, 0), IDLE);
    assert_eq!(rig.peek(base, 8), 5_u64.to_le_bytes());
}

#[test]
fn restart_without_an_entry_misses_again_and_write_only_does_not_restart() {
    let (rig, base) = Rig::started(ChipletConfig::default());
    rig.issue(0, 0, &set(base));
    rig.await_miss(0);
    rig.operate(Rig::tfh(0, 0), 0, tfh::RESTART).unwrap();
    until("the second miss", || rig.chiplet.counts().misses == 2);
    rig.await_miss(0);
    assert!(rig.fill(0));
    rig.operate(Rig::tfh(0, 0), 0, tfh::WRITE_ONLY).unwrap();
    assert!(rig.holds(8, base));
    assert_eq!(rig.fault_state(0), tfh::STATE_MISS_FMM);
    rig.operate(Rig::tfh(0, 0), 0, tfh::RESTART).unwrap();
    until("the end", || rig.status(0, 0) == IDLE);
    assert_eq!(rig.chiplet.counts().misses, 2);
}

#[test]
fn an_exception_ends_the_block_and_says_where() {
    let (rig, base) = Rig::started(ChipletConfig::default());
    rig.issue(0, 0, &set(base + 16));
    rig.await_miss(0);
    rig.operate(Rig::tfh(0, 0), 0, tfh::EXCEPTION).unwrap();
    assert_eq!(rig.status(0, 0), EXCEPTION);
    assert_eq!(rig.read(Rig::cbe(0, 3)), base + 16);
    assert_eq!(rig.read(Rig::tfm(0, 0)), 0);
}

#[test]
fn a_drop_in_takes_effect_in_time_though_nobody_polls_its_handle() {
    let latency = Latency {
        handle: Duration::from_millis(1),
        ..Latency::default()
    };
    let (rig, base) = Rig::started(ChipletConfig {
        latency,
        ..ChipletConfig::default()
    });
    rig.issue(0, 0, &set(base));
    rig.await_miss(0);
    assert!(rig.fill(0));
    let command = 1 | STATUS.put(tfh::WRITE_RESTART << 8, ACTIVE);
    rig.chiplet.write(Rig::tfh(0, 0), command).unwrap();
    until("the end", || rig.status(0, 0) == IDLE);
}

/// Writes the translation of the page at `vaddr` for a miss in `slot`, beside it.
fn preload(rig: &Rig, slot: u64, vaddr: u64) {
    assert!(rig.fill(slot));
    let found = rig.memory.translate(vaddr.into()).unwrap();
    rig.write(Rig::tfh(slot, tfh::FILL_VADDR), found.page.start().get());
    rig.write(Rig::tfh(slot, tfh::PFN), found.frame.0);
    rig.operate(Rig::tfh(slot, 0), 0, tfh::WRITE_ONLY).unwrap();
}

#[test]
fn what_is_written_beside_a_miss_is_ignored_as_well_if_a_purge_of_it_came_since() {
    let (rig, base) = Rig::started(ChipletConfig::default());
    rig.issue(0, 0, &set(base));
    rig.await_miss(0);
    rig.purge(0, 8, base + 2 * 4096, PageSize::FourKiB, 1);
    rig.await_purge(0);
    for page in 1..4 {
        preload(&rig, 0, base + page * 4096);
        assert_eq!(rig.holds(8, base + page * 4096), page != 2);
    }
    let counts = rig.chiplet.counts();
    assert_eq!((counts.preloads, counts.drop_ins_cancelled), (2, 1));
    assert_eq!(rig.finish(0, 0), IDLE);
    assert_eq!(rig.chiplet.counts().drop_ins, 3);
}

#[test]
fn the_extended_block_says_what_is_left_of_a_copy() {
    let (rig, base) = Rig::started(ChipletConfig::default());
    let (from, to) = (base + 4096 - 16, base + 8 * 4096 + 8);
    let copy = Instr {
        opcode: 1,
        element: 3,
        base0: from,
        base1: to,
        count: 1000,
        ..Instr::default()
    };
    rig.issue(0, 0, &copy);
    let says = |done: u64, lines: u64| {
        let word = |word| rig.read(Rig::cbe(0, word));
        assert_eq!(cb::OPCODE.get(word(cbe::COPY)), 1);
        assert_eq!(cb::ELEMENT.get(word(cbe::COPY)), 3);
        let bases = (word(cbe::BASE0), word(cbe::BASE1));
        assert_eq!(bases, (from + done * 8, to + done * 8));
        let left = word(cbe::LEFT);
        let left = (cbe::ELEMENTS.get(left), cbe::LINES.get(left));
        assert_eq!(left, (1000 - done, lines));
        // Written they are not.
        rig.write(Rig::cbe(0, cbe::BASE0), 1);
    };
    // The source, the destination, and the source's second page.
    for (done, lines) in [(0, 126), (0, 126), (2, 125)] {
        rig.await_miss(0);
        says(done, lines);
        rig.resolve(0);
    }
    assert_eq!(rig.finish(0, 0), IDLE);
    says(0, 126);
    assert_eq!(rig.read(Rig::cbe(2, cbe::BASE0)), 0, "nobody's");
}

#[test]
fn interrupts_that_find_one_pending_are_one_with_it() {
    let (rig, base) = Rig::started(ChipletConfig::default());
    for number in 0..2 {
        rig.issue(0, number, &set(base));
        rig.await_miss(Rig::slot(0, number));
    }
    assert_eq!(rig.chiplet.counts().interrupts, 1);
    assert_eq!(rig.chiplet.wait(0, Duration::ZERO), Ok(2));
}
