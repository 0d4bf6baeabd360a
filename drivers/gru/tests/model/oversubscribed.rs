//! More segments than contexts: contexts are stolen, and nobody notices but by the clock.

use std::thread;
use std::time::{Duration, Instant};

use crate::support::{LONG, Rig, at, load};
use shootdown::Map;
use shootdown_gru::{
    Atomic, Config, Element, Ended, GruError, Instruction, MissMode, SegmentOptions, Status, Steal,
};
use shootdown_hw_model::gru::{ChipletConfig, Latency};

fn config(window: Duration) -> Config {
    Config {
        steal: Steal {
            window,
            retry: Duration::from_micros(100),
        },
        ..Config::default()
    }
}

fn rig(window: Duration) -> Rig {
    Rig::new(1, ChipletConfig::default(), config(window))
}

fn polled() -> SegmentOptions {
    SegmentOptions {
        misses: MissMode::FaultMapPolled,
        ..Config::default().segment
    }
}

#[test]
fn state_is_intact_however_often_contexts_are_stolen() {
    let hardware = ChipletConfig {
        latency: Latency {
            access: Duration::from_micros(20),
            ..Latency::default()
        },
        ..ChipletConfig::default()
    };
    let rig = Rig::new(1, hardware, config(Duration::from_micros(500)));
    const SEGMENTS: u64 = 40;
    let spaces = [rig.space(), rig.space()];
    let buffers = spaces
        .each_ref()
        .map(|space| space.map(Map::anonymous(SEGMENTS << 12)).unwrap().start());
    let segments: Vec<_> = (0..SEGMENTS)
        .map(|nth| rig.gru.segment(&spaces[nth as usize % 2]).unwrap())
        .collect();
    let own = |nth: u64| at(buffers[nth as usize % 2], nth << 12);
    for round in 0..4u64 {
        for (nth, segment) in (0u64..).zip(&segments) {
            let data: Vec<u64> = (0..256)
                .map(|word| round << 32 | nth << 16 | word)
                .collect();
            segment.write_data(0, &data).unwrap();
            // In flight while others are loaded: two passes over a page, and increments after them.
            let set = Instruction::vset(own(nth), nth, Element::Double, 400);
            segment.submit(0, &set).unwrap();
            let gather = Instruction::vload(own(nth), 0, Element::Byte, 1).stride(1);
            segment.submit(1, &gather).unwrap();
        }
        for (nth, segment) in (0u64..).zip(&segments) {
            segment.wait(0, LONG).unwrap();
            segment.wait(1, LONG).unwrap();
            assert_eq!(load(at(own(nth), 399 * 8)), nth);
            for cb in 0..8 {
                let add = Instruction::atomic(own(nth), Atomic::Increment, Element::Double);
                segment.submit(cb, &add).unwrap();
            }
        }
        for (nth, segment) in (0u64..).zip(&segments) {
            let mut found: Vec<_> = (0..8).map(|cb| segment.wait(cb, LONG).unwrap()).collect();
            found.sort_unstable();
            let each: Vec<_> = (nth..nth + 8).collect();
            assert_eq!(found, each, "each increment is done once");
            let mut data = [0; 256];
            segment.read_data(0, &mut data).unwrap();
            let word = |word: u64| round << 32 | nth << 16 | word;
            assert_eq!(data[1..], (1..256).map(word).collect::<Vec<_>>());
        }
    }
    let stats = rig.gru.stats();
    assert!(stats.contexts_stolen > SEGMENTS, "{stats:?}");
    let stolen: u64 = segments.iter().map(|one| one.stats().stolen).sum();
    let steals: u64 = segments.iter().map(|one| one.stats().steals).sum();
    assert_eq!((stolen, steals), (stats.contexts_stolen, stolen));
    assert_eq!(stats.contexts_in_use, 16);
    drop(segments);
    rig.clean();
}

