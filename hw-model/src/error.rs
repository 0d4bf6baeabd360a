//! Why a part of the model could not be built.

use std::io::ErrorKind;

use shootdown::MemoryError;
use thiserror::Error;

/// Why a part of the model could not be built. Nothing is left behind.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ModelError {
    /// No frames, or more than a shadow entry can name.
    #[error("{frames} frames of 4 KiB of physical memory: from 1 to {limit} are possible")]
    Frames {
        /// What was asked for, in frames of 4 KiB.
        frames: u64,
        /// The most that is possible.
        limit: u64,
    },
    /// An arena of no bytes, or a larger one than an address space holds.
    #[error("an arena of {bytes:#x} bytes: from 1 to {limit:#x} are possible")]
    Arena {
        /// What was asked for, in bytes.
        bytes: u64,
        /// The most that is possible.
        limit: u64,
    },
    /// The oracle watches as many spaces as it can.
    #[error("the oracle has no room for another space: {limit} at a time are possible")]
    TooManySpaces {
        /// How many spaces can exist on one bus at a time.
        limit: usize,
    },
    /// The process's memory did not allow it.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A system call failed.
    #[error("{call} of {bytes:#x} bytes failed: {errno}")]
    System {
        /// The system call's name.
        call: &'static str,
        /// The size that it was given, in bytes.
        bytes: u64,
        /// The errno, as the C library names it.
        errno: ErrorKind,
    },
}
