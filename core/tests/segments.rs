//! Segments over a fake device: what ends them, in what order, and what a context that does not unload comes to.

mod support;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use shootdown::{
    Addr, AddressSpace, Cause, Device, DeviceContext, ExitError, Health, InvalidateError, Kind,
    Map, MapError, Op, Range, Rights, Segment, Share, UnloadFailed, Unregistered,
};
use support::{Behaviour, Counting, fake, on, space};

/// A context that notes how it was unloaded, and may refuse.
struct Context {
    device: Device,
    /// How often it still fails.
    fails: AtomicU64,
    panics: AtomicBool,
    unloads: Mutex<Vec<(Range, Cause)>>,
    /// The device had been flushed when it was unloaded last.
    flushed: AtomicBool,
    behaviour: Arc<Behaviour>,
}

impl DeviceContext for Context {
    fn device(&self) -> &Device {
        &self.device
    }

    fn unload(&self, op: &Op<'_>) -> Result<(), UnloadFailed> {
        assert!(!self.panics.load(SeqCst), "planned");
        self.flushed
            .store(self.behaviour.polls.load(SeqCst) > 0, SeqCst);
        self.unloads.lock().unwrap().push((op.range(), op.cause()));
        let left = self.fails.load(SeqCst);
        if left > 0 {
            self.fails.store(left - 1, SeqCst);
            return Err(UnloadFailed { reason: "planned" });
        }
        Ok(())
    }
}

impl Context {
    fn unloads(&self) -> Vec<(Range, Cause)> {
        self.unloads.lock().unwrap().clone()
    }
}

struct Rig {
    space: AddressSpace,
    device: Device,
    behaviour: Arc<Behaviour>,
    handler: Arc<Counting>,
    share: Arc<Share>,
    context: Arc<Context>,
}

const LEN: u64 = 16 << 12;

impl Rig {
    fn new() -> Self {
        let space = space();
        let (device, behaviour) = fake("of the segment");
        let handler = Arc::new(Counting::default());
        let share = space
            .share(1, || (Range::ALL, handler.clone(), on(&device)))
            .unwrap();
        let context = Arc::new(Context {
            device: device.clone(),
            fails: AtomicU64::new(0),
            panics: AtomicBool::new(false),
            unloads: Mutex::new(Vec::with_capacity(8)),
            flushed: AtomicBool::new(false),
            behaviour: behaviour.clone(),
        });
        Self {
            space,
            device,
            behaviour,
            handler,
            share: Arc::new(share),
            context,
        }
    }

    fn segment(&self) -> Segment {
        self.space
            .map_segment(LEN, None, self.context.clone(), self.share.clone())
            .unwrap()
    }
}

fn part(of: Range, pages: std::ops::Range<u64>) -> Range {
    let len = (pages.end - pages.start) << 12;
    Range::new(of.start().get() + (pages.start << 12), len).unwrap()
}

#[test]
fn unmapping_a_segment_unloads_it_puts_its_share_and_frees_its_addresses() {
    let rig = Rig::new();
    let segment = rig.segment();
    let range = segment.range();
    assert!(matches!(
        rig.space.map(Map::anonymous(4096).at(range.start())),
        Err(MapError::Occupied { .. })
    ));
    assert_eq!(segment.unmap().unwrap(), Unregistered::Released);
    assert_eq!(rig.context.unloads(), [(range, Cause::Unmap)]);
    assert!(
        rig.context.flushed.load(SeqCst),
        "after the TLBs had acknowledged"
    );
    assert_eq!(rig.handler.releases.load(SeqCst), 1);
    assert!(segment.is_over());
    assert_eq!(segment.unmap().unwrap(), Unregistered::AlreadyGone);
    rig.space
        .map(Map::anonymous(4096).at(range.start()))
        .unwrap();
    assert_eq!(rig.space.stats().segments, 1);
    let records = rig.space.records();
    assert!(records.iter().any(|one| one.kind == Kind::Unload));
}

#[test]
fn unmapping_its_data_leaves_a_segment_alone() {
    let rig = Rig::new();
    let data = rig.space.map(Map::anonymous(8 << 12)).unwrap();
    let segment = rig.segment();
    rig.space.unmap(part(data, 2..4)).unwrap();
    rig.space.unmap(part(data, 0..2)).unwrap();
    assert_eq!(rig.handler.starts.load(SeqCst), 2);
    assert!(!segment.is_over() && rig.context.unloads().is_empty());
    assert_eq!(rig.handler.releases.load(SeqCst), 0);
}

