//! KVM as a second MMU over the memory of this process.
//!
//! A virtual machine whose memory is memory of this process has page tables of its own over it, and the kernel keeps them coherent:
//! it registers an MMU notifier, which is what this project gives to drivers in user space. That makes KVM useful to it:
//!
//! * [`Stream`], the kernel's own notifier stream: what it invalidates in this process, whoever made it do so;
//! * [`KvmMmu`], which makes a source of that;
//! * [`Auditor`], which compares that with what the framework knew of, and names what nobody had told it;
//! * [`Guest`], the *ground truth*: a processor at privilege level 3 that reads the same addresses as a device does. Where the
//!   guest sees new contents and the device old ones, the framework is wrong.
#![deny(missing_docs)]

mod audit;
mod clock;
mod error;
mod guest;
mod ring;
mod source;
mod stream;
mod tracepoint;

pub use audit::{Audit, AuditError, Auditor, Missed};
pub use error::KvmError;
pub use guest::Guest;
pub use source::KvmMmu;
pub use stream::{News, Stream, Unmapped};

/// Tests with a virtual machine run one by one: each has the kernel tell the others once more.
#[cfg(test)]
fn alone() -> std::sync::MutexGuard<'static, ()> {
    static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    ALONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
