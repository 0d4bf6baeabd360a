//! The three ways in which misses are resolved, and what becomes of them while the map lock is held.

use std::thread;
use std::time::{Duration, Instant};

use crate::support::{LONG, Rig, load};
use shootdown::Map;
use shootdown_gru::{
    Config, Element, GruError, Instruction, MissMode, Segment, SegmentOptions, Status,
};
use shootdown_hw_model::gru::ChipletConfig;

fn rig() -> Rig {
    Rig::new(1, ChipletConfig::default(), Config::default())
}

fn segment(rig: &Rig, space: &shootdown::AddressSpace, misses: MissMode) -> Segment {
    let options = SegmentOptions {
        misses,
        ..Config::default().segment
    };
    rig.gru.segment_with(space, options).unwrap()
}

fn await_misses(rig: &Rig, count: u64) {
    let begun = Instant::now();
    while rig.model.chiplets()[0].counts().misses < count {
        assert!(begun.elapsed() < LONG);
        thread::yield_now();
    }
}

#[test]
fn each_mode_resolves_misses_in_its_own_way_and_counts_them() {
    let rig = rig();
    let space = rig.space();
    let set = |at| Instruction::vset(at, 3, Element::Double, 1);
    let page = || space.map(Map::anonymous(4096)).unwrap().start();
    let long = Duration::from_millis(30);

    let user = segment(&rig, &space, MissMode::UserPolling);
    let at = page();
    user.submit(0, &set(at)).unwrap();
    await_misses(&rig, 1);
    thread::sleep(long);
    assert_eq!(
        user.poll(0).unwrap(),
        Status::CallOs,
        "nobody else resolves it"
    );
    user.resolve(0).unwrap();
    user.wait(0, LONG).unwrap();
    assert_eq!(load(at), 3);
    let stats = user.stats();
    assert_eq!(
        (
            stats.misses_user,
            stats.misses_interrupt,
            stats.misses_polled,
            stats.drop_ins
        ),
        (1, 0, 0, 1)
    );

    let map = segment(&rig, &space, MissMode::FaultMap);
    let at = page();
    map.submit(0, &set(at)).unwrap();
    let begun = Instant::now();
    // Nobody polls.
    while map.stats().misses_interrupt == 0 {
        assert!(begun.elapsed() < LONG);
        thread::yield_now();
    }
    map.wait(0, LONG).unwrap();
    assert_eq!((load(at), map.stats().misses_interrupt), (3, 1));

    let polled = segment(&rig, &space, MissMode::FaultMapPolled);
    let at = page();
    polled.submit(0, &set(at)).unwrap();
    await_misses(&rig, 3);
    thread::sleep(long);
    assert_eq!(
        polled.stats().misses_interrupt + polled.stats().misses_polled,
        0
    );
    polled.poll(0).unwrap();
    assert_eq!(polled.stats().misses_polled, 1);
    polled.wait(0, LONG).unwrap();
    assert_eq!(load(at), 3);
    let stats = rig.gru.stats();
    assert_eq!(
        (
            stats.misses_user,
            stats.misses_interrupt,
            stats.misses_polled
        ),
        (1, 1, 1)
    );
    drop((user, map, polled));
    rig.clean();
}

/// R33: the fault path only tries the map lock.
#[test]
fn a_miss_under_the_map_lock_falls_to_user_polling_and_is_resolved_by_the_users_call() {
    for misses in [MissMode::FaultMap, MissMode::FaultMapPolled] {
        let rig = rig();
        let space = rig.space();
        let at = space.map(Map::anonymous(4096)).unwrap().start();
        let segment = segment(&rig, &space, misses);
        let guard = space.lock_write().unwrap();
        segment
            .submit(0, &Instruction::vset(at, 3, Element::Double, 1))
            .unwrap();
        let begun = Instant::now();
        while segment.poll(0).unwrap() != Status::CallOs {
            assert!(begun.elapsed() < LONG, "{misses:?}");
        }
        let refused = segment.resolve(0).unwrap_err();
        assert!(matches!(refused, GruError::Refused(_)), "{refused}");
        assert_eq!(rig.gru.stats().faults_to_user, 1);
        drop(guard);
        segment.resolve(0).unwrap();
        segment.wait(0, LONG).unwrap();
        assert_eq!(
            (load(at), segment.stats().misses_user),
            (3, 1),
            "{misses:?}"
        );
        drop(segment);
        rig.clean();
    }
}

#[test]
fn a_polled_miss_does_not_hold_up_the_unmap_of_its_segment_or_of_its_memory() {
    let rig = rig();
    let space = rig.space();
    let buffer = space.map(Map::anonymous(4096)).unwrap();
    let set = Instruction::vset(buffer.start(), 3, Element::Double, 1);
    let [one, two] = [0, 1].map(|_| segment(&rig, &space, MissMode::FaultMapPolled));
    one.submit(0, &set).unwrap();
    two.submit(0, &set).unwrap();
    await_misses(&rig, 2);
    let guard = space.lock_write().unwrap();
    one.unmap_locked(&guard).unwrap();
    guard.unmap(buffer).unwrap();
    drop(guard);
    let error = two.wait(0, LONG).unwrap_err();
    assert!(matches!(error, GruError::Exception { .. }), "{error}");
    drop((one, two));
    rig.clean();
}
