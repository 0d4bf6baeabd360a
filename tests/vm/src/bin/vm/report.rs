//! What a run found, for people and as JSON.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};
use shootdown_vm::protocol::CONTROL;
use shootdown_vm::witness::{Complaint, Findings};

/// One check of the guest.
#[derive(Debug, Serialize)]
pub(crate) struct Check {
    pub(crate) name: String,
    /// A negative control: guest and witness must both fail.
    control: bool,
    /// `None`: the guest never said.
    #[serde(serialize_with = "verdict")]
    pub(crate) guest: Option<Result<(), String>>,
    /// `None`: the check never ended.
    witness: Option<Vec<String>>,
    /// The witness found a range that was said to be unmapped and was not invalidated.
    not_invalidated: bool,
    unmapped: u64,
    descriptors: u64,
    waits: u64,
    fault_pages: u64,
    ms: u64,
}

impl Check {
    pub(crate) fn planned(name: String) -> Self {
        Self {
            control: name.starts_with(CONTROL),
            name,
            guest: None,
            witness: None,
            not_invalidated: false,
            unmapped: 0,
            descriptors: 0,
            waits: 0,
            fault_pages: 0,
            ms: 0,
        }
    }

    pub(crate) fn witnessed(&mut self, findings: &Findings, ms: u64) {
        let complaints = &findings.complaints;
        self.not_invalidated = complaints
            .iter()
            .any(|it| matches!(it, Complaint::NotInvalidated { .. }));
        self.witness = Some(complaints.iter().map(ToString::to_string).collect());
        self.unmapped = findings.unmapped;
        self.descriptors = findings.seen.iotlb + findings.seen.device_tlb;
        self.waits = findings.seen.waits;
        self.fault_pages = findings.fault_pages;
        self.ms = ms;
    }

    /// Why the check did not do what it must; `None` if it did.
    fn wrong(&self) -> Option<String> {
        let (Some(guest), Some(witness)) = (&self.guest, &self.witness) else {
            return Some("did not run to its end".into());
        };
        match (self.control, guest) {
            (false, Err(why)) => Some(format!("guest: {why}")),
            (false, Ok(())) => witness.first().map(|first| format!("witness: {first}")),
            (true, Ok(())) => Some("the guest did not notice the unmap that was left out".into()),
            // An accident is no proof that the guest would notice.
            (true, Err(why)) if why.starts_with("error:") => Some(format!("guest: {why}")),
            (true, Err(_)) if !self.not_invalidated => {
                Some("the witness did not notice the unmap that was left out".into())
            }
            (true, Err(_)) => None,
        }
    }
}

fn verdict<S: Serializer>(verdict: &Option<Result<(), String>>, to: S) -> Result<S::Ok, S::Error> {
    match verdict {
        None => to.serialize_none(),
        Some(Ok(())) => to.serialize_str("ok"),
        Some(Err(why)) => to.serialize_str(why),
    }
}

/// The whole run.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) checks: Vec<Check>,
    pub(crate) figures: Vec<(String, String)>,
    /// What went wrong outside of checks.
    pub(crate) broken: Vec<String>,
    /// From QEMU's start to the first check.
    pub(crate) boot_ms: u64,
    /// From QEMU's start to its end.
    pub(crate) run_ms: u64,
    log: PathBuf,
}

impl Report {
    pub(crate) fn new(log: &Path) -> Self {
        Self {
            checks: Vec::new(),
            figures: Vec::new(),
            broken: Vec::new(),
            boot_ms: 0,
            run_ms: 0,
            log: log.to_owned(),
        }
    }

    pub(crate) fn index(&self, name: &str) -> Option<usize> {
        self.checks.iter().position(|check| check.name == name)
    }

    pub(crate) fn has_control(&self) -> bool {
        self.checks.iter().any(|check| check.control)
    }

    /// Whether all checks held, and the negative controls failed in guest and witness.
    pub(crate) fn passed(&self) -> bool {
        self.broken.is_empty() && self.checks.iter().all(|check| check.wrong().is_none())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self
            .checks
            .iter()
            .map(|check| check.name.len())
            .max()
            .unwrap_or(5);
        writeln!(
            f,
            "{:<width$}  {:>7} {:>8} {:>6} {:>6} {:>7}  verdict",
            "check", "ms", "unmapped", "descr.", "waits", "faulted"
        )?;
        for check in &self.checks {
            let verdict = match check.wrong() {
                None if check.control => "ok (guest and witness failed, as they must)".into(),
                None => "ok".into(),
                Some(why) => format!("FAIL {why}"),
            };
            writeln!(
                f,
                "{:<width$}  {:>7} {:>8} {:>6} {:>6} {:>7}  {verdict}",
                check.name,
                check.ms,
                check.unmapped,
                check.descriptors,
                check.waits,
                check.fault_pages
            )?;
        }
        writeln!(f)?;
        for (name, text) in &self.figures {
            writeln!(f, "{name}: {text}")?;
        }
        for broken in &self.broken {
            writeln!(f, "FAIL {broken}")?;
        }
        writeln!(f, "boot {} ms, whole run {} ms", self.boot_ms, self.run_ms)?;
        if !self.passed() {
            writeln!(f, "console and trace: {}", self.log.display())?;
        }
        let failed = self
            .checks
            .iter()
            .filter(|check| check.wrong().is_some())
            .count()
            + self.broken.len();
        let passed = self
            .checks
            .iter()
            .filter(|check| check.wrong().is_none())
            .count();
        writeln!(f, "{passed} passed, {failed} failed")
    }
}
