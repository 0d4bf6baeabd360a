//! Segments over the model: what they do, and what is left when they or the memory go.

use std::time::Duration;

use crate::support::{LONG, Rig, at, load, short};
use shootdown::{Health, Map, MapError, PageSize, Range, Rights, Unregistered};
use shootdown_gru::{Atomic, Causes, Config, Element, Ended, GruError, Instruction};
use shootdown_hw_model::gru::{ChipletConfig, FaultPlan, Latency};

fn rig(chiplets: u32) -> Rig {
    Rig::new(chiplets, ChipletConfig::default(), Config::default())
}

/// Instructions take long.
fn slow() -> ChipletConfig {
    ChipletConfig {
        latency: Latency {
            access: Duration::from_micros(50),
            ..Latency::default()
        },
        ..ChipletConfig::default()
    }
}

fn set(to: shootdown::Addr, value: u64, count: u32) -> Instruction {
    Instruction::vset(to, value, Element::Double, count)
}

#[test]
fn instructions_reach_memory_and_come_back() {
    let rig = rig(1);
    let space = rig.space();
    let buffer = space.map(Map::anonymous(64 << 10)).unwrap().start();
    let segment = rig.gru.segment(&space).unwrap();
    segment.run(0, &set(buffer, 0xabcd, 1024), LONG).unwrap();
    assert_eq!(load(at(buffer, 8184)), 0xabcd);
    segment.write_data(0, &[1, 2, 3]).unwrap();
    let double = Element::Double;
    segment
        .run(
            1,
            &Instruction::vstore(0, at(buffer, 32 << 10), double, 3),
            LONG,
        )
        .unwrap();
    segment
        .run(
            1,
            &Instruction::vload(at(buffer, 32 << 10), 64, double, 3),
            LONG,
        )
        .unwrap();
    let mut back = [0; 3];
    segment.read_data(64, &mut back).unwrap();
    assert_eq!(back, [1, 2, 3]);
    let copy = Instruction::bcopy(at(buffer, 32 << 10), at(buffer, 0xf000), 0, double, 3);
    segment.run(2, &copy, LONG).unwrap();
    assert_eq!(load(at(buffer, 0xf010)), 3);
    segment.write_data(128, &[2, 0]).unwrap();
    let gather = Instruction::gather(at(buffer, 0xf000), 128, 256, double, 2);
    segment.run(3, &gather, LONG).unwrap();
    segment.read_data(256, &mut back[..2]).unwrap();
    assert_eq!(back[..2], [3, 1]);
    let add = Instruction::atomic(at(buffer, 0xf000), Atomic::Add(41), double);
    assert_eq!(segment.run(0, &add, LONG).unwrap(), 1);
    assert_eq!(load(at(buffer, 0xf000)), 42);
    assert_eq!(segment.unmap().unwrap(), Unregistered::Released);
    drop(segment);
    rig.clean();
}

#[test]
fn unmapped_memory_is_an_exception_and_never_stale() {
    let rig = rig(2);
    let space = rig.space();
    let segments: Vec<_> = (0..2).map(|_| rig.gru.segment(&space).unwrap()).collect();
    let buffer = space.map(Map::anonymous(16 << 12)).unwrap();
    for segment in &segments {
        segment.run(0, &set(buffer.start(), 7, 8192), LONG).unwrap();
    }
    space.unmap(buffer).unwrap();
    for segment in &segments {
        let error = segment
            .run(0, &set(buffer.start(), 7, 1), LONG)
            .unwrap_err();
        assert!(
            matches!(
                error,
                GruError::Exception {
                    causes: Causes::TLB_FATAL,
                    detail: 1,
                    ..
                }
            ),
            "{error}"
        );
    }
    drop(segments);
    rig.clean();
}

#[test]
fn a_store_to_read_only_memory_is_an_exception_until_it_may() {
    let rig = rig(1);
    let space = rig.space();
    let buffer = space.map(Map::anonymous(4096)).unwrap();
    let segment = rig.gru.segment(&space).unwrap();
    space.protect(buffer, Rights::READ).unwrap();
    let error = segment
        .run(0, &set(buffer.start(), 7, 1), LONG)
        .unwrap_err();
    assert!(
        matches!(
            error,
            GruError::Exception {
                causes: Causes::TLB_FATAL,
                detail: 2,
                ..
            }
        ),
        "{error}"
    );
    space.protect(buffer, Rights::READ_WRITE).unwrap();
    segment.run(0, &set(buffer.start(), 7, 1), LONG).unwrap();
    drop(segment);
    rig.clean();
}

#[test]
fn a_huge_page_is_one_entry_until_part_of_it_goes() {
    let rig = rig(1);
    let space = rig.space();
    let buffer = space
        .map(Map::anonymous(2 << 20).page_size(PageSize::TwoMiB))
        .unwrap();
    let segment = rig.gru.segment(&space).unwrap();
    segment
        .run(0, &set(buffer.start(), 9, 1 << 18), LONG)
        .unwrap();
    assert_eq!(rig.model.chiplets()[0].tlb_entries().len(), 1);
    let part = Range::new(at(buffer.start(), 0x5000), 4096).unwrap();
    space.unmap(part).unwrap();
    assert!(rig.model.chiplets()[0].tlb_entries().is_empty());
    segment
        .run(0, &set(buffer.start(), 9, 5 << 9), LONG)
        .unwrap();
    let error = segment.run(0, &set(part.start(), 9, 1), LONG).unwrap_err();
    assert!(matches!(error, GruError::Exception { .. }), "{error}");
    drop(segment);
    rig.clean();
}

