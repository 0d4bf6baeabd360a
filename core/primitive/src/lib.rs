//! Atomics, locks, threads and the clock of shootdown: the standard library's, or a simulation's.
//!
//! The framework, the GRU's driver and the hardware model take theirs from here and nowhere else, so that what decides how threads
//! interleave, and what time it is, is one crate, which knows nothing of any of them. The paths are the standard library's, and in
//! an ordinary build so are the things: nothing is wrapped.
//!
//! Under `--cfg sim` a seeded scheduler takes its place, with a clock of its own: the module `sim`, of such builds, says how.

#[cfg(not(sim))]
pub use std::{hint, sync, thread, thread_local, time};

/// Addresses to ask for a mapping at, one after the other until one is free; `None` is wherever there is room.
#[cfg(not(sim))]
pub fn places() -> impl Iterator<Item = Option<u64>> {
    std::iter::once(None)
}

#[cfg(sim)]
pub mod sim;
#[cfg(sim)]
pub use shuttle::thread_local;
#[cfg(sim)]
pub use sim::{hint, places, sync, thread, time};
