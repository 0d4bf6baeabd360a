//! Segments: what a user of the driver holds. A GSEG, which is a mapping of the space, with a context of a chiplet behind it.
//!
//! Users submit to control blocks and poll them. Nobody may use one control block from two threads at a time; else the methods
//! can be called from any thread. A segment ends as a whole, with its mapping: by unmap, by whoever unmaps a part of its
//! addresses, when its space exits, or when it is dropped.

use shootdown::{AddressSpace, MapWriteGuard, Range, Share, Unregistered};
use shootdown_primitive::sync::Arc;
use shootdown_primitive::time::Duration;

use crate::config::SegmentOptions;
use crate::context::Context;
use crate::error::{Ended, GruError};
use crate::gru::Gru;
use crate::instruction::Instruction;
use crate::layout::SEGMENT_BYTES;
use crate::stats::SegmentStats;

/// What a control block says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    /// Nothing to do, or done.
    Idle {
        /// What an atomic found.
        value: u64,
    },
    /// Ended with an error.
    Exception,
    /// At work.
    Active,
    /// Waits for [`Segment::resolve`].
    CallOs,
}

/// What became of a message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Delivery {
    /// It is in the queue.
    Delivered,
    /// The receiver's buffer is full, or did not answer: nothing has happened, and another try may succeed.
    Congested,
    /// It does not fit below the queue's limit: nothing has happened.
    QueueFull {
        /// The queue's first word: head, and limit in the upper half, in lines.
        queue: u64,
    },
    /// Its lines are claimed, and it is up to software to store the message there.
    Unstored {
        /// The first of them.
        line: u32,
    },
    /// A result that the data sheet does not have.
    Unknown(u64),
}

impl Delivery {
    pub(crate) fn new(substatus: u64, found: u64) -> Self {
        match substatus {
            0 => Self::Delivered,
            // The receiver's buffer has overflowed; the claim was not answered.
            1 | 4 => Self::Congested,
            2 => Self::QueueFull { queue: found },
            // The lines lie in another page than the queue's first; the store was not answered.
            3 | 5 => Self::Unstored { line: found as u32 },
            other => Self::Unknown(other),
        }
    }
}

/// A segment. Dropping it unmaps it, as [`shootdown::Segment`] says.
pub struct Segment {
    context: Arc<Context>,
    mapping: shootdown::Segment,
    /// Serves its faults.
    _gru: Arc<Gru>,
}

impl std::fmt::Debug for Segment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Segment")
            .field("chiplet", &self.context.chiplet.name)
            .field("context", &self.context())
            .field("range", &self.range())
            .field("ended", &self.context.ended())
            .finish()
    }
}

impl Segment {
    /// Maps what has been loaded, or unloads it.
    ///
    /// # Errors
    /// As [`AddressSpace::map_segment`].
    pub(crate) fn map(
        space: &AddressSpace,
        context: Arc<Context>,
        share: Arc<Share>,
        gru: Arc<Gru>,
    ) -> Result<Self, GruError> {
        match space.map_segment(SEGMENT_BYTES, None, context.clone(), share) {
            Ok(mapping) => Ok(Self {
                context,
                mapping,
                _gru: gru,
            }),
            Err(error) => {
                // Nobody has used it.
                context.discard(Ended::Unmapped)?;
                Err(error.into())
            }
        }
    }

    /// Where it is mapped: 256 KiB of the space. Unmapping any of it ends all of it.
    pub fn range(&self) -> Range {
        self.mapping.range()
    }

    /// The name of its chiplet.
    pub fn chiplet(&self) -> &str {
        &self.context.chiplet.name
    }

    /// The number of its context on the chiplet; `None` while it is not loaded.
    pub fn context(&self) -> Option<usize> {
        self.context.loaded().map(|loaded| loaded.index)
    }

    /// The ASID that it runs with; `None` while it is not loaded.
    pub fn asid(&self) -> Option<u32> {
        self.context.loaded().map(|loaded| loaded.asid)
    }

    /// What it was made with.
    pub fn options(&self) -> SegmentOptions {
        self.context.options
    }

    /// How many control blocks it has.
    pub fn control_blocks(&self) -> usize {
        self.context.control_blocks()
    }

    /// How many data bytes it has.
    pub fn data_bytes(&self) -> usize {
        self.context.data_bytes()
    }

