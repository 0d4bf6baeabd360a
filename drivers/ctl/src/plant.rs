//! Bugs that a run can be given, in the driver and in the model; never in the framework.

use std::time::Duration;

use shootdown_gru as gru;
use shootdown_hw_model::gru as model;
use thiserror::Error;

/// A planted bug.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Plant {
    NoFlush,
    FlushNotWaited,
    RetryNotChecked,
    AsidReused,
    LostCompletion,
}

#[derive(Debug, Error)]
#[error("no planted bug is called {name:?}: `--plant list` prints their names")]
pub(crate) struct NoSuchPlant {
    name: String,
}

impl Plant {
    pub(crate) const ALL: [Plant; 5] = [
        Self::NoFlush,
        Self::FlushNotWaited,
        Self::RetryNotChecked,
        Self::AsidReused,
        Self::LostCompletion,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::NoFlush => "no-flush",
            Self::FlushNotWaited => "flush-not-waited",
            Self::RetryNotChecked => "retry-not-checked",
            Self::AsidReused => "asid-reused",
            Self::LostCompletion => "lost-completion",
        }
    }

    pub(crate) fn meaning(self) -> &'static str {
        match self {
            Self::NoFlush => "the driver answers flushes without a purge",
            Self::FlushNotWaited => "a purge counts as acknowledged when it was started",
            Self::RetryNotChecked => {
                "the sequence is not checked before an entry is installed (R9)"
            }
            Self::AsidReused => "an ASID is handed out again without a flush (R15)",
            Self::LostCompletion => "the chiplet loses completions (R20); the run must pass",
        }
    }

    pub(crate) fn by_name(name: &str) -> Result<Self, NoSuchPlant> {
        let found = Self::ALL.into_iter().find(|plant| plant.name() == name);
        found.ok_or_else(|| NoSuchPlant {
            name: name.to_owned(),
        })
    }

    /// How long the chiplet takes to write an entry: the races between a fill and a purge need a window.
    pub(crate) fn handle_latency(self) -> Duration {
        match self {
            Self::RetryNotChecked => Duration::from_millis(1),
            _ => Duration::ZERO,
        }
    }

    /// Whether a run with it has to find something.
    pub(crate) fn must_be_found(self) -> bool {
        self != Self::LostCompletion
    }

    pub(crate) fn driver(self) -> gru::Plant {
        match self {
            Self::NoFlush => gru::Plant::NO_FLUSH_ON_UNMAP,
            Self::FlushNotWaited => gru::Plant::FLUSH_NOT_WAITED,
            Self::RetryNotChecked => gru::Plant::RETRY_NOT_CHECKED,
            Self::AsidReused => gru::Plant::ASID_REUSED,
            Self::LostCompletion => gru::Plant::empty(),
        }
    }

    pub(crate) fn model(self) -> model::Plant {
        match self {
            // The chiplet's own guard (R16) would hide it.
            Self::RetryNotChecked => model::Plant::DROP_IN_NOT_CANCELLED,
            _ => model::Plant::empty(),
        }
    }
}
