//! `run --sim`: deterministic simulation. A seed fixes what the threads do, latencies, faults, and who runs when; the clock is the
//! simulation's own. A finding is shrunk to few operations, and comes with the command that replays it, to the last step.
//!
//! # Two builds
//! Which primitives framework, driver and model are made with is decided when they are built (`shootdown_primitive`), so that the
//! ordinary build pays nothing. There `launch` makes the other one (`--cfg sim`) beside it, and becomes it. In that build:
//! - `program`: the operations of a seed, and its faults, all of them numbered;
//! - `hand`: a thread that carries them out, over the same driver, model and oracle as the main job;
//! - `execute`: one simulation, in a process of its own;
//! - `explore`: one seed after the other, and what becomes of the first finding; `shrink`: which operations it needs.
//!
//! # What it explores
//! Sequentially consistent interleavings, at atomics, locks, waits and looks at the clock. Orderings and fences are the model
//! checker's. Changes by others (`Source`) are real kernel threads' business and not simulated.

#[cfg(sim)]
mod execute;
#[cfg(sim)]
mod explore;
#[cfg(sim)]
mod hand;
#[cfg(not(sim))]
mod launch;
#[cfg(sim)]
mod program;
#[cfg(sim)]
mod report;
#[cfg(sim)]
mod shrink;

#[cfg(sim)]
pub(crate) use explore::run;
#[cfg(not(sim))]
pub(crate) use launch::launch;