    /// Why it is over; `None` while it is not.
    pub fn ended(&self) -> Option<Ended> {
        self.context.ended()
    }

    /// What has been counted of it.
    pub fn stats(&self) -> SegmentStats {
        self.context.counters.read()
    }

    /// Starts an instruction. Waits for nothing if the segment is loaded; else for a context, as all methods that use its registers do.
    ///
    /// # Errors
    /// [`GruError::SegmentEnded`], [`GruError::ContextLost`], [`GruError::Busy`], [`GruError::NoControlBlock`];
    /// [`GruError::NoneStealable`], [`GruError::NoAsid`] or the hardware's answer where it cannot be loaded.
    pub fn submit(&self, cb: usize, instruction: &Instruction) -> Result<(), GruError> {
        self.context.submit(cb, instruction)
    }

    /// What a control block says. A miss of a segment whose misses are polled for is resolved, if the map lock is to be had.
    ///
    /// # Errors
    /// As [`Segment::submit`].
    pub fn poll(&self, cb: usize) -> Result<Status, GruError> {
        self.context.poll(cb)
    }

    /// What became of the message of a control block that is idle.
    ///
    /// # Errors
    /// As [`Segment::submit`].
    pub fn delivery(&self, cb: usize) -> Result<Delivery, GruError> {
        self.context.delivery(cb)
    }

    /// Resolves the TLB miss of a control block that says [`Status::CallOs`]; nothing to do for others. Waits for the map
    /// lock and for invalidations.
    ///
    /// # Errors
    /// As [`Segment::submit`]; [`GruError::Refused`] where the map lock cannot be taken; [`GruError::Fault`] when
    /// invalidations go on past the deadline, or a chiplet of the driver is in quarantine; it can be called again afterwards.
    pub fn resolve(&self, cb: usize) -> Result<(), GruError> {
        self.context.resolve(cb)
    }

    /// Waits until a control block is done, polling it, and resolves its misses where it has to: what an atomic found. An
    /// instruction that ends with an error that is worth it is tried again, three times in all.
    ///
    /// # Errors
    /// As [`Segment::resolve`]; [`GruError::Exception`]; [`GruError::Timeout`].
    pub fn wait(&self, cb: usize, time: Duration) -> Result<u64, GruError> {
        self.context.wait(cb, time)
    }

    /// As [`Segment::wait`], asleep until it is interrupted: for instructions that [interrupt](Instruction::interrupting).
    ///
    /// # Errors
    /// As [`Segment::wait`].
    pub fn wait_asleep(&self, cb: usize, time: Duration) -> Result<u64, GruError> {
        self.context.wait_asleep(cb, time)
    }

    /// [`Segment::submit`] and [`Segment::wait`].
    ///
    /// # Errors
    /// As those.
    pub fn run(
        &self,
        cb: usize,
        instruction: &Instruction,
        time: Duration,
    ) -> Result<u64, GruError> {
        self.submit(cb, instruction)?;
        self.wait(cb, time)
    }

    /// Reads data from byte `offset` on.
    ///
    /// # Errors
    /// As [`Segment::submit`]; [`GruError::DataBounds`].
    pub fn read_data(&self, offset: usize, into: &mut [u64]) -> Result<(), GruError> {
        self.context.read_data(offset, into)
    }

    /// Writes data from byte `offset` on.
    ///
    /// # Errors
    /// As [`Segment::read_data`].
    pub fn write_data(&self, offset: usize, from: &[u64]) -> Result<(), GruError> {
        self.context.write_data(offset, from)
    }

    /// Unmaps it: its context is unloaded, its addresses are free again, its share of the registration is put. Waits for the
    /// hardware, and for callbacks if it is the last segment of its space. The second time there is nothing to do.
    ///
    /// # Errors
    /// As [`shootdown::Segment::unmap`]: a context that the hardware does not give back costs the chiplet a reset, and then
    /// the segment is in quarantine.
    pub fn unmap(&self) -> Result<Unregistered, GruError> {
        Ok(self.mapping.unmap()?)
    }

    /// [`Segment::unmap`] with the map lock held: the registration is `Quiet` on return, and released when that is dropped.
    ///
    /// # Errors
    /// As [`Segment::unmap`].
    pub fn unmap_locked(&self, guard: &MapWriteGuard<'_>) -> Result<Unregistered, GruError> {
        Ok(guard.unmap_segment(&self.mapping)?)
    }
}
