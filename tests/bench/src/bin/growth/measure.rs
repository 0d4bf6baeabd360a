//! The curves.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shootdown::{AddressSpace, Range};
use shootdown_bench::case::{self, Case, Others, shoot};
use shootdown_bench::ground::{Empty, Ground, interval};
use shootdown_bench::round::median;

/// A run of a curve takes about this long, in each round: most of them are not interrupted, on a machine that does other things too.
const RUN: Duration = Duration::from_micros(100);
const ROUNDS: usize = 301;
/// The flush of a device takes so long.
const LATENCY: Duration = Duration::from_micros(10);

/// What belongs to one name.
pub(crate) struct Curve {
    pub(crate) name: &'static str,
    /// Drawn dashed: what it is held against.
    pub(crate) baseline: bool,
    /// How many there are, and what one operation takes, in the panel's unit.
    pub(crate) points: Vec<(usize, f64)>,
}

/// By number of registrations; nanoseconds.
pub(crate) struct Registrations {
    pub(crate) no_hit: Vec<Curve>,
    pub(crate) one_hit: Vec<Curve>,
    pub(crate) pair: Vec<Curve>,
}

/// Does it so many times; how long they took.
type Run<'a> = Box<dyn FnMut(u64) -> Duration + 'a>;

/// Nanoseconds of one operation of each, the medians of rounds in which all ran in turn.
fn in_turn<const N: usize>(mut runs: [Run<'_>; N]) -> [f64; N] {
    let times = runs.each_mut().map(|run| {
        let mut times = 1;
        loop {
            // The least of three: one that was interrupted says nothing.
            let took = run(times).min(run(times)).min(run(times));
            if took >= RUN / 4 {
                break ((times as f64 * RUN.as_secs_f64() / took.as_secs_f64()) as u64).max(1);
            }
            times *= 2;
        }
    });
    let mut found = [const { Vec::new() }; N];
    for _ in 0..ROUNDS {
        for ((run, times), found) in runs.iter_mut().zip(times).zip(&mut found) {
            found.push(run(times).as_secs_f64() * 1e9 / times as f64);
        }
    }
    found.map(median)
}

fn timed(mut once: impl FnMut(), times: u64) -> Duration {
    let begun = Instant::now();
    (0..times).for_each(|_| once());
    begun.elapsed()
}

/// Pages to ask for, over and over: a run goes on where the last one ended, so that no cache holds all that it needs.
struct Pages {
    pages: Arc<Vec<Range>>,
    at: usize,
}

impl Pages {
    fn new(pages: &Arc<Vec<Range>>, at: usize) -> Self {
        Self {
            pages: pages.clone(),
            at,
        }
    }

    fn next(&mut self) -> Range {
        self.at = (self.at + 1) % self.pages.len();
        self.pages[self.at]
    }
}

fn curves<const N: usize>(names: [(&'static str, bool); N]) -> Vec<Curve> {
    let curve = |(name, baseline)| Curve {
        name,
        baseline,
        points: Vec::new(),
    };
    names.map(curve).into()
}

fn push(curves: &mut [Curve], at: usize, values: &[f64]) {
    for (curve, value) in curves.iter_mut().zip(values) {
        curve.points.push((at, *value));
    }
}

pub(crate) fn registrations(counts: &[usize]) -> Registrations {
    let walks = [
        ("shootdown, one thread", false),
        ("shootdown, each of two threads", false),
        ("iset's bare query", true),
    ];
    let mut all = Registrations {
        no_hit: curves(walks),
        one_hit: curves(walks),
        pair: curves([("shootdown", false), ("iset's bare insert + remove", true)]),
    };
    for count in counts.iter().copied() {
        let ground = Ground::new(count);
        let (space, registrations) = ground.space();
        let mut index = ground.iset();
        let queries = [0, 1].map(|hits| Arc::new(ground.queries(hits)));
        for (queries, curves) in queries.iter().zip([&mut all.no_hit, &mut all.one_hit]) {
            let shooter = |from: usize| {
                let (space, mut pages): (AddressSpace, _) =
                    (space.clone(), Pages::new(queries, from));
                move || shoot(&space, pages.next())
            };
            let (mut alone, mut mine) = (shooter(0), shooter(0));
            let mut other = shooter(queries.len() / 2);
            let second = Others::new([move |_| other()]);
            let mut pages = Pages::new(queries, 0);
            let mut bare = || {
                let found = index.iter(interval(pages.next()));
                black_box(found.map(|(_, value)| *value).sum::<u64>());
            };
            let values = in_turn([
                Box::new(|times| timed(&mut alone, times)),
                Box::new(|times| second.beside(times, |_| mine())),
                Box::new(|times| timed(&mut bare, times)),
            ]);
            push(curves, count, &values);
        }
        let handler = Arc::new(Empty);
        let (mut free, mut also) = (Pages::new(&queries[0], 0), Pages::new(&queries[0], 0));
        let mut pair = || {
            let one = space.register(free.next(), handler.clone(), &[]);
            one.expect("a registration").unregister().expect("its end");
        };
        let mut bare = || {
            let page = also.next();
            index.force_insert(interval(page), 7);
            black_box(index.remove(interval(page)));
        };
        let values = in_turn([
            Box::new(|times| timed(&mut pair, times)),
            Box::new(|times| timed(&mut bare, times)),
        ]);
        push(&mut all.pair, count, &values);
        drop(registrations);
    }
    all
}

/// By number of devices; microseconds.
pub(crate) fn devices(counts: &[usize]) -> Vec<Curve> {
    let mut all = curves([("shootdown", false), ("one device after the other", true)]);
    for count in counts.iter().copied() {
        let mut together = case::devices(count, LATENCY);
        let mut one = case::devices(1, LATENCY);
        let values = in_turn([
            Box::new(|times| together.run(times)),
            Box::new(|times| one.run(times * count as u64)),
        ]);
        push(
            &mut all,
            count,
            &values.map(|nanoseconds| nanoseconds / 1e3),
        );
    }
    all
}

/// What threads do at the same time, and what that is held against.
pub(crate) struct Threads {
    /// Nanoseconds.
    pub(crate) disjoint: Vec<Curve>,
    /// Nanoseconds.
    pub(crate) faults: Vec<Curve>,
}

/// By number of threads.
pub(crate) fn threads(counts: &[usize]) -> Threads {
    let mut all = Threads {
        disjoint: curves([
            ("of one space", false),
            ("each of a space of its own", true),
        ]),
        faults: curves([("of one registration", false)]),
    };
    fn run(mut case: Case) -> Run<'static> {
        Box::new(move |times| case.run(times))
    }
    for count in counts.iter().copied() {
        let spaces = [true, false].map(|one| run(case::disjoint(count, one)));
        push(&mut all.disjoint, count, &in_turn(spaces));
        push(&mut all.faults, count, &in_turn([run(case::faults(count))]));
    }
    all
}
