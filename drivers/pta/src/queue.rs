//! Work queues: what a user of the driver holds. A portal, which is a segment of the space, with a queue of the device behind it.
//!
//! Nobody may use one slot from two threads at a time; else the methods can be called from any thread. A queue ends with its
//! mapping: by unmap, by whoever unmaps a part of its addresses, when its space exits, or when it is dropped.

use shootdown_primitive::sync::atomic::{AtomicBool, Ordering};
use shootdown_primitive::sync::{Arc, Mutex};
use shootdown_primitive::time::{Duration, Instant};

use shootdown::{
    Addr, AddressSpace, Device, DeviceContext, Excluded, MapWriteGuard, Op, Range, Segment, Share,
    UnloadFailed, Unregistered,
};

use crate::Pta;
use crate::command::Command;
use crate::device::{Attached, Backoff, Core, lock};
use crate::error::PtaError;
use crate::layout::{BUSY, ENABLE, PASID, QUEUES, queue_control, slot};
use crate::space::Space;

/// A queue of the device, loaded for a space.
pub(crate) struct Work {
    core: Arc<Core>,
    device: Device,
    pub(crate) space: Arc<Space>,
    pub(crate) share: Arc<Share>,
    number: usize,
    epoch: u64,
    /// It is over: changed with the portal locked.
    ended: AtomicBool,
    /// Held for the register accesses of users, so that none comes after the end.
    portal: Mutex<()>,
}

impl Work {
    /// Loads a queue for `space`.
    ///
    /// # Errors
    /// No queue is free; the device.
    pub(crate) fn load(
        attached: &Attached,
        space: Arc<Space>,
        share: Share,
    ) -> Result<Arc<Self>, PtaError> {
        let core = &attached.core;
        let epoch = core.epoch();
        if !epoch.is_multiple_of(2) {
            return Err(PtaError::QueueLost);
        }
        space.mirror.lock().load(space.pasid, space.id, epoch)?;
        let mut works = lock(&core.works);
        let limit = QUEUES;
        let free = works.iter().position(Option::is_none);
        let number = free.ok_or(PtaError::NoQueue { limit })?;
        let control = ENABLE.of(1) | PASID.of(space.pasid);
        core.registers.write(queue_control(number), control)?;
        let work = Arc::new(Self {
            core: Arc::clone(core),
            device: attached.device.clone(),
            space,
            share: Arc::new(share),
            number,
            epoch,
            ended: AtomicBool::new(false),
            portal: Mutex::new(()),
        });
        works[number] = Some(Arc::downgrade(&work));
        drop(works);
        core.counters.queues_opened.hit();
        Ok(work)
    }

    pub(crate) fn has_ended(&self) -> bool {
        // Acquire, with the release in `stop`.
        self.ended.load(Ordering::Acquire)
    }

    /// Calls `access` while the queue is the user's.
    fn user<R>(&self, access: impl FnOnce(&Core) -> Result<R, PtaError>) -> Result<R, PtaError> {
        let _portal = lock(&self.portal);
        if self.has_ended() {
            return Err(PtaError::QueueEnded);
        }
        if self.core.epoch() != self.epoch {
            return Err(PtaError::QueueLost);
        }
        access(&self.core)
    }

    /// Takes the queue off the device. What waits for a page request ends at once, so that nobody has to resolve it (R33); what
    /// accesses memory is waited for. Its number is its own until then, resets or not.
    fn stop(&self) -> Result<(), UnloadFailed> {
        {
            let _portal = lock(&self.portal);
            // Release, with `has_ended`.
            self.ended.store(true, Ordering::Release);
        }
        let gone = |_| UnloadFailed {
            reason: "the device is gone",
        };
        let (registers, control) = (&self.core.registers, queue_control(self.number));
        let (begun, mut backoff) = (Instant::now(), Backoff::default());
        registers.write(control, 0).map_err(gone)?;
        while BUSY.get(registers.read(control).map_err(gone)?) == 1 {
            if begun.elapsed() >= self.core.config.deadline {
                self.core.counters.queues_stuck.hit();
                return Err(UnloadFailed {
                    reason: "an access of the queue does not end",
                });
            }
            backoff.wait();
        }
        lock(&self.core.works)[self.number] = None;
        Ok(())
    }
}

impl DeviceContext for Work {
    fn device(&self) -> &Device {
        &self.device
    }

    fn unload(&self, _: &Op<'_>) -> Result<(), UnloadFailed> {
        self.stop()
    }
}

/// What a slot says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    /// Nothing was begun.
    Idle,
    /// At work, or waits for pages.
    Active,
    /// Done: what the command came to, as [`Command`] says.
    Done {
        /// That.
        result: u64,
    },
    /// Ended by a page fault, or because the device refused it: [`Queue::wait`] says which.
    Failed,
}

/// A work queue. Dropping it unmaps it, as [`shootdown::Segment`] says.
pub struct Queue {
    work: Arc<Work>,
    portal: Segment,
    /// Serves its page requests.
    _pta: Arc<Pta>,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue")
            .field("number", &self.work.number)
            .field("pasid", &self.pasid())
            .field("portal", &self.range())
            .field("ended", &self.has_ended())
            .finish()
    }
}

impl Queue {
    /// Maps the portal of what has been loaded, or unloads it.
    pub(crate) fn map(
        space: &AddressSpace,
        work: Arc<Work>,
        pta: Arc<Pta>,
    ) -> Result<Self, PtaError> {
        let share = Arc::clone(&work.share);
        let context: Arc<dyn DeviceContext> = Arc::clone(&work) as _;
        match space.map_segment(slot::PORTAL_BYTES, None, context, share) {
            Ok(portal) => Ok(Self {
                work,
                portal,
                _pta: pta,
            }),
            Err(error) => {
                // Nobody has used it: there is nothing to wait for.
                if work.stop().is_err() {
                    tracing::error!(queue = work.number, "a queue that nobody has used is busy");
                }
                Err(error.into())
            }
        }
    }

