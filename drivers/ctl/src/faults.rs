//! Faults that a run can be given: the model's, drawn from the seed. A correct run passes with all of them, and accounts for
//! each.

use std::fmt;
use std::time::Duration;

#[cfg(sim)]
use rand::{Rng, rngs::SmallRng};
use serde::Serialize;
use shootdown_gru::GruStats;
use shootdown_hw_model::gru::{Counts, FaultPlan};
#[cfg(sim)]
use shootdown_hw_model::gru::{FaultKind, Scripted};
use thiserror::Error;

/// A fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fault {
    Lost,
    Stuck,
    Late,
    Reordered,
    Duplicated,
    PurgeInMiss,
    Delayed,
    SurvivesReset,
    Error,
    Nack,
}

#[derive(Debug, Error)]
#[error("no fault is called {name:?}: `--faults list` prints their names, `all` is all of them")]
pub(crate) struct NoSuchFault {
    name: String,
}

/// Of purges, how many never end in one way, and how many come late. At tens of thousands a second it is some a second, and each
/// costs a deadline.
const NEVER: f64 = 0.0004;
const RARELY: f64 = 0.0002;
/// Longer than the deadline of a flush, so that a wider one comes first.
const LATE_BY: Duration = Duration::from_millis(80);
/// Many times what a purge takes.
const SHORT: Duration = Duration::from_micros(100);

impl Fault {
    pub(crate) const ALL: [Fault; 10] = [
        Self::Lost,
        Self::Stuck,
        Self::Late,
        Self::Reordered,
        Self::Duplicated,
        Self::PurgeInMiss,
        Self::Delayed,
        Self::SurvivesReset,
        Self::Error,
        Self::Nack,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Lost => "lost",
            Self::Stuck => "stuck",
            Self::Late => "late",
            Self::Reordered => "reordered",
            Self::Duplicated => "duplicated",
            Self::PurgeInMiss => "purge-in-miss",
            Self::Delayed => "delayed",
            Self::SurvivesReset => "survives-reset",
            Self::Error => "error",
            Self::Nack => "nack",
        }
    }

    pub(crate) fn meaning(self) -> &'static str {
        match self {
            Self::Lost => "a purge is done, and its completion never comes",
            Self::Stuck => "a purge never begins, and its handle stays active",
            Self::Late => "a purge, and its completion, come long after the deadline",
            Self::Reordered => "later purges overtake earlier ones",
            Self::Duplicated => "a purge happens once more, unasked",
            Self::PurgeInMiss => "a purge comes between a miss and the answer to it",
            Self::Delayed => "steps of handles, accesses, interrupts and resets take longer",
            Self::SurvivesReset => "every second reset is not heeded, and the chiplet goes on",
            Self::Error => "an instruction ends with an error that is worth another try",
            Self::Nack => "a message is not delivered, or its lines are left to software",
        }
    }

    /// `all`, or names with commas between them.
    pub(crate) fn by_names(names: &str) -> Result<Vec<Self>, NoSuchFault> {
        if names == "all" {
            return Ok(Self::ALL.to_vec());
        }
        let by_name = |name: &str| {
            let found = Self::ALL.into_iter().find(|fault| fault.name() == name);
            found.ok_or_else(|| NoSuchFault {
                name: name.to_owned(),
            })
        };
        names.split(',').map(by_name).collect()
    }

    /// One of it, at a place that is drawn.
    #[cfg(sim)]
    pub(crate) fn scripted(self, device: u32, rng: &mut SmallRng) -> Scripted {
        let mut up_to = |most| rng.random_range(1..=most);
        let (kind, nth, by) = match self {
            Self::Lost => (FaultKind::Lost, up_to(24), Duration::ZERO),
            Self::Stuck => (FaultKind::Stuck, up_to(24), Duration::ZERO),
            Self::Late => (FaultKind::Late, up_to(24), LATE_BY),
            Self::Reordered => (FaultKind::Reordered, up_to(24), SHORT),
            Self::Duplicated => (FaultKind::Duplicated, up_to(24), SHORT),
            Self::PurgeInMiss => (FaultKind::PurgeInMiss, up_to(16), Duration::ZERO),
            Self::Delayed => (FaultKind::Delayed, up_to(64), 10 * SHORT),
            Self::SurvivesReset => (FaultKind::SurvivesReset, up_to(2), Duration::ZERO),
            Self::Error => (FaultKind::Error, up_to(64), Duration::ZERO),
            Self::Nack => (FaultKind::Nack, up_to(4), Duration::ZERO),
        };
        Scripted {
            device,
            kind,
            nth,
            by,
        }
    }

    /// Adds it to what goes wrong.
    pub(crate) fn inject(self, plan: &mut FaultPlan) {
        match self {
            Self::Lost => plan.lost = NEVER,
            Self::Stuck => plan.stuck = NEVER,
            Self::Late => (plan.late, plan.late_by) = (RARELY, LATE_BY),
            Self::Reordered => plan.jitter = SHORT,
            Self::Duplicated => (plan.duplicated, plan.duplicate_after) = (0.01, SHORT),
            Self::PurgeInMiss => plan.purge_in_miss = 0.01,
            Self::Delayed => (plan.delayed, plan.delay) = (0.0005, 10 * SHORT),
            Self::SurvivesReset => plan.survives_reset = 0.5,
            Self::Error => plan.error = 0.001,
            Self::Nack => plan.nack = 0.1,
        }
    }
}

