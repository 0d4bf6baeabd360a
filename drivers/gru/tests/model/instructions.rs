//! Instructions through the driver: all opcodes, what is wrong with some, errors that are worth another try, completions that
//! interrupt.

use std::time::{Duration, Instant};

use crate::support::{LONG, Rig, at, load};
use shootdown::{Addr, AddressSpace, Map, Range};
use shootdown_gru::{
    AddressKind, Atomic, Causes, Config, Delivery, Element, GruError, Instruction, Segment,
};
use shootdown_hw_model::gru::{ChipletConfig, FaultPlan, Latency};

fn with(hardware: ChipletConfig) -> (Rig, AddressSpace, Segment, Addr) {
    let rig = Rig::new(1, hardware, Config::default());
    let space = rig.space();
    let buffer = space.map(Map::anonymous(64 << 10)).unwrap().start();
    let segment = rig.gru.segment(&space).unwrap();
    (rig, space, segment, buffer)
}

fn store(address: Addr, value: u64) {
    // SAFETY: the test mapped the page for writing, and no instruction is at work on it.
    unsafe { (address.get() as *mut u64).write_volatile(value) }
}

#[test]
fn what_the_other_tests_do_not_use_does_what_it_says() {
    let (rig, _space, segment, buffer) = with(ChipletConfig::default());
    let run = |instruction: &Instruction| segment.run(0, instruction, LONG);
    let double = Element::Double;
    run(&Instruction::nop()).unwrap();
    run(&Instruction::vflush(buffer, double, 8)).unwrap();
    segment.write_data(0, &[5, 3]).unwrap();
    run(&Instruction::fill(buffer, 0, 9, double, 2)).unwrap();
    assert_eq!([3, 4, 5].map(|nth| load(at(buffer, nth * 8))), [9, 0, 9]);
    run(&Instruction::scatter(8, buffer, 0, double, 1)).unwrap();
    assert_eq!(load(at(buffer, 5 * 8)), 3);
    run(&Instruction::bstore(0, at(buffer, 64), Element::Line, 1)).unwrap();
    assert_eq!(load(at(buffer, 64)), 5);
    run(&Instruction::vset(buffer, 1, double, 1).delayed()).unwrap();

    let atomic = |atomic| run(&Instruction::atomic(buffer, atomic, double)).unwrap();
    let add = |except| Atomic::ConditionalAdd { except, operand: 6 };
    assert_eq!((atomic(add(1)), load(buffer)), (1, 1));
    assert_eq!((atomic(add(2)), load(buffer)), (1, 7));
    segment.write_data(16, &[0xff]).unwrap();
    let masked = |expected, new| Atomic::MaskedCompareSwap {
        expected,
        new,
        mask: 16,
    };
    store(buffer, 0xaa07);
    assert_eq!((atomic(masked(8, 0)), load(buffer)), (0xaa07, 0xaa07));
    assert_eq!((atomic(masked(7, 0x1122)), load(buffer)), (0xaa07, 0xaa22));
    assert_eq!(atomic(Atomic::PollUnequal(1)), 0xaa22);
    segment
        .submit(
            1,
            &Instruction::atomic(buffer, Atomic::PollEqual(77), double),
        )
        .unwrap();
    assert!(matches!(
        segment.wait(1, Duration::from_millis(20)),
        Err(GruError::Timeout { cb: 1, .. })
    ));
    store(buffer, 77);
    assert_eq!(segment.wait(1, LONG).unwrap(), 77);

    store(buffer, 2 | 3 << 32);
    segment.write_data(0, &[42]).unwrap();
    run(&Instruction::message(buffer, 0, 1)).unwrap();
    assert_eq!(segment.delivery(0).unwrap(), Delivery::Delivered);
    assert_eq!(load(at(buffer, 128)), 42);
    run(&Instruction::message(buffer, 0, 1)).unwrap();
    let full = Delivery::QueueFull { queue: 3 | 3 << 32 };
    assert_eq!(segment.delivery(0).unwrap(), full);
    drop(segment);
    rig.clean();
}

