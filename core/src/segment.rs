//! Segments: a device context behind a mapping of the space, which ends with that mapping.
//!
//! A segment (a GSEG, a doorbell page with its context) owns a range of addresses, a share of its driver's registration, and the
//! context on the device. Two things that look alike are different operations:
//! * *the segment itself* is unmapped, by its handle, or by whoever unmaps a range that overlaps it: the context is unloaded, the
//!   share is put, the addresses are free again;
//! * *data that it uses* is unmapped: the registration's handler is called, and the segment goes on.
//!
//! Unmapping a part of a segment ends all of it, as hardware does not run half a context; the addresses of the rest stay
//! taken until they are unmapped too. Discard, protect and remap of a segment are typed errors.
//!
//! # Teardown
//! It is part of the invalidation of the segment's range, in the phase that cuts off: handlers have quiesced and TLBs have
//! acknowledged before, the addresses go afterwards. Under the map lock it is the same, with the lock held throughout. A context that
//! does not unload costs its device a reset, and if that does not help the device goes into quarantine and the segment with it:
//! it keeps its addresses and its share, so that nobody gets the former and invalidations still flush what the context may use,
//! until the device has been recovered and [`AddressSpace::drain`] has torn it down.

use std::fmt;
use std::sync::Arc as StdArc;

use thiserror::Error;

use crate::addr::{Addr, Range};
use crate::context;
use crate::engine::Mode;
use crate::list::{Link, PutOff};
use crate::managed::{self, Lock, MapError};
use crate::notifier::Op;
use crate::primitive::atomic::{AtomicBool, Ordering};
use crate::primitive::{Arc, Contained};
use crate::registration::{Registration, Unregistered};
use crate::share::Share;
use crate::space::{AddressSpace, MapWriteGuard, Space};
use crate::tlb::Device;
use crate::watch::Name;

/// A device context could not be taken off its device.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("the context was not unloaded: {reason}")]
pub struct UnloadFailed {
    /// What the driver or the hardware said.
    pub reason: &'static str,
}

/// What a driver implements for the contexts behind its segments.
pub trait DeviceContext: Send + Sync + 'static {
    /// The device that it is loaded on: reset, and in the end quarantined, if it cannot be unloaded. Asked when the segment is
    /// mapped.
    fn device(&self) -> &Device;

    /// Takes it off the device. On success its user does not reach it any more, nothing of it runs, and no translation is
    /// installed for it. `op.range()` is what of the segment goes; all of it goes with it.
    ///
    /// A blocking stage: it may wait for its own hardware, up to the driver's own deadline. The map lock may be held, so pending
    /// faults have to be forced to end without it (R33), and faults that are being resolved may be waiting for an
    /// invalidation: they have to be told to give up. As in every callback, nothing is allocated or freed. Called again only after it
    /// failed: once the device has been reset, or recovered, or when another part of the segment, or all of it, goes.
    ///
    /// # Errors
    /// It may still run.
    fn unload(&self, op: &Op<'_>) -> Result<(), UnloadFailed>;

    /// What the watchdog calls it. Asked when the segment is mapped.
    fn name(&self) -> &'static str {
        std::any::type_name::<Self>()
    }
}

pub(crate) struct SegmentInner {
    pub(crate) range: Range,
    pub(crate) context: Contained<StdArc<dyn DeviceContext>>,
    /// The context's, asked once: a driver's method may panic.
    pub(crate) device: Device,
    /// What the watchdog calls it, and errors.
    pub(crate) name: Name,
    share: StdArc<Share>,
    /// The context is unloaded. Written by whoever has claimed the segment's range.
    over: AtomicBool,
    /// The next of those whose handles a thread has dropped.
    next_put_off: Link<SegmentInner>,
}

impl fmt::Debug for SegmentInner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Segment")
            .field("range", &self.range)
            .field("over", &self.is_over())
            .finish_non_exhaustive()
    }
}

impl PutOff for SegmentInner {
    fn next_put_off(&self) -> &Link<Self> {
        &self.next_put_off
    }
}

