//! The two kinds of device, as the suite sees them.

use std::sync::Arc;
use std::time::Duration;

use shootdown::{Addr, AddressSpace, ExcludeError, Excluded, Map, Range};
use shootdown_gru::{Atomic, ChipletPorts, Element, Gru, GruError, Instruction};
use shootdown_hw_model::{Bus, gru, pta};
use shootdown_pta::{Command, Pta, PtaError, Queue};

const LONG: Duration = Duration::from_secs(10);

/// The device could not go on here: it has faulted, and was told that it may not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Fault(pub(crate) Addr);

/// A device that mirrors address spaces, with its driver. One page is installed for each fault.
pub(crate) trait Mirror: Sized + Sync {
    /// What a process has of it.
    type User: User;

    /// One on `bus`, called `number` in findings.
    fn attach(bus: &Bus, number: u32) -> Self;

    /// For the use of `space`.
    fn open(&self, space: &AddressSpace) -> Self::User;

    /// How many faults its driver has answered.
    fn faults(&self) -> u64;

    /// The pages that the device TLB has for a user and that overlap `part`.
    fn entries(&self, user: &Self::User, part: Range) -> Vec<Range>;
}

/// A process's use of the device. It has a buffer of one word.
pub(crate) trait User: Sync {
    /// Memory at `at`, a word, into the buffer.
    fn load(&self, at: Addr) -> Result<(), Fault>;

    fn buffer(&self) -> u64;

    fn set_buffer(&self, value: u64);

    /// Writes `word` to every word of `range`, the first one first.
    fn fill(&self, range: Range, word: u64) -> Result<(), Fault>;

    /// Adds to the word at `at`, atomically: what was there.
    fn add(&self, at: Addr, value: u64) -> Result<u64, Fault>;

    /// Keeps the CPU away from `range` of `space`, which is its space, by the driver where that has a call for it.
    fn exclusive(&self, space: &AddressSpace, range: Range) -> Result<Excluded, ExcludeError> {
        space.exclude(range, LONG)
    }
}

/// A chiplet.
pub(crate) struct OnGru {
    model: gru::Model,
    driver: Arc<Gru>,
}

impl Mirror for OnGru {
    type User = shootdown_gru::Segment;

    fn attach(bus: &Bus, number: u32) -> Self {
        let config = gru::ChipletConfig {
            device: number,
            ..gru::ChipletConfig::default()
        };
        let model = gru::Model::new(bus, 1, config);
        let ports = model.chiplets().iter().map(|chiplet| ChipletPorts {
            name: format!("gru{number}"),
            blade: 0,
            registers: chiplet.clone(),
            interrupts: chiplet.clone(),
        });
        let driver = Gru::attach(ports.collect(), shootdown_gru::Config::default());
        Self { model, driver }
    }

    fn open(&self, space: &AddressSpace) -> Self::User {
        self.driver.segment(space).unwrap()
    }

    fn faults(&self) -> u64 {
        let stats = self.driver.stats();
        stats.faults_resolved + stats.fault_exceptions
    }

    fn entries(&self, user: &Self::User, part: Range) -> Vec<Range> {
        let entries = self.model.chiplets()[0].tlb_entries();
        let own = entries
            .iter()
            .filter(|one| Some(one.key.asid) == user.asid());
        let pages = own.map(|one| one.key.range());
        pages.filter(|page| page.overlaps(part)).collect()
    }
}

fn run(segment: &shootdown_gru::Segment, instruction: &Instruction) -> Result<u64, Fault> {
    match segment.run(0, instruction, LONG) {
        Ok(found) => Ok(found),
        Err(GruError::Exception { address, .. }) => Err(Fault(address)),
        Err(error) => panic!("{error}"),
    }
}

impl User for shootdown_gru::Segment {
    fn load(&self, at: Addr) -> Result<(), Fault> {
        run(self, &Instruction::vload(at, 0, Element::Double, 1)).map(drop)
    }