#[test]
fn a_segment_with_a_pending_miss_is_unmapped_under_the_map_lock() {
    let rig = rig(1);
    let space = rig.space();
    let buffer = space.map(Map::anonymous(4096)).unwrap();
    let segment = rig.gru.segment(&space).unwrap();
    let guard = space.lock_write().unwrap();
    segment.submit(0, &set(buffer.start(), 1, 1)).unwrap();
    let refused = segment.wait(0, LONG).unwrap_err();
    assert!(matches!(refused, GruError::Refused(_)), "{refused}");
    assert_eq!(segment.unmap_locked(&guard).unwrap(), Unregistered::Quiet);
    guard.unmap(buffer).unwrap();
    drop(guard);
    assert_eq!(space.registrations(), 0);
    assert_eq!(rig.gru.stats().faults_to_user, 1);
    drop(segment);
    rig.clean();
}

#[test]
fn unmapping_part_of_a_segment_ends_all_of_it() {
    let rig = rig(1);
    let space = rig.space();
    let segment = rig.gru.segment(&space).unwrap();
    let range = segment.range();
    assert_eq!(range.len(), 256 << 10);
    space
        .unmap(Range::new(at(range.start(), 0x1000), 0x1000).unwrap())
        .unwrap();
    let error = segment
        .submit(0, &set(shootdown::Addr::new(0), 0, 1))
        .unwrap_err();
    let why = Ended::PartlyUnmapped;
    assert!(
        matches!(error, GruError::SegmentEnded { why: found } if found == why),
        "{error}"
    );
    drop(segment);
    space
        .map(Map::anonymous(256 << 10).at(range.start()))
        .unwrap();
    rig.clean();
}

#[test]
fn memory_and_segments_go_in_one_unmap_with_work_in_flight() {
    let rig = Rig::new(2, slow(), Config::default());
    let space = rig.space();
    let buffer = space.map(Map::anonymous(1 << 20)).unwrap();
    let segments: Vec<_> = (0..2).map(|_| rig.gru.segment(&space).unwrap()).collect();
    let mut all = buffer;
    for segment in &segments {
        segment.submit(0, &set(buffer.start(), 5, 1 << 17)).unwrap();
        all = all.hull(segment.range());
    }
    space.unmap(all).unwrap();
    for segment in &segments {
        assert_eq!(segment.ended(), Some(Ended::Unmapped));
        assert_eq!(segment.unmap().unwrap(), Unregistered::AlreadyGone);
    }
    assert_eq!(space.registrations(), 0);
    rig.clean();
}

/// The fault waits for the shootdown that unloads the context, which waits for the fault (R33): it gives up.
#[test]
fn a_fault_on_its_own_segment_does_not_hold_up_the_unmap() {
    let patient = Config {
        fault_deadline: LONG,
        ..Config::default()
    };
    let rig = Rig::new(1, ChipletConfig::default(), patient);
    let space = rig.space();
    for _ in 0..50 {
        let segment = rig.gru.segment(&space).unwrap();
        for cb in 0..segment.control_blocks() {
            let own = at(segment.range().start(), cb as u64 * 4096);
            segment.submit(cb, &set(own, 5, 1)).unwrap();
        }
        let begun = std::time::Instant::now();
        segment.unmap().unwrap();
        assert!(begun.elapsed() < LONG / 2, "it waited for the fault");
    }
    rig.clean();
}

#[test]
fn no_room_for_a_segment_is_a_typed_error_and_unloads_its_context() {
    let rig = rig(1);
    let space = rig.space();
    space.map(Map::anonymous(64 << 20)).unwrap();
    let error = rig.gru.segment(&space).unwrap_err();
    assert!(
        matches!(&error, GruError::Map(MapError::NoRoom { len, .. }) if *len == 256 << 10),
        "{error}"
    );
    assert_eq!(rig.gru.stats().contexts_in_use, 0);
    let guard = space.lock_write().unwrap();
    let error = rig.gru.segment(&space).unwrap_err();
    assert!(
        matches!(error, GruError::Map(MapError::Refused(_))),
        "{error}"
    );
    drop(guard);
    rig.clean();
}

#[test]
fn the_exit_of_a_space_ends_segments_that_are_at_work() {
    let rig = Rig::new(2, slow(), Config::default());
    let space = rig.space();
    let buffer = space.map(Map::anonymous(1 << 20)).unwrap();
    let segments: Vec<_> = (0..4).map(|_| rig.gru.segment(&space).unwrap()).collect();
    for segment in &segments {
        segment.submit(0, &set(buffer.start(), 5, 1 << 17)).unwrap();
    }
    // Not by dropping it: the thread that resolves a fault right now is an owner as well.
    space.exit().unwrap();
    for segment in &segments {
        assert_eq!(segment.ended(), Some(Ended::SpaceExited));
    }
    drop(segments);
    rig.clean();
}

