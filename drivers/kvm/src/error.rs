//! What KVM does not give.

use std::io;

use shootdown::Range;
use thiserror::Error;

/// Why KVM is of no use here. Nothing is left behind.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum KvmError {
    /// No KVM, or no right to it.
    #[error(
        "/dev/kvm cannot be opened: {0}; a guest needs KVM, and the right to read and write that file"
    )]
    NoKvm(io::Error),
    /// The tracepoint cannot be read.
    #[error(
        "the tracepoint kvm:kvm_unmap_hva_range cannot be read: {0}; that needs root, and a kernel with KVM's tracepoints (CONFIG_TRACEPOINTS)"
    )]
    NoTracepoint(io::Error),
    /// More than the page tables of a guest reach.
    #[error("{range} is not whole pages, or larger than the {limit:#x} bytes that a guest sees")]
    Range {
        /// What it was to see.
        range: Range,
        /// The most, in bytes.
        limit: u64,
    },
    /// A system call failed.
    #[error("{call} failed: {error}")]
    System {
        /// Which.
        call: &'static str,
        /// What it said.
        error: io::Error,
    },
    /// The guest has done something else than to read.
    #[error("the guest stopped with {exit}")]
    Exit {
        /// How.
        exit: String,
    },
}

impl KvmError {
    pub(crate) fn system(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |error| {
            let error = error.into();
            Self::System { call, error }
        }
    }
}
