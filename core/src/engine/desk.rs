//! What an invalidation works with. It lies ready beside the slot that is claimed, so that nothing large is moved, made or dropped for an
//! invalidation that hits nothing, and so that the first entries of its lists are there already.

use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};
use std::sync::OnceLock;

use super::device_op::Known;
use super::{DEVICES, DeviceOp, HITS, Hit, Trouble};
use crate::active::{Claim, SLOTS};
use crate::addr::Range;
use crate::notifier::OpCore;
use crate::pool::Chain;
use crate::primitive::Arc;
use crate::recorder::Started;
use crate::source::Change;
use crate::space::{Deadlines, Space};
use crate::watch::PostId;

/// Between two invalidations the lists are empty and there is no trouble.
pub(crate) struct Work {
    pub(super) claim: Claim,
    pub(super) core: OpCore,
    pub(super) hits: Chain<Hit, HITS>,
    pub(super) devices: Chain<DeviceOp, DEVICES>,
    pub(super) trouble: Trouble,
    pub(super) missed_deadline: bool,
    /// Somebody was hit, or might have been.
    pub(super) busy: bool,
    /// What the flight recorder has of it.
    pub(super) started: Started,
    /// While the pages change, where somebody looks on.
    pub(super) change: Option<Change>,
}

#[repr(align(128))]
struct Place(UnsafeCell<Work>);

// SAFETY: a place is used through a `Desk` only, of which there is one for each claim, and one claim of a slot at a time, the end of
// which is ordered before the next. What lies there may be used on any thread: uses and devices are shared between threads anyway.
unsafe impl Send for Place {}
// SAFETY: as above.
unsafe impl Sync for Place {}

/// One for each slot of the claims.
pub(crate) struct Desks {
    places: Box<[Place; SLOTS]>,
    /// From the first registration on that names a device.
    known: OnceLock<Box<[KnownPlace]>>,
}

/// Where the devices of one place are found.
#[repr(transparent)]
struct KnownPlace(UnsafeCell<Known>);

// SAFETY: as for a place.
unsafe impl Sync for KnownPlace {}

impl Desks {
    /// For a space with these deadlines.
    pub(crate) fn new(deadlines: &Deadlines) -> Self {
        let place = |slot: usize| {
            Place(UnsafeCell::new(Work {
                claim: Claim::none(),
                core: OpCore::new(deadlines.drain, PostId::of(slot)),
                hits: Chain::new(),
                devices: Chain::new(),
                trouble: Trouble::default(),
                missed_deadline: false,
                busy: false,
                started: Started::NOTHING,
                change: None,
            }))
        };
        Self {
            places: Box::new(std::array::from_fn(place)),
            known: OnceLock::new(),
        }
    }

    /// Registrations that name devices are going to come. Allocates, the first time.
    pub(crate) fn reserve_devices(&self) {
        // SAFETY: numbers, for which 0 is a value like any other. What is not used is never touched.
        self.known
            .get_or_init(|| unsafe { Box::new_zeroed_slice(SLOTS).assume_init() });
    }
}

/// The place of one claim, from there to its end.
pub(super) struct Desk<'s> {
    pub(super) space: &'s Arc<Space>,
    place: &'s Place,
}

impl<'s> Desk<'s> {
    /// Claims a slot for an invalidation, and begins its walk; `None` with all taken.
    #[inline]
    pub(super) fn claim(space: &'s Arc<Space>, range: Range) -> Option<Self> {
        let claim = space.registry.active().claim(range)?;
        let place = &space.desks.places[claim.slot() % SLOTS];
        let mut this = Self { space, place };
        this.claim = claim;
        Some(this)
    }

    /// Whether there is nobody to call and nobody to fear; then the walk is over.
    #[inline]
    pub(super) fn hits_nothing(&self, range: Range) -> bool {
        self.space.registry.misses(self.claim, range) && !self.space.ghosts.are_there()
    }

    /// The lists, and where devices are in theirs.
    #[inline]
    pub(super) fn work(&mut self) -> (&mut Work, Option<&mut Known>) {
        let (known, slot) = (self.space.desks.known.get(), self.claim.slot());
        // SAFETY: as for the place itself; another one.
        let known = known.map(|all| unsafe { &mut *all[slot].0.get() });
        (self, known)
    }

    /// The pages change from here on.
    #[inline]
    pub(super) fn pages_change(&mut self, range: Range) {
        if let Some(change) = self.space.sources.change(range) {
            self.change = Some(change);
        }
    }

    /// No longer.
    #[inline]
    pub(super) fn pages_changed(&mut self) {
        if self.change.is_some() {
            self.change = None;
        }
    }

    /// Ends the invalidation.
    #[inline]
    pub(super) fn leave(self) {
        self.space.registry.active().end(self.claim);
    }
}

impl Deref for Desk<'_> {
    type Target = Work;
    #[inline]
    fn deref(&self) -> &Work {
        // SAFETY: this value's own from the claim, of which it was made, until `leave` takes it; and it is borrowed.
        unsafe { &*self.place.0.get() }
    }
}

impl DerefMut for Desk<'_> {
    #[inline]
    fn deref_mut(&mut self) -> &mut Work {
        // SAFETY: as above; borrowed exclusively.
        unsafe { &mut *self.place.0.get() }
    }
}
