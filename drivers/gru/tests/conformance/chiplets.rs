//! The model of the chiplets, as the kit builds and looks at it.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use conformance::{Asked, Failure, Fault, Hardware, Hook, Reach, Setup, outside};
use shootdown::{Addr, DeviceError, PageSize, Range, Registers};
use shootdown_gru::{ChipletPorts, Segment};
use shootdown_hw_model::gru::{Chiplet, ChipletConfig, FaultPlan, Latency, Model, layout};

/// Two chiplets, and who has a context on them: an ASID says nothing of its space.
pub(crate) struct Chiplets {
    model: Model,
    users: Mutex<Vec<(u64, Weak<Segment>)>>,
    hook: Arc<Mutex<Option<Hook>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Chiplets {
    pub(crate) fn ports(&self) -> Vec<ChipletPorts> {
        let ports = self.model.chiplets().iter().map(|chiplet| ChipletPorts {
            name: format!("gru{}", chiplet.config().device),
            blade: 0,
            registers: Arc::new(Watching {
                chiplet: Arc::clone(chiplet),
                hook: Arc::clone(&self.hook),
            }),
            interrupts: chiplet.clone(),
        });
        ports.collect()
    }

    pub(crate) fn add(&self, space: u64, segment: &Arc<Segment>) {
        let mut users = lock(&self.users);
        users.retain(|(_, segment)| segment.strong_count() > 0);
        users.push((space, Arc::downgrade(segment)));
    }

    /// An entry that a context of `space` can use.
    fn entry(&self, segment: &Segment, part: Range) -> Option<Range> {
        let names = self.model.chiplets().iter();
        let mut own =
            names.filter(|one| format!("gru{}", one.config().device) == segment.chiplet());
        let entries = own.next()?.tlb_entries();
        let used = |key: &shootdown_hw_model::gru::TlbKey| {
            Some(key.asid) == segment.asid() && key.range().overlaps(part)
        };
        let mut keys = entries.iter().map(|entry| entry.key);
        keys.find(used).map(|key| key.range())
    }
}

impl Hardware for Chiplets {
    const FAULTS: &'static [Fault] = &[
        Fault::Lost,
        Fault::Late,
        Fault::Duplicated,
        Fault::Reordered,
        Fault::Stuck,
        Fault::Dead,
    ];

    fn build(setup: &Setup) -> Result<Self, Failure> {
        let fault = |one: Fault| if setup.fault == Some(one) { 0.5 } else { 0.0 };
        let dead = setup.fault == Some(Fault::Dead);
        let faults = FaultPlan {
            seed: setup.seed,
            lost: fault(Fault::Lost),
            stuck: if dead { 1.0 } else { fault(Fault::Stuck) },
            late: fault(Fault::Late),
            late_by: setup.late_by,
            jitter: Duration::from_micros(if setup.fault == Some(Fault::Reordered) {
                1000
            } else {
                0
            }),
            duplicated: fault(Fault::Duplicated),
            duplicate_after: Duration::from_micros(150),
            survives_reset: if dead { 1.0 } else { 0.0 },
            ..FaultPlan::default()
        };
        let config = ChipletConfig {
            faults,
            latency: Latency {
                purge: Duration::from_micros(30),
                handle: Duration::ZERO,
                access: Duration::from_micros(20),
            },
            ..ChipletConfig::default()
        };
        Ok(Self {
            model: Model::new(&setup.bus, 2, config),
            users: Mutex::new(Vec::new()),
            hook: Arc::default(),
        })
    }

    fn reach(&self, space: u64, part: Range) -> Option<Reach> {
        let users = lock(&self.users).clone();
        let own = users.iter().filter(|(of, _)| *of == space);
        let segments = own.filter_map(|(_, segment)| segment.upgrade());
        let mut loaded = segments.filter(|segment| segment.ended().is_none());
        let page = loaded.find_map(|segment| self.entry(&segment, part))?;
        Some(Reach::Entry {
            page,
            asked: Asked::Unknown,
        })
    }

    fn on_install(&self, hook: Option<Hook>) -> bool {
        *lock(&self.hook) = hook;
        true
    }
}

/// A chiplet's registers. They do not use the heap, as far as the driver is concerned, and tell when an entry is about to be written.
struct Watching {
    chiplet: Arc<Chiplet>,
    hook: Arc<Mutex<Option<Hook>>>,
}

impl Watching {
    /// The entry that this write installs.
    fn entry(&self, offset: u64, value: u64) -> Option<Range> {
        let within = offset.checked_sub(layout::MANAGEMENT + layout::TFH)?;
        let handle = within < layout::SLOTS as u64 * layout::HANDLE_STRIDE
            && within % layout::HANDLE_STRIDE == 0;
        let opcode = layout::OPCODE.get(value);
        let installs = [layout::tfh::WRITE_ONLY, layout::tfh::WRITE_RESTART];
        let writes = installs.contains(&opcode) && value & 1 == 1;
        if !handle || !writes {
            return None;
        }
        let word = |word: usize| self.chiplet.read(offset + word as u64 * 8).unwrap_or(0);
        let code = layout::tfh::PAGE_SIZE.get(word(layout::tfh::FILL));
        let size = [PageSize::FourKiB, PageSize::SixtyFourKiB, PageSize::TwoMiB];
        let size = size
            .into_iter()
            .find(|size| size.shift() == layout::page_shift(code as u8))?;
        Some(Range::page(Addr::new(word(layout::tfh::FILL_VADDR)), size))
    }
}

impl Registers for Watching {
    fn len(&self) -> u64 {
        self.chiplet.len()
    }

    fn read(&self, offset: u64) -> Result<u64, DeviceError> {
        outside(|| self.chiplet.read(offset))
    }

    fn write(&self, offset: u64, value: u64) -> Result<(), DeviceError> {
        outside(|| {
            if let Some(entry) = self.entry(offset, value) {
                let hook = lock(&self.hook).clone();
                if let Some(hook) = hook {
                    hook(entry);
                }
            }
            self.chiplet.write(offset, value)
        })
    }
}