/// What the model has injected, by its own count.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Injected {
    lost: u64,
    stuck: u64,
    late: u64,
    reordered: u64,
    duplicated: u64,
    purge_in_miss: u64,
    delayed: u64,
    survives_reset: u64,
    error: u64,
    nack: u64,
}

impl Injected {
    /// Those that end by themselves, the last two at once.
    fn by_itself(&self) -> u64 {
        let purges = self.late + self.reordered + self.duplicated + self.purge_in_miss;
        purges + self.delayed + self.error + self.nack
    }
}

/// What became of it. Of purges that never end (lost, stuck) the driver counts what stood in for each; that a chiplet did not come
/// back from a reset is what the driver sees of one that it survived; everything else ends by itself, or by a reset.
///
/// A wider flush stands in for all purges before it, and a reset for everything, so that these are numbers of faults and not of
/// flushes and resets.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Accounted {
    /// Ended by themselves.
    over: u64,
    /// Ended by a reset, before they ended by themselves.
    cut_short: u64,
    /// Purges that never ended: a wider flush was acknowledged instead.
    recovered_by_flush: u64,
    /// Purges that never ended, until a reset.
    recovered_by_reset: u64,
    /// Purges that never ended, and that nothing has stood in for yet.
    open: u64,
    /// Of the last three, purges that would have ended if a reset had not come: no faults.
    no_faults: u64,
    /// Resets that failed: the device went into quarantine, or stayed there.
    quarantined: u64,
}

/// The faults of a run.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Faults {
    /// What it was given.
    pub(crate) given: Vec<&'static str>,
    pub(crate) injected: u64,
    /// Equal, or something got lost.
    pub(crate) accounted: u64,
    pub(crate) by_kind: Injected,
    pub(crate) by_outcome: Accounted,
    /// Times that a device went into quarantine, and that the run brought one back.
    pub(crate) quarantines: u64,
    pub(crate) recoveries: u64,
}

impl Faults {
    /// Takes the counts of all chiplets, and of the driver over them.
    pub(crate) fn count(&mut self, chiplets: impl Iterator<Item = Counts>, driver: &GruStats) {
        let (mut by_kind, mut by_outcome) = (Injected::default(), Accounted::default());
        for counts in chiplets {
            by_kind.lost += counts.completions_lost;
            by_kind.stuck += counts.purges_stuck;
            by_kind.late += counts.completions_late;
            by_kind.reordered += counts.completions_reordered;
            by_kind.duplicated += counts.purges_duplicated;
            by_kind.purge_in_miss += counts.purges_in_miss;
            by_kind.delayed += counts.steps_delayed;
            by_kind.survives_reset += counts.resets_survived;
            by_kind.error += counts.errors;
            by_kind.nack += counts.nacks;
            by_outcome.over += counts.faults_over;
            by_outcome.cut_short += counts.faults_cut_short;
            by_outcome.no_faults += counts.purges_cut_short;
        }
        by_outcome.recovered_by_flush = driver.purges_covered;
        by_outcome.recovered_by_reset = driver.purges_reset;
        by_outcome.open = driver.purges_open;
        by_outcome.quarantined = driver.resets_failed;
        (self.by_kind, self.by_outcome) = (by_kind, by_outcome);
        let Injected {
            lost,
            stuck,
            survives_reset,
            ..
        } = by_kind;
        self.injected = lost + stuck + by_kind.by_itself() + survives_reset;
        let o = by_outcome;
        let never = o.recovered_by_flush + o.recovered_by_reset + o.open;
        self.accounted = (never + o.over + o.cut_short + o.quarantined).saturating_sub(o.no_faults);
    }

