//! Page requests that are resolved together, and pages that are installed round those that were asked for: what it costs, counted by
//! the device and by the space, and what it must not do.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use shootdown::{
    Addr, AddressSpace, Deadlines, DeviceError, Interrupts, Map, Memory, MemoryError, PageSizes,
    Range, Rights, Translation,
};
use shootdown_hw_model::pta::{Counts, PtaConfig};
use shootdown_hw_model::{Bus, ModelMemory, pta as model};
use shootdown_pta::{Command, Config, Pta, PtaError, Queue};

const LONG: Duration = Duration::from_secs(20);
const PAGE: u64 = 4096;

/// Nothing is resolved together, and nothing is installed that nobody has asked for.
const OFF: (usize, u64) = (1, 1);

fn config((fault_batch, fault_around): (usize, u64)) -> Config {
    Config {
        fault_batch,
        fault_around,
        ..Config::default()
    }
}

/// The interrupts of the device, which come once the gate is open.
struct Gate {
    model: Arc<model::Pta>,
    is_open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn set(&self, is_open: bool) {
        *self.is_open.lock().unwrap_or_else(PoisonError::into_inner) = is_open;
        self.opened.notify_all();
    }
}

impl Interrupts for Gate {
    fn vectors(&self) -> u32 {
        self.model.vectors()
    }
    fn wait(&self, vector: u32, timeout: Duration) -> Result<u64, DeviceError> {
        let fired = self.model.wait(vector, timeout);
        let is_open = self.is_open.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.opened.wait_while(is_open, |is_open| !*is_open));
        fired
    }
}

struct Rig {
    bus: Bus,
    model: Arc<model::Pta>,
    gate: Arc<Gate>,
    pta: Arc<Pta>,
}

fn rig(config: Config) -> Rig {
    let bus = Bus::new(16 << 10).unwrap();
    let hardware = PtaConfig {
        requests: model::layout::REQUESTS,
        ..PtaConfig::default()
    };
    let model = model::Pta::new(&bus, hardware).unwrap();
    let gate = Arc::new(Gate {
        model: model.clone(),
        is_open: Mutex::new(true),
        opened: Condvar::new(),
    });
    let pta = Pta::probe("pta0", model.clone(), gate.clone(), config).unwrap();
    Rig {
        bus,
        model,
        gate,
        pta,
    }
}

impl Rig {
    fn space(&self) -> AddressSpace {
        let memory = ModelMemory::new(&self.bus, 64 << 20).unwrap();
        AddressSpace::managed(memory, Deadlines::default())
    }

    fn clean(&self) {
        let findings = self.bus.oracle().findings();
        assert!(findings.is_empty(), "{}", findings[0]);
    }
}

fn page(of: Range, nth: u64) -> Range {
    Range::new(of.start().get() + nth * PAGE, PAGE).unwrap()
}

fn read(queue: &Queue, range: Range) -> Result<u64, PtaError> {
    queue.run(0, &Command::Checksum { range }, LONG)
}

fn write(queue: &Queue, range: Range, word: u64) -> Result<u64, PtaError> {
    queue.run(0, &Command::Fill { range, word }, LONG)
}

fn is_fault(said: &Result<u64, PtaError>, at: Range) -> bool {
    matches!(said, Err(PtaError::PageFault { at: where_, .. }) if *where_ == at.start())
}

/// What a storm has cost: begins, as the space counts them, and what the device counts.
struct Cost {
    begins: u64,
    counts: Counts,
}

/// A thousand commands at once that need a page each, all of them made before the first one is answered.
fn storm(of: (usize, u64)) -> Cost {
    const PAGES: u64 = 1000;
    let rig = rig(config(of));
    let space = rig.space();
    let range = space.map(Map::anonymous(PAGES * PAGE)).unwrap();
    let queues: Vec<_> = (0..PAGES.div_ceil(16))
        .map(|_| rig.pta.queue(&space).unwrap())
        .collect();
    let (begins, before) = (space.stats().faults, rig.model.counts());
    assert_eq!((begins, before.requests), (0, 0));
    rig.gate.set(false);
    let slot = |nth: u64| (&queues[nth as usize / 16], nth as usize % 16);
    for nth in 0..PAGES {
        let (queue, slot) = slot(nth);
        let range = page(range, nth);
        let touch = Command::Touch {
            range,
            write: false,
        };
        queue.submit(slot, &touch).unwrap();
    }
    let full = model::layout::REQUESTS as u64 - 1;
    let begun = Instant::now();
    while rig.model.counts().requests < full || rig.model.counts().requests_dropped == 0 {
        assert!(begun.elapsed() < LONG);
        std::thread::yield_now();
    }
    rig.gate.set(true);
    for nth in 0..PAGES {
        let (queue, slot) = slot(nth);
        queue.wait(slot, LONG).unwrap();
    }
    let stats = rig.pta.stats();
    assert!(stats.pages_installed >= PAGES);
    assert_eq!(stats.requests_resolved, stats.requests);
    assert_eq!(stats.request_batches, space.stats().faults);
    rig.clean();
    Cost {
        begins: space.stats().faults,
        counts: rig.model.counts(),
    }
}

