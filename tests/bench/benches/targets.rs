//! The table of targets: `cargo bench -p shootdown-bench --bench targets`, or some rows of it, by words: `-- "one hit" memory`.
//!
//! A ratio is the median of the ratios of rounds in which both sides ran in turn. Nothing fails here: on a machine that does
//! something else meanwhile the figures are worth nothing, so read them, and the load beside them.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use shootdown::{AddressSpace, Deadlines};
use shootdown_bench::allocator::{Counting, live};
use shootdown_bench::case::{self, BesideWriter, Case};
use shootdown_bench::floor;
use shootdown_bench::ground::{Empty, Ground};
use shootdown_bench::round::{compare, median};

#[global_allocator]
static HEAP: Counting = Counting;

const HEAD: &str =
    "| what | ns | baseline | ns | ratio | target | |\n|---|---|---|---|---|---|---|";

/// What a figure has to be.
#[derive(Clone, Copy)]
enum Target {
    AtMost(f64),
    AtLeast(f64),
    /// No target: to be looked at.
    None,
}

impl Target {
    fn verdict(self, figure: f64) -> (String, &'static str) {
        let (text, met) = match self {
            Self::AtMost(most) => (format!("≤ {most}"), figure <= most),
            Self::AtLeast(least) => (format!("≥ {least}"), figure >= least),
            Self::None => return (String::new(), ""),
        };
        (text, if met { "met" } else { "missed" })
    }
}

/// Which rows are wanted, by words of their names.
struct Table(Vec<String>);

impl Table {
    fn wants(&self, name: &str) -> bool {
        self.0.is_empty() || self.0.iter().any(|word| name.contains(word.as_str()))
    }

    fn ratio(
        &self,
        name: &str,
        target: Target,
        subject: impl FnOnce() -> Case,
        (other, baseline): (&str, impl FnOnce() -> Case),
    ) {
        if !self.wants(name) {
            return;
        }
        let found = compare(&mut subject(), &mut baseline());
        let (text, verdict) = target.verdict(found.ratio);
        println!(
            "| {name} | {:.1} | {other} | {:.1} | {:.3} | {text} | {verdict} |",
            found.subject, found.baseline, found.ratio
        );
    }

    fn figure(&self, name: &str, unit: &str, target: Target, figure: impl FnOnce() -> f64) {
        if !self.wants(name) {
            return;
        }
        let figure = figure();
        let (text, verdict) = target.verdict(figure);
        println!("| {name} | | | | {figure:.1} {unit} | {text} | {verdict} |");
    }
}

fn index(table: &Table) {
    let thousand = || case::iset_query(1_000, 0);
    for count in [10, 1_000, 100_000, 1_000_000] {
        let name = format!("no hit of {count}");
        let subject = || case::invalidation(count, 0);
        let other = ("iset's query at 1k", thousand);
        table.ratio(&name, Target::AtMost(0.12), subject, other);
        if count == 1_000_000 {
            let other = ("iset's query", || case::iset_query(count, 0));
            table.ratio(&name, Target::AtMost(0.05), subject, other);
        }
    }
    let other = ("sorted Vec's, disjoint only", || case::vec_query(1_000, 0));
    table.ratio(
        "no hit of 1000",
        Target::None,
        || case::invalidation(1_000, 0),
        other,
    );
    for count in [1_000, 100_000, 1_000_000] {
        let other = ("iset's query", || case::iset_query(count, 1));
        table.ratio(
            &format!("one hit of {count}"),
            Target::AtMost(0.45),
            || case::invalidation(count, 1),
            other,
        );
    }
    // What stops it: an index and a protocol without a framework.
    for count in [1_000, 100_000, 1_000_000] {
        let name = |what: &str| format!("the least that {what}");
        let no_hit = format!("no hit of {count} takes");
        let in_turn = format!("{no_hit}, one after the other");
        for (what, at_once) in [(&no_hit, true), (&in_turn, false)] {
            let subject = || match at_once {
                true => floor::nothing(count),
                false => floor::nothing_in_turn(count),
            };
            let other = ("iset's query at 1k", thousand);
            table.ratio(&name(what), Target::None, subject, other);
            if count == 1_000_000 {
                let other = ("iset's query", || case::iset_query(count, 0));
                table.ratio(&name(what), Target::None, subject, other);
            }
        }
        let other = ("iset's query", || case::iset_query(count, 1));
        let subject = || floor::one_hit(count);
        let one_hit = format!("one hit of {count} takes");
        table.ratio(&name(&one_hit), Target::None, subject, other);
    }
    for (count, most) in [(1_000, 2.0), (100_000, 1.0)] {
        let other = ("iset's insert + remove", || case::iset_pair(count));
        table.ratio(
            &format!("register + unregister beside {count}"),
            Target::AtMost(most),
            || case::pair(count),
            other,
        );
    }
    for count in [1_000, 100_000] {
        let other = ("iset's insert + remove", || case::iset_pair(count));
        table.ratio(
            &format!("register + unregister, 1000 together beside {count}"),
            Target::None,
            || case::bulk(count, 1_000),
            other,
        );
    }
    table.ratio(
        "unregister",
        Target::AtMost(3.0),
        || case::unregister(1_000),
        ("SRCU grace period", case::grace),
    );
}

