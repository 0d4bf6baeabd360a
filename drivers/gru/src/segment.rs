//! Segments: what a user of the driver holds. A GSEG, which is a mapping of the space, with a context of a chiplet behind it.
//!
//! Users submit to control blocks and poll them. Nobody may use one control block from two threads at a time; else the methods
//! can be called from any thread. A segment ends as a whole, with its mapping: by unmap, by whoever unmaps a part of its
//! addresses, when its space exits, or when it is dropped.

use shootdown::{Addr, AddressSpace, MapWriteGuard, Range, Unregistered};
use shootdown_primitive::sync::Arc;
use shootdown_primitive::time::{Duration, Instant};

use crate::context::Context;
use crate::error::{Ended, GruError};
use crate::fault;
use crate::gru::Gru;
use crate::handle::Backoff;
use crate::instruction::Instruction;
use crate::layout::{SEGMENT_BYTES, control_block, data, extended, status};

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
            .field("context", &self.context.index)
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
        gru: Arc<Gru>,
    ) -> Result<Self, GruError> {
        let share = Arc::clone(&context.share);
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

    /// The number of its context on the chiplet.
    pub fn context(&self) -> usize {
        self.context.index
    }

    /// The ASID that it runs with.
    pub fn asid(&self) -> u32 {
        self.context.asid
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

    fn slot(&self, cb: usize) -> Result<usize, GruError> {
        self.context.slot(cb).ok_or(GruError::NoControlBlock {
            cb,
            count: self.control_blocks(),
        })
    }

    /// Starts an instruction. Waits for nothing.
    ///
    /// # Errors
    /// [`GruError::SegmentEnded`], [`GruError::ContextLost`], [`GruError::Busy`], [`GruError::NoControlBlock`].
    pub fn submit(&self, cb: usize, instruction: &Instruction) -> Result<(), GruError> {
        self.slot(cb)?;
        let _mapped = self.context.mapped()?;
        let registers = &*self.context.chiplet.registers;
        let at = |word| control_block(self.context.index, cb, word);
        let before = status::of(registers.read(at(0))?);
        if matches!(before, status::ACTIVE | status::CALL_OS) {
            return Err(GruError::Busy { cb });
        }
        let words = instruction.words();
        for (word, value) in words.iter().enumerate().skip(1) {
            registers.write(at(word), *value)?;
        }
        registers.write(at(0), words[0])?;
        Ok(())
    }

    /// What a control block says. Waits for nothing.
    ///
    /// # Errors
    /// As [`Segment::submit`].
    pub fn poll(&self, cb: usize) -> Result<Status, GruError> {
        self.slot(cb)?;
        let _mapped = self.context.mapped()?;
        let registers = &*self.context.chiplet.registers;
        let at = |word| control_block(self.context.index, cb, word);
        Ok(match status::of(registers.read(at(0))?) {
            status::IDLE => Status::Idle {
                value: registers.read(at(7))?,
            },
            status::EXCEPTION => Status::Exception,
            status::CALL_OS => Status::CallOs,
            _ => Status::Active,
        })
    }

    /// Resolves the TLB miss of a control block that says [`Status::CallOs`]; nothing to do for others. Waits for the map
    /// lock and for invalidations.
    ///
    /// # Errors
    /// As [`Segment::submit`]; [`GruError::Refused`] where the map lock cannot be taken; [`GruError::Fault`] when
    /// invalidations go on past the deadline, or a chiplet of the driver is in quarantine; it can be called again afterwards.
    pub fn resolve(&self, cb: usize) -> Result<(), GruError> {
        let slot = self.slot(cb)?;
        drop(self.context.mapped()?);
        fault::call_os(&self.context, slot)
    }

    /// Waits until a control block is done, and resolves its misses where it has to: what an atomic found.
    ///
    /// # Errors
    /// As [`Segment::resolve`]; [`GruError::Exception`]; [`GruError::Timeout`].
    pub fn wait(&self, cb: usize, time: Duration) -> Result<u64, GruError> {
        let slot = self.slot(cb)?;
        let (begun, mut backoff) = (Instant::now(), Backoff::default());
        loop {
            match self.poll(cb)? {
                Status::Idle { value } => return Ok(value),
                Status::Exception => {
                    let _mapped = self.context.mapped()?;
                    let registers = &*self.context.chiplet.registers;
                    return Err(GruError::Exception {
                        cb,
                        causes: registers.read(extended(slot) + 8)?,
                        address: Addr::new(registers.read(extended(slot) + 24)?),
                    });
                }
                Status::CallOs => self.resolve(cb)?,
                Status::Active => backoff.wait(),
            }
            let waited = begun.elapsed();
            if waited >= time {
                return Err(GruError::Timeout { cb, waited });
            }
        }
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

    fn check_data(&self, offset: usize, words: usize) -> Result<(), GruError> {
        let (len, bytes) = (words * 8, self.data_bytes());
        let fits = offset.checked_add(len).is_some_and(|end| end <= bytes);
        if fits && offset.is_multiple_of(8) {
            return Ok(());
        }
        Err(GruError::DataBounds { offset, len, bytes })
    }

    /// Reads data from byte `offset` on.
    ///
    /// # Errors
    /// As [`Segment::submit`]; [`GruError::DataBounds`].
    pub fn read_data(&self, offset: usize, into: &mut [u64]) -> Result<(), GruError> {
        self.check_data(offset, into.len())?;
        let _mapped = self.context.mapped()?;
        for (nth, word) in into.iter_mut().enumerate() {
            let at = data(self.context.index, offset + nth * 8);
            *word = self.context.chiplet.registers.read(at)?;
        }
        Ok(())
    }

    /// Writes data from byte `offset` on.
    ///
    /// # Errors
    /// As [`Segment::read_data`].
    pub fn write_data(&self, offset: usize, from: &[u64]) -> Result<(), GruError> {
        self.check_data(offset, from.len())?;
        let _mapped = self.context.mapped()?;
        for (nth, word) in from.iter().enumerate() {
            let at = data(self.context.index, offset + nth * 8);
            self.context.chiplet.registers.write(at, *word)?;
        }
        Ok(())
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
