//! What a driver's self check reports: its steps, with times, up to the first that failed.

use std::time::{Duration, Instant};

use crate::history::Attribution;

/// One step. `C` names what was checked, `E` why it failed.
#[derive(Clone, Debug)]
pub struct Step<C, E> {
    /// What was checked.
    pub check: C,
    /// How long it took, all in all.
    pub took: Duration,
    /// How long the shootdown in it took, where there is one: from the call to its return.
    pub shootdown: Option<Duration>,
    /// The first fault of the device that the IOMMU was heard of in it, and whose IOVA that was.
    pub fault: Option<Attribution>,
    /// Why it failed, if it did.
    pub result: Result<(), E>,
}

/// What a step that proves a shootdown has seen.
#[derive(Clone, Copy, Debug, Default)]
pub struct Proof {
    /// How long the shootdown took, from the call to its return.
    pub shootdown: Option<Duration>,
    /// The first fault of the device that the IOMMU was heard of, and whose IOVA that was.
    pub fault: Option<Attribution>,
}

/// What came of a self check.
#[derive(Clone, Debug)]
pub struct Report<C, E> {
    /// In their order; the last one may have failed, no other.
    pub steps: Vec<Step<C, E>>,
}

/// The step that was made last has failed; it says how.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Failed;

impl<C, E> Report<C, E> {
    /// Makes the steps that `all` asks for.
    pub fn of(all: impl FnOnce(&mut Self) -> Result<(), Failed>) -> Self {
        let mut this = Self { steps: Vec::new() };
        // The step has the error.
        let _: Result<(), Failed> = all(&mut this);
        this
    }

    /// Whether there were steps, and all of them held.
    pub fn passed(&self) -> bool {
        !self.steps.is_empty() && self.steps.iter().all(|step| step.result.is_ok())
    }

    /// Makes one step. `work` is given the place for what it sees of a shootdown.
    ///
    /// # Errors
    /// It failed: no other is to be made.
    pub fn step<T>(
        &mut self,
        check: C,
        work: impl FnOnce(&mut Proof) -> Result<T, E>,
    ) -> Result<T, Failed> {
        let begun = Instant::now();
        let mut proof = Proof::default();
        let (result, value) = match work(&mut proof) {
            Ok(value) => (Ok(()), Ok(value)),
            Err(error) => (Err(error), Err(Failed)),
        };
        self.steps.push(Step {
            check,
            took: begun.elapsed(),
            shootdown: proof.shootdown,
            fault: proof.fault,
            result,
        });
        value
    }
}