#[test]
fn a_storm_of_a_thousand_pages_is_resolved_in_batches() {
    let most = 250;
    let off = storm(OFF);
    assert!(off.begins > most, "{} begins one by one", off.begins);
    assert_eq!((off.begins, off.counts.responses), (1000, 1000));
    for of in [(64, 1), (64, 16)] {
        let Cost { begins, counts } = storm(of);
        println!("{of:?}: {begins} begins, {counts:?}");
        assert!(begins <= most, "{of:?}: {begins} begins");
        assert!(counts.interrupts <= most, "{of:?}: {counts:?}");
    }
}

#[test]
fn one_command_over_a_thousand_pages_asks_once_a_window() {
    for (around, requests) in [
        (0, 1000),
        (1, 1000),
        (10, 63),
        (16, 63),
        (512, 2),
        (u64::MAX, 2),
    ] {
        let rig = rig(config((64, around)));
        let space = rig.space();
        // Where windows of all sizes begin.
        let place = space.map(Map::anonymous(8 << 20)).unwrap();
        let start = place.start().get().next_multiple_of(2 << 20);
        space.unmap(place).unwrap();
        let map = Map::anonymous(1000 * PAGE).at(Addr::new(start));
        let range = space.map(map).unwrap();
        let queue = rig.pta.queue(&space).unwrap();
        let touch = Command::Touch { range, write: true };
        queue.run(0, &touch, LONG).unwrap();
        assert_eq!(rig.model.counts().requests, requests, "{around}");
        assert_eq!(rig.model.counts().interrupts, requests, "{around}");
        assert_eq!(space.stats().faults, requests, "{around}");
        assert_eq!(rig.pta.stats().pages_around, 1000 - requests);
        rig.clean();
    }
}

#[test]
fn what_was_only_read_round_is_not_writable_and_keeps_nobody_from_writing() {
    let rig = rig(config((64, 16)));
    let space = rig.space();
    let range = space.map(Map::anonymous(16 * PAGE)).unwrap();
    let queue = rig.pta.queue(&space).unwrap();
    read(&queue, page(range, 3)).unwrap();
    let requests = || rig.model.counts().requests;
    let installed = || rig.pta.stats().pages_installed;
    let window = installed();
    assert_eq!((requests(), rig.pta.stats().pages_around), (1, window - 1));
    // As it was asked for, it has the rights of its mapping.
    write(&queue, page(range, 3), 1).unwrap();
    read(&queue, page(range, 4)).unwrap();
    assert_eq!(requests(), 1);
    write(&queue, page(range, 4), 1).unwrap();
    assert_eq!((requests(), installed()), (2, window + 1));
    // An entry that is there is not taken back: the page beside it is read in anew.
    space.discard(page(range, 5)).unwrap();
    read(&queue, page(range, 5)).unwrap();
    assert_eq!((requests(), installed()), (3, window + 2));
    write(&queue, page(range, 4), 2).unwrap();
    assert_eq!(requests(), 3);
    rig.clean();
}

#[test]
fn round_a_write_is_writable_what_is_mapped_so_and_nothing_is_there_that_is_not_mapped() {
    let rig = rig(config((64, 16)));
    let space = rig.space();
    let place = space.map(Map::anonymous(32 * PAGE)).unwrap();
    let start = place.start().get().next_multiple_of(16 * PAGE);
    let range = Range::new(start, 16 * PAGE).unwrap();
    let queue = rig.pta.queue(&space).unwrap();
    space.protect(page(range, 5), Rights::READ).unwrap();
    space.protect(page(range, 6), Rights::empty()).unwrap();
    space.unmap(page(range, 7)).unwrap();
    write(&queue, page(range, 0), 1).unwrap();
    let stats = rig.pta.stats();
    assert_eq!((stats.pages_installed, stats.pages_around), (14, 13));
    write(&queue, page(range, 1), 1).unwrap();
    read(&queue, page(range, 5)).unwrap();
    assert_eq!(rig.model.counts().requests, 1);
    for nth in 5..8 {
        let beyond = page(range, nth);
        let said = write(&queue, beyond, 1);
        assert!(is_fault(&said, beyond), "page {nth}: {said:?}");
    }
    for nth in 6..8 {
        let said = read(&queue, page(range, nth));
        assert!(is_fault(&said, page(range, nth)), "page {nth}: {said:?}");
    }
    rig.clean();
}

