//! How costs grow with registrations, threads and devices, as a picture: `cargo run --release -p shootdown-bench --bin growth`.
//!
//! Everything that one panel shows was measured in this process, in turn; each point is the median of its rounds.

mod measure;
mod plot;

use std::path::PathBuf;
use std::process::ExitCode;

use plot::Panel;

fn main() -> ExitCode {
    let target = std::env::args_os().nth(1).map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/growth.svg")),
        PathBuf::from,
    );
    let registrations = measure::registrations(&[10, 1_000, 100_000, 1_000_000]);
    let devices = measure::devices(&[1, 4, 16, 64, 256, 1_024]);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let counts = std::iter::successors(Some(1), |count| Some(count * 2));
    let counts: Vec<_> = counts.take_while(|count| *count <= cores).collect();
    let threads = measure::threads(&counts);
    let panels = [
        (
            "an invalidation that hits nothing",
            "ns",
            &registrations.no_hit,
            "registrations",
        ),
        (
            "an invalidation with one hit, empty handler",
            "ns",
            &registrations.one_hit,
            "registrations",
        ),
        (
            "register + unregister",
            "ns",
            &registrations.pair,
            "registrations",
        ),
        (
            "a shootdown, every device busy for 10 µs",
            "µs",
            &devices,
            "devices",
        ),
        (
            "invalidations of each of so many threads, disjoint",
            "ns",
            &threads.disjoint,
            "threads",
        ),
        (
            "faults of each of so many threads, disjoint",
            "ns",
            &threads.faults,
            "threads",
        ),
    ];
    let panels = panels.map(|(title, unit, curves, over)| {
        for curve in curves {
            println!("{title}, {}:", curve.name);
            for (at, value) in &curve.points {
                println!("{at:>12} {} {value:>10.1} {unit}", over);
            }
        }
        Panel {
            title,
            unit,
            over,
            curves,
        }
    });
    match std::fs::write(&target, plot::svg(&panels)) {
        Ok(()) => {
            println!("{}", target.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {}: {error}", target.display());
            ExitCode::from(3)
        }
    }
}
