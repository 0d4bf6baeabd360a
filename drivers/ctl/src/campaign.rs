//! Every planted bug, with many seeds: whether the runs find them, and how soon.
//!
//! Each run is a process of its own: one that hangs is killed and counts as not found, and none inherits what another leaked.

use std::fmt;
use std::io::{self, Read};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use thiserror::Error;

use crate::options::PlantsOptions;
use crate::plant::Plant;
use crate::status;

/// Of the runs with a planted bug, per cent that have to find it.
const ENOUGH: u64 = 95;
/// What a run may take beyond its seconds. It gives itself up before.
const GRACE: Duration = Duration::from_secs(45);
/// How often a run is looked at.
const LOOK: Duration = Duration::from_millis(10);

#[derive(Debug, Error)]
pub(crate) enum CampaignError {
    #[error("a run could not be started: {0}")]
    Start(io::Error),
    #[error("{plant}, seed {seed}: the run could not be made: {said}")]
    Run {
        plant: &'static str,
        seed: u64,
        said: String,
    },
}

/// What came of the runs with one planted bug.
#[derive(Debug, Serialize)]
struct Row {
    name: &'static str,
    race: &'static str,
    /// Whether a run has to find it; if not, it has to pass, with an escalation or a quarantine counted.
    must_be_found: bool,
    runs: u64,
    /// Runs that did what they had to.
    good: u64,
    /// Runs that were killed.
    hung: u64,
    /// Seconds to the finding.
    median_seconds: f64,
    longest_seconds: f64,
    #[serde(skip)]
    times: Vec<f64>,
    /// Seeds that did not do what they had to.
    bad_seeds: Vec<u64>,
}

impl Row {
    fn new(plant: Plant) -> Self {
        Self {
            name: plant.name(),
            race: plant.race(),
            must_be_found: plant.must_be_found(),
            runs: 0,
            good: 0,
            hung: 0,
            median_seconds: 0.0,
            longest_seconds: 0.0,
            times: Vec::new(),
            bad_seeds: Vec::new(),
        }
    }

    fn add(&mut self, seed: u64, ended: &Ended) {
        self.runs += 1;
        match *ended {
            Ended::Good { seconds } => {
                self.good += 1;
                self.times.push(seconds);
                self.times.sort_by(f64::total_cmp);
                self.median_seconds = self.times[self.times.len() / 2];
                self.longest_seconds = self.times[self.times.len() - 1];
            }
            Ended::Bad => self.bad_seeds.push(seed),
            Ended::Hung => {
                self.hung += 1;
                self.bad_seeds.push(seed);
            }
        }
    }

    fn passed(&self) -> bool {
        let needed = if self.must_be_found { ENOUGH } else { 100 };
        self.good * 100 >= self.runs * needed
    }
}

/// What came of all runs; `--json` prints it as it is.
#[derive(Debug, Serialize)]
pub(crate) struct Campaign {
    seeds: u64,
    seconds: u64,
    interrupted: bool,
    plants: Vec<Row>,
    verdict: &'static str,
}

impl Campaign {
    pub(crate) fn passed(&self) -> bool {
        self.verdict == "pass"
    }
}

impl fmt::Display for Campaign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} seeds of each planted bug, at most {} s a run{}\n",
            self.seeds,
            self.seconds,
            if self.interrupted {
                " (interrupted: only what was done until then)"
            } else {
                ""
            }
        )?;
        writeln!(
            f,
            "  {:<22} {:<5} {:>16}   {:>10} {:>10}",
            "plant", "race", "", "median", "longest"
        )?;
        for row in &self.plants {
            let what = if row.must_be_found { "found" } else { "passed" };
            let count = format!("{what} {} of {}", row.good, row.runs);
            write!(f, "  {:<22} {:<5} {count:>16}", row.name, row.race)?;
            if row.must_be_found {
                write!(
                    f,
                    "   {:>8.2} s {:>8.2} s",
                    row.median_seconds, row.longest_seconds
                )?;
            }
            if !row.bad_seeds.is_empty() {
                write!(f, "   not with seeds {:?}", row.bad_seeds)?;
            }
            if row.hung > 0 {
                write!(f, ", {} of them killed", row.hung)?;
            }
            writeln!(f)?;
        }
        writeln!(
            f,
            "\n{}: at least {ENOUGH} % of the runs have to find their bug",
            self.verdict.to_uppercase()
        )
    }
}

enum Ended {
    /// It did what it had to, after so many seconds.
    Good {
        seconds: f64,
    },
    Bad,
    /// It was killed.
    Hung,
}

