//! Random programs of instructions and memory operations, through driver, framework and model, against a plain interpreter over
//! plain bytes: every result, every exception, every byte.

mod plain;
mod step;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use shootdown::{
    Addr, AddressSpace, Deadlines, DeviceError, Interrupts, Map, MapError, Memory, PageSize, Range,
    Rights,
};
use shootdown_gru::{
    Atomic, ChipletPorts, Config, Element, Gru, GruError, Instruction, LateDropIns, Plant, Segment,
    SegmentOptions, Steal,
};
use shootdown_hw_model::gru::{Chiplet, ChipletConfig, FaultPlan, Model};
use shootdown_hw_model::{Bus, ModelMemory};

use self::plain::{Instr, Machine, Meaning, PAGE, Page, Pages, Update};
use self::step::{Change, DATA, Step, Who};

/// Enough for anything that ends at all.
const PATIENCE: Duration = Duration::from_secs(20);
/// Frames of the machine: more than the pages that can be mapped at a time, with room for replacements.
const FRAMES: u64 = 8192;
/// A space's addresses: room for segments, then the program's pages.
const ARENA: u64 = 16 << 20;
const FIRST: u64 = 4 << 20;

/// Interrupts of a chiplet, with short naps: the driver's threads end as soon as they are told to.
struct Impatient(Arc<Chiplet>);

impl Interrupts for Impatient {
    fn vectors(&self) -> u32 {
        self.0.vectors()
    }

    fn wait(&self, vector: u32, timeout: Duration) -> std::result::Result<u64, DeviceError> {
        self.0.wait(vector, timeout.min(Duration::from_millis(1)))
    }
}

/// A segment on both sides.
struct Pair {
    real: Segment,
    data: Vec<u8>,
}

/// A space on both sides.
struct Space {
    real: AddressSpace,
    /// Where the program's pages begin.
    base: u64,
    pages: Pages,
    segments: Vec<Pair>,
}

struct Stack {
    bus: Bus,
    gru: Arc<Gru>,
    spaces: Vec<Space>,
    _model: Model,
}

fn range(base: u64, first: u64, count: u64) -> Range {
    Range::new(base + first * PAGE, count * PAGE).expect("neither empty nor too long")
}

fn segment(gru: &Arc<Gru>, space: &AddressSpace) -> Pair {
    let real = gru.segment(space).expect("a context is free");
    let zeroes = [0; DATA as usize / 8];
    real.write_data(0, &zeroes).expect("it is new");
    Pair {
        real,
        data: vec![0; DATA as usize],
    }
}

impl Stack {
    fn new(bytes: &mut Unstructured<'_>, plants: Plant) -> Result<Self> {
        let bus = Bus::new(FRAMES).expect("frames of sparse memory");
        let hardware = ChipletConfig {
            tlb_entries: *bytes.choose(&[2, 5, 1024])?,
            faults: FaultPlan {
                seed: bytes.arbitrary()?,
                duplicated: f64::from(bytes.int_in_range(0..=1_u8)?) / 2.0,
                purge_in_miss: f64::from(bytes.int_in_range(0..=1_u8)?) / 4.0,
                jitter: Duration::from_micros(bytes.int_in_range(0..=20)?),
                ..FaultPlan::default()
            },
            ..ChipletConfig::default()
        };
        let model = Model::new(&bus, 2, hardware);
        let ports = model.chiplets().iter().map(|chiplet| ChipletPorts {
            name: format!("gru{}", chiplet.config().device),
            blade: chiplet.config().device,
            registers: chiplet.clone(),
            interrupts: Arc::new(Impatient(chiplet.clone())),
        });
        let config = Config {
            // Few, so that they wrap.
            asids: 8..=40,
            segment: SegmentOptions {
                // All of a chiplet's: whoever has none steals it.
                control_blocks: *bytes.choose(&[8, 128])?,
                data_bytes: DATA as usize,
                ..Config::default().segment
            },
            steal: Steal {
                window: Duration::ZERO,
                retry: Duration::from_micros(50),
            },
            late_drop_ins: match bytes.arbitrary()? {
                true => LateDropIns::Excluded,
                false => LateDropIns::IgnoredByHardware,
            },
            plants,
            ..Config::default()
        };
        let gru = Gru::attach(ports.collect(), config);
        let mut this = Self {
            spaces: Vec::new(),
            bus,
            gru,
            _model: model,
        };
        for _ in 0..2 {
            let space = this.space();
            this.spaces.push(space);
        }
        Ok(this)
    }

