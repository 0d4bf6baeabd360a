//! Unmaps beside instructions: without plants the oracle finds nothing, with each of them it does.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::{LONG, Rig, at};
use shootdown::{AddressSpace, Drain, Map, Notifier, Op, PageSize, Range, WouldBlock};
use shootdown_gru::{Config, Element, GruError, Instruction, LateDropIns, Plant, Segment};
use shootdown_hw_model::gru::{Chiplet, ChipletConfig, FaultPlan, Latency, Plant as ModelPlant};

const PAGES: u64 = 8;

fn rig(plants: Plant, model: ModelPlant) -> Rig {
    let hardware = ChipletConfig {
        latency: Latency {
            // Late drop-ins need handles that are slower than purges.
            purge: Duration::from_micros(if model.is_empty() { 100 } else { 0 }),
            handle: Duration::from_micros(if model.is_empty() { 0 } else { 300 }),
            access: Duration::from_micros(5),
        },
        plants: model,
        ..ChipletConfig::default()
    };
    let config = Config {
        plants,
        ..Config::default()
    };
    Rig::new(2, hardware, config)
}

/// The driver relies on the chiplet to ignore late drop-ins. Handles are slow, so that there are some; purges end at different
/// times, so that one chiplet misses while the pages still wait for another.
fn relying(plants: Plant, model: ModelPlant) -> Rig {
    let hardware = ChipletConfig {
        latency: Latency {
            handle: Duration::from_micros(300),
            ..Latency::default()
        },
        faults: FaultPlan {
            jitter: Duration::from_micros(300),
            ..FaultPlan::default()
        },
        plants: model,
        ..ChipletConfig::default()
    };
    let config = Config {
        late_drop_ins: LateDropIns::IgnoredByHardware,
        plants,
        ..Config::default()
    };
    Rig::new(2, hardware, config)
}

