//! The engine: one invalidation over many devices, phase by phase.
//!
//! 1. **start**: the range is stated in [`Active`](crate::active::Active), the index is walked, and every registration that
//!    overlaps is taken *in use* and counts one more that has started, so that no translation of the range is installed any more.
//! 2. **quiesce**: every handler stops new work; then all those that have something in flight are polled together.
//! 3. **flush**: every TLB named gets its commands; one doorbell each; then all are polled together. What does not acknowledge
//!    by its deadline is flushed as a whole, then reset, then put into quarantine, each step for all such devices at once
//!    (the reset excepted, which is the driver's own blocking call).
//! 4. **cut off**: DMA mappings are taken away, and the contexts of segments whose own addresses go are unloaded.
//! 5. **change, end**: the pages change, unless a device could still reach them; `end` goes to whoever was started.
//!
//! Each phase is over for all devices before the next begins. From start to end nothing is allocated or freed, and no lock is
//! taken but the short ones of this crate; the lists come from pools.

mod device_op;
mod error;
mod escalate;
mod external;

use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};

pub(crate) use self::device_op::DeviceOp;
use self::device_op::{Ack, Deadline, sync};
pub use self::error::InvalidateError;
use self::escalate::{GONE, call, dead, reset_all};
pub use self::external::ExternalInvalidation;
use crate::active::{Claim, SLOTS};
use crate::addr::{PageSizes, Range};
use crate::context::{self, OpenInvalidation};
use crate::memory::MemoryError;
use crate::notes::Note;
use crate::notifier::{Cause, Gather, Op, OpCore, Outcome, WouldBlock};
use crate::plan::{FlushPlan, Pieces};
use crate::pool::Chain;
use crate::primitive::{Arc, Backoff};
use crate::recorder::Kind;
use crate::registration::{Inner, Use};
use crate::segment::SegmentInner;
use crate::source::Change;
use crate::space::Space;
use crate::stats::Counter;
use crate::tlb::{Device, FlushCommand, Health};
use crate::watch::{Stage, Watch};

/// Whether handlers may wait for locks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mode {
    Blocking,
    Try,
}

/// One registration in one invalidation.
pub(crate) struct Hit {
    used: Option<Use>,
    quiesced: bool,
    polled: bool,
    /// It failed in a way that no device in quarantine answers for; after the end it is kept.
    failed: bool,
    kept: Option<Arc<Inner>>,
}

/// The part of it that is invalidated.
fn part(inner: &Inner, core: &OpCore) -> Range {
    inner.range.intersect(core.range).expect("it was hit")
}

/// What stands between the pages and their change.
#[derive(Default)]
struct Trouble {
    would_block: bool,
    panicked: bool,
    not_drained: bool,
    /// Whose handler it was, for the last two.
    handler: &'static str,
    /// The first that may still reach the pages, and why.
    device: Option<(Device, &'static str)>,
}

impl Trouble {
    fn device(&mut self, device: &Device, reason: &'static str) {
        self.device.get_or_insert_with(|| (device.clone(), reason));
    }

    fn not_drained(&mut self, inner: &Inner) {
        self.not_drained = true;
        self.handler = inner.name.as_str();
    }

    /// A handler has panicked; its devices are in quarantine. True if it has none, so that nothing answers for it.
    fn panicked(&mut self, inner: &Inner) -> bool {
        self.panicked = true;
        self.handler = inner.name.as_str();
        inner.targets().is_empty()
    }
}

/// A failed invalidation, and who may still reach the pages then. It holds counts of devices and registrations: to be dropped
/// outside of the shootdown path.
pub(crate) struct Failed<'s> {
    pub(crate) error: InvalidateError,
    devices: Chain<'s, DeviceOp>,
    hits: Chain<'s, Hit>,
}

impl Failed<'_> {
    /// Devices that are in quarantine.
    pub(crate) fn devices(&self) -> impl Iterator<Item = &Device> {
        let all = self.devices.iter().map(|one| &one.device);
        all.filter(|device| device.health() == Health::Quarantined)
    }

    /// Registrations whose handler failed in a way that no device answers for.
    pub(crate) fn registrations(&self) -> impl Iterator<Item = &Arc<Inner>> {
        self.hits.iter().filter_map(|hit| hit.kept.as_ref())
    }
}

/// An invalidation between start and end.
pub(crate) struct Invalidation<'s> {
    space: &'s Arc<Space>,
    core: OpCore,
    claim: Claim,
    hits: Chain<'s, Hit>,
    devices: Chain<'s, DeviceOp>,
    trouble: Trouble,
    missed_deadline: bool,
    ended: bool,
    /// From the end of the phases on.
    change: Option<Change>,
    // Dropped last but one: callbacks of `end` are inside it. Then what was put off runs.
    _open: OpenInvalidation,
    _leave: crate::lock::Leave,
}

