//! What a run has done, and whether it passed.

use std::fmt;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::accelerator;
use crate::audit;
use crate::faults::Faults;
use crate::foreign;
use crate::gru::Hardware;
use crate::plant::Planted;
use crate::soak::Soak;

/// Latencies of one kind of call, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Latency {
    pub(crate) p50: u64,
    pub(crate) p99: u64,
    pub(crate) p999: u64,
    pub(crate) max: u64,
}

impl From<&Histogram<u64>> for Latency {
    fn from(histogram: &Histogram<u64>) -> Self {
        Self {
            p50: histogram.value_at_quantile(0.5),
            p99: histogram.value_at_quantile(0.99),
            p999: histogram.value_at_quantile(0.999),
            max: histogram.max(),
        }
    }
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Latencies {
    /// From the call of unmap, discard, protect or remap to its return.
    pub(crate) shootdown: Latency,
    pub(crate) unregister: Latency,
    /// Of one TLB miss, from when the driver takes it up until its answer has been written.
    pub(crate) fault: Latency,
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Unregisters {
    pub(crate) plain: u64,
    pub(crate) map_lock_held: u64,
    pub(crate) inside_own_callback: u64,
    pub(crate) inside_other_callback: u64,
    pub(crate) during_release: u64,
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Leaked {
    pub(crate) frames: u64,
    pub(crate) registrations: u64,
    pub(crate) contexts: u64,
    pub(crate) asids: u64,
}

impl Leaked {
    pub(crate) fn any(self) -> bool {
        self.frames + self.registrations + self.contexts + self.asids > 0
    }
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Escalations {
    pub(crate) timeouts: u64,
    pub(crate) recovered_by_flush: u64,
    pub(crate) recovered_by_reset: u64,
}

/// A run's report; `--json` prints it as it is.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    pub(crate) seed: u64,
    pub(crate) seconds: f64,
    pub(crate) threads: u64,
    pub(crate) devices: u32,
    pub(crate) segments: u64,
    pub(crate) plant: Option<Planted>,
    pub(crate) interrupted: bool,
    pub(crate) device_ops: u64,
    pub(crate) accelerators: Option<accelerator::Report>,
    pub(crate) device_accesses: u64,
    pub(crate) bytes_verified: u64,
    pub(crate) data_mismatches: u64,
    pub(crate) stale_accesses: u64,
    pub(crate) shootdowns: u64,
    pub(crate) flush_ops: u64,
    pub(crate) full_flushes: u64,
    pub(crate) faults_resolved: u64,
    pub(crate) fault_retries: u64,
    pub(crate) segments_torn_down: u64,
    pub(crate) spaces_exited: u64,
    pub(crate) unregisters: Unregisters,
    pub(crate) releases: u64,
    pub(crate) releases_expected: u64,
    pub(crate) leaked: Leaked,
    /// Bytes of memory in quarantine at the end.
    pub(crate) quarantined: u64,
    pub(crate) escalations: Escalations,
    pub(crate) faults: Faults,
    pub(crate) gru: Hardware,
    pub(crate) foreign: Option<foreign::Report>,
    pub(crate) audit: Option<audit::Report>,
    pub(crate) soak: Soak,
    pub(crate) latency_ns: Latencies,
    pub(crate) findings: Vec<String>,
    pub(crate) verdict: &'static str,
    /// Shootdowns by latency: up to this many nanoseconds, and how many.
    #[serde(skip)]
    pub(crate) histogram: Vec<(u64, u64)>,
}

impl Report {
    /// Settles the verdict.
    pub(crate) fn judge(&mut self) {
        let clean = self.stale_accesses == 0
            && self.data_mismatches == 0
            && self.releases == self.releases_expected
            && !self.leaked.any()
            && self.findings.is_empty();
        self.verdict = if clean { "pass" } else { "fail" };
    }

    pub(crate) fn passed(&self) -> bool {
        self.verdict == "pass"
    }
}

fn micros(nanos: u64) -> f64 {
    nanos as f64 / 1e3
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let per_second = |count: u64| count as f64 / self.seconds.max(1e-9);
        writeln!(
            f,
            "{} threads, {} devices, {} segments, seed {}, {:.1} s{}",
            self.threads,
            self.devices,
            self.segments,
            self.seed,
            self.seconds,
            if self.interrupted {
                " (interrupted)"
            } else {
                ""
            },
        )?;
        if let Some(Planted {
            name,
            race,
            meaning,
            ..
        }) = &self.plant
        {
            writeln!(f, "planted: {name} ({race}): {meaning}")?;
        }
        writeln!(f)?;
        let row = |f: &mut fmt::Formatter<'_>, name: &str, count: u64| {
            writeln!(
                f,
                "  {name:<22} {count:>12}   {:>10.0} /s",
                per_second(count)
            )
        };
        row(f, "device operations", self.device_ops)?;
        row(f, "device accesses", self.device_accesses)?;
        row(f, "bytes verified", self.bytes_verified)?;
        row(f, "shootdowns", self.shootdowns)?;
        row(f, "range flushes", self.flush_ops)?;
        row(f, "full flushes", self.full_flushes)?;
        row(f, "faults resolved", self.faults_resolved)?;
        row(f, "fault retries", self.fault_retries)?;
        row(f, "segments torn down", self.segments_torn_down)?;
        row(f, "spaces exited", self.spaces_exited)?;
        writeln!(
            f,
            "\n  latency (us)             p50        p99      p99.9        max"
        )?;
        for (name, one) in [
            ("shootdown", self.latency_ns.shootdown),
            ("unregister", self.latency_ns.unregister),
            ("fault", self.latency_ns.fault),
        ] {
            let [p50, p99, p999, max] = [one.p50, one.p99, one.p999, one.max].map(micros);
            writeln!(
                f,
                "  {name:<20} {p50:>9.1}  {p99:>9.1}  {p999:>9.1}  {max:>9.1}"
            )?;
        }
        if let Some(foreign) = &self.foreign {
            write!(f, "{foreign}")?;
        }
        if let Some(audit) = &self.audit {
            write!(f, "{audit}")?;
        }
        let most = self
            .histogram
            .iter()
            .map(|(_, count)| *count)
            .max()
            .unwrap_or(0)
            .max(1);
        writeln!(f, "\n  shootdowns by latency")?;
        for (up_to, count) in &self.histogram {
            let bar = "#".repeat((count * 40).div_ceil(most) as usize);
            writeln!(f, "  <= {:>9.1} us {count:>9} {bar}", micros(*up_to))?;
        }
        let u = self.unregisters;
        writeln!(
            f,
            "\n  unregisters: {} plain, {} with the map lock held, {} inside their own callback,",
            u.plain, u.map_lock_held, u.inside_own_callback
        )?;
        writeln!(
            f,
            "               {} inside another's, {} during release",
            u.inside_other_callback, u.during_release
        )?;
        writeln!(
            f,
            "  releases: {} of {} expected",
            self.releases, self.releases_expected
        )?;
        let e = self.escalations;
        writeln!(
            f,
            "  deadlines missed: {}, recovered by a full flush: {}, by a reset: {}; bytes in quarantine: {}",
            e.timeouts, e.recovered_by_flush, e.recovered_by_reset, self.quarantined
        )?;
        let l = self.leaked;
        writeln!(
            f,
            "  leaked: {} frames, {} registrations, {} contexts, {} ASIDs",
            l.frames, l.registrations, l.contexts, l.asids
        )?;
        if let Some(accelerators) = &self.accelerators {
            write!(f, "{accelerators}")?;
        }
        write!(f, "{}{}{}", self.faults, self.soak, self.gru)?;
        for finding in &self.findings {
            writeln!(f, "\nfound: {finding}")?;
        }
        if let Some(plant) = &self.plant
            && plant.must_be_found
            && plant.found_after_seconds.is_none()
        {
            writeln!(
                f,
                "\nthe planted bug was not found{}",
                if self.interrupted {
                    ": the run was interrupted before"
                } else {
                    ""
                }
            )?;
        }
        writeln!(
            f,
            "\n{}: {} stale accesses, {} data mismatches",
            self.verdict.to_uppercase(),
            self.stale_accesses,
            self.data_mismatches
        )
    }
}