#[test]
fn under_the_map_lock_it_is_the_same_and_release_runs_when_the_lock_is_dropped() {
    let rig = Rig::new();
    let segment = rig.segment();
    let guard = rig.space.lock_write().unwrap();
    assert!(matches!(segment.unmap(), Err(MapError::Refused(_))));
    assert_eq!(guard.unmap_segment(&segment).unwrap(), Unregistered::Quiet);
    assert_eq!(rig.context.unloads().len(), 1);
    assert_eq!(rig.handler.releases.load(SeqCst), 0);
    drop(guard);
    assert_eq!(rig.handler.releases.load(SeqCst), 1);
    // By range, as munmap does, which does not know of segments.
    let again = Rig::new();
    let segment = again.segment();
    let guard = again.space.lock_write().unwrap();
    guard.unmap(segment.range()).unwrap();
    drop(guard);
    assert_eq!(again.handler.releases.load(SeqCst), 1);
}

#[test]
fn a_guard_of_another_space_is_refused_by_name() {
    let (one, other) = (Rig::new(), Rig::new());
    let segment = one.segment();
    let guard = other.space.lock_write().unwrap();
    assert!(matches!(
        guard.unmap_segment(&segment),
        Err(MapError::OtherSpace { this, segment }) if this == other.space.id() && segment == one.space.id()
    ));
    assert!(!segment.is_over());
}

#[test]
fn a_part_ends_all_of_it_and_the_rest_stays_taken() {
    let rig = Rig::new();
    let segment = rig.segment();
    let range = segment.range();
    rig.space.unmap(part(range, 3..5)).unwrap();
    assert!(segment.is_over());
    assert_eq!(
        rig.context.unloads(),
        [(part(range, 3..5), Cause::Unmap)],
        "once, and told what of it goes"
    );
    assert_eq!(rig.handler.releases.load(SeqCst), 1, "its share was put");
    rig.space
        .map(Map::anonymous(2 << 12).at(part(range, 3..5).start()))
        .unwrap();
    assert!(matches!(
        rig.space.map(Map::anonymous(4096).at(range.start())),
        Err(MapError::Occupied { .. })
    ));
    // The rest, one part by range, the other by the handle.
    rig.space.unmap(part(range, 0..3)).unwrap();
    assert_eq!(segment.unmap().unwrap(), Unregistered::AlreadyGone);
    assert_eq!(rig.context.unloads().len(), 1);
    rig.space
        .map(Map::anonymous(4096).at(part(range, 15..16).start()))
        .unwrap();
}

#[test]
fn two_parts_at_once_unload_it_once() {
    for _ in 0..100 {
        let rig = Rig::new();
        let range = rig.segment_kept();
        thread::scope(|scope| {
            for half in [0..8, 8..16] {
                let space = &rig.space;
                scope.spawn(move || space.unmap(part(range, half)).unwrap());
            }
        });
        assert_eq!(rig.context.unloads().len(), 1);
    }
}

impl Rig {
    /// The range of a segment whose handle is forgotten.
    fn segment_kept(&self) -> Range {
        let segment = self.segment();
        let range = segment.range();
        std::mem::forget(segment);
        range
    }
}

#[test]
fn memory_and_segments_go_in_one_unmap() {
    let rig = Rig::new();
    let before = rig.space.map(Map::anonymous(4 << 12)).unwrap();
    let start = Addr::new(before.last().get() + 1);
    let segment = rig
        .space
        .map_segment(LEN, Some(start), rig.context.clone(), rig.share.clone())
        .unwrap();
    let behind = Addr::new(segment.range().last().get() + 1);
    let behind = rig.space.map(Map::anonymous(4 << 12).at(behind)).unwrap();
    let all = before.hull(behind);
    for result in [
        rig.space.discard(all),
        rig.space.protect(all, Rights::READ),
        rig.space
            .remap(all, Addr::new(all.last().get() + 1))
            .map(drop),
    ] {
        assert!(
            matches!(result, Err(MapError::Segment { segment: named, .. }) if named == segment.range()),
            "{result:?}"
        );
    }
    assert!(!segment.is_over(), "a refusal changes nothing");
    rig.space.unmap(all).unwrap();
    assert!(segment.is_over());
    assert_eq!(rig.context.unloads(), [(segment.range(), Cause::Unmap)]);
    rig.space.map(Map::anonymous(24 << 12).at(start)).unwrap();
}

#[test]
fn exit_unloads_what_nobody_unmapped() {
    let rig = Rig::new();
    let segment = rig.segment();
    rig.space.exit().unwrap();
    assert_eq!(rig.context.unloads(), [(segment.range(), Cause::Exit)]);
    assert!(segment.is_over());
    assert_eq!(rig.handler.releases.load(SeqCst), 1);
    assert_eq!(segment.unmap().unwrap(), Unregistered::AlreadyGone);
    assert!(matches!(
        rig.space
            .map_segment(LEN, None, rig.context.clone(), rig.share.clone()),
        Err(MapError::Exiting)
    ));
}

#[test]
fn a_dropped_segment_is_unmapped_at_once_or_when_the_place_is_left() {
    let rig = Rig::new();
    drop(rig.segment());
    assert_eq!(rig.context.unloads().len(), 1);
    let rig = Rig::new();
    let segment = rig.segment();
    let open = rig
        .space
        .begin_invalidation(part(Range::ALL, 0..1), Cause::External)
        .unwrap();
    drop(segment);
    assert!(rig.context.unloads().is_empty());
    drop(open);
    assert_eq!(rig.context.unloads().len(), 1);
    assert_eq!(rig.handler.releases.load(SeqCst), 1);
}

