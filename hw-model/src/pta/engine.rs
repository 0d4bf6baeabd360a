//! The device's thread: it performs the accesses.

use shootdown_primitive::sync::PoisonError;
use shootdown_primitive::time::Instant;

use super::Core;
use super::layout::{ADD, CHECKSUM, COMPARE, COPY, FILL};
use super::state::{Latch, Side};
use crate::oracle::Access;

pub(super) fn run(core: &Core) {
    let mut state = core.lock();
    while !state.stopping {
        let now = Instant::now();
        state.settle(now);
        let (work, wake) = state.step(now);
        core.fire(&mut state);
        let Some((place, latch)) = work else {
            state = match wake {
                Some(wake) => {
                    let left = wake.saturating_duration_since(Instant::now());
                    let waited = core.changed.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => {
                    let waited = core.changed.wait(state);
                    waited.unwrap_or_else(PoisonError::into_inner)
                }
            };
            continue;
        };
        // With no lock held: it is an access of the bus, and takes its time.
        drop(state);
        let result = perform(core, place.0, &latch);
        state = core.lock();
        state.performed(place, &latch, result);
    }
}

/// The result, for the commands that have one.
fn perform(core: &Core, queue: usize, latch: &Latch) -> Option<u64> {
    let mut source = [0; 4096];
    let mut destination = [0; 4096];
    let (from, to) = (&mut source[..latch.len], &mut destination[..latch.len]);
    let access = |side: Side, write| Access {
        device: core.device,
        context: queue as u32,
        space: latch.space,
        addr: side.addr.into(),
        len: latch.len as u32,
        write,
        frame: side.entry.frame_of(side.addr),
        stamp: side.entry.stamp,
    };
    let bus = &core.bus;
    match (latch.opcode, latch.source, latch.destination) {
        (COPY, Some(source), Some(destination)) => {
            bus.read(&access(source, false), from);
            bus.write(&access(destination, true), from);
            None
        }
        (FILL, _, Some(destination)) => {
            let word = latch.operand.to_le_bytes();
            let bytes = word.iter().cycle().skip((latch.done % 8) as usize);
            for (to, byte) in to.iter_mut().zip(bytes) {
                *to = *byte;
            }
            bus.write(&access(destination, true), to);
            None
        }
        (COMPARE, Some(source), Some(destination)) => {
            bus.read(&access(source, false), from);
            bus.read(&access(destination, false), to);
            let differs = from.iter().zip(&*to).position(|(from, to)| from != to);
            differs.map(|at| latch.done + at as u64)
        }
        (CHECKSUM, Some(source), _) => {
            bus.read(&access(source, false), from);
            let weights = latch.done + 1..;
            let terms = from.iter().zip(weights);
            let sum = terms.fold(0_u64, |sum, (byte, weight)| {
                sum.wrapping_add(u64::from(*byte).wrapping_mul(weight))
            });
            Some(sum)
        }
        (ADD, _, Some(destination)) => Some(bus.atomic(&access(destination, true), &mut |old| {
            Some(old.wrapping_add(latch.operand))
        })),
        _ => None,
    }
}
