//! What a device driver does when part of a window goes: stop, drained, resume.

use shootdown::{Range, WouldBlock};

/// What is under way in a range that was stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InFlight {
    /// Nothing, or nothing that could be waited for: the IOMMU's cut-off is the sync.
    Nothing,
    /// Something: [`DeviceWork::drained`] tells when it is done.
    Work,
}

/// The work of a device, as far as the windows that it uses are concerned. Each method may be called from several threads at
/// once, for different ranges and for the same.
///
/// All of it is called in the shootdown path: no allocation, no lock under which somebody allocates, no wait but for the
/// device's own registers. By `()`: a device that can neither be stopped nor asked.
pub trait DeviceWork: Send + Sync + 'static {
    /// No new work that reaches `iova` from here on, until as many `resume` of that same range as there were `stop`. Where the
    /// device cannot be stopped the IOMMU cuts it off.
    ///
    /// # Errors
    /// [`WouldBlock`], only where `may_block` is false; no `resume` follows then.
    fn stop(&self, iova: Range, may_block: bool) -> Result<InFlight, WouldBlock> {
        let _ = (iova, may_block);
        Ok(InFlight::Nothing)
    }

    /// Whether the work that was in flight in `iova` is done. Polled; returns at once.
    fn drained(&self, iova: Range) -> bool {
        let _ = iova;
        true
    }

    /// `iova` may be used again. What of it is not mapped comes back by the window's next touch.
    fn resume(&self, iova: Range) {
        let _ = iova;
    }
}

impl DeviceWork for () {}
