//! What a user does with the control blocks and the data of a context, wherever it is just now.
//!
//! An instruction that ends with an error that is worth it (something timed out, or hardware erred, and nothing of the instruction
//! is wrong) is tried three times at most, by whoever waits for it.

use shootdown_primitive::sync::Arc;
use shootdown_primitive::sync::atomic::Ordering;
use shootdown_primitive::time::{Duration, Instant};

use shootdown::Addr;

use crate::config::MissMode;
use crate::context::Context;
use crate::error::{Causes, GruError};
use crate::fault;
use crate::handle::Backoff;
use crate::instruction::Instruction;
use crate::layout::{cbe, control_block, data, extended, status};
use crate::segment::{Delivery, Status};

/// Tries of one instruction, at most.
const TRIES: u8 = 3;

/// How long a sleeper that nobody wakes sleeps: where nobody serves interrupts, or misses have to be polled for.
const NAP: Duration = Duration::from_millis(1);

impl Context {
    /// # Errors
    /// [`GruError::NoControlBlock`].
    pub(crate) fn check_block(&self, cb: usize) -> Result<(), GruError> {
        let count = self.control_blocks();
        if cb < count {
            return Ok(());
        }
        Err(GruError::NoControlBlock { cb, count })
    }

    pub(crate) fn submit(
        self: &Arc<Self>,
        cb: usize,
        instruction: &Instruction,
    ) -> Result<(), GruError> {
        self.check_block(cb)?;
        let mapped = self.mapped()?;
        let registers = &*self.chiplet.registers;
        let at = |word| control_block(mapped.loaded.index, cb, word);
        let before = status::of(registers.read(at(0))?);
        if matches!(before, status::ACTIVE | status::CALL_OS) {
            return Err(GruError::Busy { cb });
        }
        // Relaxed: one thread at a time uses a control block.
        self.tries[cb].store(1, Ordering::Relaxed);
        // Nothing: what misses has something left.
        for side in &self.preloaded[cb] {
            side.store(0, Ordering::Relaxed);
        }
        let words = instruction.words();
        for (word, value) in words.iter().enumerate().skip(1) {
            registers.write(at(word), *value)?;
        }
        registers.write(at(0), words[0])?;
        Ok(())
    }

    pub(crate) fn poll(self: &Arc<Self>, cb: usize) -> Result<Status, GruError> {
        self.check_block(cb)?;
        let found = self.look(cb)?;
        if found == Status::Active && self.options.misses == MissMode::FaultMapPolled {
            fault::poll(self, cb)?;
            return self.look(cb);
        }
        Ok(found)
    }

    fn look(self: &Arc<Self>, cb: usize) -> Result<Status, GruError> {
        let mapped = self.mapped()?;
        let registers = &*self.chiplet.registers;
        let at = |word| control_block(mapped.loaded.index, cb, word);
        Ok(match status::of(registers.read(at(0))?) {
            status::IDLE => Status::Idle {
                value: registers.read(at(7))?,
            },
            status::EXCEPTION => Status::Exception,
            status::CALL_OS => Status::CallOs,
            _ => Status::Active,
        })
    }

    pub(crate) fn delivery(self: &Arc<Self>, cb: usize) -> Result<Delivery, GruError> {
        self.check_block(cb)?;
        let mapped = self.mapped()?;
        let registers = &*self.chiplet.registers;
        let dw0 = registers.read(control_block(mapped.loaded.index, cb, 0))?;
        let found = registers.read(control_block(mapped.loaded.index, cb, 7))?;
        Ok(Delivery::new(status::substatus(dw0), found))
    }

    pub(crate) fn resolve(self: &Arc<Self>, cb: usize) -> Result<(), GruError> {
        self.check_block(cb)?;
        drop(self.mapped()?);
        fault::call_os(self, cb)
    }

