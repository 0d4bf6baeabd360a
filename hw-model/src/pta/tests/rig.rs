//! A device with one queue, and what software does with its registers.

use shootdown::{Memory, PageSize, Rights};

use super::super::*;
use crate::memory::ModelMemory;
use layout::{ACTIVE, CAUSE, DONE, ERROR, FILL, GROUP, LEAF, READ, STATUS, TABLE, WRITE};

pub(super) const LONG: Duration = Duration::from_secs(10);

pub(super) struct Rig {
    pub(super) bus: Bus,
    pub(super) memory: Arc<ModelMemory>,
    pub(super) pta: Arc<Pta>,
    /// The next table of local memory that nobody has.
    tables: std::cell::Cell<u64>,
}

/// A device with one queue, number 0, on PASID 1, whose page table is empty.
pub(super) fn rig(config: PtaConfig) -> Rig {
    let bus = Bus::new(4096).unwrap();
    let memory = ModelMemory::new(&bus, 8 << 20).unwrap();
    let rig = Rig {
        pta: Pta::new(&bus, config).unwrap(),
        bus,
        memory,
        tables: std::cell::Cell::new(0),
    };
    rig.load(0, 1, rig.memory.id());
    rig
}

impl Rig {
    pub(super) fn write(&self, offset: u64, value: u64) {
        self.pta.write(offset, value).unwrap();
    }

    pub(super) fn read(&self, offset: u64) -> u64 {
        self.pta.read(offset).unwrap()
    }

    pub(super) fn table(&self) -> u64 {
        self.tables.replace(self.tables.get() + 1)
    }

    /// Gives a PASID to a space, with an empty page table, and a queue to the PASID.
    pub(super) fn load(&self, queue: u64, pasid: u64, space: u64) {
        let entry = PASID_TABLE + pasid * 16;
        self.write(entry + 8, space);
        self.write(entry, NUMBER.put(1, self.table()));
        self.write(QUEUE_CONTROL + queue * 8, PASID.put(1, pasid));
    }

    /// Writes a page-table entry, with the tables that it needs.
    pub(super) fn install(&self, pasid: u64, page: Range, frame: u64, rights: Rights) {
        let huge = page.len() > 4096;
        let mut table = NUMBER.get(self.read(PASID_TABLE + pasid * 16));
        let addr = page.start().get();
        let entry = |table: u64, level: u32| {
            LOCAL + table * TABLE_BYTES + (addr >> layout::span(level)) % 512 * 8
        };
        let leaf = u32::from(huge);
        for level in (leaf + 1..layout::LEVELS).rev() {
            let at = entry(table, level);
            if TABLE.get(self.read(at)) == 0 {
                self.write(at, NUMBER.put(TABLE.put(0, 1), self.table()));
            }
            table = NUMBER.get(self.read(at));
        }
        let allowed = |right| u64::from(rights.contains(right));
        let word = WRITE.put(READ.put(0, allowed(Rights::READ)), allowed(Rights::WRITE));
        let word = LEAF.put(NUMBER.put(word, frame), huge.into());
        self.write(entry(table, leaf), word);
    }

    /// Maps a page, and installs it.
    pub(super) fn page(&self, nth: u64) -> Range {
        let page = self.mapped(nth);
        self.mirror(page);
        page
    }

    pub(super) fn nth(&self, nth: u64) -> Range {
        Range::new(self.memory.arena().start().get() + nth * 4096, 4096).unwrap()
    }

    pub(super) fn mapped(&self, nth: u64) -> Range {
        let page = self.nth(nth);
        let small = PageSize::FourKiB;
        self.memory.map(page, small, Rights::READ_WRITE).unwrap();
        page
    }

    /// Installs what the memory says.
    pub(super) fn mirror(&self, page: Range) {
        let found = self.memory.translate(page.start()).unwrap();
        self.install(1, page, found.frame.0, found.rights);
    }

    pub(super) fn start(
        &self,
        slot: u64,
        command: u64,
        [source, destination, length, operand]: [u64; 4],
    ) {
        let at = PORTALS + slot * SLOT_BYTES;
        for (word, value) in (1..).zip([source, destination, length, operand]) {
            self.write(at + word * 8, value);
        }
        self.write(at, STATUS.put(command, ACTIVE));
    }

    /// Waits for the end of a command: its result, or the cause.
    pub(super) fn wait(&self, slot: u64) -> Result<u64, u64> {
        let at = PORTALS + slot * SLOT_BYTES;
        let begun = Instant::now();
        loop {
            let word = self.read(at);
            match STATUS.get(word) {
                DONE => return Ok(self.read(at + 40)),
                ERROR => return Err(CAUSE.get(word)),
                _ => {}
            }
            assert!(begun.elapsed() < LONG, "the command does not end");
            std::thread::sleep(Duration::from_micros(20));
        }
    }

    pub(super) fn run(&self, command: u64, words: [u64; 4]) -> Result<u64, u64> {
        self.start(0, command, words);
        self.wait(0)
    }

    pub(super) fn fill(&self, page: Range, word: u64) -> Result<u64, u64> {
        self.run(FILL, [0, page.start().get(), 8, word])
    }

    pub(super) fn invalidate(&self, what: u64, address: u64, number: u64) {
        self.write(INVALIDATE_ADDRESS, address);
        self.write(INVALIDATE, what);
        self.write(INVALIDATE_DOORBELL, number);
    }

    pub(super) fn completion(&self) -> u64 {
        let begun = Instant::now();
        loop {
            match self.read(INVALIDATE_COMPLETION) {
                0 => assert!(begun.elapsed() < LONG, "no completion"),
                number => return number,
            }
            std::thread::sleep(Duration::from_micros(20));
        }
    }

    /// Waits for a page request, and takes it: its first word, and the address.
    pub(super) fn request(&self) -> (u64, u64) {
        assert_ne!(self.pta.wait(0, LONG).unwrap(), 0, "no page request");
        let head = self.read(REQUEST_HEAD);
        assert_ne!(head, self.read(REQUEST_TAIL));
        let at = REQUEST_RING + head * 16;
        self.write(REQUEST_HEAD, (head + 1) % self.read(REQUEST_SIZE));
        (self.read(at), self.read(at + 8))
    }

    pub(super) fn answer(&self, request: u64, code: u64) {
        let group = GROUP.put(PASID.put(code, PASID.get(request)), GROUP.get(request));
        self.write(REQUEST_RESPONSE, group);
    }

    pub(super) fn stale(&self) -> u64 {
        self.bus.oracle().stale_accesses()
    }
}

pub(super) fn load(page: Range) -> u64 {
    // SAFETY: the test mapped the page, and nothing writes to it now.
    unsafe { (page.start().get() as *const u64).read_volatile() }
}