    fn space(&self) -> Space {
        let memory = ModelMemory::new(&self.bus, ARENA).expect("addresses for an arena");
        let base = memory.arena().start().get() + FIRST;
        let real = AddressSpace::managed(memory, Deadlines::default());
        Space {
            base,
            pages: Pages::default(),
            segments: (0..2).map(|_| segment(&self.gru, &real)).collect(),
            real,
        }
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Change(space, change) => self.spaces[space].change(change),
            Step::Poke(space, at, value) => self.spaces[space].poke(at, value),
            Step::Data(who, at, value) => {
                let pair = &mut self.spaces[who.space].segments[who.segment];
                pair.real
                    .write_data(at as usize, &[value])
                    .expect("in bounds");
                pair.data[at as usize..at as usize + 8].copy_from_slice(&value.to_le_bytes());
            }
            Step::Run(who, instr) => self.spaces[who.space].run(who, &instr, None),
            Step::Beside(who, instr, change) => {
                self.spaces[who.space].run(who, &instr, Some(change));
            }
            Step::Renew(who) => {
                let space = &mut self.spaces[who.space];
                let old = space.segments.remove(who.segment);
                old.real.unmap().expect("an honest chiplet");
                drop(old);
                space
                    .segments
                    .insert(who.segment, segment(&self.gru, &space.real));
            }
            Step::Exit(space) => {
                self.spaces[space].end();
                self.spaces[space] = self.space();
            }
        }
    }

    /// Nothing is left, and nothing was stale.
    fn end(mut self) {
        for space in &mut self.spaces {
            space.compare();
            space.end();
        }
        self.spaces.clear();
        let stats = self.gru.stats();
        assert_eq!((stats.contexts_in_use, stats.asids_in_use), (0, 0));
        let physical = self.bus.physical();
        assert_eq!(physical.free_frames(), physical.total(), "frames are kept");
        let findings = self.bus.oracle().findings();
        assert!(findings.is_empty(), "{}", findings[0]);
    }
}

impl Space {
    fn end(&mut self) {
        self.segments.clear();
        self.real.exit().expect("honest chiplets");
        assert_eq!(self.real.registrations(), 0);
        assert_eq!(self.real.quarantined_bytes(), 0);
    }

    fn hole(&self, first: u64, count: u64) -> Option<u64> {
        (first..first + count).find(|page| !self.pages.0.contains_key(&self.number(*page)))
    }

    /// The key of the program's page `nth`.
    fn number(&self, nth: u64) -> u64 {
        self.base / PAGE + nth
    }

    fn taken(&self, first: u64, count: u64) -> bool {
        (first..first + count).any(|page| self.pages.0.contains_key(&self.number(page)))
    }

    /// Makes the change on both sides: it succeeds on both or on none.
    fn change(&mut self, change: Change) {
        let whole = |first, count| range(self.base, first, count);
        let result = match change {
            Change::Map(size, first, count, rights) => {
                let at = whole(first, count);
                let what = Map::anonymous(count * PAGE).page_size(size).rights(rights);
                self.real.map(what.at(at.start())).map(drop)
            }
            Change::Unmap(first, count) => self.real.unmap(whole(first, count)),
            Change::Discard(first, count) => self.real.discard(whole(first, count)),
            Change::Protect(first, count, rights) => self.real.protect(whole(first, count), rights),
            Change::Remap(first, to, count) => {
                let to = whole(to, count).start();
                self.real.remap(whole(first, count), to).map(drop)
            }
        };
        match self.refusal(change) {
            // Out of frames of that size, or of mappings of the process: nothing has changed.
            None if matches!(result, Err(MapError::Memory(_))) => {}
            None => {
                result.unwrap_or_else(|error| panic!("{change:?}: {error}"));
                self.apply(change);
            }
            Some(refusal) => {
                let error = result.expect_err("it cannot be done");
                assert_eq!(kind(&error), refusal, "{change:?}: {error}");
            }
        }
    }