/// Invalidations with the writer at work and without, in turn.
fn beside_a_writer(table: &Table) {
    for hits in [0, 1] {
        let name = format!("beside a writer, {hits} hits");
        if !table.wants(&name) {
            continue;
        }
        let mut beside = BesideWriter::new(1_000, hits);
        let mut rounds = Vec::new();
        for _ in 0..201 {
            let mut times = [0.0; 2];
            for writes in [false, true] {
                beside.writes.store(writes, Relaxed);
                std::thread::sleep(Duration::from_micros(200));
                times[usize::from(writes)] = beside.case.run(1_000).as_secs_f64() / 1_000e-9;
            }
            rounds.push(times);
        }
        beside.writes.store(false, Relaxed);
        let of = |which: usize| median(rounds.iter().map(|round| round[which]).collect());
        let ratio = median(rounds.iter().map(|round| round[1] / round[0]).collect());
        let (text, verdict) = Target::AtMost(1.5).verdict(ratio);
        println!(
            "| {name} | {:.1} | undisturbed | {:.1} | {ratio:.3} | {text} | {verdict} |",
            of(1),
            of(0)
        );
        let [made, time] = [0, 1].map(|at| beside.made[at].load(Relaxed) as f64);
        table.figure(
            &format!("{name}: the writer"),
            "k pairs/s",
            Target::AtLeast(200.0),
            || made / time * 1e6,
        );
    }
}

fn threads(table: &Table) {
    table.ratio(
        "two threads, disjoint, one space",
        Target::AtMost(1.0 / 0.95),
        || case::disjoint(2, true),
        ("two spaces", || case::disjoint(2, false)),
    );
    table.ratio(
        "two threads, disjoint, one space",
        Target::AtMost(2.0 / 1.8),
        || case::disjoint(2, true),
        ("one thread", || case::disjoint(1, true)),
    );
    table.ratio(
        "two threads, two spaces",
        Target::None,
        || case::disjoint(2, false),
        ("one thread", || case::disjoint(1, true)),
    );
    table.ratio(
        "two threads fault, disjoint",
        Target::AtMost(2.0 / 1.8),
        || case::faults(2),
        ("one thread", || case::faults(1)),
    );
}

fn rest(table: &Table) {
    table.ratio(
        "begin + lock + retry",
        Target::None,
        case::fault,
        ("lock", case::notifier_lock),
    );
    table.figure(
        "begin + retry, less the lock",
        "ns",
        Target::AtMost(5.0),
        || {
            let found = compare(&mut case::fault(), &mut case::notifier_lock());
            found.subject - found.baseline
        },
    );
    let latency = Duration::from_micros(10);
    for count in [8, 64] {
        table.ratio(
            &format!("{count} devices of 10 us"),
            Target::AtMost(1.5),
            || case::devices(count, latency),
            ("one device", || case::devices(1, latency)),
        );
    }
    table.ratio(
        "64 devices of 10 us, issue, dispatch and poll alone",
        Target::None,
        || case::bare_devices(64, latency),
        ("one device", || case::devices(1, latency)),
    );
    table.ratio(
        "managed unmap of a touched page",
        Target::AtMost(1.06),
        case::managed_unmap,
        ("the bare system calls", case::raw_unmap),
    );
    for count in [1_000, 100_000] {
        table.figure(
            &format!("memory of a registration among {count}"),
            "bytes",
            Target::AtMost(192.0),
            || {
                let ground = Ground::new(count);
                let handler = Arc::new(Empty);
                let space = AddressSpace::without_memory(Deadlines::default());
                let mut kept = Vec::with_capacity(count);
                let before = live();
                for range in &ground.ranges {
                    let one = space.register(*range, handler.clone(), &[]);
                    kept.push(one.expect("a registration"));
                }
                (live() - before) as f64 / count as f64
            },
        );
    }
}

fn main() {
    // Cargo says `--bench` to every benchmark.
    let words = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with("--"));
    let table = Table(words.collect());
    println!("{HEAD}");
    index(&table);
    beside_a_writer(&table);
    threads(&table);
    rest(&table);
}
