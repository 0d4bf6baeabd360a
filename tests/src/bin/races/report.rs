//! What came of each guard, as lines and as JSON.

use std::fmt;

use serde::Serialize;

use crate::entry::Entry;
use crate::examine::Finding;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Verdict {
    Caught,
    NotCaught,
    /// This machine lacks what the check needs.
    Skipped,
}

/// One guard.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) race: &'static str,
    /// `null` where nothing was, or could be, planted; `how` says why.
    caught: Option<bool>,
    /// The check.
    by: String,
    /// From the start of the run without the guard to its finding.
    seconds: f64,
    pub(crate) verdict: Verdict,
    /// The guard that was taken out, and where it is.
    guard: &'static str,
    /// How it is taken out.
    plant: &'static str,
    /// What the check said.
    how: String,
}

impl Row {
    pub(crate) const HEAD: &'static str =
        "race  verdict         seconds  plant                  by";

    pub(crate) fn new(entry: &Entry, finding: Finding) -> Self {
        Self {
            race: entry.race,
            caught: match finding.verdict {
                Verdict::Caught => Some(true),
                Verdict::NotCaught => Some(false),
                Verdict::Skipped => None,
            },
            by: entry.check.to_string(),
            seconds: (finding.seconds * 1000.0).round() / 1000.0,
            verdict: finding.verdict,
            guard: entry.guard,
            plant: entry.plant,
            how: finding.how,
        }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = match self.verdict {
            Verdict::Caught => "caught",
            Verdict::NotCaught => "NOT CAUGHT",
            Verdict::Skipped => "skipped",
        };
        let (race, plant, seconds) = (self.race, self.plant, self.seconds);
        writeln!(
            f,
            "{race:<5} {verdict:<14} {seconds:>8.2}  {plant:<22} {}",
            self.by
        )?;
        writeln!(f, "{:31}guard: {}", "", self.guard)?;
        write!(f, "{:31}how:   {}", "", self.how)
    }
}

pub(crate) fn summary(rows: &[Row]) -> String {
    let count = |verdict| rows.iter().filter(|row| row.verdict == verdict).count();
    let mut races: Vec<_> = rows.iter().map(|row| row.race).collect();
    races.dedup();
    format!(
        "{} guards against {} races: {} caught, {} NOT CAUGHT, {} skipped",
        rows.len(),
        races.len(),
        count(Verdict::Caught),
        count(Verdict::NotCaught),
        count(Verdict::Skipped),
    )
}
