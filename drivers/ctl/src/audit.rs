//! The audit of a run: what the kernel has invalidated in the arena, and nobody had told the space.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;
use shootdown::{AddressSpace, Observer, Range};
use thiserror::Error;

/// Why there is no audit.
#[derive(Debug, Error)]
pub(crate) enum AuditError {
    #[cfg(feature = "kvm")]
    #[error("no audit: {0}")]
    Kvm(#[from] shootdown_kvm::AuditError),
    #[cfg(not(feature = "kvm"))]
    #[error("no audit: this command was built without it; build it with --features kvm")]
    NotBuilt,
}

/// An audit in progress.
pub(crate) struct Audit {
    #[cfg(feature = "kvm")]
    auditor: shootdown_kvm::Auditor,
}

#[cfg(feature = "kvm")]
impl Audit {
    pub(crate) fn start(space: &AddressSpace, arena: Range) -> Result<Self, AuditError> {
        let auditor = shootdown_kvm::Auditor::start(space, arena)?;
        Ok(Self { auditor })
    }

    /// For who changes pages beside the space.
    pub(crate) fn observer(&self) -> Arc<dyn Observer> {
        self.auditor.observer()
    }

    pub(crate) fn finish(self) -> Report {
        let audit = self.auditor.finish();
        Report {
            seen: audit.seen,
            missed: audit.missed,
            missed_of_others: audit.missed_of_others,
            lost: audit.lost,
            first: audit.first.iter().map(ToString::to_string).collect(),
        }
    }
}

#[cfg(not(feature = "kvm"))]
impl Audit {
    pub(crate) fn start(_: &AddressSpace, _: Range) -> Result<Self, AuditError> {
        Err(AuditError::NotBuilt)
    }

    pub(crate) fn observer(&self) -> Arc<dyn Observer> {
        unreachable!("it has not started")
    }

    pub(crate) fn finish(self) -> Report {
        Report::default()
    }
}

/// What it came to.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    /// Invalidations of the arena that the kernel has made.
    seen: u64,
    /// Those by this process that nobody had told the space.
    missed: u64,
    /// Those by other processes and by the kernel itself.
    missed_of_others: u64,
    /// Invalidations that were not looked at.
    lost: u64,
    /// The first of what was missed.
    first: Vec<String>,
}

/// Lines that a report shows.
const SHOWN: usize = 4;

impl Report {
    /// What is wrong with the run by this.
    pub(crate) fn findings(&self) -> Vec<String> {
        let mut findings = Vec::new();
        if self.missed > 0 {
            let missed = self.missed;
            findings.push(format!(
                "audit: {missed} invalidations of the arena that nobody had told the space"
            ));
        }
        if self.lost > 0 {
            let lost = self.lost;
            findings.push(format!(
                "audit: incomplete, {lost} invalidations were not looked at"
            ));
        }
        findings
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            seen,
            missed,
            missed_of_others,
            lost,
            first,
        } = self;
        writeln!(
            f,
            "\n  audit: the kernel has made {seen} invalidations of the arena; nobody had told the space of\n         \
             {missed} by this process and {missed_of_others} by others; {lost} were not looked at"
        )?;
        for one in first.iter().take(SHOWN) {
            writeln!(f, "         {one}")?;
        }
        Ok(())
    }
}