    /// Where its portal is mapped. Unmapping any of it ends the queue.
    pub fn range(&self) -> Range {
        self.portal.range()
    }

    /// The PASID that it works with: that of its space.
    pub fn pasid(&self) -> u64 {
        self.work.space.pasid
    }

    /// How many slots it has.
    pub fn slots(&self) -> usize {
        slot::SLOTS
    }

    /// Whether it is over.
    pub fn has_ended(&self) -> bool {
        self.work.has_ended()
    }

    fn check(&self, slot: usize) -> Result<(), PtaError> {
        let count = self.slots();
        if slot < count {
            Ok(())
        } else {
            Err(PtaError::NoSlot { slot, count })
        }
    }

    /// Begins a command. Waits for nothing.
    ///
    /// # Errors
    /// [`PtaError::Busy`], [`PtaError::NoSlot`], [`PtaError::QueueEnded`], [`PtaError::QueueLost`], [`PtaError::Device`].
    pub fn submit(&self, slot: usize, command: &Command) -> Result<(), PtaError> {
        self.check(slot)?;
        self.work.user(|core| {
            let at = |word| slot::word(self.work.number, slot, word);
            if slot::STATUS.get(core.registers.read(at(0))?) == slot::ACTIVE {
                return Err(PtaError::Busy { slot });
            }
            // The one that begins it last.
            for (word, value) in command.words().into_iter().enumerate().rev() {
                core.registers.write(at(word), value)?;
            }
            Ok(())
        })
    }

    /// What a slot says. Waits for nothing.
    ///
    /// # Errors
    /// As [`Queue::submit`], but for [`PtaError::Busy`].
    pub fn poll(&self, slot: usize) -> Result<Status, PtaError> {
        self.check(slot)?;
        self.work.user(|core| {
            let read = |word| {
                core.registers
                    .read(slot::word(self.work.number, slot, word))
            };
            Ok(match slot::STATUS.get(read(0)?) {
                slot::IDLE => Status::Idle,
                slot::ACTIVE => Status::Active,
                slot::DONE => Status::Done {
                    result: read(slot::RESULT)?,
                },
                _ => Status::Failed,
            })
        })
    }

    /// Why the command of a slot failed.
    fn failure(&self, slot: usize) -> Result<PtaError, PtaError> {
        self.work.user(|core| {
            let read = |word| {
                core.registers
                    .read(slot::word(self.work.number, slot, word))
            };
            Ok(match slot::CAUSE.get(read(0)?) {
                slot::PAGE_FAULT => PtaError::PageFault {
                    at: Addr::new(read(slot::FAULT)?),
                    done: read(slot::DONE_BYTES)?,
                },
                slot::DISABLED => PtaError::QueueLost,
                cause => PtaError::Refused { slot, cause },
            })
        })
    }

    /// Waits until the command of a slot is done: what it came to, as [`Command`] says; 0 if there was none.
    ///
    /// # Errors
    /// As [`Queue::poll`]; [`PtaError::PageFault`]; [`PtaError::Refused`]; [`PtaError::Timeout`], and the command goes on.
    pub fn wait(&self, slot: usize, time: Duration) -> Result<u64, PtaError> {
        let (begun, mut backoff) = (Instant::now(), Backoff::default());
        loop {
            match self.poll(slot)? {
                Status::Idle => return Ok(0),
                Status::Done { result } => return Ok(result),
                Status::Failed => return Err(self.failure(slot)?),
                Status::Active => {}
            }
            let waited = begun.elapsed();
            if waited >= time {
                return Err(PtaError::Timeout { slot, waited });
            }
            backoff.wait();
        }
    }

    /// [`Queue::submit`] and [`Queue::wait`].
    ///
    /// # Errors
    /// As those.
    pub fn run(&self, slot: usize, command: &Command, time: Duration) -> Result<u64, PtaError> {
        self.submit(slot, command)?;
        self.wait(slot, time)
    }

    /// Keeps the CPU away from `range`, whole pages, until it touches one of them, and faults them in for writing: what the device does
    /// there as long as [`Excluded::is_held`] says so, it does alone. In slot `slot`, in `time` at most.
    ///
    /// # Errors
    /// [`PtaError::Exclude`] where nobody sees touches of the memory, among others; as [`Queue::run`].
    pub fn exclusive(
        &self,
        slot: usize,
        range: Range,
        time: Duration,
    ) -> Result<Excluded, PtaError> {
        let space = self.work.space.pin.upgrade().ok_or(PtaError::QueueEnded)?;
        let excluded = space.exclude(range, time)?;
        self.run(slot, &Command::Touch { range, write: true }, time)?;
        Ok(excluded)
    }

    /// Unmaps it: the queue is stopped, its addresses are free again, its share of the registration is put. Waits for the hardware,
    /// and for callbacks if it is the last queue of its space. The second time there is nothing to do.
    ///
    /// # Errors
    /// As [`shootdown::Segment::unmap`].
    pub fn unmap(&self) -> Result<Unregistered, PtaError> {
        Ok(self.portal.unmap()?)
    }

    /// [`Queue::unmap`] with the map lock held.
    ///
    /// # Errors
    /// As there.
    pub fn unmap_locked(&self, guard: &MapWriteGuard<'_>) -> Result<Unregistered, PtaError> {
        Ok(guard.unmap_segment(&self.portal)?)
    }
}