#[test]
fn a_context_stays_for_the_window_and_the_one_that_was_there_longest_goes() {
    let window = Duration::from_millis(500);
    let rig = rig(window);
    let space = rig.space();
    let begun = Instant::now();
    let segments: Vec<_> = (0..17).map(|_| rig.gru.segment(&space).unwrap()).collect();
    assert_eq!(segments[16].context(), None);
    let first = segments[0].context();
    segments[16].run(0, &Instruction::nop(), LONG).unwrap();
    assert!(begun.elapsed() >= window, "{:?}", begun.elapsed());
    assert_eq!(
        (segments[16].context(), segments[0].context()),
        (first, None)
    );
    assert_eq!(rig.gru.stats().contexts_stolen, 1);
    assert!(rig.gru.stats().steals_too_early > 0);
    drop(segments);
    rig.clean();
}

#[test]
fn a_context_with_an_unresolved_fault_is_not_stolen() {
    let rig = rig(Duration::ZERO);
    let space = rig.space();
    let buffer = space.map(Map::anonymous(4096)).unwrap().start();
    let segments: Vec<_> = (0..16)
        .map(|_| rig.gru.segment_with(&space, polled()).unwrap())
        .collect();
    let set = Instruction::vset(buffer, 7, Element::Double, 1);
    // Nobody polls: the misses stay in the fault map.
    for segment in &segments[..15] {
        segment.submit(0, &set).unwrap();
    }
    await_misses(&rig, 15);
    let places: Vec<_> = segments.iter().map(|one| one.context()).collect();
    let thief = rig.gru.segment(&space).unwrap();
    thief.run(0, &set, LONG).unwrap();
    assert_eq!(thief.context(), places[15], "the only one without a fault");
    for (segment, place) in segments[..15].iter().zip(&places) {
        assert_eq!(segment.context(), *place);
        assert_eq!(segment.wait(0, LONG).unwrap(), 0);
    }
    assert!(rig.gru.stats().steals_locked >= 15);
    drop((segments, thief));
    rig.clean();
}

fn await_misses(rig: &Rig, count: u64) {
    let begun = Instant::now();
    while rig.model.chiplets()[0].counts().misses < count {
        assert!(begun.elapsed() < LONG);
        thread::yield_now();
    }
}

#[test]
fn where_nobody_can_be_stolen_from_that_is_a_typed_error_until_a_fault_is_resolved() {
    let rig = Rig::new(
        1,
        ChipletConfig::default(),
        Config {
            load_deadline: Duration::from_millis(50),
            ..config(Duration::ZERO)
        },
    );
    let space = rig.space();
    let buffer = space.map(Map::anonymous(4096)).unwrap().start();
    let set = Instruction::vset(buffer, 7, Element::Double, 1);
    let segments: Vec<_> = (0..16)
        .map(|_| rig.gru.segment_with(&space, polled()).unwrap())
        .collect();
    for segment in &segments {
        segment.submit(0, &set).unwrap();
    }
    await_misses(&rig, 16);
    let thief = rig.gru.segment(&space).unwrap();
    let error = thief.submit(0, &set).unwrap_err();
    assert!(matches!(error, GruError::NoneStealable { .. }), "{error}");
    segments[3].wait(0, LONG).unwrap();
    thief.run(0, &set, LONG).unwrap();
    assert_eq!(segments[3].context(), None);
    drop((segments, thief));
    rig.clean();
}

#[test]
fn what_changed_while_a_context_was_saved_is_not_stale_when_it_is_back() {
    let rig = rig(Duration::ZERO);
    let (space, others) = (rig.space(), rig.space());
    let buffer = space.map(Map::anonymous(4096)).unwrap();
    let set = |value| Instruction::vset(buffer.start(), value, Element::Double, 512);
    let segment = rig.gru.segment(&space).unwrap();
    segment.run(0, &set(1), LONG).unwrap();
    let asid = segment.asid();
    let thieves: Vec<_> = (0..16).map(|_| rig.gru.segment(&others).unwrap()).collect();
    // Whose context is taken first depends on when each was last loaded, and one with a fault is passed over.
    let begun = Instant::now();
    while segment.context().is_some() {
        assert!(begun.elapsed() < LONG, "it was never taken");
        for thief in &thieves {
            thief.run(0, &Instruction::nop(), LONG).unwrap();
        }
    }
    let before = rig.gru.stats();
    space.unmap(buffer).unwrap();
    space.map(Map::anonymous(4096).at(buffer.start())).unwrap();
    let after = rig.gru.stats();
    // Its entry is still there, and needs no purge: nobody has its ASID.
    assert!(rig.model.chiplets()[0].tlb_holds(asid.unwrap(), buffer));
    assert_eq!(after.asids_retired, before.asids_retired + 1);
    assert_eq!(after.purges_pages, before.purges_pages);
    segment.run(0, &set(2), LONG).unwrap();
    assert_ne!(segment.asid(), asid);
    assert_eq!(load(buffer.start()), 2);
    drop((segment, thieves));
    rig.clean();
}

