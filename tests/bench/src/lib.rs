//! What shootdown costs, beside something that does the same job bare.
//!
//! Times drift from machine to machine, and from minute to minute on one that is shared; ratios of two things that ran in turn
//! drift less. So each figure has a baseline in the same process: an interval map without states, sequences and handlers
//! (iset), a sorted `Vec`, an SRCU that protects nothing, the raw system call.
//!
//! * [`case`]: one thing to do n times. `cargo bench -p shootdown-bench --bench time` gives each to criterion.
//! * [`round`]: two cases in turn, and the medians. `cargo bench -p shootdown-bench --bench targets` prints the table of targets.
//! * `instructions`, run by `tests/bench/counts`: some of the cases under valgrind. `growth`: the curves of the README.
//! * [`ground`]: what they are done on: ranges, queries, handlers, devices.

pub mod allocator;
pub mod case;
pub mod floor;
pub mod ground;
pub mod round;
pub mod srcu;