impl SegmentInner {
    pub(crate) fn new(
        range: Range,
        context: StdArc<dyn DeviceContext>,
        share: StdArc<Share>,
    ) -> Self {
        Self {
            range,
            device: context.device().clone(),
            name: Name::new(context.name()),
            context: Contained::new(context),
            share,
            over: AtomicBool::new(false),
            next_put_off: Link::new(),
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        // Acquire, with the Release in `set_over`: who sees it over may use its addresses.
        self.over.load(Ordering::Acquire)
    }

    pub(crate) fn set_over(&self) {
        self.over.store(true, Ordering::Release);
    }

    /// Its share of the registration.
    pub(crate) fn registration(&self) -> &Registration {
        &self.share
    }

    /// Gives its share back, and waits for callbacks if it was the last. Only where waiting is legal.
    pub(crate) fn put(&self) -> Unregistered {
        self.share.put().unwrap_or(Unregistered::Deferred)
    }

    /// Gives its share back without a wait.
    pub(crate) fn give(&self) {
        self.share.give();
    }

    /// At exit, which has every span to itself; false if the context may still run. The share ends with the registration.
    pub(crate) fn end_at_exit(this: &Arc<Self>, space: &Arc<Space>) -> bool {
        let segments = std::slice::from_ref(this);
        Space::shoot_down(space, this.range, segments) && this.is_over()
    }

    /// Its handle was dropped.
    pub(crate) fn unmap_dropped(this: &Arc<Self>) {
        let space = &this.registration().inner.space;
        match unmap(space, this, Lock::Plain(Mode::Blocking)) {
            Ok(_) | Err(MapError::Exiting) => {}
            Err(error) => {
                tracing::error!(space = space.id, segment = %this.range, %error, "a dropped segment stays mapped");
            }
        }
    }
}

/// Unmaps what is left of a segment: what the put of its share came to.
fn unmap(
    space: &Arc<Space>,
    segment: &Arc<SegmentInner>,
    lock: Lock,
) -> Result<Unregistered, MapError> {
    match lock {
        Lock::Plain(_) => context::map_lock_refusal("unmap of a segment")?,
        Lock::Guard => context::wait_refusal("unmap of a segment")?,
    }
    for part in space.table.parts_of(segment) {
        match managed::unmap_part_of(segment, space, part, lock) {
            // Somebody else has unmapped it meanwhile.
            Ok(()) | Err(MapError::NotMapped { .. }) => {}
            // Exit has unloaded it.
            Err(MapError::Exiting) if segment.is_over() => {}
            Err(error) => {
                if segment.is_over() {
                    segment.put();
                }
                return Err(error);
            }
        }
    }
    Ok(segment.put())
}

/// A segment. Dropping it unmaps it; where that is not legal, inside a callback or with a lock held, when the thread has left the
/// last of them. What goes wrong then is only logged.
pub struct Segment {
    inner: Arc<SegmentInner>,
    space: Arc<Space>,
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.inner, f)
    }
}

impl Segment {
    /// Its addresses.
    pub fn range(&self) -> Range {
        self.inner.range
    }

    /// Whether its context has been unloaded: by an unmap of it or of a part of it, or by the exit of its space.
    pub fn is_over(&self) -> bool {
        self.inner.is_over()
    }

    /// Unmaps it: unloads the context, frees the addresses, puts the share. What the put came to; where the segment was over,
    /// [`Unregistered::AlreadyGone`]. Waits as [`AddressSpace::unmap`] does, and for callbacks if its share is the last.
    ///
    /// # Errors
    /// As [`AddressSpace::unmap`]; in quarantine it stays a segment.
    pub fn unmap(&self) -> Result<Unregistered, MapError> {
        unmap(&self.space, &self.inner, Lock::Plain(Mode::Blocking))
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        context::unmap_later(self.inner.clone());
        context::leave();
    }
}

fn map(
    space: &Arc<Space>,
    len: u64,
    at: Option<Addr>,
    context: StdArc<dyn DeviceContext>,
    share: StdArc<Share>,
    lock: Lock,
) -> Result<Segment, MapError> {
    if !Arc::ptr_eq(space, &share.inner.space) {
        return Err(MapError::OtherSpace {
            this: space.id,
            segment: share.inner.space.id,
        });
    }
    let inner = managed::map_segment(space, len, at, lock, |range| {
        Arc::new(SegmentInner::new(range, context, share))
    })?;
    Ok(Segment {
        inner,
        space: space.clone(),
    })
}

impl AddressSpace {
    /// Maps a segment of `len` bytes, whole pages, at `at` or anywhere: addresses for a context that is loaded and works
    /// under `share`. The driver may keep clones of the share to resolve faults with. Waits for the map lock.
    ///
    /// # Errors
    /// As [`AddressSpace::map`]. The context is then the caller's to unload, and the share to put.
    pub fn map_segment(
        &self,
        len: u64,
        at: Option<Addr>,
        context: StdArc<dyn DeviceContext>,
        share: StdArc<Share>,
    ) -> Result<Segment, MapError> {
        let lock = Lock::Plain(Mode::Blocking);
        map(&self.space, len, at, context, share, lock)
    }
}

impl MapWriteGuard<'_> {
    /// [`AddressSpace::map_segment`] under the lock.
    ///
    /// # Errors
    /// As there.
    pub fn map_segment(
        &self,
        len: u64,
        at: Option<Addr>,
        context: StdArc<dyn DeviceContext>,
        share: StdArc<Share>,
    ) -> Result<Segment, MapError> {
        map(self.space, len, at, context, share, Lock::Guard)
    }

    /// [`Segment::unmap`] with the lock kept throughout: no callback runs or will run on return, and where the share was the
    /// last, `release` runs when the lock is dropped.
    ///
    /// # Errors
    /// As there; [`MapError::OtherSpace`].
    pub fn unmap_segment(&self, segment: &Segment) -> Result<Unregistered, MapError> {
        if !Arc::ptr_eq(self.space, &segment.space) {
            return Err(MapError::OtherSpace {
                this: self.space.id,
                segment: segment.space.id,
            });
        }
        unmap(self.space, &segment.inner, Lock::Guard)
    }
}
