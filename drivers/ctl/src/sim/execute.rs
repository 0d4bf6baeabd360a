//! One simulation, from the devices to what was found. It is a process of its own: the state of the process is part of what has to
//! be the same, and it ends wherever its threads are.

use std::sync::{Mutex, OnceLock, Weak};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use shootdown::{AddressSpace, Memory, Operations};
use shootdown_gru::Config;
use shootdown_hw_model::gru::{ChipletConfig, FaultPlan, Model};
use shootdown_hw_model::{Bus, ModelError, ModelMemory};
use shootdown_primitive::sim::{self, End, Settings, SoFar, Waiting};
use shootdown_primitive::sync::{Arc, atomic::Ordering};
use shootdown_primitive::thread;

use super::hand::Hand;
use super::program::Program;
use crate::faults::{Fault, Faults};
use crate::finish::finish;
use crate::plant::Plant;
use crate::recovery::Recovery;
use crate::report::Report;
use crate::run::{attach, deadlines, driver};
use crate::shared::Shared;

/// 32 MiB.
const FRAMES: u64 = 1 << 13;
const ARENA: u64 = 12 << 20;
/// Far more than a program needs that ends.
const STEPS: u64 = 20_000_000;
/// Every wait of a program ends within its deadline, some seconds at most.
const TIME: Duration = Duration::from_secs(300);
/// How often it is looked whether a device can be brought back.
const LOOK: Duration = Duration::from_millis(20);
/// Records of the flight recorder that are shown.
const RECORDS: usize = 24;

/// What kind of thing was found: shrinking does not exchange one for another.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Class {
    StaleAccess,
    DataMismatch,
    Deadlock,
    NoEnd,
    Panic,
    /// The process died, or hung.
    Died,
    /// Something leaked, an error that should not be, a fault that is not accounted for.
    Other,
}

/// What came of a simulation.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub(super) struct Outcome {
    pub(super) class: Option<Class>,
    pub(super) findings: Vec<String>,
    /// The newest of the flight recorder of the shared space, the oldest first.
    pub(super) records: Vec<String>,
    pub(super) steps: u64,
    pub(super) nanoseconds: u64,
    /// A hash of all that happened.
    pub(super) trace: u64,
    pub(super) device_accesses: u64,
    pub(super) shootdowns: u64,
    pub(super) faults_injected: u64,
}

impl Outcome {
    /// Whether the same thing was found. What is nothing else is told apart by its words, without the numbers.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        let words = |outcome: &Self| {
            let first = outcome.findings.first().map(String::as_str);
            let mut words = first.unwrap_or_default().to_owned();
            words.retain(|letter| !letter.is_ascii_digit());
            words
        };
        let told_apart = self.class == Some(Class::Other);
        self.class == other.class && (!told_apart || words(self) == words(other))
    }
}

/// What the body leaves for the end.
static REPORT: Mutex<Option<Report>> = Mutex::new(None);
static RECORDED: Mutex<Vec<String>> = Mutex::new(Vec::new());
static SHARED: OnceLock<Weak<Shared>> = OnceLock::new();

/// Runs `program` under `schedule`, prints the outcome as one JSON object, and ends the process.
pub(super) fn simulate(
    program: Program,
    schedule: u64,
    plant: Option<Plant>,
    faults: &[Fault],
) -> ! {
    let settings = Settings {
        schedule,
        steps: STEPS,
        time: TIME,
    };
    let faults = faults.to_vec();
    sim::run(
        settings,
        move || {
            let report = run(&program, plant, &faults).unwrap_or_else(|error| Report {
                findings: vec![format!("the model could not be made: {error}")],
                ..Report::default()
            });
            *lock(&REPORT) = Some(report);
        },
        |end| match serde_json::to_string(&outcome(end)) {
            Ok(text) => {
                println!("{text}");
                0
            }
            Err(error) => {
                eprintln!("error: the outcome could not be written: {error}");
                3
            }
        },
    )
}

/// Nothing is done under these locks but an assignment.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn chiplets(program: &Program, plant: Option<Plant>) -> ChipletConfig {
    let mut config = ChipletConfig {
        tlb_entries: 64,
        latency: program.latency,
        faults: FaultPlan {
            // It lives as long as the process.
            scripted: program.scripted().leak(),
            ..FaultPlan::default()
        },
        ..ChipletConfig::default()
    };
    if let Some(plant) = plant {
        plant.hardware(&mut config);
    }
    config
}