    /// What does not add up: each kind of fault by itself, so that one too many does not make up for one too few.
    pub(crate) fn unaccounted(&self) -> Vec<String> {
        let (k, o) = (self.by_kind, self.by_outcome);
        let equations = [
            (
                "purges that never ended, and those that a reset cut short",
                k.lost + k.stuck + o.no_faults,
                o.recovered_by_flush + o.recovered_by_reset + o.open,
            ),
            (
                "faults that end by themselves",
                k.by_itself(),
                o.over + o.cut_short,
            ),
            ("resets that were survived", k.survives_reset, o.quarantined),
        ];
        let wrong = equations
            .into_iter()
            .filter(|(_, injected, accounted)| injected != accounted);
        wrong
            .map(|(what, injected, accounted)| {
                format!("{what}: {injected} injected, {accounted} accounted for")
            })
            .collect()
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.given.is_empty() {
            return Ok(());
        }
        let (k, o) = (self.by_kind, self.by_outcome);
        writeln!(
            f,
            "  faults injected: {} lost, {} stuck, {} late, {} reordered, {} duplicated, {} in a miss, {} delayed, {} resets survived, {} errors, {} nacks",
            k.lost,
            k.stuck,
            k.late,
            k.reordered,
            k.duplicated,
            k.purge_in_miss,
            k.delayed,
            k.survives_reset,
            k.error,
            k.nack
        )?;
        writeln!(
            f,
            "  accounted for: {} of {}: {} over, {} cut short by a reset, {} recovered by a wider flush, {} by a reset, {} open, {} quarantined",
            self.accounted,
            self.injected,
            o.over,
            o.cut_short,
            o.recovered_by_flush,
            o.recovered_by_reset,
            o.open,
            o.quarantined
        )?;
        writeln!(
            f,
            "  devices: {} times in quarantine, {} times brought back; {} purges cut short by a reset were no faults",
            self.quarantines, self.recoveries, o.no_faults
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_all_or_a_list_or_an_error_that_says_which() {
        assert_eq!(Fault::by_names("all").unwrap(), Fault::ALL);
        let two = Fault::by_names("late,lost").unwrap();
        assert_eq!(two, [Fault::Late, Fault::Lost]);
        for name in Fault::ALL.map(Fault::name) {
            assert_eq!(Fault::by_names(name).unwrap().len(), 1);
        }
        let error = Fault::by_names("lost,los").unwrap_err();
        assert!(error.to_string().contains("\"los\""), "{error}");
        assert!(Fault::by_names("").is_err());
    }

    #[test]
    fn each_fault_changes_the_plan() {
        for fault in Fault::ALL {
            let mut plan = FaultPlan::default();
            fault.inject(&mut plan);
            assert_ne!(plan, FaultPlan::default(), "{fault:?}");
        }
    }

    /// One too many in one place does not make up for one too few in another.
    #[test]
    fn one_that_is_missing_is_found_whatever_the_sums_say() {
        let mut faults = Faults {
            by_kind: Injected {
                lost: 3,
                late: 5,
                survives_reset: 1,
                ..Injected::default()
            },
            by_outcome: Accounted {
                over: 4,
                cut_short: 1,
                recovered_by_flush: 2,
                recovered_by_reset: 3,
                no_faults: 2,
                quarantined: 1,
                ..Accounted::default()
            },
            ..Faults::default()
        };
        assert_eq!(faults.unaccounted(), Vec::<String>::new());
        faults.by_outcome.over += 1;
        faults.by_outcome.quarantined -= 1;
        assert_eq!(faults.unaccounted().len(), 2);
    }
}
