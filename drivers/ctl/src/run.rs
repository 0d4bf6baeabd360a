//! The main job, from the devices to the verdict.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use shootdown::{AddressSpace, Deadlines, Memory, Operations, SourceError, Watched};
use shootdown_gru::{
    ChipletPorts, Config, Gru, Kernel, MissMode, SegmentOptions, SelfTestFailed, Steal,
};
use shootdown_hw_model::gru::{ChipletConfig, FaultPlan, Latency, Model};
use shootdown_hw_model::{Bus, ModelError, ModelMemory};
use shootdown_pta::PtaError;
use thiserror::Error;

use crate::accelerator::Accelerators;
use crate::audit::{Audit, AuditError};
use crate::faults::{Fault, Faults};
use crate::finish::finish;
use crate::foreign::{Foreign, SourceName};
use crate::options::Options;
use crate::plant::Plant;
use crate::recovery::Recovery;
use crate::report::{Latencies, Report};
use crate::shared::Shared;
use crate::soak::{Count, Sampler};
use crate::status::{self, Server, Snapshot};
use crate::trace;
use crate::worker::{BLOCKS, CHUNK, Worker};

/// Why there was no run, or no report.
#[derive(Debug, Error)]
pub(crate) enum RunError {
    #[error("the model's memory could not be made: {0}")]
    Model(#[from] ModelError),
    #[error("an accelerator does not come up: {0}")]
    Accelerator(#[from] PtaError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Audit(#[from] AuditError),
    #[error(
        "--source none finds stale accesses whatever else is wrong: {with} says nothing beside it; name a source that tells in time"
    )]
    NothingToLearn { with: &'static str },
    #[error("no trace can be written to {path}: {error}")]
    NoTrace { path: String, error: std::io::Error },
    #[error("the trace could not be written to {path}: {error}")]
    Trace { path: String, error: std::io::Error },
}

impl RunError {
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::NoTrace { .. } | Self::NothingToLearn { .. } => 2,
            Self::Model(_)
            | Self::Accelerator(_)
            | Self::Source(_)
            | Self::Audit(_)
            | Self::Trace { .. } => 3,
        }
    }
}

/// What the threads have in their hands when the time is over is done by then, each of its waits within its deadline, or never.
const GIVE_UP: Duration = Duration::from_secs(30);

/// Ends the process unless what it gives is dropped in time. Threads that wait for each other cannot be ended otherwise.
fn watchdog() -> Sender<()> {
    let (watched, ended) = mpsc::channel();
    thread::spawn(move || {
        if ended.recv_timeout(GIVE_UP) == Err(RecvTimeoutError::Timeout) {
            eprintln!(
                "error: the run did not end within {GIVE_UP:?} after its time was over: a thread hangs"
            );
            status::forget(std::process::id());
            std::process::exit(1);
        }
    });
    watched
}

/// 256 MiB.
const FRAMES: u64 = 1 << 16;
const ARENA: u64 = 1 << 30;
/// For the driver's own memory.
const KERNEL_ARENA: u64 = 4 << 20;

pub(crate) fn deadlines() -> Deadlines {
    Deadlines {
        drain: Duration::from_secs(1),
        flush: Duration::from_millis(50),
        full_flush: Duration::from_millis(100),
        reset: Duration::from_millis(300),
        ..Deadlines::default()
    }
}

fn chiplets(options: &Options, plant: Option<Plant>, faults: &[Fault]) -> ChipletConfig {
    let mut config = ChipletConfig {
        tlb_entries: 256,
        latency: Latency {
            // "A few microseconds" on hardware.
            purge: Duration::from_micros(3),
            ..Latency::default()
        },
        faults: FaultPlan {
            seed: options.seed,
            ..FaultPlan::default()
        },
        ..ChipletConfig::default()
    };
    if let Some(plant) = plant {
        plant.hardware(&mut config);
    }
    for fault in faults {
        fault.inject(&mut config.faults);
    }
    config
}

pub(crate) fn driver(plant: Option<Plant>, foreign: Operations) -> Config {
    let mut config = Config {
        // One more than there are contexts, so that they wrap often and are enough.
        asids: 8..=8 * 17,
        first_asid: Some(8 * 14),
        segment: SegmentOptions {
            control_blocks: BLOCKS,
            data_bytes: CHUNK as usize * 8,
            misses: MissMode::default(),
            ..Config::default().segment
        },
        // Short, so that they are stolen often.
        steal: Steal {
            window: Duration::from_millis(1),
            retry: Duration::from_micros(100),
        },
        // For the flush when they wrap, too, which is waited for with a chiplet's lock held.
        handle_deadline: Duration::from_millis(300),
        foreign,
        ..Config::default()
    };
    if let Some(plant) = plant {
        plant.driver(&mut config);
    }
    config
}

