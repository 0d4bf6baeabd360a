//! The checks.

mod child;
mod devices;
mod flight;
mod hole;
mod kernel;

use crate::check::Check;

/// All of them, in the order in which they run.
pub(crate) const CHECKS: &[&[Check]] = &[
    devices::CHECKS,
    kernel::CHECKS,
    hole::CHECKS,
    flight::CHECKS,
    flight::CONTROL,
];
