//! Atomics, locks, threads and the clock of shootdown: the standard library's.
//!
//! The framework, the GRU's driver and the hardware model take theirs from here and nowhere else, so that what decides how threads
//! interleave, and what time it is, is one crate, which knows nothing of any of them. The paths are the standard library's.

pub use std::{hint, sync, thread, thread_local, time};