#[test]
fn purges_that_never_begin_end_in_a_reset_and_lost_contexts_are_typed_errors() {
    let faults = FaultPlan {
        stuck: 1.0,
        ..FaultPlan::default()
    };
    let hardware = ChipletConfig {
        faults,
        ..ChipletConfig::default()
    };
    let rig = Rig::new(1, hardware, Config::default());
    let space = rig.space();
    let buffer = space.map(Map::anonymous(4096)).unwrap();
    let segment = rig.gru.segment(&space).unwrap();
    segment.run(0, &set(buffer.start(), 1, 1), LONG).unwrap();
    space.discard(buffer).unwrap();
    assert_eq!(rig.gru.devices()[0].stats().recovered_by_reset, 1);
    let error = segment.submit(0, &set(buffer.start(), 1, 1)).unwrap_err();
    assert!(matches!(error, GruError::ContextLost { .. }), "{error}");
    drop(segment);
    let segment = rig.gru.segment(&space).unwrap();
    segment.run(0, &set(buffer.start(), 2, 1), LONG).unwrap();
    assert_eq!(load(buffer.start()), 2);
    drop(segment);
    rig.clean();
}

#[test]
fn a_chiplet_that_is_dead_quarantines_and_hangs_nobody() {
    let faults = FaultPlan {
        stuck: 1.0,
        survives_reset: 1.0,
        ..FaultPlan::default()
    };
    let hardware = ChipletConfig {
        faults,
        ..ChipletConfig::default()
    };
    let rig = Rig::new(1, hardware, Config::default());
    let space = rig.space();
    let buffer = space.map(Map::anonymous(4096)).unwrap();
    let segment = rig.gru.segment(&space).unwrap();
    segment.run(0, &set(buffer.start(), 1, 1), LONG).unwrap();
    assert!(space.unmap(buffer).is_err());
    assert_eq!(rig.gru.devices()[0].health(), Health::Quarantined);
    assert!(segment.submit(0, &set(buffer.start(), 1, 1)).is_err());
    assert!(rig.gru.segment(&space).is_err());
    drop(segment);
    assert_eq!(rig.stale(), 0);
}

#[test]
fn a_chiplet_that_survived_its_reset_comes_back_with_a_later_one_and_all_its_contexts() {
    let faults = FaultPlan {
        seed: 1,
        stuck: 0.6,
        survives_reset: 0.5,
        ..FaultPlan::default()
    };
    let hardware = ChipletConfig {
        faults,
        ..ChipletConfig::default()
    };
    let rig = Rig::new(1, hardware, Config::default());
    let space = rig.space_with(short());
    let device = &rig.gru.devices()[0];
    for nth in 1..=6 {
        while device.stats().quarantined < nth {
            let buffer = space.map(Map::anonymous(4096)).unwrap();
            let segment = rig.gru.segment(&space).unwrap();
            segment.run(0, &set(buffer.start(), 1, 1), LONG).unwrap();
            let _ = space.unmap(buffer);
        }
        assert!(matches!(
            rig.gru.segment(&space),
            Err(GruError::NoContext { .. })
        ));
        // Nor does it come back because a purge is acknowledged, which half of them are.
        while device.recover(Duration::from_millis(20)).is_err() {}
        space.drain().unwrap();
        assert_eq!(space.quarantined_bytes(), 0);
        let segments: Vec<_> = (0..16).map(|_| rig.gru.segment(&space).unwrap()).collect();
        drop(segments);
    }
    let stats = rig.gru.stats();
    let counts = rig.model.chiplets()[0].counts();
    assert_eq!(
        (stats.resets, stats.resets_failed),
        (counts.resets, counts.resets_survived)
    );
    rig.clean();
}

#[test]
fn each_lost_purge_is_made_up_for_by_a_wider_one_or_by_a_reset() {
    let faults = FaultPlan {
        seed: 3,
        lost: 0.5,
        ..FaultPlan::default()
    };
    let hardware = ChipletConfig {
        faults,
        ..ChipletConfig::default()
    };
    let rig = Rig::new(1, hardware, Config::default());
    let space = rig.space_with(short());
    let mut buffers = 0;
    while rig.gru.stats().resets == 0 {
        let buffer = space.map(Map::anonymous(4096)).unwrap();
        let segment = rig.gru.segment(&space).unwrap();
        segment.run(0, &set(buffer.start(), 1, 1), LONG).unwrap();
        space.unmap(buffer).unwrap();
        buffers += 1;
    }
    assert!(buffers < 200, "{buffers}");
    let (stats, counts) = (rig.gru.stats(), rig.model.chiplets()[0].counts());
    assert_eq!(
        counts.completions_lost + counts.purges_cut_short,
        stats.purges_covered + stats.purges_reset + stats.purges_open
    );
    rig.clean();
}