/// Runs every planted bug with every seed.
pub(crate) fn run(
    options: &PlantsOptions,
    interrupted: &AtomicBool,
) -> Result<Campaign, CampaignError> {
    let mut campaign = Campaign {
        seeds: options.seeds,
        seconds: options.seconds,
        interrupted: false,
        plants: Vec::new(),
        verdict: "fail",
    };
    let bar = if options.json {
        ProgressBar::hidden()
    } else {
        // Hides itself where standard error is no terminal.
        ProgressBar::new(Plant::ALL.len() as u64 * options.seeds)
    };
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len} {elapsed}  {msg}") {
        bar.set_style(style);
    }
    'all: for plant in Plant::ALL {
        let mut row = Row::new(plant);
        for seed in 1..=options.seeds {
            bar.set_message(format!("{}, seed {seed}", plant.name()));
            match one(plant, seed, options.seconds, interrupted)? {
                Some(ended) => row.add(seed, &ended),
                None => {
                    campaign.interrupted = true;
                    if row.runs > 0 {
                        campaign.plants.push(row);
                    }
                    break 'all;
                }
            }
            bar.inc(1);
        }
        campaign.plants.push(row);
    }
    bar.finish_and_clear();
    if campaign.plants.iter().all(Row::passed) {
        campaign.verdict = "pass";
    }
    Ok(campaign)
}

/// One run; `None` if it was interrupted.
fn one(
    plant: Plant,
    seed: u64,
    seconds: u64,
    interrupted: &AtomicBool,
) -> Result<Option<Ended>, CampaignError> {
    let program = std::env::current_exe().map_err(CampaignError::Start)?;
    let mut child = Command::new(program)
        .args(["run", "--json", "--plant", plant.name()])
        .args(["--seed", &seed.to_string()])
        .args(["--seconds", &seconds.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(CampaignError::Start)?;
    let deadline = Instant::now() + Duration::from_secs(seconds) + GRACE;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(CampaignError::Start)? {
            break status;
        }
        // Relaxed: a flag that carries nothing else. A terminal's Ctrl-C has reached the run as well.
        let stop = interrupted.load(Ordering::Relaxed);
        if stop || Instant::now() >= deadline {
            // It may have ended meanwhile.
            let _ = child.kill();
            child.wait().map_err(CampaignError::Start)?;
            status::forget(child.id());
            return Ok((!stop).then_some(Ended::Hung));
        }
        thread::sleep(LOOK);
    };
    if interrupted.load(Ordering::Relaxed) {
        return Ok(None);
    }
    let (out, said) = (text(child.stdout.take()), text(child.stderr.take()));
    if matches!(status.code(), Some(2 | 3)) {
        return Err(CampaignError::Run {
            plant: plant.name(),
            seed,
            said: said.trim().to_owned(),
        });
    }
    Ok(Some(judge(plant, &out)))
}

/// What a process has printed. A report is far smaller than a pipe holds.
fn text(pipe: Option<impl Read>) -> String {
    let mut text = String::new();
    if let Some(mut pipe) = pipe {
        // What is cut off is no report, and judged as none.
        let _ = pipe.read_to_string(&mut text);
    }
    text
}

/// A run that printed no report has crashed.
fn judge(plant: Plant, report: &str) -> Ended {
    let Ok(report) = serde_json::from_str::<serde_json::Value>(report) else {
        return Ended::Bad;
    };
    let number = |path| report.pointer(path).and_then(serde_json::Value::as_f64);
    if plant.must_be_found() {
        return match number("/plant/found_after_seconds") {
            Some(seconds) => Ended::Good { seconds },
            None => Ended::Bad,
        };
    }
    let counted = ["/escalations/timeouts", "/quarantined"]
        .into_iter()
        .any(|path| number(path).is_some_and(|count| count > 0.0));
    match number("/seconds") {
        Some(seconds) if report["verdict"] == "pass" && counted => Ended::Good { seconds },
        _ => Ended::Bad,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bug_may_be_missed_once_in_twenty_and_no_run_that_has_to_pass_may_fail() {
        for (plant, bad, passes) in [
            (Plant::NoFlush, 1, true),
            (Plant::NoFlush, 2, false),
            (Plant::LostCompletion, 0, true),
            (Plant::LostCompletion, 1, false),
        ] {
            let mut row = Row::new(plant);
            for seed in 1..=20 {
                let ended = if seed <= bad {
                    Ended::Hung
                } else {
                    Ended::Good { seconds: 1.0 }
                };
                row.add(seed, &ended);
            }
            assert_eq!(row.passed(), passes, "{row:?}");
        }
    }

    #[test]
    fn a_report_is_good_if_the_bug_was_found_or_what_was_lost_was_dealt_with() {
        let found = r#"{"plant": {"found_after_seconds": 0.5}, "verdict": "fail"}"#;
        let missed = r#"{"plant": {"found_after_seconds": null}, "verdict": "pass"}"#;
        let good = |plant, report: &str| matches!(judge(plant, report), Ended::Good { .. });
        assert!(good(Plant::WrongRange, found));
        assert!(!good(Plant::WrongRange, missed));
        assert!(!good(Plant::WrongRange, ""));
        let lost = |timeouts: u64, verdict| {
            format!(
                r#"{{"seconds": 3, "verdict": "{verdict}", "quarantined": 0, "escalations": {{"timeouts": {timeouts}}}}}"#
            )
        };
        assert!(good(Plant::LostCompletion, &lost(1, "pass")));
        assert!(!good(Plant::LostCompletion, &lost(0, "pass")));
        assert!(!good(Plant::LostCompletion, &lost(1, "fail")));
    }
}
