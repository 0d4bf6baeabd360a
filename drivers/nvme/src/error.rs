//! What can go wrong, each with the value that did.

use std::fmt;
use std::time::Duration;

use shootdown::{DeviceError, MapError, Range};
use shootdown_vfio::WindowError;
use thiserror::Error;

/// How a command ended: status code type and status code, as the completion has them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Status(pub u16);

impl Status {
    /// It succeeded.
    pub const SUCCESS: Self = Self(0);
    /// It was aborted by request. Source: NVMe 1.4, figure 127.
    pub const ABORTED: Self = Self(7);
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let meaning = match self.0 & 0x7ff {
            0x00 => "success",
            0x01 => "invalid opcode",
            0x02 => "invalid field",
            0x04 => "data transfer error: the controller could not reach the memory",
            0x06 => "internal error",
            0x07 => "aborted by request",
            0x08 => "aborted: its submission queue was deleted",
            0x0b => "invalid namespace or format",
            0x13 => "invalid PRP offset",
            0x80 => "block address out of range",
            _ => return write!(f, "status {:#05x}", self.0 & 0x7ff),
        };
        f.write_str(meaning)
    }
}

/// Why the driver could not do something.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum NvmeError {
    /// The device could not be reached.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A window could not be opened or used.
    #[error(transparent)]
    Window(#[from] WindowError),
    /// Memory for the queues could not be had.
    #[error(transparent)]
    Map(#[from] MapError),
    /// This controller cannot do what the driver needs.
    #[error("the controller has {what} {found}: this driver needs {needed}")]
    Unfit {
        /// The property.
        what: &'static str,
        /// What it has.
        found: u64,
        /// What is needed.
        needed: &'static str,
    },
    /// It did not become ready, or did not stop.
    #[error("{what} took longer than {deadline:?}: reset the function")]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// How long.
        deadline: Duration,
    },
    /// It says that it has failed for good.
    #[error("the controller reports a fatal error: reset the function")]
    Fatal,
    /// A command ended with an error.
    #[error("{command} failed: {status}")]
    Command {
        /// The command.
        command: &'static str,
        /// How it ended.
        status: Status,
    },
    /// As many commands as there is room for are in flight.
    #[error("{limit} commands are in flight already: wait for one")]
    Busy {
        /// How many.
        limit: usize,
    },
    /// The controller was reset while the command was in flight, or has not been restarted since.
    #[error("the controller was reset: restart it")]
    Reset,
    /// The namespace, or the controller, cannot carry this transfer.
    #[error(
        "a transfer of {memory} at block {block}: whole blocks of {block_bytes} bytes, aligned to 4 bytes, at most {most:#x} bytes, below block {blocks}"
    )]
    Transfer {
        /// The memory.
        memory: Range,
        /// The first block.
        block: u64,
        /// Bytes of a block.
        block_bytes: u64,
        /// The most that one command carries, in bytes.
        most: u64,
        /// How many blocks there are.
        blocks: u64,
    },
}
