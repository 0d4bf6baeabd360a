//! Misses that are answered together, and what is preloaded for block copies: what they cost, by the counts of space and chiplet, and
//! what they must not do.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::support::{LONG, Rig, at, load};
use shootdown::{
    Addr, AddressSpace, Deadlines, DeviceError, Interrupts, Map, Memory, MemoryError, PageSize,
    PageSizes, Range, Rights, Translation,
};
use shootdown_gru::{
    ChipletPorts, Config, Element, Gru, GruError, Instruction, LateDropIns, MissMode, Plant,
    Segment, SegmentOptions,
};
use shootdown_hw_model::gru::{Chiplet, ChipletConfig, Counts, Model, Plant as Broken, TlbEntry};
use shootdown_hw_model::{Bus, ModelMemory};

const PAGE: u64 = 4096;

/// The interrupts of a chiplet, which come once the gate is open.
struct Gate {
    chiplet: Arc<Chiplet>,
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
        self.chiplet.vectors()
    }
    fn wait(&self, vector: u32, timeout: Duration) -> Result<u64, DeviceError> {
        let fired = self.chiplet.wait(vector, timeout);
        let is_open = self.is_open.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.opened.wait_while(is_open, |is_open| !*is_open));
        fired
    }
}

/// A chiplet, whose interrupts come through a gate that is open.
fn rig(hardware: ChipletConfig, config: Config) -> (Rig, Arc<Gate>) {
    let bus = Bus::new(16 << 10).unwrap();
    let model = Model::new(&bus, 1, hardware);
    let chiplet = model.chiplets()[0].clone();
    let gate = Arc::new(Gate {
        chiplet: chiplet.clone(),
        is_open: Mutex::new(true),
        opened: Condvar::new(),
    });
    let ports = ChipletPorts {
        name: "gru0".into(),
        blade: 0,
        registers: chiplet,
        interrupts: gate.clone(),
    };
    let gru = Gru::attach(vec![ports], config);
    (Rig { bus, model, gru }, gate)
}

fn counts(rig: &Rig) -> Counts {
    rig.model.chiplets()[0].counts()
}

fn await_misses(rig: &Rig, count: u64) {
    let begun = std::time::Instant::now();
    while counts(rig).misses < count {
        assert!(begun.elapsed() < LONG);
        std::thread::yield_now();
    }
}

/// A thousand pages, eight times as many at once as a chiplet can miss: what that has cost, where all of them are in the fault map
/// when it is looked at, and where each is alone.
fn storm(at_once: bool) -> (u64, Counts) {
    const BLOCKS: u64 = 125;
    let (rig, gate) = rig(ChipletConfig::default(), Config::default());
    let space = rig.space();
    let options = SegmentOptions {
        control_blocks: 128,
        ..Config::default().segment
    };
    let segment = rig.gru.segment_with(&space, options).unwrap();
    let buffer = space.map(Map::anonymous(1000 * PAGE)).unwrap().start();
    let set = |nth: u64| Instruction::vset(at(buffer, nth * PAGE), nth, Element::Double, 1);
    for round in 0..8 {
        gate.set(!at_once);
        for block in 0..BLOCKS {
            let nth = round * BLOCKS + block;
            segment.submit(block as usize, &set(nth)).unwrap();
            if !at_once {
                segment.wait(block as usize, LONG).unwrap();
            }
        }
        await_misses(&rig, (round + 1) * BLOCKS);
        gate.set(true);
        for block in 0..BLOCKS {
            segment.wait(block as usize, LONG).unwrap();
        }
    }
    for nth in 0..1000 {
        assert_eq!(load(at(buffer, nth * PAGE)), nth);
    }
    let begins = space.stats().faults;
    let stats = rig.gru.stats();
    assert_eq!((stats.faults_resolved, stats.fault_batches), (1000, begins));
    drop(segment);
    rig.clean();
    (begins, counts(&rig))
}

