//! What came of a run.

use std::fmt;
use std::time::Duration;

use shootdown::{Kind, Record};

use crate::rule::Rule;

/// One moment of an interleaving: from the flight recorder, or a step that the kit took.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Moment {
    /// Since the address space was made.
    pub at: Duration,
    /// What happened.
    pub what: String,
}

impl Moment {
    pub(crate) fn of(record: &Record) -> Self {
        let Record { subject, a, b, .. } = *record;
        let what = match record.kind {
            Kind::Start => {
                format!("operation {subject:#x}: an invalidation of {a:#x}..={b:#x} starts")
            }
            Kind::Passed => {
                format!(
                    "operation {subject:#x}: an invalidation of {a:#x}..={b:#x} reached no device and is over"
                )
            }
            Kind::Quiesced => {
                format!("operation {subject:#x}: every handler has quiesced and drained")
            }
            Kind::Dispatched => format!("operation {subject:#x}: flushes are dispatched"),
            Kind::Flushed => {
                format!("operation {subject:#x}: every device has acknowledged, or was given up")
            }
            Kind::End => {
                let outcome = [
                    "the pages have changed",
                    "nothing has changed",
                    "the pages are in quarantine",
                ];
                let outcome = outcome.get(a as usize).unwrap_or(&"?");
                format!("operation {subject:#x}: over, {outcome}")
            }
            Kind::Refused => format!("operation {subject:#x}: refused by registration {a}"),
            Kind::Deadline => {
                let what = [
                    "the work in flight",
                    "a flush",
                    "a flush of the whole device",
                    "a reset",
                    "the unloading of a context",
                ];
                let what = what.get(a as usize).unwrap_or(&"?");
                format!("operation {subject:#x}: {what} missed its deadline")
            }
            Kind::Quarantine => format!("operation {subject:#x}: a device goes into quarantine"),
            Kind::Panicked => {
                format!("operation {subject:#x}: the handler of registration {a} panicked")
            }
            Kind::Insert => format!("registration {subject} of {a:#x}..={b:#x} is inserted"),
            Kind::Unregister => format!("registration {subject} is given up"),
            Kind::Release => format!("registration {subject} has been released"),
            Kind::Unload => {
                format!("operation {subject:#x}: the context of the segment at {a:#x} is unloaded")
            }
            other => format!("{other:?} {subject:#x} {a:#x} {b:#x}"),
        };
        Self {
            at: record.at,
            what: format!("[{}] {what}", record.shard),
        }
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>12.1} us  {}", self.at.as_secs_f64() * 1e6, self.what)
    }
}

/// A rule that was broken. Its `Display` is a paragraph.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Finding {
    /// The rule.
    pub rule: Rule,
    /// What the kit was at.
    pub scenario: &'static str,
    /// What was seen: what the device could do or did, and what the driver had said.
    pub did: String,
    /// What led there, the oldest first: the flight recorder's records, and the kit's steps. The number in brackets is the
    /// recorder's shard, which mostly tells threads apart.
    pub interleaving: Vec<Moment>,
    /// How often it was seen in this scenario.
    pub times: u64,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:?}: {}", self.rule, self.rule)?;
        write!(f, "  {}: {}", self.scenario, self.did)?;
        if self.times > 1 {
            write!(f, " (and {} times more)", self.times - 1)?;
        }
        writeln!(f)?;
        self.interleaving
            .iter()
            .try_for_each(|moment| writeln!(f, "  {moment}"))
    }
}

/// Something that was not asked, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Skipped {
    /// What was not asked.
    pub scenario: &'static str,
    /// Why.
    pub why: String,
}

/// What came of a run. Its `Display` is the whole of it.
#[derive(Clone, Debug, Default)]
#[must_use = "a report says nothing until it is looked at: `assert` does"]
#[non_exhaustive]
pub struct Report {
    /// Replays the run.
    pub seed: u64,
    /// The driver.
    pub driver: &'static str,
    /// The rules that were broken: one a scenario, the first, as others may be its consequences.
    pub findings: Vec<Finding>,
    /// What was not asked.
    pub skipped: Vec<Skipped>,
    /// Device accesses that the oracle checked.
    pub accesses: u64,
    /// Invalidations.
    pub invalidations: u64,
}

impl Report {
    /// Whether no rule was broken.
    pub fn passed(&self) -> bool {
        self.findings.is_empty()
    }

    /// The rules that were broken, each once, in order of [`Rule`].
    pub fn rules(&self) -> Vec<Rule> {
        let mut rules: Vec<_> = self.findings.iter().map(|finding| finding.rule).collect();
        rules.sort();
        rules.dedup();
        rules
    }

    /// Panics with the whole report if a rule was broken.
    #[track_caller]
    pub fn assert(&self) {
        assert!(self.passed(), "{self}");
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let broken = self.findings.len();
        writeln!(
            f,
            "{}: {}; {} device accesses beside {} invalidations",
            self.driver,
            match broken {
                0 => "passed".to_owned(),
                1 => "1 finding".to_owned(),
                _ => format!("{broken} findings"),
            },
            self.accesses,
            self.invalidations,
        )?;
        for finding in &self.findings {
            write!(f, "\n{finding}")?;
        }
        for Skipped { scenario, why } in &self.skipped {
            writeln!(f, "not asked: {scenario}: {why}")?;
        }
        if broken > 0 {
            writeln!(
                f,
                "\nagain, with the same workload: {}={}",
                crate::SEED,
                self.seed
            )?;
        }
        Ok(())
    }
}