/// What is invalidated.
#[derive(Clone, Copy)]
pub(crate) struct What<'a> {
    pub(crate) range: Range,
    /// What is mapped in the range.
    pub(crate) pieces: Pieces<'a>,
    pub(crate) cause: Cause,
    /// Segments whose own addresses go: their contexts are unloaded.
    pub(crate) segments: &'a [Arc<SegmentInner>],
}

/// The sizes of all pages in `range`.
fn sizes_of(range: Range, pieces: Pieces<'_>) -> PageSizes {
    let mut all = PageSizes::empty();
    pieces(range, &mut |_, sizes| all |= sizes);
    all
}

/// Runs all phases, with `change` as the fifth.
pub(crate) fn run<'s>(
    space: &'s Arc<Space>,
    what: What<'_>,
    mode: Mode,
    change: impl FnOnce() -> Result<(), MemoryError>,
) -> Result<(), Failed<'s>> {
    // Not held: disjoint invalidations run in parallel (R28).
    static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _whole = planted!("r28").then(|| ONE_AT_A_TIME.lock());
    let mut invalidation = Invalidation::begin(space, what, mode)?;
    let changed = catch_unwind(AssertUnwindSafe(change));
    // What a memory that panicked has done nobody knows.
    match changed.unwrap_or(Err(MemoryError::Panicked)) {
        Ok(()) => {
            invalidation.end(Outcome::Changed);
            let panicked = invalidation.panic_at_end();
            panicked.map_err(|error| invalidation.failed(error))
        }
        Err(error) => {
            invalidation.end(match error {
                MemoryError::Panicked => Outcome::Quarantined,
                _ if planted!("r27") => Outcome::Changed,
                _ => Outcome::Unchanged,
            });
            Err(invalidation.failed(error.into()))
        }
    }
}