#[test]
fn a_storm_of_a_thousand_misses_is_answered_by_one_begin_for_all_that_are_in_the_map() {
    let (begins, hardware) = storm(false);
    assert_eq!((begins, hardware.drop_ins), (1000, 1000));
    assert!(hardware.interrupts > 500, "{hardware:?}");
    let (begins, hardware) = storm(true);
    assert_eq!((begins, hardware.drop_ins), (8, 1000));
    // The first of each round, and the others.
    assert!(hardware.interrupts <= 16, "{hardware:?}");
}

/// Buffers of so many pages each, with a page that is not mapped behind each.
fn buffers(space: &AddressSpace, pages: u64) -> [Range; 2] {
    [0, 1].map(|_| {
        let whole = space.map(Map::anonymous((pages + 1) * PAGE)).unwrap();
        space.unmap(page(whole, pages)).unwrap();
        Range::new(whole.start(), pages * PAGE).unwrap()
    })
}

fn page(of: Range, nth: u64) -> Range {
    Range::new(of.start().get() + nth * PAGE, PAGE).unwrap()
}

fn copy(from: Addr, to: Addr, pages: u64) -> Instruction {
    Instruction::bcopy(from, to, 0, Element::Double, (pages * PAGE / 8) as u32)
}

fn segment(rig: &Rig, space: &AddressSpace, preload: u8, misses: MissMode) -> Segment {
    let options = SegmentOptions {
        preload,
        misses,
        ..Config::default().segment
    };
    rig.gru.segment_with(space, options).unwrap()
}

fn entries(rig: &Rig, of: Range) -> Vec<TlbEntry> {
    let mut entries = rig.model.chiplets()[0].tlb_entries();
    entries.retain(|one| one.key.range().overlaps(of));
    entries
}

#[test]
fn a_block_copy_misses_once_for_what_is_preloaded_and_nothing_behind_its_end_is() {
    for (preload, misses) in [(0, 200), (1, 100), (8, 24), (99, 2), (255, 2)] {
        for mode in [
            MissMode::FaultMap,
            MissMode::FaultMapPolled,
            MissMode::UserPolling,
        ] {
            let (rig, _) = rig(ChipletConfig::default(), Config::default());
            let space = rig.space();
            let buffers = [0, 1].map(|_| space.map(Map::anonymous(200 * PAGE)).unwrap());
            let segment = segment(&rig, &space, preload, mode);
            // From inside of a page, and to its very end.
            let [from, to] = buffers.map(|buffer| at(buffer.start(), 8));
            let words = (100 * PAGE - 8) / 8;
            let all = Instruction::bcopy(from, to, 0, Element::Double, words as u32);
            segment.run(0, &all, LONG).unwrap();
            let seen = counts(&rig);
            assert_eq!(
                seen.misses + seen.modify_misses,
                misses,
                "{preload} {mode:?}"
            );
            assert_eq!(seen.preloads, 200 - misses, "{preload} {mode:?}");
            assert_eq!(rig.gru.stats().preloads, 200 - misses);
            assert_eq!(segment.stats().drop_ins, 200);
            assert_eq!(space.stats().faults, misses);
            for buffer in buffers {
                assert_eq!(entries(&rig, buffer).len(), 100, "{preload} {mode:?}");
            }
            drop(segment);
            rig.clean();
        }
    }
}

#[test]
fn what_a_copy_reads_is_preloaded_for_reading_only_and_what_it_writes_as_it_is_mapped() {
    let (rig, _) = rig(ChipletConfig::default(), Config::default());
    let space = rig.space();
    let [from, to] = buffers(&space, 8);
    let segment = segment(&rig, &space, 8, MissMode::FaultMap);
    segment
        .run(0, &copy(from.start(), to.start(), 8), LONG)
        .unwrap();
    let writable = |of| {
        let entries = entries(&rig, of);
        entries.iter().filter(|one| one.writable).count()
    };
    assert_eq!((writable(from), writable(to)), (1, 8));
    // A store to one of the others finds out, once.
    let set = Instruction::vset(page(from, 5).start(), 7, Element::Double, 1);
    for _ in 0..2 {
        segment.run(0, &set, LONG).unwrap();
        assert_eq!(counts(&rig).modify_misses, 1);
    }
    // Pages that may not be written are not preloaded for a copy into them, which ends where it has to.
    space.protect(page(to, 4), Rights::READ).unwrap();
    space.discard(to).unwrap();
    let said = segment.run(0, &copy(from.start(), to.start(), 8), LONG);
    let Err(GruError::Exception { address, .. }) = said else {
        panic!("{said:?}");
    };
    assert_eq!(entries(&rig, to).len(), 5);
    assert_eq!(counts(&rig).modify_misses, 2);
    assert_eq!(address, page(to, 4).start());
    drop(segment);
    rig.clean();
}

