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
    run: fn(Lab<D>) -> Result<(), Failure>,
}

fn all<D: Driver>() -> Vec<Scenario<D>> {
    vec![
        Scenario {
            name: "pages change, in whole and in part",
            run: changes::run,
        },
        Scenario {
            name: "pages change between their translation and the entry",
            run: races::between,
        },
        Scenario {
            name: "a miss while the pages change",
            run: races::during,
        },
        Scenario {
            name: "a page changes while its entry is being installed",
            run: races::installing,
        },
        Scenario {
            name: "pages change below work in flight",
            run: flight::below,
        },
        Scenario {
            name: "pages change beside work in flight",
            run: flight::elsewhere,
        },
        Scenario {
            name: "non-blocking operations are refused",
            run: refusal::by_others,
        },
        Scenario {
            name: "a non-blocking operation meets the driver's lock",
            run: refusal::by_the_driver,
        },
        Scenario {
            name: "the segment itself is unmapped",
            run: places::segment,
        },
        Scenario {
            name: "the session is given up, in each place",
            run: places::each,
        },
        Scenario {
            name: "the space exits with work in flight",
            run: places::exit,
        },
    ]
}

/// Runs everything, from a seed, each scenario for so long at most; calls `each` with what a scenario has seen.
pub(crate) fn run<D: Driver>(
    probe: Probe<'_, D>,
    (seed, patience): (u64, Duration),
    mut each: impl FnMut(Seen),
) {
    let mut found = false;
    for Scenario { name, run } in all::<D>() {
        let plan = Plan {
            seed,
            fault: None,
            deadlines: patient(),
        };
        let Ran { seen, hangs } = one(probe, name, plan, patience, run);
        found |= seen.finding.is_some();
        each(seen);
        if hangs {
            return;
        }
    }
    let mut left = vec![(None, "everything at once", stress::run as fn(Lab<D>) -> _)];
    left.extend(Fault::ALL.map(|fault| {
        let run = match fault {
            Fault::Endless => faults::endless,
            Fault::Dead => faults::dead,
            _ => faults::recovers,
        };
        (Some(fault), fault.name(), run as _)
    }));
    for (fault, name, run) in left {
        let why = match fault {
            // Whatever it found could be another face of that.
            _ if found => Some("a rule is broken already on a healthy device, one step at a time"),
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
            seed,
            fault,
            deadlines: if fault.is_some() {
                impatient()
            } else {
                patient()
            },
        };
        let Ran { seen, hangs } = one(probe, name, plan, patience, run);
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
    run: fn(Lab<D>) -> Result<(), Failure>,
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
