//! The checks.

mod devices;

use crate::check::Check;

/// All of them, in the order in which they run.
pub(crate) const CHECKS: &[&[Check]] = &[devices::CHECKS];
