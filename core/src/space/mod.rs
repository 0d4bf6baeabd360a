//! Address spaces: what is registered on one, who owns it, and how it ends.
//!
//! Two counts, as in the kernel. *Owners* ([`AddressSpace`], mm_users): the last one out runs exit. *Pins* ([`SpacePin`],
//! mm_count): the memory of the space itself; every registration is one, so a driver may unregister long after the
//! exit, and finds nothing left to do (R6).
//!
//! **Exit** excludes insertion by a word of both (R7), and operations on mappings by a lock; ends every segment, invalidates everything,
//! detaches every registration, and waits until every `release` that any thread has begun has returned (R4); then the memory goes.
//!
//! **Completion.** Who completes a registration releases it there and then, where it gives it up by name and holds nothing, or else puts
//! it on the space's completed list. The list is run (`release`, Released, index entry away) by any thread that is outermost: it holds no
//! lock of ours and is inside no callback. Who completes remembers it ([`context::completed`]) and runs the list when it has left the last
//! of them, if nobody has before. What a `release` puts off runs when the index entry is away: the exit of the space waits for that.

mod inner;
mod lifecycle;
mod map_lock;

use std::fmt;
use std::sync::Arc as StdArc;
use std::time::Duration;

use thiserror::Error;

pub(crate) use self::inner::Space;
pub(crate) use self::map_lock::{Held, MapLock};
use crate::addr::Range;
use crate::context::{self, Refused};
use crate::lock::Leave;
use crate::managed;
use crate::memory::Memory;
use crate::notifier::Notifier;
use crate::primitive::Arc;
use crate::primitive::atomic::Ordering;
use crate::recorder::Record;
use crate::registration::state::StateWord;
use crate::registration::{Prepared, Target};
use crate::stats::Stats;

/// How long hardware may take before the next step of the escalation: wider flush, reset, quarantine.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// For work in flight to end, after `quiesce`.
    pub drain: Duration,
    /// For a flush to be acknowledged; then the device is flushed as a whole.
    pub flush: Duration,
    /// For the whole flush; then the device is reset.
    pub full_flush: Duration,
    /// For the reset; then the device goes into quarantine.
    pub reset: Duration,
    /// For room in the pools, when more invalidations are in progress than they were made for.
    pub room: Duration,
    /// For a callback to return: then the watchdog names it and its thread. It is waited for all the same, as nothing can cut a
    /// callback short.
    pub callback: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            drain: Duration::from_secs(1),
            flush: Duration::from_millis(100),
            full_flush: Duration::from_millis(500),
            reset: Duration::from_secs(2),
            room: Duration::from_secs(10),
            callback: Duration::from_secs(10),
        }
    }
}

/// An owner of an address space. Cloning makes another; the last one to be dropped runs [`AddressSpace::exit`].
pub struct AddressSpace {
    pub(crate) space: Arc<Space>,
}

impl fmt::Debug for AddressSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.space, f)
    }
}

impl Clone for AddressSpace {
    fn clone(&self) -> Self {
        // Relaxed: made from an owner, which is there.
        self.space.owners.fetch_add(1, Ordering::Relaxed);
        Self {
            space: self.space.clone(),
        }
    }
}

impl Drop for AddressSpace {
    fn drop(&mut self) {
        // AcqRel: the last one has seen what the others did.
        if self.space.owners.fetch_sub(1, Ordering::AcqRel) == 1
            && let Err(error) = Space::exit(&self.space)
        {
            tracing::error!(%error, "the last owner of an address space is gone");
        }
    }
}

/// Why an exit was refused, or what it has to tell.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[non_exhaustive]
pub enum ExitError {
    /// Not where it was called. Nothing has happened.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The space is over, and every registration is released, but a device did not acknowledge: it may still reach the memory.
    /// That of a managed space stays where it is for as long as the process lives; other memory is the caller's to keep.
    #[error(
        "address space {space:#x} is over, but a device may still reach its memory: keep that until the device has been reset"
    )]
    Reached {
        /// Which.
        space: u64,
    },
}

