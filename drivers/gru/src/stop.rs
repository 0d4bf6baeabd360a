//! Stopping a context, whatever it is at.

use shootdown_primitive::time::Instant;

use crate::config::Plant;
use crate::context::{Context, Loaded};
use crate::error::GruError;
use crate::handle::{Backoff, Operation};
use crate::layout::{cch, fault, slots, tfh};

impl Context {
    /// Stops the context and gives its resources back to the hardware, in whatever state it is.
    pub(crate) fn stop(&self, loaded: &Loaded) -> Result<(), GruError> {
        let deadline = self.chiplet.config.handle_deadline;
        let (begun, mut backoff) = (Instant::now(), Backoff::default());
        loop {
            let epoch = self.chiplet.epoch();
            if epoch != loaded.epoch && epoch.is_multiple_of(2) {
                return Ok(());
            }
            if !self.chiplet.planted(Plant::FAULTS_NOT_FORCED) {
                self.force_user_polling(loaded)?;
            }
            let stopped = self
                .handle(loaded.index, Operation::InterruptSync, 0)
                .or_else(not_running)
                .and_then(|()| self.handle(loaded.index, Operation::Deallocate, 0))
                .or_else(not_running);
            match stopped {
                Err(GruError::HandleException {
                    cause: cch::LOCKED, ..
                }) if begun.elapsed() < deadline => backoff.wait(),
                result => return result,
            }
        }
    }

    /// As [`Context::stop`], and a chiplet that does not stop it is reset. Where that fails it is in quarantine: as the framework
    /// has not asked for this reset, nobody else would try another one.
    pub(crate) fn stop_or_reset(&self, loaded: &Loaded) -> Result<(), GruError> {
        self.stop(loaded).or_else(|error| {
            let deadline = self.chiplet.config.handle_deadline;
            self.chiplet.reset(deadline).map_err(|_| {
                self.device.quarantine();
                error
            })
        })
    }

    /// Whether a fault in the fault map locks the context.
    ///
    /// # Errors
    /// The chiplet is gone.
    pub(crate) fn is_locked(&self, loaded: &Loaded) -> Result<bool, GruError> {
        for slot in slots(loaded.cb_map) {
            let dw0 = self.chiplet.registers.read(fault(slot))?;
            if tfh::state(dw0) == tfh::MISS_MAP {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn force_user_polling(&self, loaded: &Loaded) -> Result<(), GruError> {
        for slot in slots(loaded.cb_map) {
            let dw0 = self.chiplet.registers.read(fault(slot))?;
            if tfh::state(dw0) == tfh::MISS_MAP {
                self.operate(fault(slot), Operation::UserPolling, 0)?;
            }
        }
        Ok(())
    }
}

/// There is nothing to stop, or nothing to deallocate.
fn not_running(error: GruError) -> Result<(), GruError> {
    match error {
        GruError::HandleException {
            cause: cch::WRONG_STATE,
            ..
        } => Ok(()),
        error => Err(error),
    }
}
