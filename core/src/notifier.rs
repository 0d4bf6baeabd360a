//! What a driver author writes: the [`Notifier`] trait, and the values that its methods get and give back.
//!
//! Two of these values are *witnesses*, branded with the lifetime `'o` of one call: [`Drain`] says how to tell that
//! in-flight work is done, [`Issued`] that the flush was asked for. Neither can be made except from what the framework
//! handed in for this very operation, so a handler cannot report success without flushing, nor keep a witness for
//! the next operation. What proves that a flush *happened* is only the device's acknowledgement, which the engine awaits.

use std::marker::PhantomData;
use std::time::Duration;

use thiserror::Error;

use crate::addr::{PageSizes, Range};
use crate::source::{Needs, Operations};
use crate::watch::PostId;

/// Why pages change.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[non_exhaustive]
#[repr(u8)]
pub enum Cause {
    /// The mapping goes.
    Unmap,
    /// The pages are replaced by zeroed ones.
    Discard,
    /// The access rights change.
    Protect,
    /// The pages move to another address.
    Remap,
    /// The pages move to other frames.
    Migrate,
    /// The address space goes.
    Exit,
    /// Somebody outside told of a change.
    External,
}

impl std::fmt::Display for Cause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Unmap => "unmap",
            Self::Discard => "discard",
            Self::Protect => "protect",
            Self::Remap => "remap",
            Self::Migrate => "migrate",
            Self::Exit => "exit",
            Self::External => "external",
        })
    }
}

/// How an operation ended; given to `end` of everybody who got its start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Outcome {
    /// The pages have changed.
    Changed,
    /// Nothing has changed: the system call failed, or a handler refused a non-blocking operation.
    Unchanged,
    /// A device did not acknowledge: the pages stay where they are and are not handed out again.
    Quarantined,
}

/// The handler of a non-blocking operation would have to wait.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[error("the handler would have to wait")]
pub struct WouldBlock;

/// A value that is tied to one operation: neither shorter nor longer lifetimes fit.
pub(crate) type Brand<'o> = PhantomData<fn(&'o ()) -> &'o ()>;

/// What stays the same for all handlers of one operation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OpCore {
    pub(crate) id: u64,
    pub(crate) range: Range,
    pub(crate) cause: Cause,
    pub(crate) sizes: PageSizes,
    pub(crate) may_block: bool,
    pub(crate) drain: Duration,
    /// Where the watchdog looks.
    pub(crate) post: PostId,
}

impl OpCore {
    /// Of none yet: what is the same for all that follow one another in one place.
    pub(crate) fn new(drain: Duration, post: PostId) -> Self {
        Self {
            id: 0,
            range: Range::ALL,
            cause: Cause::External,
            sizes: PageSizes::empty(),
            may_block: false,
            drain,
            post,
        }
    }
}

/// One operation, as one handler sees it.
#[derive(Debug)]
pub struct Op<'o> {
    core: &'o OpCore,
    clipped: Range,
    brand: Brand<'o>,
}

impl<'o> Op<'o> {
    pub(crate) fn new(core: &'o OpCore, clipped: Range) -> Self {
        Self {
            core,
            clipped,
            brand: PhantomData,
        }
    }

    /// The part of the range that lies in this registration.
    pub fn range(&self) -> Range {
        self.clipped
    }

    /// The whole range of the operation.
    pub fn whole(&self) -> Range {
        self.core.range
    }

    /// Why.
    pub fn cause(&self) -> Cause {
        self.core.cause
    }

    /// The page sizes that mappings in the range have; all where that is not known.
    pub fn page_sizes(&self) -> PageSizes {
        self.core.sizes
    }

    /// Whether the handler may wait for a lock. If not, and it would have to, it returns [`WouldBlock`].
    pub fn may_block(&self) -> bool {
        self.core.may_block
    }

    /// How long [`Notifier::drained`] is polled before the devices of the registration are reset.
    pub fn deadline(&self) -> Duration {
        self.core.drain
    }

    /// A number that the flight recorder knows this operation by.
    pub fn id(&self) -> u64 {
        self.core.id
    }

    /// Nothing is in flight.
    pub fn idle(&self) -> Drain<'o> {
        Drain {
            polled: false,
            brand: PhantomData,
        }
    }

    /// Something may be in flight: the engine polls [`Notifier::drained`] until it is done.
    pub fn drain(&self) -> Drain<'o> {
        Drain {
            polled: true,
            brand: PhantomData,
        }
    }
}

/// How to tell that the work in flight is done. Made by [`Op::idle`] and [`Op::drain`] only.
#[must_use]
#[derive(Debug)]
pub struct Drain<'o> {
    polled: bool,
    brand: Brand<'o>,
}

impl Drain<'_> {
    pub(crate) fn is_polled(&self) -> bool {
        self.polled
    }
}

