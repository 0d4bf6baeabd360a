//! Two cases in turn, and the medians.

use std::time::Duration;

use crate::case::Case;

/// Each of a case's runs takes about this long: shorter than a time slice, so that most runs are not interrupted, on a machine that has
/// other things to do.
const RUN: Duration = Duration::from_micros(100);
const ROUNDS: usize = 501;

/// Nanoseconds an operation of both, and the ratio, each the median of all rounds.
#[derive(Clone, Copy, Debug)]
pub struct Compared {
    /// Of what is measured.
    pub subject: f64,
    /// Of what it is measured against.
    pub baseline: f64,
    /// Of the rounds' ratios, subject to baseline.
    pub ratio: f64,
}

/// The middle one.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// How often `case` is done in a run.
fn calibrate(case: &mut Case) -> u64 {
    let mut times = 1;
    loop {
        let took = case.run(times);
        if took >= RUN / 4 {
            let wanted = times as f64 * RUN.as_secs_f64() / took.as_secs_f64();
            return (wanted as u64).max(1);
        }
        times *= 2;
    }
}

fn nanoseconds(case: &mut Case, times: u64) -> f64 {
    case.run(times).as_secs_f64() * 1e9 / times as f64
}

/// Runs both in turn, many times.
pub fn compare(subject: &mut Case, baseline: &mut Case) -> Compared {
    let times = (calibrate(subject), calibrate(baseline));
    let rounds: Vec<_> = (0..ROUNDS)
        .map(|_| {
            (
                nanoseconds(subject, times.0),
                nanoseconds(baseline, times.1),
            )
        })
        .collect();
    Compared {
        subject: median(rounds.iter().map(|round| round.0).collect()),
        baseline: median(rounds.iter().map(|round| round.1).collect()),
        ratio: median(rounds.iter().map(|round| round.0 / round.1).collect()),
    }
}