/// Keeps an address space's own memory past its exit, not the space alive: a driver holds one to unregister later.
#[derive(Clone, Debug)]
pub struct SpacePin {
    space: Arc<Space>,
}

impl SpacePin {
    /// Becomes an owner, unless the space is exiting or has no owner left.
    pub fn upgrade(&self) -> Option<AddressSpace> {
        let mut owners = self.space.owners.load(Ordering::Relaxed);
        while planted!("r6") || owners > 0 && !self.space.is_exiting() {
            match self.space.owners.compare_exchange_weak(
                owners,
                owners + 1,
                Ordering::AcqRel,
                Ordering::Relaxed,
            ) {
                Ok(_) => {
                    return Some(AddressSpace {
                        space: self.space.clone(),
                    });
                }
                Err(now) => owners = now,
            }
        }
        None
    }

    pub(crate) fn space(&self) -> &Arc<Space> {
        &self.space
    }

    /// Whether exit has begun.
    pub fn is_exiting(&self) -> bool {
        self.space.is_exiting()
    }
}

impl AddressSpace {
    /// A space with memory behind it, managed by its own map, unmap, protect, discard and remap.
    pub fn managed(memory: StdArc<dyn Memory>, deadlines: Deadlines) -> Self {
        Self {
            space: Arc::new(Space::new(Some(memory), deadlines)),
        }
    }

    /// A space without process memory: guest-physical addresses, IOVAs. Only
    /// [`AddressSpace::begin_invalidation`] tells of changes.
    pub fn without_memory(deadlines: Deadlines) -> Self {
        Self {
            space: Arc::new(Space::new(None, deadlines)),
        }
    }

    /// The number that dumps, and device models, know it by.
    pub fn id(&self) -> u64 {
        self.space.id
    }

    /// A pin.
    pub fn pin(&self) -> SpacePin {
        SpacePin {
            space: self.space.clone(),
        }
    }

    /// Prepares a registration of `notifier` on `range`, which may outlive mappings; the TLBs of `targets` are flushed
    /// for it. Allocates all that invalidations will need.
    ///
    /// # Errors
    /// [`Refused`] inside a callback, as it allocates: there insert one that was prepared before.
    pub fn prepare(
        &self,
        range: Range,
        notifier: StdArc<dyn Notifier>,
        targets: &[Target],
    ) -> Result<Prepared, Refused> {
        context::callback_refusal("prepare")?;
        let word = StateWord::new();
        let prepared = Prepared::new(&self.space, range, notifier, targets, word);
        if planted!("r25") {
            let _ = Prepared::admit(std::slice::from_ref(&prepared));
        }
        Ok(prepared)
    }

    /// Prepares and inserts.
    ///
    /// # Errors
    /// As [`AddressSpace::prepare`] and [`Prepared::insert`].
    pub fn register(
        &self,
        range: Range,
        notifier: StdArc<dyn Notifier>,
        targets: &[Target],
    ) -> Result<crate::Registration, crate::InsertError> {
        self.prepare(range, notifier, targets)?.insert()
    }

    /// Inserts many, each as by [`Prepared::insert`], all or none: they become visible together, so that it costs less than one after the
    /// other, and an invalidation finds all of them or none.
    ///
    /// # Errors
    /// [`InsertError::AnotherSpace`](crate::InsertError::AnotherSpace), and as [`Prepared::insert`]. None was inserted then, no handler was
    /// called, and what was prepared is dropped.
    pub fn insert_all(
        &self,
        prepared: Vec<Prepared>,
    ) -> Result<Vec<crate::Registration>, crate::InsertError> {
        let another = |one: &&Prepared| !Arc::ptr_eq(&one.inner().space, &self.space);
        if let Some(one) = prepared.iter().find(another) {
            let range = one.inner().range;
            return Err(crate::InsertError::AnotherSpace { range });
        }
        drop(Prepared::admit(&prepared)?);
        context::leave();
        Ok(prepared.into_iter().map(Prepared::inserted).collect())
    }