/// The flush that one registration is asked for: every TLB that it names, over the clipped range.
#[must_use]
#[derive(Debug)]
pub struct Gather<'o> {
    range: Range,
    brand: Brand<'o>,
}

impl<'o> Gather<'o> {
    /// For one call, of this part of a range.
    pub(crate) fn new(range: Range) -> Self {
        Self {
            range,
            brand: PhantomData,
        }
    }

    /// What would be flushed.
    pub fn range(&self) -> Range {
        self.range
    }

    /// Flush all of it.
    pub fn all(self) -> Issued<'o> {
        Issued {
            flush: Some(self.range),
            brand: PhantomData,
        }
    }

    /// Only `part` can be cached. What of it lies outside the range is left out; if nothing is left nothing is
    /// flushed.
    pub fn only(self, part: Range) -> Issued<'o> {
        Issued {
            flush: self.range.intersect(part),
            brand: PhantomData,
        }
    }

    /// Nothing of this is cached by any TLB of the registration, and nothing can come to be before `end`.
    pub fn nothing_cached(self) -> Issued<'o> {
        Issued {
            flush: None,
            brand: PhantomData,
        }
    }
}

/// Witness that the flush was asked for. Made from a [`Gather`] only, so there is no success without one.
#[must_use]
#[derive(Debug)]
pub struct Issued<'o> {
    flush: Option<Range>,
    brand: Brand<'o>,
}

impl Issued<'_> {
    pub(crate) fn range(&self) -> Option<Range> {
        self.flush
    }
}

/// A driver's handler for one registration.
///
/// For each operation that overlaps the registration the engine calls `quiesce`, then `drained` until it says true, then
/// `flush`, flushes the device TLBs that the registration names and awaits their acknowledgement, calls `cut_off`, changes
/// the pages, and calls `end`; each step for all registrations concerned before the next. Whoever got `quiesce` called gets
/// `end`. Different operations run in parallel, on different threads.
///
/// # What a handler must guarantee
/// * After `quiesce` has returned and `drained` has said true, no work of the device that uses the range is running or
///   can start, other than through entries that the flush takes away; and no translation that was read before is
///   installed any more: `quiesce` takes the [`NotifierLock`](crate::NotifierLock) under which
///   [`retry`](crate::Fault::retry) is checked, unless the hardware drops such an entry itself.
/// * It neither allocates nor frees nor takes a lock that is held while somebody does, and waits for nothing but its own
///   hardware. Taking the map lock is refused with a typed error; waiting forms become deferrals.
/// * A panic is contained: the other handlers run, the devices of this registration are quarantined. One of the handler's own drop, for
///   which nobody waits, goes no further where the last reference was the framework's.
pub trait Notifier: Send + Sync + 'static {
    /// No new work in `op.range()` from here on, until `end`.
    ///
    /// # Errors
    /// [`WouldBlock`], only where [`Op::may_block`] is false.
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        Ok(op.idle())
    }

    /// Whether the work that was in flight is done. Polled; must return at once.
    fn drained(&self, op: &Op<'_>) -> bool {
        let _ = op;
        true
    }

    /// What of the range to flush. May only narrow.
    fn flush<'o>(&self, op: &Op<'o>, gather: Gather<'o>) -> Issued<'o> {
        let _ = op;
        gather.all()
    }

    /// Takes DMA mappings of the range away. May wait for a system call: a *blocking* stage, which no
    /// deadline binds.
    ///
    /// # Errors
    /// The device could still reach the pages, which are then quarantined.
    fn cut_off(&self, op: &Op<'_>) -> Result<(), CutOffFailed> {
        let _ = op;
        Ok(())
    }

    /// The operation is over.
    fn end(&self, op: &Op<'_>, outcome: Outcome) {
        let _ = (op, outcome);
    }

    /// The registration is over: exactly once, after the last callback, with no lock held, on whatever thread. May
    /// allocate, free, unregister, and drop the driver's last reference.
    fn release(&self) {}

    /// What it needs to be told of changes that others make; read once, by `prepare`. A registration on a space whose sources tell
    /// less is refused; of a registration of more than the space's arena the arena counts. On a space that nothing watches it does
    /// not matter, unless [`Needs::FOREIGN`] is among it.
    fn needs(&self) -> Needs {
        Needs::BEFORE_AND_BARRIER
    }

    /// The operations for which it needs that.
    fn operations(&self) -> Operations {
        Operations::CALLS
    }

    /// What the watchdog calls it when a callback does not return; read once, by `prepare`.
    fn name(&self) -> &'static str {
        std::any::type_name::<Self>()
    }
}

/// A DMA mapping could not be taken away.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[error("the DMA mapping of {range} could not be taken away")]
pub struct CutOffFailed {
    /// What the device may still reach.
    pub range: Range,
}
