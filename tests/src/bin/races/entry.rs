//! What an entry of the table is: a race, a guard against it, and what must notice that the guard is gone.

use std::fmt;

/// What must notice.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Check {
    /// Every interleaving of the real code, within a bound, by the model checker.
    Model { test: &'static str },
    /// A test of core or of the windows over it, against real memory of the process and fake devices.
    Test {
        target: &'static str,
        test: &'static str,
    },
    /// A test whose allocator aborts in the shootdown path.
    Trap {
        target: &'static str,
        test: &'static str,
    },
    /// A driver's tests: one runs with the guard and finds nothing, the other without it and passes only if the bug is found, by
    /// the oracle of the model, or by what the hardware was seen to do.
    Pair {
        target: &'static str,
        with: &'static str,
        without: &'static str,
    },
    /// The oracle, in a run of the `shootdown` command.
    Run,
    /// A real kernel, in a virtual machine, and the witness that reads the trace of its IOMMU.
    Vm,
}

impl Check {
    /// Not for every change.
    pub(crate) fn is_slow(self) -> bool {
        matches!(self, Self::Run | Self::Vm)
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Model { test } => write!(f, "loom: {test}"),
            Self::Test { target, test } => write!(f, "test {target}: {test}"),
            Self::Trap { target, test } => write!(f, "allocator trap, {target}: {test}"),
            Self::Pair { without, .. } => write!(f, "driver over the GRU model: {without}"),
            Self::Run => f.write_str("oracle, in a run of the main job"),
            Self::Vm => f.write_str("VM tier: the negative controls, in guest and witness"),
        }
    }
}

/// One guard against one race.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub(crate) race: &'static str,
    /// What the guard is, and where.
    pub(crate) guard: &'static str,
    /// How it is taken out: the name in `SHOOTDOWN_PLANTED`, the plant of a driver or model, or of `shootdown --plant`.
    pub(crate) plant: &'static str,
    pub(crate) check: Check,
}

pub(crate) const fn model(
    race: &'static str,
    plant: &'static str,
    guard: &'static str,
    test: &'static str,
) -> Entry {
    Entry {
        race,
        guard,
        plant,
        check: Check::Model { test },
    }
}

pub(crate) const fn test(
    race: &'static str,
    plant: &'static str,
    guard: &'static str,
    target: &'static str,
    test: &'static str,
) -> Entry {
    Entry {
        race,
        guard,
        plant,
        check: Check::Test { target, test },
    }
}

pub(crate) const fn pair(
    race: &'static str,
    plant: &'static str,
    guard: &'static str,
    target: &'static str,
    [with, without]: [&'static str; 2],
) -> Entry {
    Entry {
        race,
        guard,
        plant,
        check: Check::Pair {
            target,
            with,
            without,
        },
    }
}

pub(crate) const fn job(race: &'static str, plant: &'static str, guard: &'static str) -> Entry {
    Entry {
        race,
        guard,
        plant,
        check: Check::Run,
    }
}
