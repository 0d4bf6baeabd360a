//! What a run found, for people and as JSON.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};
use shootdown_vm::protocol::CONTROL;
use shootdown_vm::witness::{Complaint, Findings};

use crate::error::{Error, at};

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
    /// Why the check did not do what it must; `None` if it did. Set when the run is over.
    failed: Option<String>,
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
            failed: None,
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

    fn judge(&self) -> Option<String> {
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
    /// What the `shootdown` command printed in the guest, by name of file.
    #[serde(skip)]
    pub(crate) outputs: BTreeMap<String, String>,
    /// What went wrong outside of checks.
    pub(crate) broken: Vec<String>,
    /// From QEMU's start to the first check.
    pub(crate) boot_ms: u64,
    /// From QEMU's start to its end.
    pub(crate) run_ms: u64,
    /// Where console and trace are.
    pub(crate) log: PathBuf,
    /// All checks held, and the negative controls failed in guest and witness. Set when the run is over.
    passed: bool,
}

impl Report {
    pub(crate) fn new(log: &Path) -> Self {
        Self {
            checks: Vec::new(),
            figures: Vec::new(),
            outputs: BTreeMap::new(),
            broken: Vec::new(),
            boot_ms: 0,
            run_ms: 0,
            log: log.to_owned(),
            passed: false,
        }
    }

    pub(crate) fn index(&self, name: &str) -> Option<usize> {
        self.checks.iter().position(|check| check.name == name)
    }

    /// Judges the run, which is over.
    pub(crate) fn judge(&mut self) {
        if !self.checks.iter().any(|check| check.control) {
            let text = "no negative control was planned: a run without one proves nothing";
            self.broken.push(text.into());
        }
        for check in &mut self.checks {
            check.failed = check.judge();
        }
        self.passed =
            self.broken.is_empty() && self.checks.iter().all(|check| check.failed.is_none());
    }

    /// Writes the command's outputs to files in a directory, which is made if it is not there.
    pub(crate) fn save(&self, directory: &Path) -> Result<(), Error> {
        at(directory, std::fs::create_dir_all(directory))?;
        for (name, text) in &self.outputs {
            let file = directory.join(name);
            at(&file, std::fs::write(&file, text))?;
        }
        Ok(())
    }

    pub(crate) fn passed(&self) -> bool {
        self.passed
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
            let verdict = match &check.failed {
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
        if !self.passed {
            writeln!(f, "console and trace: {}", self.log.display())?;
        }
        let wrong = self
            .checks
            .iter()
            .filter(|check| check.failed.is_some())
            .count();
        let passed = self.checks.len() - wrong;
        let failed = wrong + self.broken.len();
        writeln!(f, "{passed} passed, {failed} failed")
    }
}
