//! A driver for the kit's accelerator, with bugs to choose from.

mod handler;
mod session;
mod tlb;

pub(crate) use session::MyAccelerator;
pub(crate) use tlb::Bug;