    /// Why it cannot be done.
    fn refusal(&self, change: Change) -> Option<&'static str> {
        match change {
            Change::Map(size, first, count, _) => {
                let whole = count.is_multiple_of(size.bytes() / PAGE);
                if !whole {
                    return Some("misaligned");
                }
                self.taken(first, count).then_some("occupied")
            }
            Change::Remap(first, to, count) => {
                let there = self.hole(first, count).map(|_| "not mapped");
                there.or(self.taken(to, count).then_some("occupied"))
            }
            Change::Unmap(first, count)
            | Change::Discard(first, count)
            | Change::Protect(first, count, _) => self.hole(first, count).map(|_| "not mapped"),
        }
    }

    fn apply(&mut self, change: Change) {
        let key = self.number(0);
        let (from, to) = match change {
            Change::Map(_, first, count, _)
            | Change::Unmap(first, count)
            | Change::Discard(first, count)
            | Change::Protect(first, count, _)
            | Change::Remap(first, _, count) => (key + first, key + first + count),
        };
        let pages = &mut self.pages.0;
        match change {
            Change::Map(.., rights) => pages.extend((from..to).map(|number| {
                let page = Page {
                    read: rights.contains(Rights::READ),
                    write: rights.contains(Rights::WRITE),
                    bytes: Vec::new(),
                };
                (number, page)
            })),
            Change::Unmap(..) => pages.retain(|number, _| !(from..to).contains(number)),
            Change::Discard(..) => pages
                .range_mut(from..to)
                .for_each(|(_, page)| page.bytes.clear()),
            Change::Protect(_, _, rights) => pages.range_mut(from..to).for_each(|(_, page)| {
                page.read = rights.contains(Rights::READ);
                page.write = rights.contains(Rights::WRITE);
            }),
            Change::Remap(_, target, _) => {
                let gone: Vec<_> = (from..to).map(|number| pages.remove(&number)).collect();
                let moved = gone.into_iter().flatten().zip(key + target..);
                pages.extend(moved.map(|(page, number)| (number, page)));
            }
        }
    }

    fn poke(&mut self, at: u64, value: u64) {
        let number = self.number(at / PAGE);
        let Some(page) = self.pages.0.get_mut(&number).filter(|page| page.write) else {
            return;
        };
        for (nth, byte) in value.to_le_bytes().into_iter().enumerate() {
            page.set((at % PAGE) as usize + nth, byte);
        }
        // SAFETY: eight bytes, aligned, of a page that the space has mapped for writing: the two sides agree, or the program has ended.
        unsafe { ((self.base + at) as *mut u64).write_volatile(value.to_le()) };
    }

    /// Runs an instruction on both sides, and makes a change meanwhile if it has nothing to do with that.
    fn run(&mut self, who: Who, instr: &Instr, beside: Option<Change>) {
        if overlaps(instr) {
            return;
        }
        let pair = &mut self.segments[who.segment];
        let mut machine = Machine {
            pages: &mut self.pages,
            data: &mut pair.data,
            touched: BTreeSet::new(),
        };
        let expected = machine.run(instr);
        let touched = machine.touched;
        let block = usize::from(beside.is_some());
        pair.real
            .submit(block, &instruction(instr))
            .expect("it is idle");
        if let Some(change) = beside.filter(|change| self.is_apart(*change, &touched)) {
            self.change(change);
        }
        let pair = &self.segments[who.segment];
        match (pair.real.wait(block, PATIENCE), expected) {
            (Ok(found), Ok(expected)) => {
                if let Some(expected) = expected {
                    assert_eq!(found, expected, "{instr:x?}");
                }
            }
            (
                Err(GruError::Exception {
                    causes,
                    detail,
                    address,
                    ..
                }),
                Err(expected),
            ) => {
                let found = (causes.bits().into(), detail, address.get());
                assert_eq!(found, expected, "{instr:x?}");
            }
            (found, expected) => panic!("{instr:x?}: {found:?} instead of {expected:x?}"),
        }
        let mut words = [0; DATA as usize / 8];
        pair.real.read_data(0, &mut words).expect("it is there");
        let data: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        assert!(data == pair.data, "data segment after {instr:x?}");
    }

    /// Whether a change leaves alone what an instruction has touched.
    fn is_apart(&self, change: Change, touched: &BTreeSet<u64>) -> bool {
        let key = self.number(0);
        let apart = |first: u64, count: u64| {
            let mut inside = touched.range(key + first..key + first + count);
            inside.next().is_none()
        };
        match change {
            Change::Map(_, first, count, _)
            | Change::Unmap(first, count)
            | Change::Discard(first, count)
            | Change::Protect(first, count, _) => apart(first, count),
            Change::Remap(first, to, count) => apart(first, count) && apart(to, count),
        }
    }

    /// Every byte.
    fn compare(&mut self) {
        let numbers: Vec<u64> = self.pages.0.keys().copied().collect();
        for number in numbers {
            let page = &self.pages.0[&number];
            let at = Range::new(number * PAGE, PAGE).expect("a page");
            if !page.read {
                let result = self.real.protect(at, Rights::READ);
                if matches!(result, Err(MapError::Memory(_))) {
                    continue;
                }
                result.expect("honest chiplets");
            }
            // SAFETY: the page is mapped, and for reading; nobody writes.
            let bytes =
                unsafe { std::slice::from_raw_parts(at.start().get() as *const u8, PAGE as usize) };
            let expected = match page.bytes.as_slice() {
                [] => &[0; PAGE as usize],
                bytes => bytes,
            };
            if bytes != expected {
                let mut pairs = bytes.iter().zip(expected);
                let nth = pairs.position(|(byte, expected)| byte != expected);
                panic!("{at} differs, first at byte {nth:x?}");
            }
        }
    }
}

