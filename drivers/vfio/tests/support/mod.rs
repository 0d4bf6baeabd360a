//! An IOMMU and a device that the test holds in its hand, and memory that looks at both when its pages change.
#![allow(dead_code, reason = "each test file uses its own part of this module")]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use shootdown::{
    Addr, AddressSpace, Deadlines, DeviceError, DmaWindow, Map, Memory, MemoryError, PageSize,
    PageSizes, ProcessMemory, Range, Rights, Translation, WouldBlock,
};
use shootdown_vfio::{DeviceWork, InFlight, Window, WindowOptions};

/// What happened, in order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Event {
    Map(Range),
    Unmap(Range),
    Stop(Range),
    Drained,
    Resume(Range),
    Pages(Range),
}

/// A log with room made beforehand: what is logged in the shootdown path allocates nothing.
pub(crate) struct Log(Mutex<Vec<Event>>);

impl Log {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(Vec::with_capacity(1 << 17))))
    }

    pub(crate) fn push(&self, event: Event) {
        let mut events = self.0.lock().unwrap();
        if events.len() < events.capacity() {
            events.push(event);
        }
    }

    pub(crate) fn take(&self) -> Vec<Event> {
        let mut events = self.0.lock().unwrap();
        let taken = events.clone();
        events.clear();
        taken
    }
}

/// An endpoint with granules as the kernel has them.
pub(crate) struct FakeEndpoint {
    pub(crate) log: Arc<Log>,
    pub(crate) mapped: Mutex<Vec<(Range, Range)>>,
    /// The next so many maps succeed, then one fails.
    pub(crate) maps_left: AtomicU64,
    /// How long a map takes, in microseconds.
    pub(crate) slowness: AtomicU64,
    /// Unmaps fail.
    pub(crate) stuck: AtomicBool,
    /// Says that it unmapped, and does not.
    pub(crate) lies: AtomicBool,
}

impl FakeEndpoint {
    pub(crate) fn new(log: &Arc<Log>) -> Arc<Self> {
        Arc::new(Self {
            log: log.clone(),
            mapped: Mutex::new(Vec::with_capacity(1 << 16)),
            maps_left: AtomicU64::new(u64::MAX),
            slowness: AtomicU64::new(0),
            stuck: AtomicBool::new(false),
            lies: AtomicBool::new(false),
        })
    }

    /// Whether a device reaches any of `memory`.
    pub(crate) fn reaches(&self, memory: Range) -> bool {
        let mapped = self.mapped.lock().unwrap();
        mapped.iter().any(|(_, one)| one.overlaps(memory))
    }

    pub(crate) fn granules(&self) -> usize {
        self.mapped.lock().unwrap().len()
    }
}

pub(crate) const REFUSED: DeviceError = DeviceError::System {
    call: "planned",
    errno: 5,
};

impl DmaWindow for FakeEndpoint {
    fn iova_ranges(&self) -> Vec<Range> {
        vec![Range::inclusive(0, 0xff_ffff_ffff).unwrap()]
    }

    fn map(&self, iova: Range, memory: Range, _: Rights) -> Result<(), DeviceError> {
        let slowness = self.slowness.load(SeqCst);
        if slowness > 0 {
            std::thread::sleep(Duration::from_micros(slowness));
        }
        let mut mapped = self.mapped.lock().unwrap();
        if mapped.iter().any(|(one, _)| one.overlaps(iova)) {
            return Err(DeviceError::Overlap { iova });
        }
        let left = self
            .maps_left
            .fetch_update(SeqCst, SeqCst, |left| Some(left.wrapping_sub(1)));
        if left == Ok(0) {
            return Err(REFUSED);
        }
        mapped.push((iova, memory));
        self.log.push(Event::Map(iova));
        Ok(())
    }

    fn unmap(&self, iova: Range) -> Result<(), DeviceError> {
        if self.stuck.load(SeqCst) {
            return Err(REFUSED);
        }
        let mut mapped = self.mapped.lock().unwrap();
        let mut inside = mapped.iter().filter(|(one, _)| one.overlaps(iova));
        if let Some((mapping, _)) = inside.find(|(one, _)| !iova.contains(*one)) {
            return Err(DeviceError::Cut {
                iova,
                mapping: *mapping,
            });
        }
        let before = mapped.len();
        if !self.lies.load(SeqCst) {
            mapped.retain(|(one, _)| !one.overlaps(iova));
            if mapped.len() == before {
                return Err(DeviceError::NotMapped { iova });
            }
        }
        self.log.push(Event::Unmap(iova));
        Ok(())
    }
}

/// A device whose work takes some polls to drain.
pub(crate) struct FakeWork {
    pub(crate) log: Arc<Log>,
    pub(crate) in_flight: AtomicU64,
    pub(crate) refuses: AtomicBool,
    pub(crate) stops: AtomicU64,
    pub(crate) resumes: AtomicU64,
}

impl FakeWork {
    pub(crate) fn new(log: &Arc<Log>) -> Arc<Self> {
        Arc::new(Self {
            log: log.clone(),
            in_flight: AtomicU64::new(0),
            refuses: AtomicBool::new(false),
            stops: AtomicU64::new(0),
            resumes: AtomicU64::new(0),
        })
    }
}

