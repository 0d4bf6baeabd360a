//! Bugs that a run can be given, in the driver and in the model; never in the framework.

use std::time::Duration;

use serde::Serialize;
use shootdown_gru::{Config, LateDropIns, Plant as Driver};
use shootdown_hw_model::gru::{ChipletConfig, Plant as Hardware};
use thiserror::Error;

/// A planted bug.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Plant {
    NoFlush,
    FlushNotWaited,
    RetryNotChecked,
    WrongRange,
    DropInNotCancelled,
    AsidReused,
    ContextNotUnloaded,
    LostCompletion,
}

/// A planted bug in a report.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Planted {
    pub(crate) name: &'static str,
    pub(crate) race: &'static str,
    pub(crate) meaning: &'static str,
    pub(crate) must_be_found: bool,
    /// When the first stale access or data mismatch was seen.
    pub(crate) found_after_seconds: Option<f64>,
}

#[derive(Debug, Error)]
#[error("no planted bug is called {name:?}: `--plant list` prints their names")]
pub(crate) struct NoSuchPlant {
    name: String,
}

/// How long a handle takes where a fill has to lose a race against a purge, and how much longer a purge may take where a miss
/// has to come between the purges of two chiplets: many times what a thread needs to be woken.
const WINDOW: Duration = Duration::from_micros(300);

impl Plant {
    pub(crate) const ALL: [Plant; 8] = [
        Self::NoFlush,
        Self::FlushNotWaited,
        Self::RetryNotChecked,
        Self::WrongRange,
        Self::DropInNotCancelled,
        Self::AsidReused,
        Self::ContextNotUnloaded,
        Self::LostCompletion,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::NoFlush => "no-flush",
            Self::FlushNotWaited => "flush-not-waited",
            Self::RetryNotChecked => "retry-not-checked",
            Self::WrongRange => "wrong-range",
            Self::DropInNotCancelled => "drop-in-not-cancelled",
            Self::AsidReused => "asid-reused",
            Self::ContextNotUnloaded => "context-not-unloaded",
            Self::LostCompletion => "lost-completion",
        }
    }

    /// The race that it opens, as the catalogue of races numbers them.
    pub(crate) fn race(self) -> &'static str {
        match self {
            Self::NoFlush | Self::ContextNotUnloaded => "R14",
            Self::FlushNotWaited => "R21",
            Self::RetryNotChecked => "R9",
            Self::WrongRange => "R34",
            Self::DropInNotCancelled => "R16",
            Self::AsidReused => "R15",
            Self::LostCompletion => "R20",
        }
    }

    pub(crate) fn meaning(self) -> &'static str {
        match self {
            Self::NoFlush => "the driver answers flushes without a purge",
            Self::FlushNotWaited => "a purge counts as acknowledged when it was started",
            Self::RetryNotChecked => "the sequence is not checked before an entry is installed",
            Self::WrongRange => {
                "the sequence of 4 KiB is checked, whatever the size of the entry that is installed"
            }
            Self::DropInNotCancelled => {
                "the chiplet installs an entry that a purge came for, in a driver that relies on it not to"
            }
            Self::AsidReused => "an ASID is handed out again without a flush",
            Self::ContextNotUnloaded => "the context of an unmapped segment goes on",
            Self::LostCompletion => "the chiplet loses completions; the run must pass",
        }
    }

    /// For a report.
    pub(crate) fn planted(self) -> Planted {
        Planted {
            name: self.name(),
            race: self.race(),
            meaning: self.meaning(),
            must_be_found: self.must_be_found(),
            found_after_seconds: None,
        }
    }

    pub(crate) fn by_name(name: &str) -> Result<Self, NoSuchPlant> {
        let found = Self::ALL.into_iter().find(|plant| plant.name() == name);
        found.ok_or_else(|| NoSuchPlant {
            name: name.to_owned(),
        })
    }

    /// Whether a run with it has to find something.
    pub(crate) fn must_be_found(self) -> bool {
        self != Self::LostCompletion
    }

    /// The driver with it.
    pub(crate) fn driver(self, config: &mut Config) {
        config.plants = match self {
            Self::NoFlush => Driver::NO_FLUSH_ON_UNMAP,
            Self::FlushNotWaited => Driver::FLUSH_NOT_WAITED,
            Self::RetryNotChecked => Driver::RETRY_NOT_CHECKED,
            Self::WrongRange => Driver::WRONG_RANGE,
            Self::AsidReused => Driver::ASID_REUSED,
            Self::ContextNotUnloaded => Driver::CONTEXT_NOT_UNLOADED,
            Self::DropInNotCancelled | Self::LostCompletion => Driver::empty(),
        };
        if self == Self::DropInNotCancelled {
            config.late_drop_ins = LateDropIns::IgnoredByHardware;
        }
    }

    /// The hardware with it, or hardware that does not hide it. All of these latencies are legal, and without the bug a run over
    /// them is clean.
    pub(crate) fn hardware(self, config: &mut ChipletConfig) {
        match self {
            // Hardware that ignores late drop-ins would hide the first.
            Self::RetryNotChecked | Self::DropInNotCancelled => {
                config.plants = Hardware::DROP_IN_NOT_CANCELLED;
                config.latency.handle = WINDOW;
            }
            // Purges that take as long as they may.
            Self::WrongRange | Self::FlushNotWaited => config.faults.jitter = WINDOW,
            Self::LostCompletion => config.faults.lost = 0.002,
            _ => {}
        }
    }
}