#[test]
fn preloads_end_at_a_page_that_is_not_mapped_or_is_larger() {
    let (rig, _) = rig(ChipletConfig::default(), Config::default());
    let space = rig.space();
    let [from, to] = buffers(&space, 16);
    let segment = segment(&rig, &space, 255, MissMode::FaultMap);
    space.unmap(page(from, 3)).unwrap();
    let said = segment.run(0, &copy(from.start(), to.start(), 16), LONG);
    let Err(GruError::Exception { address, .. }) = said else {
        panic!("{said:?}");
    };
    assert_eq!(address, page(from, 3).start());
    assert_eq!(
        (entries(&rig, from).len(), entries(&rig, to).len()),
        (3, 16)
    );
    // From a page of 2 MiB on nothing is preloaded: the next one is far.
    let huge = Map::anonymous(4 << 20).page_size(PageSize::TwoMiB);
    let huge = space.map(huge).unwrap();
    let before = counts(&rig).preloads;
    let set = Instruction::bcopy(
        huge.start(),
        at(huge.start(), 2 << 20),
        0,
        Element::Double,
        99,
    );
    segment.run(0, &set, LONG).unwrap();
    assert_eq!(counts(&rig).preloads, before);
    drop(segment);
    rig.clean();
}

/// What is preloaded for one side of a copy must not push out what the other needs, for ever.
#[test]
fn a_tlb_that_is_smaller_than_what_is_preloaded_ends_every_copy() {
    for tlb_entries in [2, 3, 8, 9, 10, 17, 18] {
        let hardware = ChipletConfig {
            tlb_entries,
            ..ChipletConfig::default()
        };
        let (rig, _) = rig(hardware, Config::default());
        let space = rig.space();
        let [from, to] = buffers(&space, 20);
        let segment = segment(&rig, &space, 8, MissMode::FaultMap);
        let set = Instruction::vset(from.start(), 7, Element::Double, (20 * PAGE / 8) as u32);
        segment.run(0, &set, LONG).unwrap();
        segment
            .run(0, &copy(from.start(), to.start(), 20), LONG)
            .unwrap();
        for nth in 0..20 {
            assert_eq!(load(page(to, nth).start()), 7, "{tlb_entries} entries");
        }
        drop(segment);
        rig.clean();
    }
}

type Hook = Box<dyn FnOnce() + Send>;

/// The model's memory, with something that happens once a page has been translated for the second time: after begin.
struct Hooked {
    inner: Arc<ModelMemory>,
    hook: Arc<Mutex<Option<(Addr, u32, Hook)>>>,
}

impl Hooked {
    fn seen(&self, found: impl Fn(Addr) -> bool) {
        let mut hook = self.hook.lock().unwrap();
        let Some((at, times, _)) = hook.as_mut() else {
            return;
        };
        *times -= u32::from(found(*at));
        let due = if *times == 0 { hook.take() } else { None };
        drop(hook);
        if let Some((_, _, call)) = due {
            call();
        }
    }
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
    fn map(&self, range: Range, page: PageSize, rights: Rights) -> Result<(), MemoryError> {
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
        let found = self.inner.translate(addr);
        self.seen(|at| found.is_some_and(|found| found.page.holds(at)));
        found
    }
    fn walk(&self, range: Range, found: &mut dyn FnMut(Translation)) {
        self.inner.walk(range, found);
        self.seen(|at| range.holds(at));
    }
}