/// The driver over the chiplets of `model`.
pub(crate) fn attach(model: &Model, config: Config) -> Arc<Gru> {
    let chiplets = model.chiplets().iter().enumerate();
    let ports = chiplets.map(|(nth, chiplet)| ChipletPorts {
        name: format!("gru{nth}"),
        blade: nth as u32 / 2,
        registers: chiplet.clone(),
        interrupts: chiplet.clone(),
    });
    Gru::attach(ports.collect(), config)
}

fn bar(options: &Options) -> ProgressBar {
    if options.json {
        return ProgressBar::hidden();
    }
    // Hides itself where standard error is no terminal.
    let bar = ProgressBar::new(options.seconds * 10);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {elapsed}  {msg}") {
        bar.set_style(style);
    }
    bar
}

/// The report, and whether the trace was written.
pub(crate) fn run(
    options: &Options,
    plant: Option<Plant>,
    faults: &[Fault],
    interrupted: &AtomicBool,
) -> Result<(Report, Result<(), RunError>), RunError> {
    let time = Duration::from_secs(options.seconds);
    let mut sampler = Sampler::new(time);
    let segments = options.segments.max(options.threads);
    if options.source == Some(SourceName::None) {
        let beside = [
            (plant.is_some(), "--plant"),
            (!faults.is_empty(), "--faults"),
        ];
        if let Some((_, with)) = beside.into_iter().find(|(given, _)| *given) {
            return Err(RunError::NothingToLearn { with });
        }
    }
    // Before the run, which would be for nothing otherwise.
    let trace = match &options.trace {
        None => None,
        Some(path) => Some(File::create(path).map_err(|error| RunError::NoTrace {
            path: path.display().to_string(),
            error,
        })?),
    };
    let bus = Bus::new(FRAMES)?;
    let model = Model::new(&bus, options.devices, chiplets(options, plant, faults));
    let memory = match options.source {
        None => ModelMemory::new(&bus, ARENA)?,
        Some(_) => ModelMemory::open_to_others(&bus, ARENA)?,
    };
    let arena = memory.arena();
    let space = AddressSpace::managed(memory.clone(), deadlines());
    let start = || Audit::start(&space, arena);
    let audit = options.audit.then(start).transpose()?;
    let observer = audit.as_ref().map(Audit::observer);
    let (foreign, watches) = match options.source {
        None => (None, None),
        Some(source) => {
            let before = Count::now();
            let (foreign, watched) = Foreign::start(source, &space, memory.clone(), observer)?;
            sampler.keeps(before, Count::now());
            (Some(foreign), watched)
        }
    };
    drop(memory);
    let operations = foreign
        .as_ref()
        .map_or(Operations::CALLS, Foreign::operations);
    let gru = attach(&model, driver(plant, operations));
    let kernel = Kernel::new(&gru, ModelMemory::new(&bus, KERNEL_ARENA)?);
    // Their driver has to be told in time, which not every source does.
    let accelerators = options.source.map_or(options.accelerators, |_| 0);
    let faulty = !faults.is_empty() || plant.is_some_and(|plant| !plant.must_be_found());
    let shared = Shared {
        kernel: Some(kernel),
        accelerators: Accelerators::new(&bus, options.devices, accelerators, options.threads)?,
        foreign,
        ..Shared::new(&bus, &gru, space, arena, faulty)
    };
    let mut report = Report {
        seed: options.seed,
        threads: options.threads,
        devices: options.devices,
        segments,
        plant: plant.map(Plant::planted),
        faults: Faults {
            given: faults.iter().map(|fault| fault.name()).collect(),
            ..Faults::default()
        },
        ..Report::default()
    };

    self_test(&mut report, &shared);
    let status = match Server::open() {
        Ok(server) => Some(server),
        Err(error) => {
            tracing::warn!(%error, "`shootdown gru status` will not find this run");
            None
        }
    };
    let begun = Instant::now();
    let ends = begun + time;
    let progress = bar(options);
    let mut recovery = Recovery::new(gru.devices(), &shared.space);
    let (measured, watched) = thread::scope(|scope| {
        let workers: Vec<_> = (0..options.threads)
            .map(|nth| {
                let share =
                    segments / options.threads + u64::from(nth < segments % options.threads);
                let worker = Worker::new(
                    &shared,
                    (nth, options.seed.wrapping_mul(1009) ^ nth),
                    share as usize,
                    shared
                        .foreign
                        .as_ref()
                        .map(|foreign| foreign.stranger(scope)),
                );
                scope.spawn(move || worker.run())
            })
            .collect();
        while Instant::now() < ends && !interrupted.load(Ordering::Relaxed) {
            let found =
                bus.oracle().stale_accesses() + shared.data_mismatches.load(Ordering::Relaxed);
            if found > 0
                && let Some(plant) = report.plant.as_mut().filter(|plant| plant.must_be_found)
            {
                plant.found_after_seconds = Some(begun.elapsed().as_secs_f64());
                break;
            }
            thread::sleep(
                Duration::from_millis(20).min(ends.saturating_duration_since(Instant::now())),
            );
            recovery.tick();
            sampler.look(begun.elapsed());
            if let Some(status) = &status {
                let seconds = begun.elapsed().as_secs_f64();
                status.answer(|| Snapshot::new(&gru, &model, seconds));
            }
            progress.set_position(begun.elapsed().as_millis() as u64 / 100);
            progress.set_message(format!(
                "{} shootdowns",
                shared.shootdowns.load(Ordering::Relaxed)
            ));
        }
        sampler.end();
        shared.stop.store(true, Ordering::Relaxed);
        let watched = watchdog();
        let measured: Vec<_> = workers
            .into_iter()
            .filter_map(|worker| worker.join().ok())
            .collect();
        (measured, watched)
    });
    report.seconds = begun.elapsed().as_secs_f64();
    report.interrupted = interrupted.load(Ordering::Relaxed);
    drop(status);
    progress.finish_and_clear();
    if !recovery.finish() {
        let findings = &mut report.findings;
        findings.push("a device did not come back from quarantine".to_owned());
    }
    report.findings.append(&mut recovery.findings);
    report.faults.recoveries = recovery.recoveries;
    if measured.len() < options.threads as usize {
        report
            .findings
            .push("a thread of the workload panicked".to_owned());
    }

    let mut shootdown = None;
    let mut unregister = None;
    let mut foreign = None;
    for one in measured {
        let add = |sum: &mut Option<hdrhistogram::Histogram<u64>>,
                   more: hdrhistogram::Histogram<u64>| match sum {
            // Both are made alike.
            Some(sum) => sum.add(&more).is_ok(),
            None => sum.replace(more).is_none(),
        };
        add(&mut shootdown, one.shootdown);
        add(&mut unregister, one.unregister);
        add(&mut foreign, one.foreign);
        report.findings.extend(one.findings);
    }
    let latency = |one: &Option<hdrhistogram::Histogram<u64>>| {
        one.as_ref().map(Into::into).unwrap_or_default()
    };
    let faults = gru.fault_latencies().into_iter().reduce(|mut sum, more| {
        sum += more;
        sum
    });
    report.latency_ns = Latencies {
        shootdown: latency(&shootdown),
        unregister: latency(&unregister),
        fault: latency(&faults),
    };
    report.foreign = (shared.foreign.as_ref()).map(|one| one.report(latency(&foreign)));
    if let Some(histogram) = &shootdown {
        report.histogram = histogram
            .iter_log(1000, 4.0)
            .map(|step| (step.value_iterated_to(), step.count_since_last_iteration()))
            .skip_while(|(_, count)| *count == 0)
            .collect();
    }
    let trace = match (&options.trace, trace) {
        (Some(path), Some(file)) => {
            trace::write(file, &shared.space.records()).map_err(|error| RunError::Trace {
                path: path.display().to_string(),
                error,
            })
        }
        _ => Ok(()),
    };
    if let Some(audit) = audit.map(Audit::finish) {
        report.findings.extend(audit.findings());
        report.audit = Some(audit);
    }
    if let Some(Err((_, refused))) = watches.map(Watched::stop) {
        report
            .findings
            .push(format!("the source does not stop: {refused}"));
    }
    finish(&mut report, shared, &gru, &model);
    drop((gru, model, bus));
    drop(watched);
    let kept = report.quarantined > 0;
    report.soak = sampler.after(kept);
    report.findings.extend(report.soak.leaks(kept));
    report.judge();
    Ok((report, trace))
}

/// The driver's own tests of its chiplets, before the work begins.
fn self_test(report: &mut Report, shared: &Shared) {
    let Some(kernel) = &shared.kernel else { return };
    report.gru.blades = kernel.blades().count();
    report.gru.chiplets = report.devices as usize;
    match kernel.self_test() {
        Ok(passed) => report.gru.self_tests = passed,
        Err(SelfTestFailed::Error { error, .. }) if shared.is_lost(&error) => {}
        Err(failed) => report.findings.push(failed.to_string()),
    }
}