#[test]
fn what_is_wrong_with_an_instruction_is_told_and_nothing_else_is_disturbed() {
    let (rig, space, segment, buffer) = with(ChipletConfig::default());
    let double = Element::Double;
    segment
        .submit(
            7,
            &Instruction::atomic(buffer, Atomic::PollEqual(1), double),
        )
        .unwrap();
    let own = segment.range().start();
    let set = |to, count| Instruction::vset(to, 5, double, count);
    let cases = [
        (set(buffer, 0), Causes::INVALID_INSTRUCTION, 3),
        (set(at(buffer, 4), 1), Causes::INVALID_INSTRUCTION, 4),
        (
            set(buffer, 2).stride(i64::MAX),
            Causes::INVALID_INSTRUCTION,
            5,
        ),
        (
            Instruction::atomic(buffer, Atomic::Clear, Element::Line),
            Causes::INVALID_INSTRUCTION,
            2,
        ),
        // A queue without lines.
        (
            Instruction::message(at(buffer, 4096), 0, 1),
            Causes::INVALID_INSTRUCTION,
            6,
        ),
        (
            Instruction::vload(buffer, 2040, double, 2),
            Causes::DATA_SEGMENT_LIMIT,
            0,
        ),
        (
            set(buffer, 1).unmapped(),
            Causes::UNMAPPED_MODE_FORBIDDEN,
            0,
        ),
        (
            set(buffer, 1).kinds(AddressKind::Registers, AddressKind::Ram),
            Causes::ADDRESS_KIND_MISMATCH,
            0,
        ),
        // The segment itself, in the middle of it, from one of its control blocks to its data.
        (set(own, 1), Causes::TLB_FATAL, 1),
        (
            Instruction::bcopy(own, at(own, 0x2_0000), 0, double, 4),
            Causes::TLB_FATAL,
            1,
        ),
        (
            Instruction::atomic(own, Atomic::Increment, double),
            Causes::TLB_FATAL,
            1,
        ),
        (set(Addr::new(0x10), 1), Causes::TLB_FATAL, 1),
        (set(Addr::new(u64::MAX - 7), 1), Causes::TLB_FATAL, 1),
    ];
    for (instruction, want, wrong) in &cases {
        let error = segment.run(0, instruction, LONG).unwrap_err();
        let GruError::Exception {
            cb: 0,
            causes,
            detail,
            ..
        } = error
        else {
            panic!("{instruction:?}: {error}");
        };
        assert_eq!((causes, detail), (*want, *wrong), "{instruction:?}");
        segment.run(0, &Instruction::nop(), LONG).unwrap();
    }
    assert_eq!(rig.gru.stats().exceptions, cases.len() as u64);
    assert_eq!(rig.gru.stats().retries, 0);
    store(buffer, 1);
    segment.wait(7, LONG).unwrap();
    assert_eq!(load(at(buffer, 8)), 0);
    let rest = Range::new(at(buffer, 8), (64 << 10) - 8).unwrap();
    for word in (0..rest.len() as u64 / 8).map(|nth| at(rest.start(), nth * 8)) {
        assert_eq!(load(word), 0, "{word}");
    }
    assert_eq!(segment.ended(), None);
    space.exit().unwrap();
    drop(segment);
    rig.clean();
}

fn failing(error: f64) -> ChipletConfig {
    ChipletConfig {
        faults: FaultPlan {
            seed: 5,
            error,
            ..FaultPlan::default()
        },
        ..ChipletConfig::default()
    }
}

#[test]
fn an_error_that_is_worth_it_is_tried_again_and_done_once() {
    let (rig, _space, segment, buffer) = with(failing(0.2));
    let add = Instruction::atomic(buffer, Atomic::Increment, Element::Double);
    let (mut done, mut given_up) = (0, 0);
    for _ in 0..400 {
        match segment.run(0, &add, LONG) {
            Ok(_) => done += 1,
            Err(GruError::Exception { causes, .. }) if causes.is_retryable() => given_up += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(load(buffer), done);
    let (stats, counts) = (rig.gru.stats(), rig.model.chiplets()[0].counts());
    assert_eq!(counts.errors, stats.retries + given_up);
    assert_eq!(stats.retries_exhausted, given_up);
    assert_eq!(segment.stats().retries, stats.retries);
    assert!(stats.retries > 40 && given_up < 40, "{stats:?}");
    drop(segment);
    rig.clean();
}

#[test]
fn an_instruction_is_tried_three_times_at_most() {
    let (rig, _space, segment, buffer) = with(failing(1.0));
    for nth in 1..=4 {
        let set = Instruction::vset(buffer, 1, Element::Double, 1);
        let error = segment.run(0, &set, LONG).unwrap_err();
        assert!(
            matches!(error, GruError::Exception { causes, .. } if causes.is_retryable()),
            "{error}"
        );
        assert_eq!(rig.model.chiplets()[0].counts().errors, nth * 3);
    }
    assert_eq!(load(buffer), 0);
    drop(segment);
    rig.clean();
}

#[test]
fn a_completion_interrupts_who_sleeps_for_it() {
    let hardware = ChipletConfig {
        latency: Latency {
            access: Duration::from_millis(2),
            ..Latency::default()
        },
        ..ChipletConfig::default()
    };
    let (rig, _space, segment, buffer) = with(hardware);
    let set = |nth: u64| {
        let to = at(buffer, nth * 8);
        Instruction::vset(to, nth + 1, Element::Double, 1).interrupting()
    };
    let begun = Instant::now();
    for cb in 0..8 {
        segment.submit(cb, &set(cb as u64)).unwrap();
    }
    for cb in 0..8 {
        segment.wait_asleep(cb, LONG).unwrap();
        assert_eq!(load(at(buffer, cb as u64 * 8)), cb as u64 + 1);
    }
    assert!(begun.elapsed() < LONG / 2, "woken by the deadline only");
    let begun = Instant::now();
    while rig.gru.stats().completions < 8 {
        assert!(begun.elapsed() < LONG);
    }
    // One that does not interrupt is not heard of: the sleeper looks when its time is over.
    let quiet = Instruction::vset(buffer, 9, Element::Double, 1);
    segment.submit(0, &quiet).unwrap();
    let (begun, time) = (Instant::now(), Duration::from_millis(300));
    segment.wait_asleep(0, time).unwrap();
    assert!(begun.elapsed() >= time, "{:?}", begun.elapsed());
    drop(segment);
    rig.clean();
}