    /// Ends the space, whoever else owns it: every registration is released, then the memory goes. Waits for callbacks that are
    /// running; the second call waits for the first. Afterwards registering and mapping are typed errors, and unregistering
    /// finds nothing to do.
    ///
    /// # Errors
    /// [`Refused`] where waiting is not legal; dropping the last owner there puts the exit off. [`ExitError::Reached`], each time,
    /// if a device may still reach the memory.
    pub fn exit(&self) -> Result<(), ExitError> {
        context::map_lock_refusal("exit")?;
        Space::exit(&self.space)
    }

    /// Runs what is put off: releases, quarantined memory whose devices have recovered, and `tracing` events (level debug) for
    /// what the flight recorder has seen since the last time.
    ///
    /// # Errors
    /// [`Refused`] inside a callback, and with a lock held.
    pub fn drain(&self) -> Result<(), Refused> {
        context::map_lock_refusal("drain")?;
        Space::run_completed(&self.space);
        managed::recover(&self.space);
        self.space.recorder.dump_if_wanted(self.space.id);
        self.space.recorder.publish(self.space.id);
        Ok(())
    }

    /// Counters.
    pub fn stats(&self) -> Stats {
        Stats {
            overdue: self.space.watch.overdue(),
            ..self.space.stats.read()
        }
    }

    /// How many registrations are inserted and not yet released.
    pub fn registrations(&self) -> usize {
        self.space.registered()
    }

    /// The flight recorder's records, the oldest first.
    pub fn records(&self) -> Vec<Record> {
        self.space.recorder.records()
    }

    /// Takes the map lock for write; waits for its holders.
    ///
    /// # Errors
    /// [`Refused`] inside a callback or an open invalidation, with a `NotifierLock` held, and with a map lock held.
    pub fn lock_write(&self) -> Result<MapWriteGuard<'_>, Refused> {
        let held = self.space.map_lock.write("lock_write")?;
        Ok(MapWriteGuard {
            space: &self.space,
            _held: held,
            _leave: Leave,
        })
    }

    /// Takes it if nobody holds it: `None` if somebody does.
    ///
    /// # Errors
    /// As [`AddressSpace::lock_write`].
    pub fn try_lock_write(&self) -> Result<Option<MapWriteGuard<'_>>, Refused> {
        let held = self.space.map_lock.try_write("try_lock_write")?;
        Ok(held.map(|held| MapWriteGuard {
            space: &self.space,
            _held: held,
            _leave: Leave,
        }))
    }

    /// Takes the map lock for read; waits for a writer.
    ///
    /// # Errors
    /// As [`AddressSpace::lock_write`].
    pub fn lock_read(&self) -> Result<MapReadGuard<'_>, Refused> {
        let held = self.space.map_lock.read("lock_read")?;
        Ok(MapReadGuard {
            _held: held,
            _leave: Leave,
        })
    }

    /// Takes it if no writer holds it or waits: what a fault path does.
    ///
    /// # Errors
    /// As [`AddressSpace::lock_write`].
    pub fn try_lock_read(&self) -> Result<Option<MapReadGuard<'_>>, Refused> {
        let held = self.space.map_lock.try_read("try_lock_read")?;
        Ok(held.map(|held| MapReadGuard {
            _held: held,
            _leave: Leave,
        }))
    }
}

/// Proof that this thread holds the map lock for write. Its methods are those of the space, with the lock kept throughout.
#[derive(Debug)]
pub struct MapWriteGuard<'a> {
    pub(crate) space: &'a Arc<Space>,
    // In this order: the lock is let go, then what was put off runs.
    _held: Held<'a>,
    _leave: Leave,
}

impl MapWriteGuard<'_> {
    /// Inserts a prepared registration.
    ///
    /// # Errors
    /// As [`Prepared::insert`].
    pub fn insert(&self, prepared: Prepared) -> Result<crate::Registration, crate::InsertError> {
        prepared.insert()
    }
}

/// Proof that this thread holds the map lock for read: nobody maps or unmaps.
#[derive(Debug)]
pub struct MapReadGuard<'a> {
    _held: Held<'a>,
    _leave: Leave,
}