#[test]
fn a_large_segment_takes_the_units_of_as_many_as_it_needs() {
    let rig = rig(Duration::ZERO);
    let space = rig.space();
    let buffer = space.map(Map::anonymous(4096)).unwrap().start();
    let small: Vec<_> = (0..16).map(|_| rig.gru.segment(&space).unwrap()).collect();
    let whole = SegmentOptions {
        control_blocks: 128,
        data_bytes: 32 << 10,
        ..Config::default().segment
    };
    let large = rig.gru.segment_with(&space, whole).unwrap();
    let set = |nth| Instruction::vset(at(buffer, nth * 8), nth, Element::Double, 1);
    for cb in 0..128 {
        large.submit(cb, &set(cb as u64)).unwrap();
    }
    for cb in 0..128 {
        large.wait(cb, LONG).unwrap();
        assert_eq!(load(at(buffer, cb as u64 * 8)), cb as u64);
    }
    large.write_data((32 << 10) - 8, &[77]).unwrap();
    assert!(small.iter().all(|one| one.context().is_none()));
    small[5].run(7, &set(9), LONG).unwrap();
    assert_eq!(large.context(), None);
    let mut last = [0];
    large.read_data((32 << 10) - 8, &mut last).unwrap();
    assert_eq!(last, [77]);
    for (control_blocks, data_bytes) in [(0, 0), (129, 0), (8, (32 << 10) + 1)] {
        let options = SegmentOptions {
            control_blocks,
            data_bytes,
            ..whole
        };
        let error = rig.gru.segment_with(&space, options).unwrap_err();
        assert!(matches!(error, GruError::TooLarge { .. }), "{error}");
    }
    drop((small, large));
    rig.clean();
}

#[test]
fn a_call_that_waits_for_its_user_is_one_of_the_new_context() {
    let rig = rig(Duration::ZERO);
    let space = rig.space();
    let buffer = space.map(Map::anonymous(4096)).unwrap().start();
    let options = SegmentOptions {
        misses: MissMode::UserPolling,
        ..Config::default().segment
    };
    let segment = rig.gru.segment_with(&space, options).unwrap();
    segment
        .submit(2, &Instruction::vset(buffer, 7, Element::Double, 1))
        .unwrap();
    let begun = Instant::now();
    while segment.poll(2).unwrap() != Status::CallOs {
        assert!(begun.elapsed() < LONG);
    }
    let others: Vec<_> = (0..16).map(|_| rig.gru.segment(&space).unwrap()).collect();
    for other in &others {
        other.run(0, &Instruction::nop(), LONG).unwrap();
    }
    assert_eq!(segment.context(), None);
    segment.wait(2, LONG).unwrap();
    assert_eq!(load(buffer), 7);
    drop((segment, others));
    rig.clean();
}

#[test]
fn a_segment_ends_while_it_is_saved_as_well() {
    let rig = rig(Duration::ZERO);
    let (space, others) = (rig.space(), rig.space());
    let segments: Vec<_> = (0..2).map(|_| rig.gru.segment(&space).unwrap()).collect();
    let thieves: Vec<_> = (0..16).map(|_| rig.gru.segment(&others).unwrap()).collect();
    for thief in &thieves {
        thief.run(0, &Instruction::nop(), LONG).unwrap();
    }
    assert!(segments.iter().all(|one| one.context().is_none()));
    segments[0].unmap().unwrap();
    space.exit().unwrap();
    let ended = [Some(Ended::Unmapped), Some(Ended::SpaceExited)];
    for (segment, why) in segments.iter().zip(ended) {
        assert_eq!(segment.ended(), why);
        let error = segment.submit(0, &Instruction::nop()).unwrap_err();
        assert!(matches!(error, GruError::SegmentEnded { .. }), "{error}");
    }
    drop((segments, thieves));
    rig.clean();
}