    /// Starts an instruction that has ended with an exception once more, if that is worth it; else the exception.
    fn again(self: &Arc<Self>, cb: usize) -> Result<(), GruError> {
        let mapped = self.mapped()?;
        let registers = &*self.chiplet.registers;
        let first = control_block(mapped.loaded.index, cb, 0);
        let dw0 = registers.read(first)?;
        // It may have been stolen, or tried again by another, since it was looked at.
        let Some(slot) = (mapped.loaded.slot(cb)).filter(|_| status::of(dw0) == status::EXCEPTION)
        else {
            return Ok(());
        };
        let word = |word| registers.read(extended(slot, word));
        let causes = Causes::from_bits_truncate(word(cbe::CAUSE)? as u32);
        let counters = &self.chiplet.counters;
        if causes.is_retryable() {
            // Relaxed: one thread at a time uses a control block.
            if self.tries[cb].load(Ordering::Relaxed) < TRIES {
                self.tries[cb].fetch_add(1, Ordering::Relaxed);
                counters.retries.hit();
                self.counters.retries.hit();
                return Ok(registers.write(first, status::again(dw0))?);
            }
            counters.retries_exhausted.hit();
        }
        counters.exceptions.hit();
        Err(GruError::Exception {
            cb,
            causes,
            detail: word(cbe::DETAIL)?,
            address: Addr::new(word(cbe::ADDRESS)?),
        })
    }

    pub(crate) fn wait(self: &Arc<Self>, cb: usize, time: Duration) -> Result<u64, GruError> {
        let mut backoff = Backoff::default();
        self.wait_with(cb, time, |_, _| backoff.wait())
    }

    pub(crate) fn wait_asleep(
        self: &Arc<Self>,
        cb: usize,
        time: Duration,
    ) -> Result<u64, GruError> {
        self.wait_with(cb, time, |seen, left| {
            // Acquire: as in `start`.
            let served = self.chiplet.served.load(Ordering::Acquire);
            let wakes = served && self.options.misses == MissMode::FaultMap;
            self.await_completion(seen, if wakes { left } else { left.min(NAP) });
        })
    }

    /// Waits by `pause`, which is given the completions that had been seen before the last look, and the time that is left.
    fn wait_with(
        self: &Arc<Self>,
        cb: usize,
        time: Duration,
        mut pause: impl FnMut(u64, Duration),
    ) -> Result<u64, GruError> {
        let begun = Instant::now();
        loop {
            let seen = self.completions();
            let found = self.poll(cb)?;
            match found {
                Status::Idle { value } => return Ok(value),
                Status::Exception => self.again(cb)?,
                Status::CallOs => self.resolve(cb)?,
                Status::Active => {}
            }
            let waited = begun.elapsed();
            let Some(left) = time.checked_sub(waited).filter(|left| !left.is_zero()) else {
                return Err(GruError::Timeout { cb, waited });
            };
            if found == Status::Active {
                pause(seen, left);
            }
        }
    }

    fn check_data(&self, offset: usize, words: usize) -> Result<(), GruError> {
        let (len, bytes) = (words * 8, self.data_bytes());
        let fits = offset.checked_add(len).is_some_and(|end| end <= bytes);
        if fits && offset.is_multiple_of(8) {
            return Ok(());
        }
        Err(GruError::DataBounds { offset, len, bytes })
    }

    pub(crate) fn read_data(
        self: &Arc<Self>,
        offset: usize,
        into: &mut [u64],
    ) -> Result<(), GruError> {
        self.check_data(offset, into.len())?;
        let mapped = self.mapped()?;
        for (nth, word) in into.iter_mut().enumerate() {
            let at = data(mapped.loaded.index, offset + nth * 8);
            *word = self.chiplet.registers.read(at)?;
        }
        Ok(())
    }

    pub(crate) fn write_data(
        self: &Arc<Self>,
        offset: usize,
        from: &[u64],
    ) -> Result<(), GruError> {
        self.check_data(offset, from.len())?;
        let mapped = self.mapped()?;
        for (nth, word) in from.iter().enumerate() {
            let at = data(mapped.loaded.index, offset + nth * 8);
            self.chiplet.registers.write(at, *word)?;
        }
        Ok(())
    }
}
