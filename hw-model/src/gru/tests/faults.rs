//! Fault handles and fault maps.

use std::time::Duration;

use shootdown::{Interrupts, Registers};

use super::rig::{Instr, Misses, Rig, calls_os, until};
use crate::gru::layout::{ACTIVE, CAUSE, EXCEPTION, IDLE, STATUS, tfh};
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