impl DeviceWork for FakeWork {
    fn stop(&self, iova: Range, may_block: bool) -> Result<InFlight, WouldBlock> {
        if self.refuses.load(SeqCst) && !may_block {
            return Err(WouldBlock);
        }
        self.stops.fetch_add(1, SeqCst);
        self.log.push(Event::Stop(iova));
        Ok(if self.in_flight.load(SeqCst) > 0 {
            InFlight::Work
        } else {
            InFlight::Nothing
        })
    }

    fn drained(&self, _: Range) -> bool {
        let left = self
            .in_flight
            .fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1));
        if left == Ok(1) {
            self.log.push(Event::Drained);
        }
        left.is_err()
    }

    fn resume(&self, iova: Range) {
        self.resumes.fetch_add(1, SeqCst);
        self.log.push(Event::Resume(iova));
    }
}

/// Real memory of the process. When pages change no endpoint may reach them: that is counted here, by nobody who could have
/// forgotten it.
pub(crate) struct Watched {
    memory: ProcessMemory,
    pub(crate) endpoints: Vec<Arc<FakeEndpoint>>,
    pub(crate) log: Arc<Log>,
    pub(crate) violations: AtomicU64,
    /// The next change fails.
    pub(crate) fails: AtomicBool,
    /// How long a change takes, in microseconds.
    pub(crate) slowness: AtomicU64,
}

impl Watched {
    pub(crate) fn new(log: &Arc<Log>, endpoints: &[Arc<FakeEndpoint>]) -> Arc<Self> {
        Arc::new(Self {
            memory: ProcessMemory::reserve(1 << 30).unwrap(),
            endpoints: endpoints.to_vec(),
            log: log.clone(),
            violations: AtomicU64::new(0),
            fails: AtomicBool::new(false),
            slowness: AtomicU64::new(0),
        })
    }

    fn changing(&self, range: Range) -> Result<(), MemoryError> {
        if self.fails.swap(false, SeqCst) {
            return Err(MemoryError::System {
                call: "planned",
                range,
                errno: std::io::ErrorKind::Other,
            });
        }
        let slowness = self.slowness.load(SeqCst);
        if slowness > 0 {
            std::thread::sleep(Duration::from_micros(slowness));
        }
        if self.endpoints.iter().any(|one| one.reaches(range)) {
            self.violations.fetch_add(1, SeqCst);
        }
        self.log.push(Event::Pages(range));
        Ok(())
    }
}

impl Memory for Watched {
    fn id(&self) -> u64 {
        self.memory.id()
    }
    fn arena(&self) -> Range {
        self.memory.arena()
    }
    fn page_sizes(&self) -> PageSizes {
        self.memory.page_sizes()
    }
    fn map(&self, range: Range, page: PageSize, rights: Rights) -> Result<(), MemoryError> {
        self.memory.map(range, page, rights)
    }
    fn unmap(&self, range: Range) -> Result<(), MemoryError> {
        self.changing(range)?;
        self.memory.unmap(range)
    }
    fn discard(&self, range: Range) -> Result<(), MemoryError> {
        self.changing(range)?;
        self.memory.discard(range)
    }
    fn protect(&self, range: Range, rights: Rights) -> Result<(), MemoryError> {
        self.changing(range)?;
        self.memory.protect(range, rights)
    }
    fn remap(&self, from: Range, to: Range) -> Result<(), MemoryError> {
        self.changing(from)?;
        self.memory.remap(from, to)
    }
    fn translate(&self, addr: Addr) -> Option<Translation> {
        self.memory.translate(addr)
    }
}

/// Everything together.
pub(crate) struct Rig {
    pub(crate) log: Arc<Log>,
    pub(crate) endpoints: Vec<Arc<FakeEndpoint>>,
    pub(crate) work: Arc<FakeWork>,
    pub(crate) memory: Arc<Watched>,
    pub(crate) space: AddressSpace,
    pub(crate) iommu: Arc<shootdown_vfio::Iommu>,
}

pub(crate) fn rig(endpoints: usize) -> Rig {
    let log = Log::new();
    let endpoints: Vec<_> = (0..endpoints).map(|_| FakeEndpoint::new(&log)).collect();
    let memory = Watched::new(&log, &endpoints);
    let each = endpoints
        .iter()
        .map(|one| one.clone() as Arc<dyn DmaWindow>);
    Rig {
        iommu: shootdown_vfio::Iommu::new(each.collect(), shootdown_vfio::Reuse::Late).unwrap(),
        work: FakeWork::new(&log),
        space: AddressSpace::managed(
            memory.clone(),
            Deadlines {
                drain: Duration::from_millis(50),
                ..Deadlines::default()
            },
        ),
        memory,
        endpoints,
        log,
    }
}

pub(crate) const SECOND: Duration = Duration::from_secs(1);

pub(crate) fn options(granule: u64) -> WindowOptions {
    WindowOptions {
        granule,
        deadline: SECOND,
        ..WindowOptions::default()
    }
}

pub(crate) fn open(rig: &Rig, memory: Range, granule: u64) -> Window {
    Window::open(
        &rig.iommu,
        &rig.space,
        memory,
        rig.work.clone(),
        options(granule),
    )
    .unwrap()
}

pub(crate) fn pages(rig: &Rig, count: u64) -> Range {
    rig.space.map(Map::anonymous(count << 12)).unwrap()
}

/// The `nth` page of `range`.
pub(crate) fn page(range: Range, nth: u64) -> Range {
    Range::new(range.start().get() + (nth << 12), 4096).unwrap()
}