fn run(program: &Program, plant: Option<Plant>, faults: &[Fault]) -> Result<Report, ModelError> {
    let bus = Bus::new(FRAMES)?;
    let model = Model::new(&bus, program.devices, chiplets(program, plant));
    let config = Config {
        asids: 8..=8 * program.asids,
        ..driver(plant, Operations::CALLS)
    };
    let gru = attach(&model, config);
    let memory = ModelMemory::new(&bus, ARENA)?;
    let faulty = !faults.is_empty() || plant.is_some_and(|plant| !plant.must_be_found());
    let arena = memory.arena();
    let space = AddressSpace::managed(memory, deadlines());
    let shared = Arc::new(Shared::new(&bus, &gru, space, arena, faulty));
    // Once a process.
    let _ = SHARED.set(Arc::downgrade(&shared));
    let mut report = Report {
        plant: plant.map(Plant::planted),
        faults: Faults {
            given: faults.iter().map(|fault| fault.name()).collect(),
            ..Faults::default()
        },
        ..Report::default()
    };
    let threads: Vec<_> = (0..program.threads)
        .map(|nth| {
            let steps = program.steps.iter().filter(|step| step.thread == nth);
            let steps: Vec<_> = steps.copied().collect();
            let hand = Hand::new(shared.clone());
            let name = thread::Builder::new().name(format!("thread {nth}"));
            name.spawn(move || hand.run(&steps))
        })
        .collect();
    let mut recovery = Recovery::new(gru.devices(), &shared.space);
    for thread in threads {
        match thread {
            Ok(thread) => {
                while !thread.is_finished() {
                    thread::sleep(LOOK);
                    recovery.tick();
                }
                report.findings.extend(thread.join().into_iter().flatten());
            }
            Err(error) => report.findings.push(format!("no thread: {error}")),
        }
    }
    shared.stop.store(true, Ordering::Relaxed);
    if !recovery.finish() {
        let what = "a device did not come back from quarantine";
        report.findings.push(what.to_owned());
    }
    report.findings.append(&mut recovery.findings);
    report.faults.recoveries = recovery.recoveries;
    *lock(&RECORDED) = recorded(&shared);
    if let Some(shared) = Arc::into_inner(shared) {
        finish(&mut report, shared, &gru, &model);
    }
    let Report {
        releases,
        releases_expected,
        leaked,
        ..
    } = report;
    if releases != releases_expected {
        let what = format!("{releases} releases, and {releases_expected} expected");
        report.findings.push(what);
    }
    if leaked.any() {
        report.findings.push(format!("leaked: {leaked:?}"));
    }
    Ok(report)
}

fn recorded(shared: &Shared) -> Vec<String> {
    let records = shared.space.records();
    let newest = &records[records.len().saturating_sub(RECORDS)..];
    newest.iter().map(ToString::to_string).collect()
}

fn waiting(all: &[Waiting]) -> String {
    let each = all
        .iter()
        .map(|one| format!("{} for {} at {}", one.thread, one.what, one.at));
    each.collect::<Vec<_>>().join("; ")
}

/// Nobody runs any more.
fn outcome(end: End) -> Outcome {
    let SoFar {
        steps,
        nanoseconds,
        trace,
    } = sim::so_far();
    let mut report = lock(&REPORT).take().unwrap_or_default();
    let mut records = std::mem::take(&mut *lock(&RECORDED));
    let mut stale = report.stale_accesses;
    let ended = match end {
        End::Done => None,
        End::Deadlock(all) => Some((Class::Deadlock, format!("a deadlock: {}", waiting(&all)))),
        End::StepLimit(all) => Some((
            Class::NoEnd,
            format!("no end within {STEPS} steps; waiting: {}", waiting(&all)),
        )),
        End::Panicked { thread, message } => {
            Some((Class::Panic, format!("{thread} panicked: {message}")))
        }
    };
    if let (Some(_), Some(shared)) = (&ended, SHARED.get().and_then(Weak::upgrade)) {
        records = recorded(&shared);
        let oracle = shared.bus.oracle();
        stale = oracle.stale_accesses();
        let found = oracle.findings();
        report
            .findings
            .extend(found.iter().take(4).map(ToString::to_string));
        report.device_accesses = oracle.accesses();
        // Its threads are where they are; nothing of it can be given back.
        std::mem::forget(shared);
    }
    let class = if stale > 0 {
        Some(Class::StaleAccess)
    } else if report.data_mismatches > 0 {
        Some(Class::DataMismatch)
    } else if let Some((class, _)) = &ended {
        Some(*class)
    } else if !report.findings.is_empty() {
        Some(Class::Other)
    } else {
        None
    };
    report.findings.extend(ended.map(|(_, what)| what));
    Outcome {
        class,
        findings: report.findings,
        records,
        steps,
        nanoseconds,
        trace,
        device_accesses: report.device_accesses,
        shootdowns: report.shootdowns,
        faults_injected: report.faults.injected,
    }
}
