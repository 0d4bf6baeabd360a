//! What was explored, and what was found.

use std::fmt;

use serde::Serialize;

use super::execute::{Class, Outcome};
use super::explore::Case;
use super::program::{Number, Program};
use crate::options::Options;
use crate::plant::{Plant, Planted};

/// How much was left out of a finding.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Shrunk {
    /// Operations and faults that there were.
    pub(super) from: usize,
    /// Simulations that it took.
    pub(super) simulations: usize,
}

/// What was found, with what is left of the program.
#[derive(Debug, Serialize)]
pub(crate) struct Finding {
    seed: u64,
    schedule: u64,
    class: Class,
    findings: Vec<String>,
    records: Vec<String>,
    only: Vec<Number>,
    operations: Vec<String>,
    steps: u64,
    nanoseconds: u64,
    trace: String,
    shrunk: Option<Shrunk>,
    /// The command.
    replay: String,
}

impl Finding {
    pub(super) fn new(
        case: Case<'_>,
        class: Class,
        schedule: u64,
        program: &Program,
        only: &[Number],
        outcome: Outcome,
        shrunk: Option<Shrunk>,
    ) -> Self {
        let part = program.only(only);
        let steps = part.steps.iter().map(ToString::to_string);
        let operations = steps.chain(part.events.iter().map(ToString::to_string));
        // Without the list, all of it.
        let all = only.len() == program.numbers().len();
        let arguments = case.arguments(schedule, (!all).then_some(only));
        Self {
            seed: case.seed,
            schedule,
            class,
            findings: outcome.findings,
            records: outcome.records,
            only: only.to_vec(),
            operations: operations.collect(),
            steps: outcome.steps,
            nanoseconds: outcome.nanoseconds,
            trace: format!("{:016x}", outcome.trace),
            shrunk,
            replay: format!("shootdown {}", arguments.join(" ")),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.findings {
            writeln!(f, "\nfound: {finding}")?;
        }
        writeln!(
            f,
            "\nwith seed {} and schedule {:#x}, in {} steps, {:.3} us; trace {}",
            self.seed,
            self.schedule,
            self.steps,
            self.nanoseconds as f64 / 1e3,
            self.trace
        )?;
        let count = self.operations.len();
        match self.shrunk {
            Some(Shrunk { from, simulations }) => writeln!(
                f,
                "\n{count} operations and faults, shrunk from {from} by {simulations} simulations"
            )?,
            None => writeln!(f, "\n{count} operations and faults")?,
        }
        for operation in &self.operations {
            writeln!(f, "{operation}")?;
        }
        if !self.records.is_empty() {
            writeln!(f, "\nthe flight recorder's newest records")?;
        }
        for record in &self.records {
            writeln!(f, "{record}")?;
        }
        writeln!(f, "\nreplay: {}", self.replay)
    }
}

/// What `run --sim` has done; `--json` prints it as it is.
#[derive(Debug, Serialize)]
pub(crate) struct Exploration {
    seed: u64,
    plant: Option<Planted>,
    faults: Option<String>,
    pub(super) interrupted: bool,
    schedules: u64,
    steps: u64,
    nanoseconds: u64,
    device_accesses: u64,
    shootdowns: u64,
    faults_injected: u64,
    /// Of all that happened, in all simulations.
    trace: String,
    #[serde(skip)]
    hash: u64,
    pub(super) finding: Option<Finding>,
    verdict: &'static str,
}

impl Exploration {
    pub(super) fn new(options: &Options, plant: Option<Plant>) -> Self {
        Self {
            seed: options.seed,
            plant: plant.map(Plant::planted),
            faults: options.faults.clone(),
            interrupted: false,
            schedules: 0,
            steps: 0,
            nanoseconds: 0,
            device_accesses: 0,
            shootdowns: 0,
            faults_injected: 0,
            trace: String::new(),
            hash: 0,
            finding: None,
            verdict: "pass",
        }
    }

    pub(super) fn add(&mut self, outcome: &Outcome) {
        self.schedules += 1;
        self.steps += outcome.steps;
        self.nanoseconds += outcome.nanoseconds;
        self.device_accesses += outcome.device_accesses;
        self.shootdowns += outcome.shootdowns;
        self.faults_injected += outcome.faults_injected;
        self.hash = (self.hash ^ outcome.trace).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.trace = format!("{:016x}", self.hash);
        if outcome.class.is_some() {
            self.verdict = "fail";
        }
    }

    pub(crate) fn passed(&self) -> bool {
        self.verdict == "pass"
    }
}

impl fmt::Display for Exploration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "simulated from seed {} on: {} schedules, {} steps, {:.3} s; trace {}{}",
            self.seed,
            self.schedules,
            self.steps,
            self.nanoseconds as f64 / 1e9,
            self.trace,
            if self.interrupted {
                " (interrupted)"
            } else {
                ""
            }
        )?;
        if let Some(Planted {
            name,
            race,
            meaning,
            ..
        }) = &self.plant
        {
            writeln!(f, "planted: {name} ({race}): {meaning}")?;
        }
        writeln!(
            f,
            "{} device accesses, {} shootdowns, {} faults injected",
            self.device_accesses, self.shootdowns, self.faults_injected
        )?;
        match (&self.finding, &self.plant) {
            (Some(finding), _) => write!(f, "{finding}")?,
            (None, Some(plant)) if plant.must_be_found => {
                writeln!(f, "\nthe planted bug was not found")?;
            }
            _ => {}
        }
        writeln!(f, "\n{}", self.verdict.to_uppercase())
    }
}