#[test]
fn a_context_that_does_not_unload_costs_its_device_a_reset() {
    let rig = Rig::new();
    rig.behaviour.resets.store(true, SeqCst);
    let segment = rig.segment();
    rig.context.fails.store(1, SeqCst);
    segment.unmap().unwrap();
    assert_eq!(rig.context.unloads().len(), 2);
    assert_eq!(rig.device.stats().resets, 1);
    assert_eq!(rig.device.health(), Health::Healthy);
}

/// Quarantine, not a leak: the addresses stay taken, the share is kept, and both come back once the device does.
#[test]
fn a_context_that_never_unloads_is_quarantined_with_its_device_until_that_is_recovered() {
    let rig = Rig::new();
    let segment = rig.segment();
    let range = segment.range();
    rig.context.fails.store(u64::MAX, SeqCst);
    let error = segment.unmap().unwrap_err();
    assert!(
        matches!(&error, MapError::Invalidate(InvalidateError::Quarantined { device, .. }) if device.name() == "of the segment"),
        "{error}"
    );
    assert_eq!(rig.device.health(), Health::Quarantined);
    assert_eq!(rig.space.quarantined_bytes(), 0, "it has no memory");
    assert_eq!(rig.handler.releases.load(SeqCst), 0, "the share is kept");
    let taken = |when: &str| {
        let first = rig.space.map(Map::anonymous(4096).at(range.start()));
        assert!(
            matches!(first, Err(MapError::InQuarantine { .. })),
            "{when}"
        );
    };
    taken("at once");
    assert!(matches!(
        segment.unmap(),
        Err(MapError::InQuarantine { .. })
    ));
    rig.space.drain().unwrap();
    taken("until it is recovered");
    rig.context.fails.store(0, SeqCst);
    rig.device.recover(Duration::from_millis(20)).unwrap();
    rig.space.drain().unwrap();
    assert!(segment.is_over());
    assert_eq!(rig.handler.releases.load(SeqCst), 1);
    rig.space
        .map(Map::anonymous(4096).at(range.start()))
        .unwrap();
}

/// The memory of an exited space stays for good where a device may reach it; the space itself and what it knew do not.
#[test]
fn a_context_that_does_not_unload_at_exit_does_not_keep_its_space() {
    let rig = Rig::new();
    let segment = rig.segment();
    rig.context.fails.store(u64::MAX, SeqCst);
    assert!(matches!(rig.space.exit(), Err(ExitError::Reached { .. })));
    assert_eq!(rig.device.health(), Health::Quarantined);
    assert!(!segment.is_over());
    let Rig {
        space,
        context,
        handler,
        share,
        ..
    } = rig;
    drop((segment, share, space));
    assert_eq!(
        (Arc::strong_count(&context), Arc::strong_count(&handler)),
        (1, 1)
    );
}

#[test]
fn a_context_that_panics_is_quarantined_and_the_caller_told() {
    let rig = Rig::new();
    let segment = rig.segment();
    rig.context.panics.store(true, SeqCst);
    assert!(matches!(
        segment.unmap(),
        Err(MapError::Invalidate(InvalidateError::HandlerPanicked {
            changed: false,
            ..
        }))
    ));
    assert_eq!(rig.device.health(), Health::Quarantined);
    let taken = rig
        .space
        .map(Map::anonymous(4096).at(segment.range().start()));
    assert!(matches!(taken, Err(MapError::InQuarantine { .. })));
}

#[test]
fn bad_input_is_a_typed_error() {
    let rig = Rig::new();
    let map = |len, at| {
        let (context, share) = (rig.context.clone(), rig.share.clone());
        rig.space.map_segment(len, at, context, share).unwrap_err()
    };
    assert!(matches!(map(0, None), MapError::Range(_)));
    assert!(matches!(map(100, None), MapError::Misaligned { .. }));
    let outside = Some(Addr::new(0x1000));
    assert!(matches!(map(LEN, outside), MapError::OutsideArena { .. }));
    assert!(matches!(map(1 << 40, None), MapError::NoRoom { .. }));
    let other = space();
    let error = other
        .map_segment(LEN, None, rig.context.clone(), rig.share.clone())
        .unwrap_err();
    assert!(
        matches!(error, MapError::OtherSpace { this, segment } if this == other.id() && segment == rig.space.id()),
        "{error}"
    );
    let bare = AddressSpace::without_memory(support::short());
    let own = bare
        .share(1, || (Range::ALL, rig.handler.clone(), on(&rig.device)))
        .unwrap();
    let error = bare
        .map_segment(LEN, None, rig.context.clone(), Arc::new(own))
        .unwrap_err();
    assert!(matches!(error, MapError::NoMemory));
}
