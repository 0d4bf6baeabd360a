//! Escalation for devices without a TLB of their own: the last resort of the engine is a reset of the function.
//!
//! What a PCI device caches of the IOMMU's translations (ATS) the kernel flushes when a range is unmapped; so as a device TLB a
//! function holds nothing. But work that does not drain by its deadline leads to [`DeviceTlb::reset`], and that is here.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use shootdown::{
    Completion, DeviceTlb, FlushCommand, Issue, Limits, PageSizes, ResetError, Ticket,
};

use crate::device::Device;

/// A PCI function as a target of registrations: `Target { device: shootdown::Device::new(name, FunctionReset::new(device)), tag: 0 }`.
#[derive(Debug)]
pub struct FunctionReset {
    device: Arc<Device>,
    /// It could not be reset: no flush may be acknowledged in its name.
    stuck: AtomicBool,
}

impl FunctionReset {
    /// The function of `device`.
    pub fn new(device: Arc<Device>) -> Self {
        Self {
            device,
            stuck: AtomicBool::new(false),
        }
    }
}

impl DeviceTlb for FunctionReset {
    fn limits(&self) -> Limits {
        Limits {
            entry_sizes: PageSizes::all(),
            pages_per_command: 1 << 40,
            commands_per_batch: 1,
            full_flush_cost: 1,
        }
    }

    fn issue(&self, _: FlushCommand) -> Issue {
        // Relaxed: the framework's own state word of the device orders what follows from it.
        if self.stuck.load(Ordering::Relaxed) {
            Issue::Queued
        } else {
            Issue::NothingCached
        }
    }

    fn dispatch(&self) -> Ticket {
        Ticket(0)
    }

    fn poll(&self, _: Ticket) -> Completion {
        if self.stuck.load(Ordering::Relaxed) {
            Completion::Failed
        } else {
            Completion::Done
        }
    }

    /// The function's own reset; without one its bus mastering is taken away, and stays away until the driver sets it again.
    fn reset(&self, deadline: Duration) -> Result<(), ResetError> {
        let done = self.device.stop_for_good();
        self.stuck.store(!done, Ordering::Relaxed);
        if done {
            Ok(())
        } else {
            Err(ResetError::Timeout { deadline })
        }
    }
}
