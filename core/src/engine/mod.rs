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

#![allow(
    clippy::result_large_err,
    reason = "nothing may be allocated here, and an error is rare"
)]

mod call;
mod collect;
mod desk;
mod device_op;
mod error;
mod escalate;
mod external;
mod phases;

use std::mem::ManuallyDrop;

use self::desk::Desk;
pub(crate) use self::desk::Desks;
use self::device_op::Deadline;
pub(crate) use self::device_op::DeviceOp;
pub use self::error::{InvalidateError, SinkError};
pub use self::external::ExternalInvalidation;
use crate::active::SLOTS;
use crate::addr::Range;
use crate::context::OpenInvalidation;
use crate::lock::Leave;
use crate::memory::MemoryError;
use crate::notifier::{Cause, Outcome};
use crate::plan::Pieces;
use crate::pool::Chain;
use crate::primitive::{Arc, Backoff, contain};
use crate::registration::{Inner, Use};
use crate::segment::SegmentInner;
use crate::space::Space;
use crate::stats::Counter;
use crate::tlb::{Device, Health};
use crate::watch::Name;

/// Whether handlers may wait for locks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mode {
    Blocking,
    Try,
}

/// Hits, and devices, that an invalidation has room for without asking anybody. There is a chunk of so many hits for as many registrations:
/// what is left of its lines is little.
pub(crate) const HITS: usize = 31;
pub(crate) const DEVICES: usize = 8;

/// One registration in one invalidation. As small as can be: there is room set aside for as many as there are registrations.
pub(crate) enum Hit {
    Used(Used),
    /// After the end: it has failed in a way that no device in quarantine answers for. The count is given back by [`Ended`]: if each hit
    /// had to be looked at where it is dropped, those of a list would be gone over once more.
    Kept(ManuallyDrop<Arc<Inner>>),
    /// After the end.
    Over,
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<Hit>() == 2 * size_of::<usize>() && !std::mem::needs_drop::<Hit>());

/// One that is in use.
pub(crate) struct Used {
    used: Use,
    /// Where its first device is in the list of them.
    device: u32,
    quiesced: bool,
    polled: bool,
    /// It failed in a way that no device in quarantine answers for.
    failed: bool,
}

impl Hit {
    fn used(&mut self) -> Option<&mut Used> {
        match self {
            Self::Used(used) => Some(used),
            _ => None,
        }
    }
}

/// What stands between the pages and their change.
#[derive(Default)]
struct Trouble {
    /// There is some.
    any: bool,
    would_block: bool,
    panicked: bool,
    not_drained: bool,
    /// Whose handler it was, for the last two.
    handler: &'static str,
    /// Why a device may still reach the pages.
    reached: Option<&'static str>,
    /// The first such device, if it is kept.
    device: Option<Device>,
    /// Whoever is told keeps counts of those that may still reach the pages, and may drop them.
    keeps: bool,
}

impl Trouble {
    fn device(&mut self, device: &Device, reason: &'static str) {
        self.any = true;
        if self.reached.is_none() {
            self.reached = Some(reason);
            self.device = self.keeps.then(|| device.clone());
        }
    }

    #[cold]
    fn would_block(&mut self) {
        self.any = true;
        self.would_block = true;
    }

    #[cold]
    fn not_drained(&mut self, inner: &Inner) {
        self.any = true;
        self.not_drained = true;
        self.handler = inner.who.name().as_str();
    }

    #[cold]
    fn panicked_as(&mut self, name: Name) {
        self.any = true;
        self.panicked = true;
        self.handler = name.as_str();
    }

    /// A handler has panicked; its devices are in quarantine. True if it has none, so that nothing answers for it.
    #[cold]
    fn panicked(&mut self, inner: &Inner) -> bool {
        self.panicked_as(inner.who.name());
        inner.targets().is_empty()
    }
}

/// What is left of an invalidation that has ended: who may still reach the pages, if it was quarantined. It holds counts of devices and
/// registrations: to be dropped outside of the shootdown path.
pub(crate) struct Ended<'s> {
    space: &'s Arc<Space>,
    /// Whose handler panicked, and over which range.
    panicked: Option<(&'static str, Range)>,
    /// The first device that may still reach the pages.
    first: Option<Device>,
    devices: Chain<DeviceOp, DEVICES>,
    hits: Chain<Hit, HITS>,
}

impl<'s> Ended<'s> {
    fn without_trouble(space: &'s Arc<Space>) -> Self {
        Self {
            space,
            panicked: None,
            first: None,
            devices: Chain::new(),
            hits: Chain::new(),
        }
    }

