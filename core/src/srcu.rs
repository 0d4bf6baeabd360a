//! Sleepable read-copy-update of our own: the writer's side. The readers' are the walks in [`Active`](crate::active).
//!
//! A writer unlinks, fences, and notes the walks that go on: only they may see what it unlinked. When all of those are over it is
//! free. What is unlinked meanwhile waits for the walks of its own time; so there are two generations of garbage, and a
//! reader writes to nothing that another reader, or the writer, writes to.
//!
//! Walks are short and never span a callback, so that the older generation is mostly over by the next change.

use crate::active::{Active, Claim};
use crate::primitive::atomic::{Ordering, fence};

/// What was unlinked, and may still be seen.
#[derive(Debug)]
pub(crate) struct Retired<G> {
    /// The walks that may see `old`: where there are none nothing is kept.
    walks: Vec<Claim>,
    old: G,
    /// Unlinked since: `walks` says nothing of it.
    fresh: G,
}

/// Things that are freed together.
pub(crate) trait Garbage: Default {
    /// There is none.
    fn is_empty(&self) -> bool;
    /// Moves what there is of `more` to it.
    fn append(&mut self, more: &mut Self);
}

impl<G: Garbage> Retired<G> {
    pub(crate) fn new() -> Self {
        Self {
            walks: Vec::new(),
            old: G::default(),
            fresh: G::default(),
        }
    }

    /// Takes what has just been unlinked, and leaves there what nobody can see any more; never waits. Allocates.
    pub(crate) fn retire(&mut self, active: &Active, garbage: &mut G) {
        fence(Ordering::SeqCst); // (B)
        if !self.walks.is_empty() {
            self.retire_more(active, garbage);
        } else if self.is_seen(active) {
            self.old.append(garbage);
        }
    }

    #[cold]
    fn retire_more(&mut self, active: &Active, garbage: &mut G) {
        self.fresh.append(garbage);
        if self.walks.iter().any(|walk| active.is_walking(*walk)) {
            return;
        }
        garbage.append(&mut self.old);
        let to = if self.is_seen(active) {
            &mut self.old
        } else {
            garbage
        };
        to.append(&mut self.fresh);
    }

    /// Whether somebody walks, and who it is.
    fn is_seen(&mut self, active: &Active) -> bool {
        self.walks.clear();
        if !planted!("r5-grace") {
            self.walks.extend(active.walks());
        }
        !self.walks.is_empty()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.old.is_empty() && self.fresh.is_empty()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::addr::Range;

    impl Garbage for Vec<u32> {
        fn is_empty(&self) -> bool {
            self.is_empty()
        }
        fn append(&mut self, more: &mut Self) {
            Vec::append(self, more);
        }
    }

    fn retire(retired: &mut Retired<Vec<u32>>, active: &Active, mut garbage: Vec<u32>) -> Vec<u32> {
        retired.retire(active, &mut garbage);
        garbage
    }

    fn walk(active: &Active) -> Claim {
        active.claim(Range::ALL).unwrap()
    }

    #[test]
    fn what_is_retired_outlives_the_walks_that_may_see_it() {
        let (active, mut retired) = (Active::new(), Retired::new());
        let one = walk(&active);
        assert!(retire(&mut retired, &active, vec![1]).is_empty());
        active.walked(one);
        assert_eq!(retire(&mut retired, &active, vec![2]), [1, 2]);
        active.end(one);
        assert!(retired.is_empty());
    }

    #[test]
    fn a_walk_that_began_later_does_not_hold_up_the_free() {
        let (active, mut retired) = (Active::new(), Retired::new());
        let old = walk(&active);
        assert!(retire(&mut retired, &active, vec![1]).is_empty());
        let young = walk(&active);
        active.end(old);
        assert_eq!(retire(&mut retired, &active, vec![2]), [1]);
        active.end(young);
        assert_eq!(retire(&mut retired, &active, vec![]), [2]);
    }

    #[test]
    fn what_is_unlinked_during_a_grace_period_waits_for_its_own_walks() {
        let (active, mut retired) = (Active::new(), Retired::new());
        let first = walk(&active);
        assert!(retire(&mut retired, &active, vec![1]).is_empty());
        let second = walk(&active);
        assert!(retire(&mut retired, &active, vec![2]).is_empty());
        active.end(first);
        assert_eq!(
            retire(&mut retired, &active, vec![]),
            [1],
            "2 may be seen by the second"
        );
        active.end(second);
        assert_eq!(retire(&mut retired, &active, vec![]), [2]);
    }
}
