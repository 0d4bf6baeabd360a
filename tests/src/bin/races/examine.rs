//! Runs the check of one entry, with the guard and without, and judges what it said.

use std::collections::HashMap;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::build::{Builds, Kind, Program};
use crate::entry::{Check, Entry};
use crate::error::{Error, at};
use crate::report::Verdict;
use crate::run::{Run, run};

/// Many times what the longest model takes.
const LIMIT: Duration = Duration::from_secs(180);
/// Seconds of one run of the `shootdown` command, which ends at its first finding.
const SECONDS: &str = "10";
/// What it may take beyond that.
const GRACE: Duration = Duration::from_secs(60);
/// Runs with different seeds until one finds the bug: whether a run meets it is a matter of timing.
const SEEDS: u64 = 3;

pub(crate) struct Finding {
    pub(crate) verdict: Verdict,
    pub(crate) seconds: f64,
    pub(crate) how: String,
}

impl Finding {
    fn new(caught: bool, seconds: f64, how: impl Into<String>) -> Self {
        Self {
            verdict: if caught {
                Verdict::Caught
            } else {
                Verdict::NotCaught
            },
            seconds,
            how: how.into(),
        }
    }
}

pub(crate) struct Examiner {
    builds: Builds,
    logs: PathBuf,
    /// Tests that have passed with every guard in place.
    passed: HashMap<(PathBuf, &'static str), ()>,
    shootdown: Option<PathBuf>,
}

impl Examiner {
    pub(crate) fn new() -> Result<Self, Error> {
        let builds = Builds::new()?;
        let logs = builds.logs();
        at(&logs, fs::create_dir_all(&logs))?;
        Ok(Self {
            builds,
            logs,
            passed: HashMap::new(),
            shootdown: None,
        })
    }

    pub(crate) fn examine(&mut self, entry: &Entry) -> Result<Finding, Error> {
        match entry.check {
            Check::Model { test } => self.core(entry, Kind::Models, "shootdown", test),
            Check::Test { target, test } | Check::Trap { target, test } => {
                self.core(entry, Kind::Core, target, test)
            }
            Check::Pair {
                target,
                with,
                without,
            } => {
                let program = self.builds.program(Kind::Drivers, target)?;
                self.baseline(entry, &program, with)?;
                let run = self.test(entry, &program, without, "")?;
                let found = is_one_pass(&run);
                let how = if found {
                    format!("{without} passes, which it does only if the bug is found")
                } else {
                    format!("{without}: {}", run.ended())
                };
                Ok(Finding::new(found, run.seconds, how))
            }
            Check::Run => self.oracle(entry),
            Check::Vm => self.vm(entry),
        }
    }

    fn log(&self, entry: &Entry, what: &str) -> PathBuf {
        self.logs.join(format!("{}-{what}.log", entry.plant))
    }

    fn test(
        &self,
        entry: &Entry,
        program: &Program,
        test: &str,
        planted: &str,
    ) -> Result<Run, Error> {
        let what = if planted.is_empty() {
            "with"
        } else {
            "without"
        };
        let mut command = Command::new(&program.path);
        command
            .args([test, "--exact", "--nocapture"])
            .current_dir(&program.package)
            .env("SHOOTDOWN_PLANTED", planted);
        run(&mut command, &self.log(entry, what), LIMIT)
    }

    /// The check passes with every guard in place.
    fn baseline(
        &mut self,
        entry: &Entry,
        program: &Program,
        test: &'static str,
    ) -> Result<(), Error> {
        let key = (program.path.clone(), test);
        if self.passed.contains_key(&key) {
            return Ok(());
        }
        let run = self.test(entry, program, test, "")?;
        if !is_one_pass(&run) {
            let why = if run.succeeded() {
                "there is no such test".to_owned()
            } else {
                run.ended()
            };
            return Err(Error::Baseline {
                race: entry.race,
                test: test.to_owned(),
                why,
                log: self.log(entry, "with"),
            });
        }
        self.passed.insert(key, ());
        Ok(())
    }

    /// A guard of core: the same test, twice.
    fn core(
        &mut self,
        entry: &Entry,
        kind: Kind,
        target: &str,
        test: &'static str,
    ) -> Result<Finding, Error> {
        let program = self.builds.program(kind, target)?;
        self.baseline(entry, &program, test)?;
        let run = self.test(entry, &program, test, entry.plant)?;
        if run.succeeded() {
            return Ok(Finding::new(false, run.seconds, "the check passes"));
        }
        let evidence = run.status.and_then(|status| match entry.check {
            Check::Trap { .. } => (status.signal() == Some(SIGABRT))
                .then(|| trap(&run.output))
                .flatten(),
            _ => objection(&run.output),
        });
        Ok(match evidence {
            Some(how) => Finding::new(true, run.seconds, how),
            None => Finding::new(
                false,
                run.seconds,
                format!("{}, without an objection of the check", run.ended()),
            ),
        })
    }

