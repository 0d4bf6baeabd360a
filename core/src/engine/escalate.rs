//! What did not do as it was told: wider flush, reset, quarantine.

use super::call::Caller;
use super::desk::{Desk, Work};
use super::device_op::{Ack, Deadline, DeviceOp, sync};
use crate::notifier::{Op, OpCore};
use crate::primitive::Arc;
use crate::recorder::Kind;
use crate::registration::Inner;
use crate::segment::SegmentInner;
use crate::space::Space;
use crate::stats::Counter;
use crate::tlb::{Device, Health};
use crate::watch::{Stage, Who};

impl Desk<'_> {
    /// What missed its deadline: the whole device, then its reset, then quarantine. False if nothing has.
    pub(super) fn escalate(&mut self) -> bool {
        if self.devices.iter().all(|one| one.state == Ack::Done) {
            return false;
        }
        self.escalate_all();
        true
    }

    #[cold]
    fn escalate_all(&mut self) {
        let space = self.space;
        let Work {
            core,
            devices,
            trouble,
            missed_deadline,
            ..
        } = &mut **self;
        *missed_deadline = true;
        let mut deadline = Deadline::new(space.deadlines.full_flush);
        let healthy = |one: &DeviceOp| one.device.health() == Health::Healthy;
        devices.for_each(|one| {
            if one.state == Ack::Missed && healthy(one) {
                space.recorder.record(Kind::Deadline, core.id, 1, 0);
                one.device.note_timeout();
                one.missed = true;
                one.set_whole();
                one.issue();
            }
        });
        sync(devices, &mut deadline);
        devices.for_each(|one| match one.state {
            Ack::Done if one.missed => one.device.note_recovered_by_flush(),
            Ack::Missed if healthy(one) => {
                space.recorder.record(Kind::Deadline, core.id, 2, 0);
                if reset(
                    space,
                    core,
                    Who::new(0, one.device.watched_as()),
                    &one.device,
                ) {
                    one.state = Ack::Done;
                    if one.missed {
                        one.device.note_recovered_by_reset();
                    }
                } else {
                    space.recorder.record(Kind::Deadline, core.id, 3, 0);
                    space.recorder.record(Kind::Quarantine, core.id, 0, 0);
                    one.device.quarantine();
                }
            }
            _ => {}
        });
        let missed = devices.iter().find(|one| one.state == Ack::Missed);
        if let Some(missed) = missed
            && !planted!("r20")
        {
            trouble.device(&missed.device, "it does not acknowledge");
        }
    }

    /// The contexts of the segments whose own addresses go. One that stays costs its device a reset; one that stays even then is in
    /// quarantine, with its device.
    pub(super) fn unload(&mut self, segments: &[Arc<SegmentInner>]) {
        let space = self.space;
        let Work { core, trouble, .. } = &mut **self;
        let caller = Caller::new(space, core);
        for segment in segments.iter().filter(|one| !one.is_over()) {
            let Some(part) = segment.range.intersect(core.range) else {
                continue;
            };
            let (inner, op) = (&segment.registration().inner, Op::new(core, part));
            let device = &segment.device;
            let who = Who::new(inner.id(), segment.name);
            let attempt =
                || caller.call_as(inner, (Stage::Unload, who), |_| segment.context.unload(&op));
            let unloaded = match attempt() {
                Some(Err(failed)) => {
                    space.recorder.record(Kind::Deadline, core.id, 4, 0);
                    if device.health() == Health::Healthy && reset(space, core, who, device) {
                        attempt()
                    } else {
                        Some(Err(failed))
                    }
                }
                other => other,
            };
            match unloaded {
                Some(Ok(())) => {
                    segment.set_over();
                    space.stats.add(Counter::Segments, 1);
                    let start = segment.range.start().get();
                    space.recorder.record(Kind::Unload, core.id, start, 0);
                }
                Some(Err(failed)) => {
                    device.quarantine();
                    space.recorder.record(Kind::Quarantine, core.id, 0, 0);
                    trouble.device(device, failed.reason);
                }
                None => {
                    device.quarantine();
                    trouble.panicked_as(segment.name);
                }
            }
        }
    }
}

/// Why a device counts that no registration names any more.
pub(super) const GONE: &str =
    "it was in quarantine when the last registration that named it here ended";

/// The first device of `inner` that is in quarantine.
pub(super) fn dead(inner: &Inner) -> Option<&Device> {
    let mut devices = inner.targets().iter().map(|target| &target.device);
    devices.find(|device| device.health() == Health::Quarantined)
}

/// Work that does not drain ends with a reset of every device of its registration; false if it has none, or one is dead.
pub(super) fn reset_all(space: &Space, core: &OpCore, inner: &Inner) -> bool {
    let mut all = !inner.targets().is_empty();
    for target in inner.targets() {
        let device = &target.device;
        let healthy = device.health() == Health::Healthy;
        if !healthy || !reset(space, core, inner.who, device) {
            space.recorder.record(Kind::Quarantine, core.id, 0, 0);
            device.quarantine();
            all = false;
        }
    }
    all
}

/// Resets a device, watched under the name of whose sake it is for.
fn reset(space: &Space, core: &OpCore, who: Who, device: &Device) -> bool {
    let post = space.watch.post(core.post);
    let _watched = post.map(|post| post.enter(Stage::Reset, who));
    device.reset(space.deadlines.reset).is_ok()
}
