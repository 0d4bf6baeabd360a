//! Observers: told of every change of memory that the framework knows of, to compare with what really happens.

use thiserror::Error;

use crate::addr::Range;
use crate::space::AddressSpace;

/// Is told when pages of a space may change, and when that is over: by the space's own operations, by its sources, by
/// invalidations that others drive. Not of what nobody has told the space, which is what an auditor is after.
///
/// # What an implementer must guarantee
/// Both are called inside the shootdown path: neither may allocate, free, or wait for more than a moment.
pub trait Observer: Send + Sync + 'static {
    /// Every device concerned has acknowledged: pages of `range` may change from now on.
    fn may_change(&self, range: Range);

    /// No more for that reason: once for each [`Observer::may_change`], with the same range.
    fn changed(&self, range: Range);
}

/// A space has one observer at most, for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the address space {space:#x} has an observer already")]
pub struct Observed {
    /// Which.
    pub space: u64,
}

impl AddressSpace {
    /// Has `observer` told of the changes that the space knows of, from now on and for as long as it exists.
    ///
    /// # Errors
    /// [`Observed`] if there is one already.
    pub fn observe(&self, observer: std::sync::Arc<dyn Observer>) -> Result<(), Observed> {
        let space = self.id();
        let set = self.space.sources.observe(observer);
        set.map_err(|_| Observed { space })
    }
}
