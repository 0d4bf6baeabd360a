//! One seed after the other, each a process of its own, until something is found.

use std::io::{self, Read};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use thiserror::Error;

use super::execute::{Class, Outcome, simulate};
use super::program::{Number, Program};
use super::report::{Exploration, Finding, Shrunk};
use super::shrink::shrink;
use crate::faults::Fault;
use crate::options::Options;
use crate::plant::Plant;

/// What a simulation may take in real time. It ends by its own limits long before, if it takes steps.
const PATIENCE: Duration = Duration::from_secs(120);

/// Why there is no report.
#[derive(Debug, Error)]
pub(crate) enum SimError {
    #[error("a simulation could not be started: {0}")]
    Start(#[from] io::Error),
    #[error("seed {seed} has no operation and no fault {number}: it has 1 to {most}")]
    NoSuchNumber {
        seed: u64,
        number: Number,
        most: Number,
    },
    #[error("a simulation, {command}, could not be made: {said}")]
    Failed { command: String, said: String },
}

impl SimError {
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::NoSuchNumber { .. } => 2,
            Self::Start(_) | Self::Failed { .. } => 3,
        }
    }
}

/// What one simulation is.
#[derive(Clone, Copy)]
pub(super) struct Case<'o> {
    pub(super) options: &'o Options,
    pub(super) seed: u64,
}

impl Case<'_> {
    /// The arguments that make this very simulation.
    pub(super) fn arguments(self, schedule: u64, only: Option<&[Number]>) -> Vec<String> {
        let mut arguments = vec!["run".to_owned(), "--sim".to_owned()];
        let mut add = |name: &str, value: String| {
            arguments.extend([format!("--{name}"), value]);
        };
        add("seed", self.seed.to_string());
        if let Some(plant) = &self.options.plant {
            add("plant", plant.clone());
        }
        if let Some(faults) = &self.options.faults {
            add("faults", faults.clone());
        }
        if let Some(only) = only {
            let numbers: Vec<_> = only.iter().map(ToString::to_string).collect();
            add("only", numbers.join(","));
        }
        add("schedule", format!("{schedule:#x}"));
        arguments
    }

    /// Runs it, in a process of its own.
    pub(super) fn run(self, schedule: u64, only: Option<&[Number]>) -> Result<Outcome, SimError> {
        let arguments = self.arguments(schedule, only);
        let mut child = Command::new(std::env::current_exe()?)
            .args(&arguments)
            .arg("--alone")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let (out, err) = (text(child.stdout.take()), text(child.stderr.take()));
        let hung = match out.recv_timeout(PATIENCE) {
            Ok(out) => Ok(out),
            Err(RecvTimeoutError::Disconnected) => Ok(String::new()),
            Err(RecvTimeoutError::Timeout) => Err(child.kill()),
        };
        let status = child.wait()?;
        let died = match hung {
            Ok(out) => match serde_json::from_str(&out) {
                Ok(outcome) => return Ok(outcome),
                Err(_) => status.to_string(),
            },
            Err(_) => format!("it had taken no step for long, and was killed after {PATIENCE:?}"),
        };
        let said = err.recv().unwrap_or_default();
        if matches!(status.code(), Some(2 | 3)) {
            let command = arguments.join(" ");
            return Err(SimError::Failed {
                command,
                said: said.trim().to_owned(),
            });
        }
        Ok(Outcome::died(format!(
            "the simulation died: {died}; it said: {}",
            said.trim()
        )))
    }
}

/// What a process prints, once it has closed that.
fn text(pipe: Option<impl Read + Send + 'static>) -> mpsc::Receiver<String> {
    let (to, text) = mpsc::channel();
    thread::spawn(move || {
        let mut text = String::new();
        if let Some(mut pipe) = pipe {
            // What is cut off is no outcome, and judged as none.
            let _ = pipe.read_to_string(&mut text);
        }
        // Nobody may want it any more.
        let _ = to.send(text);
    });
    text
}

impl Outcome {
    fn died(what: String) -> Self {
        Self {
            class: Some(Class::Died),
            findings: vec![what],
            ..Self::default()
        }
    }
}

/// Explores, or replays what was found.
pub(crate) fn run(
    options: &Options,
    plant: Option<Plant>,
    faults: &[Fault],
    interrupted: &AtomicBool,
) -> Result<Exploration, SimError> {
    let program = Program::new(options.seed, faults);
    let numbers = program.numbers();
    for number in options.only.iter().flatten() {
        if !numbers.contains(number) {
            let most = numbers.last().copied().unwrap_or_default();
            return Err(SimError::NoSuchNumber {
                seed: options.seed,
                number: *number,
                most,
            });
        }
    }
    let only = options.only.as_deref();
    let replays = options.schedule.is_some() || only.is_some();
    let schedule = options.schedule.unwrap_or(options.seed);
    if options.alone {
        let program = only.map_or(program.clone(), |only| program.only(only));
        simulate(program, schedule, plant, faults);
    }
    let mut exploration = Exploration::new(options, plant);
    if replays {
        let case = Case {
            options,
            seed: options.seed,
        };
        let outcome = case.run(schedule, only)?;
        exploration.add(&outcome);
        if let Some(class) = outcome.class {
            let only = only.unwrap_or(&numbers);
            let finding = Finding::new(case, class, schedule, &program, only, outcome, None);
            exploration.finding = Some(finding);
        }
        return Ok(exploration);
    }
    let bar = bar(options);
    for nth in 0..options.schedules {
        // Relaxed: a flag that carries nothing else.
        if interrupted.load(Ordering::Relaxed) {
            exploration.interrupted = true;
            break;
        }
        let seed = options.seed.wrapping_add(nth);
        let case = Case { options, seed };
        let outcome = case.run(seed, None)?;
        exploration.add(&outcome);
        bar.inc(1);
        let Some(class) = outcome.class else {
            continue;
        };
        let program = Program::new(seed, faults);
        bar.set_message("shrinking what was found");
        let smallest = shrink(program.numbers(), seed, |only, schedule| {
            let part = case.run(schedule, Some(only))?;
            Ok::<_, SimError>(part.is_like(&outcome).then_some(part))
        })?;
        let shrunk = Shrunk {
            from: program.numbers().len(),
            simulations: smallest.tries,
        };
        let (schedule, only) = (smallest.schedule, &smallest.only[..]);
        let outcome = smallest.found.unwrap_or(outcome);
        let finding = Finding::new(case, class, schedule, &program, only, outcome, Some(shrunk));
        exploration.finding = Some(finding);
        break;
    }
    bar.finish_and_clear();
    Ok(exploration)
}

fn bar(options: &Options) -> ProgressBar {
    if options.json {
        return ProgressBar::hidden();
    }
    // Hides itself where standard error is no terminal.
    let bar = ProgressBar::new(options.schedules);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len} {elapsed}  {msg}") {
        bar.set_style(style);
    }
    bar
}