/// What is wrong, if anything, and with what late drop-ins are left to.
#[derive(Clone, Copy)]
struct Kept {
    plants: Plant,
    hardware: Broken,
    late_drop_ins: LateDropIns,
}

/// Two misses of a segment, or one whose copy has the other's page preloaded: the second page is discarded, from beginning to end, after
/// it has been translated. What the oracle has found.
fn discarded_between(kept: Kept, preloads: bool) -> u64 {
    let hardware = ChipletConfig {
        plants: kept.hardware,
        ..ChipletConfig::default()
    };
    let config = Config {
        plants: kept.plants,
        late_drop_ins: kept.late_drop_ins,
        ..Config::default()
    };
    let (rig, gate) = rig(hardware, config);
    let hook = Arc::new(Mutex::new(None));
    let memory = Arc::new(Hooked {
        inner: ModelMemory::new(&rig.bus, 64 << 20).unwrap(),
        hook: hook.clone(),
    });
    let space = AddressSpace::managed(memory, Deadlines::default());
    let [from, to] = buffers(&space, 4);
    let segment = segment(&rig, &space, 8, MissMode::FaultMap);
    let (pin, gone) = (space.pin(), page(to, 2));
    let discard = move || {
        let space = pin.upgrade().unwrap();
        std::thread::scope(|scope| {
            let discard = scope.spawn(|| space.discard(gone));
            discard.join().unwrap().unwrap();
        });
    };
    // Of a miss the first time is before begin, of a preload there is but one.
    let times = if preloads { 1 } else { 2 };
    let mut due = Some((gone.start(), times, Box::new(discard) as Hook));
    gate.set(false);
    if preloads {
        *hook.lock().unwrap() = due.take();
        segment
            .submit(0, &copy(from.start(), to.start(), 4))
            .unwrap();
        gate.set(true);
        segment.wait(0, LONG).unwrap();
    } else {
        let set = |of: Range| Instruction::vset(of.start(), 7, Element::Double, 512);
        *hook.lock().unwrap() = due.take();
        for (block, nth) in [(0, 0), (1, 2)] {
            segment.submit(block, &set(page(to, nth))).unwrap();
        }
        await_misses(&rig, 2);
        gate.set(true);
        for block in [0, 1] {
            segment.wait(block, LONG).unwrap();
        }
    }
    assert!(hook.lock().unwrap().is_none(), "it has not happened");
    if rig.stale() == 0 {
        let checked = !kept.plants.contains(Plant::RETRY_NOT_CHECKED);
        assert_eq!(rig.gru.stats().fault_retries > 0, checked);
        let value = if preloads { 0 } else { 7 };
        assert_eq!(load(gone.start()), value);
        drop(segment);
        rig.clean();
    }
    rig.stale()
}

/// R9, for what is answered together and for what is preloaded: by the sequence alone, where the hardware does not help; and where the
/// sequence is not looked at, that is found.
#[test]
fn what_was_discarded_after_it_was_translated_is_not_installed_with_the_rest() {
    let kept = Kept {
        plants: Plant::empty(),
        hardware: Broken::DROP_IN_NOT_CANCELLED,
        late_drop_ins: LateDropIns::Excluded,
    };
    let planted = Kept {
        plants: Plant::RETRY_NOT_CHECKED,
        ..kept
    };
    for preloads in [false, true] {
        assert_eq!(discarded_between(kept, preloads), 0);
        assert!(discarded_between(planted, preloads) > 0, "{preloads}");
    }
}

/// R16: the chiplet ignores what is preloaded too late, as it does what answers the miss.
#[test]
fn hardware_that_ignores_late_drop_ins_ignores_late_preloads() {
    let kept = Kept {
        plants: Plant::RETRY_NOT_CHECKED,
        hardware: Broken::empty(),
        late_drop_ins: LateDropIns::IgnoredByHardware,
    };
    for preloads in [false, true] {
        assert_eq!(discarded_between(kept, preloads), 0);
        let broken = Kept {
            hardware: Broken::DROP_IN_NOT_CANCELLED,
            ..kept
        };
        assert!(discarded_between(broken, preloads) > 0);
    }
}
