//! The model of the device, as the kit builds and looks at it.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use conformance::{Asked, Failure, Fault, Hook, Reach, Setup, outside};
use shootdown::{DeviceError, Range, Registers};
use shootdown_hw_model::pta::{FaultPlan, Latency, Pta, PtaConfig, layout};

/// What does not reach the device, as if the driver had left it out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Broken {
    Nothing,
    /// Page-table entries are never taken away.
    EntriesStay,
    /// Completions are made up before there are any.
    AnswersAtOnce,
    /// Queues are not disabled.
    QueuesGoOn,
}

pub(crate) struct Hardware {
    pub(crate) model: Arc<Pta>,
    hook: Arc<Mutex<Option<Hook>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Hardware {
    pub(crate) fn registers(&self, broken: Broken) -> Arc<dyn Registers> {
        Arc::new(Watching {
            model: Arc::clone(&self.model),
            hook: Arc::clone(&self.hook),
            broken,
            rung: AtomicU64::new(0),
        })
    }
}

impl conformance::Hardware for Hardware {
    const FAULTS: &'static [Fault] = &Fault::ALL;

    fn build(setup: &Setup) -> Result<Self, Failure> {
        let fault = |one: Fault| if setup.fault == Some(one) { 0.5 } else { 0.0 };
        let dead = setup.fault == Some(Fault::Dead);
        let jitter = if setup.fault == Some(Fault::Reordered) {
            1000
        } else {
            0
        };
        let faults = FaultPlan {
            seed: setup.seed,
            lost: fault(Fault::Lost),
            stuck: if dead { 1.0 } else { fault(Fault::Stuck) },
            late: fault(Fault::Late),
            late_by: setup.late_by,
            jitter: Duration::from_micros(jitter),
            duplicated: fault(Fault::Duplicated),
            duplicate_after: Duration::from_micros(150),
            unissued: fault(Fault::Unissued),
            survives_reset: if dead { 1.0 } else { 0.0 },
            ..FaultPlan::default()
        };
        let config = PtaConfig {
            faults,
            latency: Latency {
                walk: Duration::from_micros(5),
                access: Duration::from_micros(20),
                invalidate: Duration::from_micros(30),
                reset: Duration::from_micros(50),
            },
            ..PtaConfig::default()
        };
        Ok(Self {
            model: Pta::new(&setup.bus, config)?,
            hook: Arc::default(),
        })
    }

    fn reach(&self, space: u64, part: Range) -> Option<Reach> {
        if let Some(page) = self.model.works_at(space, part) {
            return Some(Reach::Work { page });
        }
        let page = self.model.maps(space, part)?;
        Some(Reach::Entry {
            page,
            asked: Asked::Unknown,
        })
    }

    fn hold(&self, held: bool) -> bool {
        self.model.hold(held);
        true
    }

    fn on_install(&self, hook: Option<Hook>) -> bool {
        *lock(&self.hook) = hook;
        true
    }
}

/// The registers. They do not use the heap, as far as the driver is concerned, and tell when an entry is about to be written.
struct Watching {
    model: Arc<Pta>,
    hook: Arc<Mutex<Option<Hook>>>,
    broken: Broken,
    rung: AtomicU64,
}

impl Watching {
    fn is_lost(&self, offset: u64, value: u64) -> bool {
        let queues = layout::QUEUE_CONTROL..layout::QUEUE_CONTROL + layout::QUEUES as u64 * 8;
        match self.broken {
            Broken::EntriesStay => offset >= layout::LOCAL && value == 0,
            Broken::QueuesGoOn => queues.contains(&offset) && layout::ENABLE.get(value) == 0,
            Broken::Nothing | Broken::AnswersAtOnce => false,
        }
    }
}

impl Registers for Watching {
    fn len(&self) -> u64 {
        self.model.len()
    }

    fn read(&self, offset: u64) -> Result<u64, DeviceError> {
        outside(|| {
            if self.broken == Broken::AnswersAtOnce && offset == layout::INVALIDATE_COMPLETION {
                return Ok(self.rung.swap(0, SeqCst));
            }
            self.model.read(offset)
        })
    }

    fn write(&self, offset: u64, value: u64) -> Result<(), DeviceError> {
        outside(|| {
            if let Some(entry) = self.model.would_install(offset, value) {
                let hook = lock(&self.hook).clone();
                if let Some(hook) = hook {
                    hook(entry);
                }
            }
            if offset == layout::INVALIDATE_DOORBELL {
                self.rung.store(value, SeqCst);
            }
            if self.is_lost(offset, value) {
                return Ok(());
            }
            self.model.write(offset, value)
        })
    }
}
