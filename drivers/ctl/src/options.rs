//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::attach::AttachOptions;
use crate::devices::DevicesOptions;
use crate::foreign::SourceName;
use crate::sources::SourcesOptions;
use crate::status::StatusOptions;

/// Shootdown of user-space accelerators' TLBs, run against model hardware.
#[derive(Debug, Parser)]
#[command(
    name = "shootdown",
    version,
    after_help = "Exit status: 0 passed, 1 a violation was found, 2 wrong usage, 3 this machine lacks something.",
    args_conflicts_with_subcommands = true
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) run: Options,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Accelerators work on real process memory while threads map, unmap, discard, protect and remap it (the default).
    Run(Options),
    /// Runs every planted bug with many seeds and says how often, and how soon, it was found.
    Plants(PlantsOptions),
    /// Lists the PCI functions of this machine, and what stands between each and VFIO.
    Devices(DevicesOptions),
    /// Attaches a real device through VFIO, checks it, and proves the shootdown on it.
    Attach(AttachOptions),
    /// Looks at the GRUs of a run that is at work.
    #[command(subcommand)]
    Gru(GruCommand),
    /// Lists what tells of changes that others make to memory on this machine: what each source sees, and what it costs.
    Sources(SourcesOptions),
}

fn hexadecimal(text: &str) -> Result<u64, String> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    u64::from_str_radix(digits, 16).map_err(|error| format!("{error}: it is hexadecimal"))
}

/// What there is of the GRUs of a run.
#[derive(Debug, Subcommand)]
pub(crate) enum GruCommand {
    /// Shows blades, chiplets, contexts, ASIDs, TLB occupancy and pending faults of a run that is at work.
    Status(StatusOptions),
}

/// What `plants` does.
#[derive(Clone, Debug, Args)]
pub(crate) struct PlantsOptions {
    /// Seeds of each planted bug, from 1 on.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub(crate) seeds: u64,
    /// How long one run goes on at most; it ends at its first finding.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) seconds: u64,
    /// Prints the table as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What a run does.
#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    /// How long it runs.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) seconds: u64,
    /// Threads that change memory and give work to the devices.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=64))]
    pub(crate) threads: u64,
    /// Accelerators (GRU chiplets, 16 contexts each, two a blade).
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) devices: u32,
    /// Page-table accelerators beside them, on the same memory; none where there is a --source.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=16))]
    pub(crate) accelerators: u32,
    /// Segments that the threads hold together; at least one a thread. More than 16 a device steal each other's contexts.
    #[arg(long, default_value_t = 72, value_parser = clap::value_parser!(u64).range(1..=960))]
    pub(crate) segments: u64,
    /// Fixes the workload and the faults; with `--sim` the interleaving, too.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Plants a bug and looks whether it is found; `list` prints their names.
    #[arg(long, value_name = "NAME")]
    pub(crate) plant: Option<String>,
    /// Injects faults into the devices, from the seed: `all`, or names with commas between them; `list` prints them.
    #[arg(long, value_name = "NAMES", conflicts_with = "plant")]
    pub(crate) faults: Option<String>,
    /// Others change the memory too, by raw system calls, and this tells of them.
    #[arg(long, value_name = "NAME")]
    pub(crate) source: Option<SourceName>,
    /// Compares the kernel's own invalidations of the arena with what was told (root, /dev/kvm).
    #[arg(long)]
    pub(crate) audit: bool,
    /// Prints the report as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
    /// Writes the phases of the newest invalidations as a Chrome / Perfetto trace.
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
    /// Logs what happens.
    #[arg(short, long)]
    pub(crate) verbose: bool,
    /// Simulates: one program of operations after the other, a seed each, interleaving and clock fixed by the seed.
    #[arg(long, conflicts_with_all = ["seconds", "threads", "devices", "segments", "accelerators", "trace", "verbose", "source", "audit"])]
    pub(crate) sim: bool,
    /// Seeds that are simulated, from `--seed` on, until something is found.
    #[arg(long, value_name = "COUNT", default_value_t = 200, requires = "sim", conflicts_with_all = ["schedule", "only"], value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub(crate) schedules: u64,
    /// Simulates under this schedule, once: who runs when.
    #[arg(long, value_name = "HEX", requires = "sim", value_parser = hexadecimal)]
    pub(crate) schedule: Option<u64>,
    /// Simulates the operations and faults with these numbers, once.
    #[arg(long, value_name = "NUMBERS", requires = "sim", value_delimiter = ',')]
    pub(crate) only: Option<Vec<u32>>,
    /// One simulation, in this process.
    #[arg(long, hide = true, requires = "sim")]
    pub(crate) alone: bool,
}
