//! The report's part on the GRUs: what of them a run has used.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;
use shootdown_gru::{Gru, GruStats};

use crate::status::{Operation, operations, write_operations};

/// What a run has used of its GRUs.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Hardware {
    pub(crate) blades: usize,
    pub(crate) chiplets: usize,
    /// Self tests of the driver that have passed at the start.
    pub(crate) self_tests: u32,
    /// All that the driver counts.
    pub(crate) counters: BTreeMap<&'static str, u64>,
    pub(crate) operations: Vec<Operation>,
}

impl Hardware {
    pub(crate) fn count(&mut self, gru: &Gru, stats: &GruStats) {
        self.counters = stats.counters().collect();
        self.operations = operations(gru);
    }
}

impl fmt::Display for Hardware {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let get = |name| self.counters.get(name).copied().unwrap_or(0);
        writeln!(
            f,
            "\n  GRU: {} chiplets on {} blades, {} self tests passed",
            self.chiplets, self.blades, self.self_tests
        )?;
        writeln!(
            f,
            "  misses: {} by the service threads, {} by who polled, {} on their user's call, {} of them left to it under the map lock",
            get("misses_interrupt"),
            get("misses_polled"),
            get("misses_user"),
            get("faults_to_user")
        )?;
        writeln!(
            f,
            "  faults: {} in {} batches, {} filled around",
            get("faults_resolved"),
            get("fault_batches"),
            get("preloads")
        )?;
        writeln!(
            f,
            "  contexts: {} loaded, {} stolen, {} not as a fault was unresolved, {} not within the window",
            get("contexts_loaded"),
            get("contexts_stolen"),
            get("steals_locked"),
            get("steals_too_early")
        )?;
        writeln!(
            f,
            "  purges: {} of pages, {} of an ASID, {} of a chiplet, {} spared; ASIDs: {} retired, {} wraps",
            get("purges_pages"),
            get("purges_asid"),
            get("purges_whole"),
            get("purges_spared"),
            get("asids_retired"),
            get("asid_wraps")
        )?;
        writeln!(
            f,
            "  messages: {} sent, {} received, {} found the queue full, {} flips, {} stored by software, {} congested",
            get("messages_sent"),
            get("messages_received"),
            get("messages_full"),
            get("queue_flips"),
            get("messages_stored"),
            get("messages_congested")
        )?;
        writeln!(
            f,
            "  interrupts: {}, completions: {}; instructions tried again: {}, given up: {}, exceptions: {}\n",
            get("interrupts"),
            get("completions"),
            get("retries"),
            get("retries_exhausted"),
            get("exceptions")
        )?;
        write_operations(f, &self.operations)
    }
}