    /// The main job, clean and with the bug.
    fn oracle(&mut self, entry: &Entry) -> Result<Finding, Error> {
        let path = match self.shootdown.clone() {
            Some(path) => path,
            None => {
                let path = self.builds.shootdown()?;
                let clean = Self::job(&path, &self.log(entry, "clean"), "1", None)?;
                if !clean.succeeded() {
                    return Err(Error::Baseline {
                        race: entry.race,
                        test: "shootdown".to_owned(),
                        why: clean.ended(),
                        log: self.log(entry, "clean"),
                    });
                }
                self.shootdown.insert(path).clone()
            }
        };
        let mut seconds = 0.0;
        for seed in 1..=SEEDS {
            let log = self.log(entry, "run");
            let run = Self::job(&path, &log, &seed.to_string(), Some(entry.plant))?;
            seconds += run.seconds;
            if run.status.and_then(|status| status.code()) == Some(1) {
                let how = format!("seed {seed}: {}", stale(&run.output));
                return Ok(Finding::new(true, seconds, how));
            }
        }
        Ok(Finding::new(false, seconds, format!("{SEEDS} seeds pass")))
    }

    fn job(path: &Path, log: &Path, seed: &str, plant: Option<&str>) -> Result<Run, Error> {
        let mut command = Command::new(path);
        command.args(["run", "--json", "--seconds", SECONDS, "--seed", seed]);
        if let Some(plant) = plant {
            command.args(["--plant", plant]);
        }
        run(&mut command, log, GRACE)
    }

    /// A real kernel and an IOMMU that somebody has lied about: the tier's own negative control.
    fn vm(&self, entry: &Entry) -> Result<Finding, Error> {
        let path = self.builds.vm()?;
        let mut command = Command::new(path);
        command.arg("--json");
        // Its first run fetches what it needs.
        let limit = Duration::from_secs(900);
        let run = run(&mut command, &self.log(entry, "vm"), limit)?;
        if run.status.and_then(|status| status.code()) == Some(3) {
            let why = run.output.lines().last().unwrap_or_default();
            return Ok(Finding {
                verdict: Verdict::Skipped,
                seconds: run.seconds,
                how: format!("the virtual machine cannot be had: {why}"),
            });
        }
        let how = if run.succeeded() {
            "guest and witness both report the negative control"
        } else {
            "the tier fails"
        };
        Ok(Finding::new(run.succeeded(), run.seconds, how))
    }
}

const SIGABRT: i32 = 6;

/// Exactly one test ran, and passed.
fn is_one_pass(run: &Run) -> bool {
    run.succeeded() && run.output.contains("test result: ok. 1 passed")
}

/// What the allocator's trap said.
pub(crate) fn trap(output: &str) -> Option<String> {
    output
        .lines()
        .find(|line| line.starts_with("in the shootdown path: "))
        .map(|line| format!("aborted {line}"))
}

/// The first panic of a test, a model or the checker, and what it said. One of the code under test proves nothing, and one that the
/// test itself has a handler do neither.
pub(crate) fn objection(output: &str) -> Option<String> {
    const CHECKS: [&str; 4] = ["/tests/", "/tests.rs", "/model", "/loom-"];
    const PLANNED: &str = "planned";
    let lines: Vec<_> = output.lines().collect();
    let first = lines.windows(2).find_map(|pair| {
        let (_, place) = pair[0].split_once(" panicked at ")?;
        let is_check = CHECKS.iter().any(|check| place.contains(check));
        (is_check && pair[1] != PLANNED).then(|| pair[1])
    })?;
    // What was compared follows on lines of its own.
    let said = lines.iter().skip_while(|line| **line != first);
    let compared = |line: &&&str| {
        let line = line.trim();
        line.starts_with("left: ") || line.starts_with("right: ")
    };
    let rest = said.skip(1).take_while(compared).map(|line| line.trim());
    let all: Vec<_> = std::iter::once(first).chain(rest).collect();
    Some(short(&all.join(", ")))
}

/// Enough of a line to know it by.
fn short(line: &str) -> String {
    const MOST: usize = 160;
    let line = line.trim();
    match line.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line.to_owned(),
    }
}

/// What the oracle counted, of a run's report.
fn stale(output: &str) -> String {
    let report = output
        .lines()
        .find_map(|line| serde_json::from_str(line).ok());
    let Some(Value::Object(report)) = report else {
        return "a violation".to_owned();
    };
    let count = |name: &str| report.get(name).and_then(Value::as_u64).unwrap_or(0);
    format!(
        "{} stale accesses, {} data mismatches",
        count("stale_accesses"),
        count("data_mismatches")
    )
}