    /// A handler that panicked in `end` is told to the caller too; the pages have changed by then.
    pub(crate) fn panic_at_end(&self) -> Result<(), SinkError> {
        self.panicked.map_or(Ok(()), |(handler, range)| {
            Err(SinkError::HandlerPanicked {
                range,
                handler,
                changed: true,
            })
        })
    }
}

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        std::mem::take(&mut self.devices).give(&self.space.device_ops);
        let mut hits = std::mem::take(&mut self.hits);
        hits.for_each(|hit| {
            if let Hit::Kept(inner) = std::mem::replace(hit, Hit::Over) {
                drop(ManuallyDrop::into_inner(inner));
            }
        });
        hits.give(&self.space.hits);
    }
}

/// A failed invalidation.
pub(crate) struct Failed<'s> {
    pub(crate) error: InvalidateError,
    ended: Ended<'s>,
}

impl Failed<'_> {
    /// Devices that are in quarantine.
    pub(crate) fn devices(&self) -> impl Iterator<Item = &Device> {
        let all = self.ended.devices.iter().map(|one| &one.device);
        all.filter(|device| device.health() == Health::Quarantined)
    }

    /// Registrations whose handler failed in a way that no device answers for.
    pub(crate) fn registrations(&self) -> impl Iterator<Item = &Arc<Inner>> {
        self.ended.hits.iter().filter_map(|hit| match hit {
            Hit::Kept(inner) => Some(&**inner),
            _ => None,
        })
    }
}

/// An invalidation between start and end. Two words: it is handed from hand to hand.
pub(crate) struct Invalidation<'s> {
    /// Until the end.
    desk: Option<Desk<'s>>,
    // Dropped last: callbacks of `end` are inside it.
    _open: OpenInvalidation,
}

/// What is invalidated, besides the range.
#[derive(Clone, Copy)]
pub(crate) struct What<'a> {
    /// What is mapped in the range.
    pub(crate) pieces: Pieces<'a>,
    pub(crate) cause: Cause,
    /// Segments whose own addresses go: their contexts are unloaded.
    pub(crate) segments: &'a [Arc<SegmentInner>],
}

/// Runs all phases, with `change` as the fifth.
pub(crate) fn run<'s>(
    space: &'s Arc<Space>,
    range: Range,
    what: What<'_>,
    mode: Mode,
    change: impl FnOnce() -> Result<(), MemoryError>,
) -> Result<(), Failed<'s>> {
    // Not held: disjoint invalidations run in parallel (R28).
    static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _whole = planted!("r28").then(|| ONE_AT_A_TIME.lock());
    // When all is over, what was put off runs.
    let _leave = Leave;
    let mut invalidation = Invalidation::begin(space, range, what, mode)?;
    let changed = contain(change);
    // What a memory that panicked has done nobody knows.
    let error = match changed.unwrap_or(Err(MemoryError::Panicked)) {
        Ok(()) => {
            let Some(ended) = invalidation.end(Outcome::Changed) else {
                return Ok(());
            };
            let panicked = ended.panic_at_end();
            return panicked.map_err(|error| Failed {
                error: error.with(None),
                ended,
            });
        }
        Err(error) => error,
    };
    let ended = invalidation.end(match error {
        MemoryError::Panicked => Outcome::Quarantined,
        _ if planted!("r27") => Outcome::Changed,
        _ => Outcome::Unchanged,
    });
    let ended = ended.unwrap_or_else(|| Ended::without_trouble(space));
    let error = error.into();
    Err(Failed { error, ended })
}