#[test]
fn users_unmaps_and_thieves_at_once_leave_nothing_behind() {
    let rig = Rig::new(
        2,
        ChipletConfig::default(),
        config(Duration::from_micros(200)),
    );
    let ends = Instant::now() + Duration::from_secs(2);
    thread::scope(|scope| {
        for thread in 0..4u64 {
            let rig = &rig;
            scope.spawn(move || {
                let space = rig.space();
                let buffer = space.map(Map::anonymous(16 << 12)).unwrap().start();
                let mut segments = Vec::new();
                let mut round = thread;
                while Instant::now() < ends {
                    round = round
                        .wrapping_mul(6364136223846793005)
                        .wrapping_add(1442695);
                    while segments.len() < 12 {
                        let options = SegmentOptions {
                            misses: [
                                MissMode::UserPolling,
                                MissMode::FaultMap,
                                MissMode::FaultMapPolled,
                            ][segments.len() % 3],
                            ..Config::default().segment
                        };
                        segments.push(rig.gru.segment_with(&space, options).unwrap());
                    }
                    let nth = (round >> 40) as usize % segments.len();
                    let page = (round >> 50) % 16;
                    let set = Instruction::vset(at(buffer, page << 12), round, Element::Double, 64);
                    segments[nth].run(nth % 8, &set, LONG).unwrap();
                    assert_eq!(load(at(buffer, (page << 12) + 63 * 8)), round);
                    let part = shootdown::Range::new(at(buffer, page << 12), 4096).unwrap();
                    space.discard(part).unwrap();
                    if (round >> 44).is_multiple_of(8) {
                        segments.swap_remove(nth);
                    }
                }
            });
        }
    });
    assert!(rig.gru.stats().contexts_stolen > 0);
    rig.clean();
}

/// Takes the context of `segment`, which is the only one of its space, by those of another space.
fn steal(rig: &Rig, segment: &shootdown_gru::Segment) {
    let others = rig.space();
    let thieves: Vec<_> = (0..16).map(|_| rig.gru.segment(&others).unwrap()).collect();
    // Whose context is taken first depends on when each was last loaded, and one with a fault is passed over.
    let begun = Instant::now();
    while segment.context().is_some() {
        assert!(begun.elapsed() < LONG, "it was never taken");
        for thief in &thieves {
            thief.run(0, &Instruction::nop(), LONG).unwrap();
        }
    }
}

#[test]
fn an_instruction_goes_on_where_it_was_stopped_and_an_exception_keeps_its_cause() {
    let hardware = ChipletConfig {
        latency: Latency {
            access: Duration::from_millis(1),
            ..Latency::default()
        },
        ..ChipletConfig::default()
    };
    let rig = Rig::new(1, hardware, config(Duration::ZERO));
    let space = rig.space();
    let buffer = space.map(Map::anonymous(64 << 12)).unwrap().start();
    let segment = rig.gru.segment(&space).unwrap();
    const BYTES: u64 = 64 << 12;
    let set = Instruction::vset(buffer, 5, Element::Double, (BYTES / 8) as u32);
    segment.submit(0, &set).unwrap();
    let bytes = || rig.model.chiplets()[0].counts().bytes;
    let begun = Instant::now();
    while bytes() < 8 << 12 {
        assert!(begun.elapsed() < LONG);
    }
    // At address 4: not a multiple of 8.
    let wrong = Instruction::vset(shootdown::Addr::new(4), 5, Element::Double, 1);
    segment.submit(1, &wrong).unwrap();
    while segment.poll(1).unwrap() != Status::Exception {
        assert!(begun.elapsed() < LONG);
    }
    steal(&rig, &segment);
    assert!(bytes() < BYTES, "it was not stopped");
    let error = segment.wait(1, LONG).unwrap_err();
    let GruError::Exception {
        detail, address, ..
    } = error
    else {
        panic!("{error}");
    };
    assert_eq!((detail, address.get()), (4, 4));
    segment.wait(0, LONG).unwrap();
    assert_eq!(bytes(), BYTES, "nothing is done twice");
    assert_eq!(load(at(buffer, BYTES - 8)), 5);
    drop(segment);
    rig.clean();
}