/// The CPU is kept away from a page: what another device faults in beside it neither touches it nor shoots anybody down.
#[test]
fn a_page_that_is_held_exclusively_is_still_after_a_fault_beside_it() {
    let rig = rig(config((64, 16)));
    let other = model::Pta::new(&rig.bus, PtaConfig::default()).unwrap();
    let other = Pta::probe("pta1", other.clone(), other, config((64, 16))).unwrap();
    let space = rig.space();
    let range = space.map(Map::anonymous(16 * PAGE)).unwrap();
    let (queue, beside) = (rig.pta.queue(&space).unwrap(), other.queue(&space).unwrap());
    let held = queue.exclusive(0, page(range, 5), LONG).unwrap();
    let before = space.stats().invalidations;
    read(&beside, page(range, 4)).unwrap();
    write(&beside, page(range, 6), 1).unwrap();
    assert!(other.stats().pages_around > 0);
    assert!(held.is_held());
    assert_eq!(space.stats().invalidations, before);
    rig.clean();
}

type Hook = Box<dyn FnOnce() + Send>;

/// The model's memory, with something that happens once a stretch has been walked.
struct Hooked {
    inner: Arc<ModelMemory>,
    hook: Arc<Mutex<Option<Hook>>>,
}

impl Memory for Hooked {
    fn id(&self) -> u64 {
        self.inner.id()
    }
    fn arena(&self) -> Range {
        self.inner.arena()
    }
    fn page_sizes(&self) -> PageSizes {
        self.inner.page_sizes()
    }
    fn map(
        &self,
        range: Range,
        page: shootdown::PageSize,
        rights: Rights,
    ) -> Result<(), MemoryError> {
        self.inner.map(range, page, rights)
    }
    fn unmap(&self, range: Range) -> Result<(), MemoryError> {
        self.inner.unmap(range)
    }
    fn discard(&self, range: Range) -> Result<(), MemoryError> {
        self.inner.discard(range)
    }
    fn protect(&self, range: Range, rights: Rights) -> Result<(), MemoryError> {
        self.inner.protect(range, rights)
    }
    fn remap(&self, from: Range, to: Range) -> Result<(), MemoryError> {
        self.inner.remap(from, to)
    }
    fn translate(&self, addr: Addr) -> Option<Translation> {
        self.inner.translate(addr)
    }
    fn walk(&self, range: Range, found: &mut dyn FnMut(Translation)) {
        self.inner.walk(range, found);
        let hook = self.hook.lock().unwrap().take();
        if let Some(hook) = hook {
            hook();
        }
    }
}

/// Between begin and the writing of its entries one page of a stretch is invalidated, from beginning to end: nothing that was read
/// before is installed (R9), and the other pages are resolved without it.
#[test]
fn a_stretch_of_which_a_part_was_invalidated_is_cut() {
    let rig = rig(config((64, 16)));
    let hook = Arc::new(Mutex::new(None::<Hook>));
    let memory = Arc::new(Hooked {
        inner: ModelMemory::new(&rig.bus, 64 << 20).unwrap(),
        hook: hook.clone(),
    });
    let space = AddressSpace::managed(memory, Deadlines::default());
    let place = space.map(Map::anonymous(32 * PAGE)).unwrap();
    let start = place.start().get().next_multiple_of(16 * PAGE);
    let range = Range::new(start, 16 * PAGE).unwrap();
    let queue = rig.pta.queue(&space).unwrap();
    let (pin, gone) = (space.pin(), page(range, 5));
    *hook.lock().unwrap() = Some(Box::new(move || {
        let space = pin.upgrade().unwrap();
        std::thread::scope(|scope| {
            let unmap = scope.spawn(|| space.unmap(gone));
            unmap.join().unwrap().unwrap();
        });
    }));
    write(&queue, page(range, 3), 1).unwrap();
    let stats = rig.pta.stats();
    // A frame of somebody else's by now.
    let other = rig.space();
    let theirs = other.map(Map::anonymous(16 * PAGE)).unwrap();
    let said = write(&queue, gone, 2);
    assert!(is_fault(&said, gone), "{said:?}");
    write(&queue, page(range, 4), 3).unwrap();
    let word = theirs.start().get() as *const u64;
    // SAFETY: the test mapped the pages for reading.
    let words = (0..16 * PAGE / 8).map(|nth| unsafe { word.add(nth as usize).read_volatile() });
    assert_eq!(words.sum::<u64>(), 0);
    rig.clean();
    assert_eq!((stats.batches_cut, stats.request_retries), (1, 0));
    assert_eq!((stats.pages_installed, stats.pages_around), (1, 0));
}