    fn buffer(&self) -> u64 {
        let mut word = [0];
        self.read_data(0, &mut word).unwrap();
        word[0]
    }

    fn set_buffer(&self, value: u64) {
        self.write_data(0, &[value]).unwrap();
    }

    fn fill(&self, range: Range, word: u64) -> Result<(), Fault> {
        let words = (range.len() / 8) as u32;
        let set = Instruction::vset(range.start(), word, Element::Double, words);
        run(self, &set).map(drop)
    }

    fn add(&self, at: Addr, value: u64) -> Result<u64, Fault> {
        run(
            self,
            &Instruction::atomic(at, Atomic::Add(value), Element::Double),
        )
    }
}

/// A page-table accelerator.
pub(crate) struct OnPta {
    model: Arc<pta::Pta>,
    driver: Arc<Pta>,
}

/// A queue, and the page that its buffer is in.
pub(crate) struct OnQueue {
    queue: Queue,
    buffer: Range,
}

impl Mirror for OnPta {
    type User = OnQueue;

    fn attach(bus: &Bus, number: u32) -> Self {
        let config = pta::PtaConfig {
            device: number,
            ..pta::PtaConfig::default()
        };
        let model = pta::Pta::new(bus, config).unwrap();
        let config = shootdown_pta::Config {
            fault_around: 1,
            ..shootdown_pta::Config::default()
        };
        let (registers, interrupts) = (model.clone(), model.clone());
        let name = format!("pta{number}");
        Self {
            driver: Pta::probe(&name, registers, interrupts, config).unwrap(),
            model,
        }
    }

    fn open(&self, space: &AddressSpace) -> OnQueue {
        let queue = self.driver.queue(space).unwrap();
        let buffer = space.map(Map::anonymous(4096)).unwrap();
        let range = buffer;
        let touch = Command::Touch { range, write: true };
        queue.run(0, &touch, LONG).unwrap();
        OnQueue { queue, buffer }
    }

    fn faults(&self) -> u64 {
        let stats = self.driver.stats();
        stats.requests_resolved + stats.requests_refused
    }

    fn entries(&self, user: &OnQueue, part: Range) -> Vec<Range> {
        let entries = self.model.tlb_entries();
        let pasid = user.queue.pasid();
        let own = entries.iter().filter(|one| one.key.pasid == pasid);
        let pages = own.map(|one| one.key.range());
        pages.filter(|page| page.overlaps(part)).collect()
    }
}

impl OnQueue {
    fn run(&self, command: Command) -> Result<u64, Fault> {
        match self.queue.run(0, &command, LONG) {
            Ok(found) => Ok(found),
            Err(PtaError::PageFault { at, .. }) => Err(Fault(at)),
            Err(error) => panic!("{error}"),
        }
    }
}

impl User for OnQueue {
    fn load(&self, at: Addr) -> Result<(), Fault> {
        let from = Range::new(at, 8).unwrap();
        let to = self.buffer.start();
        self.run(Command::Copy { from, to }).map(drop)
    }

    /// By the device's own sum: the buffer may lie where this process does not have it.
    fn buffer(&self) -> u64 {
        let at = self.buffer.start();
        self.run(Command::AtomicAdd { at, value: 0 }).unwrap()
    }

    fn set_buffer(&self, value: u64) {
        let range = Range::new(self.buffer.start(), 8).unwrap();
        self.run(Command::Fill { range, word: value }).unwrap();
    }

    fn fill(&self, range: Range, word: u64) -> Result<(), Fault> {
        self.run(Command::Fill { range, word }).map(drop)
    }

    fn add(&self, at: Addr, value: u64) -> Result<u64, Fault> {
        self.run(Command::AtomicAdd { at, value })
    }

    fn exclusive(&self, _: &AddressSpace, range: Range) -> Result<Excluded, ExcludeError> {
        match self.queue.exclusive(0, range, LONG) {
            Ok(excluded) => Ok(excluded),
            Err(PtaError::Exclude(error)) => Err(error),
            Err(error) => panic!("{error}"),
        }
    }
}
