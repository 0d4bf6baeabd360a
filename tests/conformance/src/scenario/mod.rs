//! What is asked of a driver, one thing at a time, each over a rig of its own.

mod changes;
mod faults;
mod flight;
mod places;
mod races;
mod refusal;
mod stress;

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use crate::author::{Driver, Failure, Fault, Hardware};
use crate::lab::{Lab, Plan, Probe, impatient, patient};
use crate::log::{Log, Seen};
use crate::rule::Rule;

/// A scenario.
struct Scenario<D: Driver> {
    name: &'static str,
    fault: Option<Fault>,
    run: Run<D>,
}

/// What a scenario does with its lab.
type Run<D> = fn(Lab<D>) -> Result<(), Failure>;

const EVERYTHING: &str = "everything at once";

fn all<D: Driver>() -> impl Iterator<Item = Scenario<D>> {
    let healthy = [
        ("pages change, in whole and in part", changes::run as Run<D>),
        (
            "pages change between their translation and the entry",
            races::between,
        ),
        ("a miss while the pages change", races::during),
        (
            "a page changes while its entry is being installed",
            races::installing,
        ),
        ("pages change below work in flight", flight::below),
        ("pages change beside work in flight", flight::elsewhere),
        ("non-blocking operations are refused", refusal::by_others),
        (
            "a non-blocking operation meets the driver's lock",
            refusal::by_the_driver,
        ),
        ("the segment itself is unmapped", places::segment),
        ("the session is given up, in each place", places::each),
        ("the space exits with work in flight", places::exit),
        (EVERYTHING, stress::run),
    ];
    let healthy = healthy.map(|(name, run)| Scenario {
        name,
        fault: None,
        run,
    });
    let sick = Fault::ALL.map(|fault| Scenario {
        name: fault.name(),
        fault: Some(fault),
        run: match fault {
            Fault::Endless => faults::endless as Run<D>,
            Fault::Dead => faults::dead,
            _ => faults::recovers,
        },
    });
    healthy.into_iter().chain(sick)
}

/// How everything is run.
pub(crate) struct How<'h> {
    pub(crate) seed: u64,
    /// For each scenario.
    pub(crate) patience: Duration,
    /// What a scenario's name has to contain.
    pub(crate) only: &'h str,
}

/// Runs everything; calls `each` with what a scenario has seen.
pub(crate) fn run<D: Driver>(probe: Probe<'_, D>, how: &How<'_>, mut each: impl FnMut(Seen)) {
    let mut found = false;
    for Scenario { name, fault, run } in all::<D>() {
        if !name.contains(how.only) {
            continue;
        }
        // A healthy device, one step at a time.
        let simple = fault.is_none() && name != EVERYTHING;
        let why = match fault {
            // Whatever it found could be another face of that.
            _ if found && !simple => {
                Some("a rule is broken already on a healthy device, one step at a time")
            }
            Some(fault) if !D::Hardware::FAULTS.contains(&fault) => {
                Some("the model of the device cannot do this")
            }
            _ => None,
        };
        if let Some(why) = why {
            let log = Log::new(name);
            log.skip(why);
            each(log.take());
            continue;
        }
        let plan = Plan {
            seed: how.seed,
            fault,
            deadlines: if fault.is_some() {
                impatient()
            } else {
                patient()
            },
        };
        let Ran { seen, hangs } = one(probe, name, plan, how.patience, run);
        found |= simple && seen.finding.is_some();
        each(seen);
        if hangs {
            return;
        }
    }
}

/// What came of a scenario.
struct Ran {
    seen: Seen,
    hangs: bool,
}

/// Runs one scenario on a thread of its own.
fn one<D: Driver>(
    probe: Probe<'_, D>,
    name: &'static str,
    plan: Plan,
    patience: Duration,
    run: Run<D>,
) -> Ran {
    let log = Arc::new(Log::new(name));
    let lab = match Lab::new(probe, &log, &plan) {
        Ok(lab) => lab,
        Err(error) => {
            log.find(Rule::Works, || {
                format!("the driver does not come up: {error}")
            });
            let seen = log.take();
            return Ran { seen, hangs: false };
        }
    };
    let (over, waits) = mpsc::channel::<()>();
    let own = Arc::clone(&log);
    let thread = std::thread::Builder::new()
        .name("scenario".to_owned())
        .spawn(move || {
            if let Err(error) = run(lab) {
                let rule = if own.stats().is_some_and(|stats| stats.panics > 0) {
                    Rule::Panics
                } else {
                    Rule::Works
                };
                own.find(rule, || format!("it could not go on: {error}"));
            }
            own.watch(None);
            drop(over);
        });
    let hangs = match thread {
        Ok(thread) => match waits.recv_timeout(patience) {
            Err(RecvTimeoutError::Timeout) => {
                let rule = if log.stats().is_some_and(|stats| stats.overdue > 0) {
                    Rule::Blocks
                } else {
                    Rule::Hangs
                };
                log.find(rule, || {
                    format!("after {patience:?} it was not over: {}", log.newest())
                });
                true
            }
            _ => {
                if thread.join().is_err() {
                    log.find(Rule::Panics, || {
                        "the driver panicked; the thread has printed it".to_owned()
                    });
                }
                false
            }
        },
        Err(error) => {
            log.skip(format!("no thread for it: {error}"));
            false
        }
    };
    let seen = log.take();
    Ran { seen, hangs }
}
