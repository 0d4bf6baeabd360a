//! What can go wrong, each with the value that did.

use std::time::Duration;

use shootdown::{DeviceError, Range};
use shootdown_vfio::WindowError;
use thiserror::Error;

/// Why the driver could not do something.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum EduError {
    /// The device could not be reached.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The window could not be used.
    #[error(transparent)]
    Window(#[from] WindowError),
    /// It is another device.
    #[error("the device identifies itself as {found:#010x}: an edu is {expected:#010x}")]
    NotEdu {
        /// What it says.
        found: u32,
        /// What an edu says.
        expected: u32,
    },
    /// It does not invert what is written.
    #[error("liveness: wrote {wrote:#010x}, read {found:#010x} instead of its inverse")]
    NotAlive {
        /// What was written.
        wrote: u32,
        /// What came back.
        found: u32,
    },
    /// The part of the buffer, or of the memory, is too long, or none of the device's.
    #[error(
        "a transfer of {memory} to or from byte {buffer:#x} of the buffer: at most {most:#x} bytes, inside of 4 KiB"
    )]
    Transfer {
        /// The memory.
        memory: Range,
        /// Where in the buffer.
        buffer: u64,
        /// The most that one transfer carries, in bytes.
        most: u64,
    },
    /// The device goes on and on.
    #[error(
        "{what} did not end within {deadline:?}: edu has no reset; take its bus mastering away"
    )]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// How long.
        deadline: Duration,
    },
}
