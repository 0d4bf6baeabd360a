//! VFIO.
pub use caps::ChainError;
pub use container::{Container, Group, IommuInfo};
pub use device::{Departure, Device, HotReset, Sibling, open};
pub use error::VfioError;
pub use irq::{Irqs, Kind};
pub use region::{Region, Width};
mod book;
mod caps;
mod container;
mod device;
mod error;
mod irq;
pub mod pci;
mod region;
mod sys;