fn kind(error: &MapError) -> &'static str {
    match error {
        MapError::Misaligned { .. } => "misaligned",
        MapError::Occupied { .. } => "occupied",
        MapError::NotMapped { .. } => "not mapped",
        _ => "something else",
    }
}

/// A copy onto itself has no meaning.
fn overlaps(instr: &Instr) -> bool {
    let bytes = instr.count * instr.size;
    matches!(instr.meaning, Meaning::Copy { from, to } if from.abs_diff(to) < bytes || from.checked_add(bytes).or(to.checked_add(bytes)).is_none())
}

fn instruction(instr: &Instr) -> Instruction {
    let element = match instr.size {
        1 => Element::Byte,
        2 => Element::Short,
        4 => Element::Word,
        8 => Element::Double,
        _ => Element::Line,
    };
    let (at, count) = (Addr::new, instr.count as u32);
    match instr.meaning {
        Meaning::Load { from, data, stride } => {
            Instruction::vload(at(from), data as u16, element, count).stride(stride)
        }
        Meaning::Store { data, to, stride } => {
            Instruction::vstore(data as u16, at(to), element, count).stride(stride)
        }
        Meaning::Set { to, value, stride } => {
            Instruction::vset(at(to), value, element, count).stride(stride)
        }
        Meaning::Copy { from, to } => Instruction::bcopy(at(from), at(to), 0, element, count),
        Meaning::Gather {
            from,
            indices,
            data,
        } => Instruction::gather(at(from), indices as u16, data as u16, element, count),
        Meaning::Scatter { data, to, indices } => {
            Instruction::scatter(data as u16, at(to), indices as u16, element, count)
        }
        Meaning::Atomic { at: place, what } => {
            let what = match what {
                Update::Fetch => Atomic::Fetch,
                Update::Clear => Atomic::Clear,
                Update::Increment => Atomic::Increment,
                Update::Decrement => Atomic::Decrement,
                Update::DecrementUnlessZero => Atomic::DecrementUnlessZero,
                Update::Swap(value) => Atomic::Swap(value),
                Update::Or(value) => Atomic::Or(value),
                Update::And(value) => Atomic::And(value),
                Update::Xor(value) => Atomic::Xor(value),
                Update::Add(value) => Atomic::Add(value),
                Update::CompareSwap { expected, new } => Atomic::CompareSwap { expected, new },
            };
            Instruction::atomic(at(place), what, element)
        }
    }
}

/// Steps of a program at most.
const STEPS: usize = 100;

/// Runs the program that the bytes spell.
///
/// # Panics
/// The stack and the interpreter differ.
pub fn program(bytes: &[u8]) {
    program_with(bytes, Plant::empty());
}

/// As [`program`], with a driver that has these bugs.
///
/// # Panics
/// As there.
pub fn program_with(bytes: &[u8], plants: Plant) {
    let mut bytes = Unstructured::new(bytes);
    let Ok(mut stack) = Stack::new(&mut bytes, plants) else {
        return;
    };
    // Something to begin with.
    for space in &mut stack.spaces {
        space.change(Change::Map(PageSize::FourKiB, 0, 12, Rights::READ_WRITE));
        space.change(Change::Map(PageSize::TwoMiB, 512, 512, Rights::READ_WRITE));
    }
    for _ in 0..STEPS {
        let bases = [0, 1].map(|nth: usize| stack.spaces[nth].base);
        match step::step(&mut bytes, bases) {
            Ok(step) if !bytes.is_empty() => stack.step(&step),
            _ => break,
        }
    }
    stack.end();
}