impl<'s> Invalidation<'s> {
    /// Phases 1 to 4. On an error `end` has been called.
    pub(crate) fn begin(
        space: &'s Arc<Space>,
        what: What<'_>,
        mode: Mode,
    ) -> Result<Self, Failed<'s>> {
        let mut this = Self::start(space, what, mode).map_err(|error| Failed {
            error,
            devices: Chain::empty(&space.device_ops),
            hits: Chain::empty(&space.hits),
        })?;
        if !this.hits.is_empty() || !what.segments.is_empty() {
            this.core.sizes = sizes_of(what.range, what.pieces);
            this.quiesce();
            if !this.trouble.would_block {
                this.drain();
                this.flush(what.pieces);
                this.cut_off();
                this.unload(what.segments);
            }
        }
        match this.error() {
            None => {
                this.change = Some(space.sources.change(this.core.range));
                Ok(this)
            }
            Some(error) => {
                this.end(match error {
                    InvalidateError::WouldBlock { .. } => Outcome::Unchanged,
                    _ => Outcome::Quarantined,
                });
                Err(this.failed(error))
            }
        }
    }

    /// After the end.
    fn failed(&mut self, error: InvalidateError) -> Failed<'s> {
        let space = self.space;
        Failed {
            error,
            devices: std::mem::replace(&mut self.devices, Chain::empty(&space.device_ops)),
            hits: std::mem::replace(&mut self.hits, Chain::empty(&space.hits)),
        }
    }

    fn start(space: &'s Arc<Space>, what: What<'_>, mode: Mode) -> Result<Self, InvalidateError> {
        let What { range, cause, .. } = what;
        let limit = space.deadlines.room;
        let mut deadline = Deadline::new(limit);
        let mut backoff = Backoff::new();
        loop {
            if let Some(claim) = space.registry.active().claim(range) {
                let mut this = Self {
                    space,
                    core: OpCore {
                        id: claim.id(),
                        range,
                        cause,
                        sizes: PageSizes::empty(),
                        may_block: mode == Mode::Blocking,
                        drain: space.deadlines.drain,
                        post: Watch::post(claim.slot()),
                    },
                    claim,
                    hits: Chain::new(&space.hits, claim.slot()),
                    devices: Chain::new(&space.device_ops, claim.slot()),
                    trouble: Trouble::default(),
                    missed_deadline: false,
                    ended: false,
                    change: None,
                    _open: OpenInvalidation::enter(),
                    _leave: crate::lock::Leave,
                };
                if this.collect() {
                    return Ok(this);
                }
                // Nobody has been called: give everything back, so that those who hold the room can end.
                this.end(Outcome::Unchanged);
            }
            if mode == Mode::Try {
                return Err(InvalidateError::WouldBlock { range });
            }
            if deadline.is_over(&backoff) {
                return Err(InvalidateError::NoRoom {
                    range,
                    waited: limit,
                    limit: SLOTS,
                });
            }
            backoff.wait();
        }
    }

    /// Takes every overlapping registration in use; false when the pools have no room.
    fn collect(&mut self) -> bool {
        let mut room = true;
        let (range, hits, devices) = (self.core.range, &mut self.hits, &mut self.devices);
        let (trouble, registry) = (&mut self.trouble, &self.space.registry);
        let claim = self.claim;
        let mut count = 0;
        registry.walk(claim, range, |found| {
            let inner: &Inner = &found;
            let Some((used, number)) = Use::enter(&found) else {
                // It is over, but not yet among the ghosts.
                if let Some(device) = dead(inner) {
                    trouble.device(device, GONE);
                }
                return ControlFlow::Continue(());
            };
            let note = Note {
                registration: inner.id,
                number,
                range,
            };
            registry.active().note(claim, note);
            let hit = Hit {
                quiesced: false,
                polled: false,
                failed: false,
                kept: None,
                used: Some(used),
            };
            if let Err(Hit { used, .. }) = hits.push(hit) {
                room = planted!("r19-hit");
                if let Some(used) = used {
                    used.leave();
                }
                return ControlFlow::Break(());
            }
            count += 1;
            for target in inner.targets() {
                if !devices.iter().any(|one| one.device.same(&target.device)) {
                    room &= devices.push(DeviceOp::new(target.device.clone())).is_ok();
                }
            }
            if room {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        });
        if let Some(device) = self.space.ghosts.find(range) {
            self.trouble.device(&device, GONE);
        }
        if count > 0 && room {
            let (start, last) = (range.start().get(), range.last().get());
            let recorder = &self.space.recorder;
            recorder.record(Kind::Start, self.core.id, start, last);
            self.space.stats.add(Counter::Hits, count);
        }
        room
    }

    fn quiesce(&mut self) {
        let Self {
            space,
            core,
            hits,
            trouble,
            ..
        } = self;
        hits.for_each(|hit| {
            let Some(used) = &hit.used else { return };
            if trouble.would_block || planted!("r22-others") && trouble.panicked {
                return;
            }
            hit.quiesced = true;
            let op = Op::new(core, part(used, core));
            match call(space, used, core, Stage::Quiesce, || {
                used.notifier.quiesce(&op).map(|drain| drain.is_polled())
            }) {
                Some(Ok(polled)) => hit.polled = polled,
                Some(Err(WouldBlock)) if core.may_block => {
                    hit.failed = true;
                    trouble.not_drained(used);
                }
                Some(Err(WouldBlock)) => {
                    space.recorder.record(Kind::Refused, core.id, used.id, 0);
                    space.stats.add(Counter::Refused, 1);
                    trouble.would_block = true;
                }
                None => hit.failed = trouble.panicked(used),
            }
        });
    }

    fn drain(&mut self) {
        let Self {
            space,
            core,
            hits,
            trouble,
            ..
        } = self;
        let mut deadline = Deadline::new(space.deadlines.drain);
        let mut backoff = Backoff::new();
        loop {
            let mut waiting = false;
            let over = deadline.is_over(&backoff);
            hits.for_each(|hit| {
                let Some(used) = &hit.used else { return };
                if !hit.polled {
                    return;
                }
                let op = Op::new(core, part(used, core));
                match call(space, used, core, Stage::Drained, || {
                    used.notifier.drained(&op)
                }) {
                    Some(true) => hit.polled = false,
                    // A dead device is not waited for again.
                    Some(false) if !over && dead(used).is_none() => waiting = true,
                    Some(false) => {
                        hit.polled = false;
                        space.recorder.record(Kind::Deadline, core.id, 0, 0);
                        if !reset_all(space, core, used) {
                            hit.failed = used.targets().is_empty();
                            trouble.not_drained(used);
                        }
                    }
                    None => {
                        hit.polled = false;
                        hit.failed = trouble.panicked(used);
                    }
                }
            });
            if !waiting {
                break;
            }
            backoff.wait();
        }
        space.recorder.record(Kind::Quiesced, core.id, 0, 0);
    }

    fn flush(&mut self, pieces: Pieces<'_>) {
        let Self {
            space,
            core,
            hits,
            devices,
            trouble,
            ..
        } = self;
        hits.for_each(|hit| {
            let Some(used) = &hit.used else { return };
            let op = Op::new(core, part(used, core));
            let asked = call(space, used, core, Stage::Flush, || {
                used.notifier.flush(&op, Gather::new(&op)).range()
            });
            let Some(asked) = asked else {
                hit.failed = trouble.panicked(used);
                return;
            };
            let Some(range) = asked else { return };
            for target in used.targets() {
                let plan = FlushPlan::new(range, pieces, &target.device);
                devices.for_each(|one| {
                    if one.device.same(&target.device) {
                        for &scope in plan.scopes() {
                            one.add(FlushCommand {
                                tag: target.tag,
                                scope,
                            });
                        }
                    }
                });
            }
        });
        let mut deadline = Deadline::new(space.deadlines.flush);
        devices.for_each(|one| {
            if one.len == 0 {
                one.state = Ack::Done;
            } else if one.device.health() == Health::Quarantined && !planted!("r20-twice") {
                one.state = Ack::Missed; // It is not waited for again.
            } else {
                one.issue();
            }
        });
        if devices.is_empty() {
            return;
        }
        space.recorder.record(Kind::Dispatched, core.id, 0, 0);
        sync(devices, &mut deadline);
        self.escalate();
        self.space
            .recorder
            .record(Kind::Flushed, self.core.id, 0, 0);
    }

    fn cut_off(&mut self) {
        let Self {
            space,
            core,
            hits,
            trouble,
            ..
        } = self;
        hits.for_each(|hit| {
            let Some(used) = &hit.used else { return };
            let op = Op::new(core, part(used, core));
            match call(space, used, core, Stage::CutOff, || {
                used.notifier.cut_off(&op)
            }) {
                Some(Ok(())) => {}
                Some(Err(_)) => {
                    hit.failed = true;
                    trouble.not_drained(used);
                }
                None => hit.failed = trouble.panicked(used),
            }
        });
    }

    fn error(&self) -> Option<InvalidateError> {
        let range = self.core.range;
        let trouble = &self.trouble;
        if trouble.panicked {
            Some(InvalidateError::HandlerPanicked {
                range,
                handler: trouble.handler,
                changed: false,
            })
        } else if trouble.would_block {
            Some(InvalidateError::WouldBlock { range })
        } else if let Some((device, reason)) = &trouble.device {
            Some(InvalidateError::Quarantined {
                range,
                device: device.clone(),
                reason,
            })
        } else if trouble.not_drained {
            Some(InvalidateError::NotDrained {
                range,
                handler: trouble.handler,
            })
        } else {
            None
        }
    }

    /// The last phase: `end` for whoever was started, and everything is given back.
    pub(crate) fn end(&mut self, outcome: Outcome) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        self.change = None;
        let quarantined = outcome == Outcome::Quarantined;
        if !quarantined {
            // Before the uses are given back: while they last, a registration holds each device, and no count here is the last.
            self.devices.clear();
        }
        let Self {
            space,
            core,
            hits,
            trouble,
            ..
        } = self;
        let hit_any = !hits.is_empty();
        hits.for_each(|hit| {
            let Some(used) = hit.used.take() else { return };
            if hit.quiesced && !(planted!("r13") && trouble.would_block) {
                let op = Op::new(core, part(&used, core));
                let end = || used.notifier.end(&op, outcome);
                if call(space, &used, core, Stage::End, end).is_none() {
                    hit.failed |= trouble.panicked(&used);
                }
            }
            hit.kept = (quarantined && hit.failed).then(|| used.count());
            used.leave();
        });
        if !quarantined {
            self.hits.clear();
        }
        // What is kept for the caller goes back to the pool.
        self.hits.leave_slot();
        self.devices.leave_slot();
        self.space.registry.active().end(self.claim);
        self.space.stats.add(Counter::Invalidations, 1);
        if outcome == Outcome::Quarantined {
            self.space.stats.add(Counter::Quarantined, 1);
        }
        if outcome == Outcome::Quarantined || self.missed_deadline || self.trouble.panicked {
            self.space.recorder.want_dump();
            context::put_off(self.space);
        }
        if hit_any {
            let number = match outcome {
                Outcome::Changed => 0,
                Outcome::Unchanged => 1,
                Outcome::Quarantined => 2,
            };
            self.space
                .recorder
                .record(Kind::End, self.core.id, number, 0);
        }
        self.space.events.ended_and_fenced();
    }

    /// A handler that panicked in `end` is told to the caller too; the pages have changed by then.
    pub(crate) fn panic_at_end(&self) -> Result<(), InvalidateError> {
        if self.trouble.panicked {
            let range = self.core.range;
            return Err(InvalidateError::HandlerPanicked {
                range,
                handler: self.trouble.handler,
                changed: true,
            });
        }
        Ok(())
    }
}

impl Drop for Invalidation<'_> {
    fn drop(&mut self) {
        // Whoever drops it without a word may have changed the pages.
        self.end(Outcome::Changed);
    }
}
