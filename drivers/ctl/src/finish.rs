//! The end of a run: what is left, what was counted, and what does not add up.

use shootdown::ExitError;
use shootdown_gru::{Gru, GruStats};
use shootdown_hw_model::gru::Model;
use shootdown_primitive::sync::atomic::{AtomicU64, Ordering};
use shootdown_primitive::thread;
use shootdown_primitive::time::{Duration, Instant};

use crate::faults::Faults;
use crate::report::{Escalations, Leaked, Report, Unregisters};
use crate::shared::Shared;

/// Far beyond what any fault takes that ends by itself.
const SETTLES: Duration = Duration::from_secs(2);

const FRAME_BYTES: u64 = 4096;

/// Ends the space, and counts what is left.
pub(crate) fn finish(report: &mut Report, mut shared: Shared, gru: &Gru, model: &Model) {
    drop(shared.kernel.take());
    let Shared {
        bus,
        space,
        short_lived,
        releases,
        ..
    } = &shared;
    match space.exit() {
        // Memory that a dead device may still reach stays; it was counted as quarantined before.
        Ok(()) | Err(ExitError::Reached { .. }) => {}
        Err(error) => report.findings.push(format!("exit: {error}")),
    }
    let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let stats = space.stats();
    report.releases_expected = stats.inserts + get(&short_lived.inserts);
    report.releases = stats.releases + get(&short_lived.releases);
    if get(releases) > report.releases {
        report
            .findings
            .push("handlers saw more releases than the framework counted".to_owned());
    }
    report.leaked.registrations = space.registrations() as u64 + get(&short_lived.registrations);
    let [
        plain,
        map_lock_held,
        inside_own_callback,
        inside_other_callback,
        during_release,
    ] = stats.unregisters;
    report.unregisters = Unregisters {
        plain,
        map_lock_held,
        inside_own_callback,
        inside_other_callback,
        during_release,
    };
    report.quarantined = shared.quarantined();
    report.shootdowns = get(&shared.shootdowns);
    report.bytes_verified = get(&shared.bytes_verified);
    report.data_mismatches = get(&shared.data_mismatches);
    report.segments_torn_down = get(&shared.segments_torn_down);
    report.spaces_exited = get(&shared.spaces_exited);
    report.device_accesses = bus.oracle().accesses();
    report.stale_accesses = bus.oracle().stale_accesses();
    report.findings.extend(
        bus.oracle()
            .findings()
            .iter()
            .take(4)
            .map(ToString::to_string),
    );
    // A finding in a run with a planted bug is that bug's.
    if let Some(plant) = report.plant.as_ref().filter(|plant| plant.must_be_found) {
        for finding in &mut report.findings {
            *finding = format!("{} ({}): {finding}", plant.race, plant.name);
        }
    }
    for device in gru.devices() {
        let stats = device.stats();
        report.flush_ops += stats.flush_ops;
        report.full_flushes += stats.full_flushes;
        let e = &mut report.escalations;
        *e = Escalations {
            timeouts: e.timeouts + stats.timeouts,
            recovered_by_flush: e.recovered_by_flush + stats.recovered_by_flush,
            recovered_by_reset: e.recovered_by_reset + stats.recovered_by_reset,
        };
        report.faults.quarantines += stats.quarantined;
    }
    report.accelerators = shared.accelerators.report();
    report.device_ops += report.accelerators.map_or(0, |one| one.commands);
    for chiplet in model.chiplets() {
        report.device_ops += chiplet.counts().instructions;
    }
    let stats = account(&mut report.faults, gru, model);
    report.findings.extend(report.faults.unaccounted());
    report.gru.count(gru, &stats);
    report.faults_resolved = stats.faults_resolved;
    report.fault_retries = stats.fault_retries;
    report.leaked = Leaked {
        contexts: stats.contexts_in_use,
        asids: stats.asids_in_use,
        ..report.leaked
    };
    let bus = bus.clone();
    drop(shared);
    let used = bus.physical().total() - bus.physical().free_frames();
    // What is in quarantine is kept on purpose, and counted apart.
    report.leaked.frames = used.saturating_sub(report.quarantined / FRAME_BYTES);
}

/// Accounts for what was injected, once what ends by itself has ended.
fn account(faults: &mut Faults, gru: &Gru, model: &Model) -> GruStats {
    let begun = Instant::now();
    loop {
        // Any look at a chiplet carries out what is due.
        let counts = model.chiplets().iter().map(|chiplet| {
            chiplet.tlb_entries();
            chiplet.counts()
        });
        let stats = gru.stats();
        faults.count(counts, &stats);
        if faults.unaccounted().is_empty() || begun.elapsed() > SETTLES {
            return stats;
        }
        thread::sleep(Duration::from_millis(10));
    }
}