impl<'s> Invalidation<'s> {
    /// Phases 1 to 4. On an error `end` has been called.
    fn begin(
        space: &'s Arc<Space>,
        range: Range,
        what: What<'_>,
        mode: Mode,
    ) -> Result<Self, Failed<'s>> {
        let mut this = Self::claim(space, range);
        if !(what.segments.is_empty() && this.hits_nothing(range)) {
            this.of_those_hit(space, range, what, mode)?;
        }
        Ok(this)
    }

    /// The same for whoever may be waited for by somebody that holds the allocator's lock: not even an error frees anything, and what
    /// was put off is handed over by its owner.
    pub(crate) fn begin_for_others(
        space: &'s Arc<Space>,
        range: Range,
        what: What<'_>,
    ) -> Result<Self, SinkError> {
        let mut this = Self::claim(space, range);
        if this.hits_nothing(range) {
            return Ok(this);
        }
        let keeps = planted!("r18-failed");
        let begun = this.phases(space, range, what, Mode::Blocking, keeps);
        begun.map(|()| this).map_err(|(error, _)| error)
    }

    /// A slot, if there is one; and the walk has begun.
    #[inline]
    fn claim(space: &'s Arc<Space>, range: Range) -> Self {
        let open = OpenInvalidation::enter();
        Self {
            desk: Desk::claim(space, range),
            _open: open,
        }
    }

    /// Whether there is nobody to call, as mostly: then it has begun, and there is no more to it than the claim.
    #[inline]
    fn hits_nothing(&mut self, range: Range) -> bool {
        let nothing = |desk: &&mut Desk<'_>| desk.hits_nothing(range);
        let Some(desk) = self.desk.as_mut().filter(nothing) else {
            return false;
        };
        desk.pages_change(range);
        true
    }

    // Always, this and what it calls: they have one hot caller each. Whether a compiler sees that goes by what else lies in the crate.
    #[inline(always)]
    fn of_those_hit(
        &mut self,
        space: &'s Arc<Space>,
        range: Range,
        what: What<'_>,
        mode: Mode,
    ) -> Result<(), Failed<'s>> {
        let begun = self.phases(space, range, what, mode, true);
        begun.map_err(|(error, mut ended)| {
            let error = error.with(ended.first.take());
            Failed { error, ended }
        })
    }

    /// Phases 1 to 4 but for the claim.
    #[inline(always)]
    fn phases(
        &mut self,
        space: &'s Arc<Space>,
        range: Range,
        what: What<'_>,
        mode: Mode,
        keeps: bool,
    ) -> Result<(), (SinkError, Ended<'s>)> {
        if let Some(desk) = &mut self.desk {
            desk.begin(range, what.cause, mode, keeps);
            if desk.collect() {
                return self.go_on(space, range, what);
            }
        }
        self.in_a_crowd(space, range, what, mode, keeps)
    }

    /// There was no slot, or no room for all that was hit: waits for those who have it to end.
    #[cold]
    fn in_a_crowd(
        &mut self,
        space: &'s Arc<Space>,
        range: Range,
        what: What<'_>,
        mode: Mode,
        keeps: bool,
    ) -> Result<(), (SinkError, Ended<'s>)> {
        let limit = space.deadlines.room;
        let mut deadline = Deadline::new(limit);
        let mut backoff = Backoff::new();
        loop {
            // Nobody has been called: give everything back, so that those who hold the room can end.
            self.end(Outcome::Unchanged);
            let failed = if mode == Mode::Try {
                Some(SinkError::WouldBlock { range })
            } else if deadline.is_over(&backoff) {
                let (waited, limit) = (limit, SLOTS);
                Some(SinkError::NoRoom {
                    range,
                    waited,
                    limit,
                })
            } else {
                None
            };
            if let Some(error) = failed {
                return Err((error, Ended::without_trouble(space)));
            }
            backoff.wait();
            self.desk = Desk::claim(space, range);
            if let Some(desk) = &mut self.desk {
                desk.begin(range, what.cause, mode, keeps);
                if desk.collect() {
                    return self.go_on(space, range, what);
                }
            }
        }
    }

    /// With everybody in use whom it hits.
    #[inline(always)]
    fn go_on(
        &mut self,
        space: &'s Arc<Space>,
        range: Range,
        what: What<'_>,
    ) -> Result<(), (SinkError, Ended<'s>)> {
        let Some(desk) = &mut self.desk else {
            return Ok(());
        };
        if !desk.hits.is_empty() || !what.segments.is_empty() {
            desk.core.sizes = what.pieces.sizes(range);
            desk.handlers(what.pieces);
            if !desk.trouble.would_block && !what.segments.is_empty() {
                desk.unload(what.segments);
            }
        }
        if !desk.trouble.any {
            desk.pages_change(range);
            return Ok(());
        }
        let error = desk.error();
        let ended = self.end(match error {
            SinkError::WouldBlock { .. } => Outcome::Unchanged,
            _ => Outcome::Quarantined,
        });
        let ended = ended.unwrap_or_else(|| Ended::without_trouble(space));
        Err((error, ended))
    }

    /// Whoever drops it without a word may have changed the pages.
    #[cold]
    fn dropped(&mut self) {
        self.end(Outcome::Changed);
    }

    /// The last phase; what is left where somebody was hit.
    // Always: of a function with many callers a compiler would make one more that hands two words on.
    #[inline(always)]
    pub(crate) fn end(&mut self, outcome: Outcome) -> Option<Ended<'s>> {
        // Before it is taken from here, where the drop ends what an observer's panic has left.
        self.desk.as_mut()?.pages_changed();
        let desk = self.desk.take()?;
        if desk.busy {
            return desk.end(outcome);
        }
        let space = desk.space;
        desk.leave();
        space.stats.add(Counter::Invalidations, 1);
        space.events.ended_and_fenced();
        None
    }
}

impl Drop for Invalidation<'_> {
    #[inline]
    fn drop(&mut self) {
        if self.desk.is_some() {
            self.dropped();
        }
    }
}
