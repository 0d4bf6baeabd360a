//! How a window is made, and why it could not be made or used.

use std::time::Duration;

use shootdown::{
    Addr, DeviceError, FaultError, InsertError, Range, Rights, Target, UnregisterError,
};
use thiserror::Error;

/// How a window is made.
#[derive(Clone, Debug)]
pub struct WindowOptions {
    /// What is mapped, and unmapped, at a time, in bytes: a power of two, and at least a page of the IOMMU. IOVAs begin at a multiple
    /// of it: where the memory does too, the IOMMU can use pages as large as the memory has. Large ones are few
    /// mappings (65 535 are possible by default) and few entries in the IOMMU's TLB; small ones leave more in
    /// place when a page of the window goes.
    pub granule: u64,
    /// What the device may do.
    pub rights: Rights,
    /// The IOVA, which must be free. Without one it is chosen.
    pub at: Option<Addr>,
    /// The last address that the device can form.
    pub last: Addr,
    /// How long an invalidation in the same range may hold up the opening, and how long the device's work may take to drain
    /// when the window is closed.
    pub deadline: Duration,
    /// The device TLBs that the memory may be cached in, and the resets that work which does not drain leads to
    /// ([`FunctionReset`](crate::FunctionReset)).
    pub targets: Vec<Target>,
    /// Keeps the memory out of children: a child's copy would take the page away from the device, or the device's page from
    /// the parent, at the first store after a fork. It stays so after the window.
    pub keep_from_children: bool,
}

impl Default for WindowOptions {
    fn default() -> Self {
        Self {
            granule: 2 << 20,
            rights: Rights::READ_WRITE,
            at: None,
            last: Addr::new(u64::MAX),
            deadline: Duration::from_secs(1),
            targets: Vec::new(),
            keep_from_children: true,
        }
    }
}

/// Why a window could not be opened or used.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum WindowError {
    /// Not a power of two, or smaller than a page of the IOMMU.
    #[error("a granule of {granule:#x} bytes: a power of two from {page:#x} on is possible")]
    Granule {
        /// What was asked for, in bytes.
        granule: u64,
        /// The IOMMU's smallest page, in bytes.
        page: u64,
    },
    /// Not whole pages of the IOMMU.
    #[error("{range} is not whole pages of {page:#x} bytes")]
    Misaligned {
        /// The memory, or the IOVA.
        range: Range,
        /// The IOMMU's smallest page, in bytes.
        page: u64,
    },
    /// There are no such addresses left.
    #[error(
        "no IOVA is free for {len:#x} bytes{} up to {last}: close a window{}", at.map(|at| format!(" at {at}")).unwrap_or_default(), if *sanitize { "; with Reuse::Never addresses do not come back" } else { "" }
    )]
    NoIova {
        /// What was asked for, in bytes.
        len: u64,
        /// Where, if anywhere.
        at: Option<Addr>,
        /// The last address that the device can form.
        last: Addr,
        /// Whether addresses are used once only.
        sanitize: bool,
    },
    /// Part of it is no part of the window.
    #[error("{part} reaches beyond the window's memory {window}")]
    Outside {
        /// What was asked for.
        part: Range,
        /// The window.
        window: Range,
    },
    /// The window was closed.
    #[error("the window of {window} is closed")]
    Closed {
        /// The window.
        window: Range,
    },
    /// Its pages are in quarantine.
    #[error(
        "{granule} is in quarantine: recover what may still reach it, drain the space, and open another window"
    )]
    Quarantined {
        /// The memory of the first such granule.
        granule: Range,
    },
    /// It could not be registered.
    #[error(transparent)]
    Insert(#[from] InsertError),
    /// It could not be unregistered.
    #[error(transparent)]
    Unregister(#[from] UnregisterError),
    /// An invalidation was in the way, or the space has exited.
    #[error(transparent)]
    Fault(#[from] FaultError),
    /// The IOMMU did not do it.
    #[error(transparent)]
    Device(#[from] DeviceError),
}
