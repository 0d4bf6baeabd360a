//! The checks.

mod between;
mod child;
mod command;
mod device;
mod devices;
mod drivers;
mod flight;
mod handed;
mod hole;
mod kernel;
mod kinds;
mod path;
mod rig;
mod together;
mod transport;
mod windows;

use crate::check::Check;

/// All of them, in the order in which they run.
pub(crate) const CHECKS: &[&[Check]] = &[
    devices::CHECKS,
    kernel::CHECKS,
    hole::CHECKS,
    flight::CHECKS,
    transport::CHECKS,
    device::CHECKS,
    handed::CHECKS,
    windows::CHECKS,
    path::CHECKS,
    kinds::CHECKS,
    drivers::CHECKS,
    together::CHECKS,
    command::CHECKS,
    flight::CONTROL,
    windows::CONTROL,
    drivers::CONTROL,
];
