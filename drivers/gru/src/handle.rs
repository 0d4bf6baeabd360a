//! Handle operations: write the fields, start, poll until the handle is idle, for so long and no longer.
//!
//! A dead chiplet is a typed error after the deadline, never a hang and never a panic (R20).

use shootdown::Registers;
use shootdown_primitive::time::{Duration, Instant};
use shootdown_primitive::{hint, thread};

use crate::error::GruError;
use crate::layout::{start, status};

/// Waits longer and longer: first on the processor, as hardware answers within microseconds, then asleep.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    round: u32,
}

impl Backoff {
    pub(crate) fn wait(&mut self) {
        match self.round {
            0..=32 => hint::spin_loop(),
            33..=64 => thread::yield_now(),
            _ => thread::sleep(Duration::from_micros(50)),
        }
        self.round = self.round.saturating_add(1);
    }
}

/// Starts operation `opcode` of the handle at `base`, with the other `bits` of its first word, and waits for its end.
///
/// # Errors
/// The handle's exception, [`GruError::HandleTimeout`] after `deadline`, or the chiplet is gone.
pub(crate) fn run(
    registers: &dyn Registers,
    base: u64,
    opcode: u64,
    bits: u64,
    what: &'static str,
    deadline: Duration,
) -> Result<(), GruError> {
    registers.write(base, start(opcode) | bits)?;
    let begun = Instant::now();
    let mut backoff = Backoff::default();
    loop {
        let dw0 = registers.read(base)?;
        match status::of(dw0) {
            status::IDLE => return Ok(()),
            status::EXCEPTION => {
                return Err(GruError::HandleException {
                    what,
                    cause: status::cause(dw0),
                });
            }
            _ if begun.elapsed() >= deadline => {
                return Err(GruError::HandleTimeout { what, deadline });
            }
            _ => backoff.wait(),
        }
    }
}
