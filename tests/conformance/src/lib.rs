//! The conformance kit: everything that can be asked of a driver of [`shootdown`], asked over a model of its device.
//!
//! # The author's three lines
//! ```
//! # mod tlb { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/driver/tlb.rs")); }
//! # mod handler { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/driver/handler.rs")); }
//! # mod session { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/driver/session.rs")); }
//! # use session::MyAccelerator;
//! # fn main() {
//! conformance::run(MyAccelerator::probe).assert();
//! # }
//! ```
//! `probe` is given the model of the device and makes the driver. `assert` panics with the whole report; [`Report::findings`] has it as
//! values. For these lines the author has implemented [`Driver`] and [`Session`], some forty lines that say how a process opens
//! the driver, has the device write, and begins work. The model is the kit's [`Accelerator`], or one of the author's own device for which
//! [`Hardware`] is implemented.
//!
//! # What is asked
//! Each scenario has a rig of its own: physical memory whose frames are used again at once, a model that really caches and really
//! accesses what its entries name, an oracle that knows nothing of the framework and checks each access, and the driver.
//! * Unmap, discard, protect and remap: whole and in part, at both ends and in the middle, of pages of each size.
//! * A page that changes between its translation and its entry; part of a huge page that does; a miss between the flush and the
//!   change; a change while the entry is being installed.
//! * Work in flight below the change, and beside it.
//! * Non-blocking operations that another handler refuses, and that meet the driver's own lock.
//! * The segment itself, with and without the map lock; a session that is given up in each of five places; an exit; all of it with
//!   work in flight.
//! * Devices whose completions are lost, late, come twice, out of order, or for nothing that was asked; whose flushes never begin,
//!   whose work never ends, whom no reset helps.
//! * All of it at once, from a seed.
//!
//! Where the driver's entries should be gone the kit does not ask the driver: it looks into the model, at the moment when the pages
//! change. It learns of that moment as the memory behind the space, and of the operation's start and end by handlers of its own,
//! registered before and after the driver's. Nothing is hooked into the driver.
//!
//! # What is reported
//! The [`Rule`] that was broken, in the words of the framework's documentation; what the device did or could have done; what led
//! there, from the flight recorder and the steps of the kit; and the seed. The interleaving of the scenarios is forced; that of the last
//! one, where everything happens at once, is the machine's, and the seed fixes its workload.
//!
//! # Allocation
//! With [`Watched`] as the test program's allocator the kit finds callbacks that allocate, or free, and says where.

mod accelerator;
mod alloc;
mod author;
mod lab;
mod log;
mod memory;
mod report;
mod rule;
mod scenario;

use std::sync::Arc;
use std::time::Duration;

pub use accelerator::{Accelerator, QUEUE, SLOTS, WorkId, WorkState};
pub use alloc::{Watched, outside};
pub use author::{Access, Asked, Driver, Failure, Fault, Hardware, Hook, Reach, Session, Setup};
pub use report::{Finding, Moment, Report, Skipped};
pub use rule::Rule;

/// The environment variable that a seed is taken from.
pub const SEED: &str = "SHOOTDOWN_CONFORMANCE_SEED";

/// Runs everything, with the seed of [`SEED`], or 1.
pub fn run<D, E>(probe: impl Fn(Arc<D::Hardware>) -> Result<D, E> + Sync) -> Report
where
    D: Driver,
    E: Into<Failure>,
{
    Kit::new().run(probe)
}

/// Runs with something else than the defaults.
#[derive(Clone, Copy, Debug)]
pub struct Kit {
    seed: u64,
    patience: Duration,
    only: &'static str,
}

impl Default for Kit {
    fn default() -> Self {
        Self::new()
    }
}

impl Kit {
    /// The defaults of [`run`].
    ///
    /// # Panics
    /// When [`SEED`] is set and is no number: a run that replays another has to say so.
    pub fn new() -> Self {
        let seed = match std::env::var(SEED) {
            Err(_) => 1,
            Ok(text) => match text.parse() {
                Ok(seed) => seed,
                Err(_) => panic!("{SEED}={text}: a number is needed, as a report prints it"),
            },
        };
        Self {
            seed,
            patience: Duration::from_secs(60),
            only: "",
        }
    }

    /// With another seed.
    #[must_use]
    pub fn seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// With another time for one scenario to be over: 60 s, and far more than any takes. What is not over by then is a finding, and
    /// the last one; its threads are left behind, as nothing can cut a callback short.
    #[must_use]
    pub fn patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// Only the scenarios whose names contain this, as a report has them.
    #[must_use]
    pub fn only(self, only: &'static str) -> Self {
        Self { only, ..self }
    }

    /// Runs everything.
    pub fn run<D, E>(self, probe: impl Fn(Arc<D::Hardware>) -> Result<D, E> + Sync) -> Report
    where
        D: Driver,
        E: Into<Failure>,
    {
        let probe = |hardware| probe(hardware).map_err(Into::into);
        let mut report = Report {
            seed: self.seed,
            driver: std::any::type_name::<D>(),
            ..Report::default()
        };
        let how = scenario::How {
            seed: self.seed,
            patience: self.patience,
            only: self.only,
        };
        scenario::run(&probe, &how, |seen| {
            report.findings.extend(seen.finding);
            report.skipped.extend(seen.skipped);
            report.accesses += seen.accesses;
            report.invalidations += seen.invalidations;
        });
        if !alloc::is_installed() {
            report.skipped.push(Skipped {
                scenario: "callbacks do not allocate",
                why: "the allocator of this program is not conformance::Watched".to_owned(),
            });
        }
        report
    }
}
