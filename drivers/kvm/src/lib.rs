//! KVM as a second MMU over the memory of this process.
//!
//! A virtual machine whose memory is memory of this process has page tables of its own over it, and the kernel keeps them coherent:
//! it registers an MMU notifier, which is what this project gives to drivers in user space. That makes KVM useful to it:
//!
//! * [`Guest`], the *ground truth*: a processor at privilege level 3 that reads the same addresses as a device does. Where the
//!   guest sees new contents and the device old ones, the framework is wrong.
#![deny(missing_docs)]

mod error;
mod guest;

pub use error::KvmError;
pub use guest::Guest;