/// Sets one word in each page of `buffer` until told to stop, and does not mind exceptions.
fn work(segment: &Segment, buffer: Range, page: u64, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        for nth in 0..PAGES {
            let to = at(buffer.start(), nth * page);
            match segment.run(0, &Instruction::vset(to, nth, Element::Double, 1), LONG) {
                Ok(_) | Err(GruError::Exception { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }
}

/// Two threads work, this one discards a page after the other, each several times, so that later ones meet the misses that
/// earlier ones have caused, until something is found or the time is over.
fn churn(rig: &Rig, time: Duration) -> u64 {
    let space = rig.space();
    let buffer = space.map(Map::anonymous(PAGES << 12)).unwrap();
    beside(rig, &space, buffer, 4096, time, |nth| {
        let page = Range::new(at(buffer.start(), nth / 4 % PAGES * 4096), 4096).unwrap();
        space.discard(page).unwrap();
    })
}

fn beside(
    rig: &Rig,
    space: &AddressSpace,
    buffer: Range,
    page: u64,
    time: Duration,
    mut change: impl FnMut(u64),
) -> u64 {
    let stop = AtomicBool::new(false);
    let segments: Vec<_> = (0..2).map(|_| rig.gru.segment(space).unwrap()).collect();
    thread::scope(|scope| {
        for segment in &segments {
            scope.spawn(|| work(segment, buffer, page, &stop));
        }
        let begun = Instant::now();
        let mut nth = 0;
        while begun.elapsed() < time && rig.stale() == 0 {
            change(nth);
            nth += 1;
        }
        stop.store(true, Ordering::Relaxed);
    });
    rig.stale()
}

#[test]
fn without_plants_nothing_is_stale() {
    let rig = rig(Plant::empty(), ModelPlant::empty());
    churn(&rig, Duration::from_secs(1));
    assert!(rig.gru.stats().faults_resolved > 0);
    rig.clean();
}

#[test]
fn retry_alone_protects_on_hardware_that_installs_late_drop_ins() {
    let rig = rig(Plant::empty(), ModelPlant::DROP_IN_NOT_CANCELLED);
    churn(&rig, Duration::from_secs(1));
    rig.clean();
}

#[test]
fn a_flush_left_out_is_found() {
    let rig = rig(Plant::NO_FLUSH_ON_UNMAP, ModelPlant::empty());
    assert!(churn(&rig, LONG) > 0);
}

#[test]
fn a_flush_not_waited_for_is_found() {
    let rig = rig(Plant::FLUSH_NOT_WAITED, ModelPlant::empty());
    assert!(churn(&rig, LONG) > 0);
}

#[test]
fn a_retry_not_checked_is_found_where_the_hardware_does_not_hide_it() {
    let rig = rig(Plant::RETRY_NOT_CHECKED, ModelPlant::DROP_IN_NOT_CANCELLED);
    assert!(churn(&rig, LONG) > 0);
}

#[test]
fn hardware_that_ignores_late_drop_ins_protects_without_the_driver_lock() {
    let rig = relying(Plant::empty(), ModelPlant::empty());
    churn(&rig, Duration::from_secs(1));
    split(&rig, Duration::from_secs(1));
    let cancelled = |chiplet: &Arc<Chiplet>| chiplet.counts().drop_ins_cancelled;
    assert!(rig.model.chiplets().iter().map(cancelled).sum::<u64>() > 0);
    rig.clean();
}

#[test]
fn a_late_drop_in_that_nobody_excludes_is_found() {
    let rig = relying(Plant::empty(), ModelPlant::DROP_IN_NOT_CANCELLED);
    assert!(churn(&rig, LONG) > 0);
}

#[test]
fn an_invalidation_in_progress_has_to_be_waited_for_on_any_hardware() {
    let rig = relying(Plant::NOT_BEGUN, ModelPlant::empty());
    assert!(churn(&rig, LONG) > 0);
}

/// Unmaps 4 KiB of a huge page while other parts of it are used.
fn split(rig: &Rig, time: Duration) -> u64 {
    let begun = Instant::now();
    let space = rig.space();
    while begun.elapsed() < time && rig.stale() == 0 {
        let map = Map::anonymous(2 << 20).page_size(PageSize::TwoMiB);
        let buffer = space.map(map).unwrap();
        let part = Range::new(at(buffer.start(), 4096), 4096).unwrap();
        let mut changed = false;
        beside(rig, &space, buffer, 4096, Duration::from_millis(20), |_| {
            if !changed {
                space.unmap(part).unwrap();
                changed = true;
            }
        });
        let rest = [(0, 4096), (8192, (2 << 20) - 8192)];
        for (offset, len) in rest {
            space
                .unmap(Range::new(at(buffer.start(), offset), len).unwrap())
                .unwrap();
        }
    }
    rig.stale()
}

#[test]
fn the_sequence_of_the_whole_entry_protects_beside_an_unmap_of_a_part() {
    let right = rig(Plant::empty(), ModelPlant::empty());
    split(&right, Duration::from_secs(1));
    right.clean();
}

#[test]
fn the_sequence_of_a_part_of_the_entry_is_found() {
    assert!(split(&rig(Plant::WRONG_RANGE, ModelPlant::empty()), LONG) > 0);
}

/// One ASID for all: each segment has that of the one before.
fn reuse(plants: Plant) -> Rig {
    let config = Config {
        asids: 8..=8,
        plants,
        ..Config::default()
    };
    let rig = Rig::new(1, ChipletConfig::default(), config);
    let space = rig.space();
    let buffer = space.map(Map::anonymous(4096)).unwrap();
    let set = Instruction::vset(buffer.start(), 1, Element::Double, 1);
    for _ in 0..8 {
        rig.gru.segment(&space).unwrap().run(0, &set, LONG).unwrap();
        space.discard(buffer).unwrap();
    }
    rig
}

#[test]
fn an_asid_handed_out_again_is_flushed_first() {
    let right = reuse(Plant::empty());
    assert_eq!(right.gru.stats().asid_wraps, 7);
    right.clean();
}

#[test]
fn an_asid_handed_out_again_without_a_flush_is_found() {
    assert!(reuse(Plant::ASID_REUSED).stale() > 0);
}

/// Memory goes right after the segment that is at work in it, on one word for much longer than that takes.
fn leave(plants: Plant) -> Rig {
    let rig = rig(plants, ModelPlant::empty());
    let space = rig.space();
    let buffer = space.map(Map::anonymous(4096)).unwrap();
    let segment = rig.gru.segment(&space).unwrap();
    let set = |count| Instruction::vset(buffer.start(), 1, Element::Double, count).stride(0);
    segment.run(0, &set(1), LONG).unwrap();
    segment.submit(0, &set(1 << 26)).unwrap();
    segment.unmap().unwrap();
    space.discard(buffer).unwrap();
    thread::sleep(Duration::from_millis(50));
    rig
}

#[test]
fn a_context_ends_with_its_segment() {
    leave(Plant::empty()).clean();
}

#[test]
fn a_context_that_goes_on_after_its_segment_is_found() {
    assert!(leave(Plant::CONTEXT_NOT_UNLOADED).stale() > 0);
}

/// Has its segment miss on the data while that is being unmapped.
struct Misses {
    segment: Mutex<Option<Segment>>,
    data: Range,
}

impl Notifier for Misses {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        if let Some(segment) = &*self.segment.lock().unwrap() {
            let set = Instruction::vset(self.data.start(), 1, Element::Double, 1);
            segment.submit(0, &set).unwrap();
            // Long enough for the miss to be in the fault map, with the thread that serves it waiting for the end of this.
            thread::sleep(Duration::from_millis(50));
        }
        Ok(op.idle())
    }
}

/// One unmap of a segment and of the data that it misses on meanwhile: the miss waits for the unmap.
fn miss_on_what_goes(plants: Plant) -> Rig {
    let rig = rig(plants, ModelPlant::empty());
    let space = rig.space();
    let data = space.map(Map::anonymous(4096)).unwrap();
    let segment = rig.gru.segment(&space).unwrap();
    let all = data.hull(segment.range());
    assert_eq!(all.len(), data.len() + segment.range().len());
    let misses = Arc::new(Misses {
        segment: Mutex::new(Some(segment)),
        data,
    });
    let registration = space.register(data, misses.clone(), &[]).unwrap();
    // Not under the map lock, or the thread that serves the miss would not get it, and leave the miss to its user at once.
    space.unmap(all).unwrap();
    registration.unregister().unwrap();
    drop(misses.segment.lock().unwrap().take());
    rig
}

#[test]
fn a_miss_that_waits_for_the_unmap_of_its_context_is_forced_to_its_user() {
    let rig = miss_on_what_goes(Plant::empty());
    assert_eq!(rig.gru.stats().resets, 0);
    rig.clean();
}

#[test]
fn a_miss_that_is_not_forced_to_its_user_keeps_its_context_from_unloading() {
    let stats = miss_on_what_goes(Plant::FAULTS_NOT_FORCED).gru.stats();
    assert_eq!((stats.contexts_leaked, stats.resets), (1, 1), "locked");
}

#[test]
fn a_context_that_goes_on_is_stopped_when_its_place_is_needed_and_hangs_nobody() {
    let rig = rig(Plant::CONTEXT_NOT_UNLOADED, ModelPlant::empty());
    let (done, over) = mpsc::channel();
    thread::spawn(move || {
        let space = rig.space();
        rig.gru.segment(&space).unwrap().unmap().unwrap();
        // The context is still at work for the segment that is gone.
        let next = rig.gru.segment(&space).unwrap();
        next.run(0, &Instruction::nop(), LONG).unwrap();
        next.unmap().unwrap();
        assert_eq!(space.registrations(), 0, "the last share is given back");
        done.send(()).unwrap();
    });
    over.recv_timeout(LONG).unwrap();
}
