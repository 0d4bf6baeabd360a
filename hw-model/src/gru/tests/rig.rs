//! A chiplet, a memory, and the smallest driver: it pokes registers, and resolves misses by translating.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use shootdown::{Addr, Memory, PageSize, Range, Registers, Rights};

use crate::bus::Bus;
use crate::gru::layout::{
    ACTIVE, CALL_OS, CAUSE, CBE, CCH, DSR_OFFSET, EXCEPTION, GSEG_STRIDE, HANDLE_STRIDE, IDLE,
    MANAGEMENT, OPCODE, RESET, STATUS, TFH, TFM, TGH, cb, cbe, cch, page_code, tfh, tgh,
};
use crate::gru::{Chiplet, ChipletConfig};
use crate::memory::ModelMemory;

/// After this long a test has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// The page sizes that the rig's contexts use: 4 KiB, 64 KiB, 2 MiB.
pub(super) const SIZES: u64 = 0b10_0101;

/// Spins until `what` is true.
pub(super) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "{what}: never");
        thread::yield_now();
    }
}

/// What a control block is given.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Instr {
    pub(super) opcode: u64,
    pub(super) extended: u64,
    pub(super) element: u64,
    pub(super) modifiers: u64,
    /// Of the first and the second address.
    pub(super) kinds: [u64; 2],
    pub(super) base0: u64,
    pub(super) base1: u64,
    pub(super) count: u64,
    pub(super) tri0: u64,
    pub(super) tri1: u64,
    pub(super) stride: i64,
    pub(super) operand1: u64,
    pub(super) operand2: u64,
}

impl Instr {
    fn words(&self) -> [u64; 7] {
        let dw0 = 1 | STATUS.put(0, ACTIVE) | cb::OPCODE.put(0, self.opcode);
        let dw0 = cb::ELEMENT.put(cb::MODIFIERS.put(dw0, self.modifiers), self.element);
        let dw0 = cb::KIND1.put(cb::KIND0.put(dw0, self.kinds[0]), self.kinds[1]);
        let shape = cb::COUNT.put(0, self.count);
        [
            cb::EXTENDED.put(dw0, self.extended),
            self.base0,
            self.base1,
            cb::TRI1.put(cb::TRI0.put(shape, self.tri0), self.tri1),
            self.stride as u64,
            self.operand1,
            self.operand2,
        ]
    }
}

/// Sets one double word.
pub(super) fn set(base0: u64, value: u64) -> Instr {
    Instr {
        opcode: 6,
        element: 3,
        base0,
        base1: value,
        count: 1,
        stride: 1,
        ..Instr::default()
    }
}

/// How a miss of the rig's contexts is reported.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Misses {
    FaultMap,
    /// Without an interrupt.
    FaultMapPolled,
    UserPolling,
}

pub(super) struct Rig {
    pub(super) chiplet: Arc<Chiplet>,
    pub(super) memory: Arc<ModelMemory>,
    pub(super) bus: Bus,
}

impl Rig {
    pub(super) fn new(config: ChipletConfig) -> Self {
        let bus = Bus::new(4096).unwrap();
        Self {
            memory: ModelMemory::new(&bus, 8 << 20).unwrap(),
            chiplet: Chiplet::new(bus.clone(), config),
            bus,
        }
    }

    /// A rig with context 0 started, and 16 pages of 4 KiB mapped: their first address.
    pub(super) fn started(config: ChipletConfig) -> (Self, u64) {
        let rig = Self::new(config);
        let base = rig.map(0, 16 * 4096, PageSize::FourKiB, Rights::READ_WRITE);
        rig.start(0, 8, Misses::FaultMap);
        (rig, base)
    }

    pub(super) fn map(&self, offset: u64, len: u64, page: PageSize, rights: Rights) -> u64 {
        let start = self.memory.arena().start().get() + offset;
        self.memory
            .map(Range::new(start, len).unwrap(), page, rights)
            .unwrap();
        start
    }

    pub(super) fn read(&self, offset: u64) -> u64 {
        self.chiplet.read(offset).unwrap()
    }

    pub(super) fn write(&self, offset: u64, value: u64) {
        self.chiplet.write(offset, value).unwrap();
    }

    fn handle(kind: u64, index: u64, word: usize) -> u64 {
        MANAGEMENT + kind + index * HANDLE_STRIDE + word as u64 * 8
    }

    pub(super) fn cch(index: u64, word: usize) -> u64 {
        Self::handle(CCH, index, word)
    }

    pub(super) fn tgh(index: u64, word: usize) -> u64 {
        Self::handle(TGH, index, word)
    }

    pub(super) fn tfh(index: u64, word: usize) -> u64 {
        Self::handle(TFH, index, word)
    }

    pub(super) fn cbe(index: u64, word: usize) -> u64 {
        Self::handle(CBE, index, word)
    }

    pub(super) fn tfm(index: u64, word: usize) -> u64 {
        Self::handle(TFM, index, word)
    }

    /// A handle operation, to its end.
    pub(super) fn operate(&self, offset: u64, dw0: u64, opcode: u64) -> Result<(), u64> {
        self.write(offset, 1 | STATUS.put(OPCODE.put(dw0, opcode), ACTIVE));
        until("a handle operation ends", || {
            STATUS.get(self.read(offset)) != ACTIVE
        });
        let dw0 = self.read(offset);
        if STATUS.get(dw0) == EXCEPTION {
            Err(CAUSE.get(dw0))
        } else {
            Ok(())
        }
    }

    /// An operation of a context that keeps its enables.
    pub(super) fn context(&self, index: u64, opcode: u64) -> Result<(), u64> {
        let dw0 = self.read(Self::cch(index, 0)) & cch::SOFTWARE;
        self.operate(Self::cch(index, 0), dw0, opcode)
    }

    pub(super) fn state(&self, index: u64) -> u64 {
        cch::STATE.get(self.read(Self::cch(index, 0)))
    }

    /// Writes the handle of context `index`: four control blocks and two units of data segment, not next to each other.
    pub(super) fn configure(&self, index: u64, asid: u64, misses: Misses) {
        let interrupt = u64::from(misses == Misses::FaultMap);
        let dw0 = cch::TLB_INTERRUPT.put(cch::CB_INTERRUPT.put(0, 1), interrupt);
        let dw0 = cch::FAULT_BITS.put(dw0, u64::from(misses == Misses::FaultMapPolled));
        self.write(Self::cch(index, 0), cch::FAULT_MAP.put(dw0, index));
        self.write(Self::cch(index, cch::DSR_MAP), 0b101 << (index * 4));
        self.write(Self::cch(index, cch::CB_MAP), 0b101 << (index * 4));
        for region in 0..cch::REGIONS {
            let word = cch::SIZES.put(cch::ASID.put(0, asid), SIZES);
            self.write(Self::cch(index, cch::REGION + region), word);
        }
        self.write(Self::cch(index, cch::OWNER), self.memory.id());
    }

    /// Configures, allocates, zeroes and starts a context.
    pub(super) fn start(&self, index: u64, asid: u64, misses: Misses) {
        self.configure(index, asid, misses);
        self.context(index, cch::ALLOCATE).unwrap();
        for number in 0..4 {
            for word in 0..8 {
                self.write(Self::cb(index, number, word), 0);
            }
        }
        for word in 0..256 {
            self.write(Self::dsr(index, word * 8), 0);
        }
        self.context(index, cch::START).unwrap();
    }

    pub(super) fn cb(context: u64, number: u64, word: usize) -> u64 {
        context * GSEG_STRIDE + number * HANDLE_STRIDE + word as u64 * 8
    }

    pub(super) fn dsr(context: u64, offset: u64) -> u64 {
        context * GSEG_STRIDE + DSR_OFFSET + offset
    }

    /// The slot of control block `number` of a context that [`Rig::configure`] configured.
    pub(super) fn slot(context: u64, number: u64) -> u64 {
        let unit = context * 4 + number / 2 * 2;
        unit * 2 + number % 2
    }

    /// Starts an instruction.
    pub(super) fn issue(&self, context: u64, number: u64, instr: &Instr) {
        let words = instr.words();
        for (word, value) in words.iter().enumerate().skip(1) {
            self.write(Self::cb(context, number, word), *value);
        }
        self.write(Self::cb(context, number, 0), words[0]);
    }

    pub(super) fn status(&self, context: u64, number: u64) -> u64 {
        STATUS.get(self.read(Self::cb(context, number, 0)))
    }

    /// Waits for an instruction, and resolves its misses: its final status.
    pub(super) fn finish(&self, context: u64, number: u64) -> u64 {
        let slot = Self::slot(context, number);
        until("an instruction ends", || {
            self.resolve(slot);
            matches!(self.status(context, number), IDLE | EXCEPTION)
        });
        self.status(context, number)
    }

    /// Issues and finishes; an exception's causes and their detail as an error, else the result.
    pub(super) fn run(&self, context: u64, instr: &Instr) -> Result<u64, (u64, u64)> {
        self.issue(context, 0, instr);
        if self.finish(context, 0) == EXCEPTION {
            let word = |word| self.read(Self::cbe(Self::slot(context, 0), word));
            return Err((word(cbe::CAUSE), word(cbe::DETAIL)));
        }
        Ok(self.read(Self::cb(context, 0, cb::RESULT)))
    }

    pub(super) fn fault_state(&self, slot: u64) -> u64 {
        tfh::STATE.get(self.read(Self::tfh(slot, 0)))
    }

    pub(super) fn await_miss(&self, slot: u64) {
        until("a miss", || {
            matches!(
                self.fault_state(slot),
                tfh::STATE_MISS_FMM | tfh::STATE_MISS_UPM
            )
        });
    }

    /// Resolves the slot's miss, if it has one, as the page table says.
    pub(super) fn resolve(&self, slot: u64) {
        let state = self.fault_state(slot);
        if !matches!(state, tfh::STATE_MISS_FMM | tfh::STATE_MISS_UPM) {
            return;
        }
        let opcode = if self.fill(slot) {
            tfh::WRITE_RESTART
        } else {
            tfh::EXCEPTION
        };
        self.operate(Self::tfh(slot, 0), 0, opcode).unwrap();
    }

    /// Writes the translation of the slot's miss into its handle, if there is one that allows it.
    pub(super) fn fill(&self, slot: u64) -> bool {
        let vaddr = self.read(Self::tfh(slot, tfh::MISS_VADDR));
        let asid = self.read(Self::tfh(slot, tfh::MISS_ASID));
        let modify = CAUSE.get(self.read(Self::tfh(slot, 0))) == u64::from(tfh::CAUSE_MOD);
        let Some(found) = self.memory.translate(Addr::new(vaddr)) else {
            return false;
        };
        let writable = found.rights.contains(Rights::WRITE);
        let fill = tfh::PAGE_SIZE.put(asid, page_code(found.page_size.shift()).into());
        self.write(Self::tfh(slot, tfh::FILL_VADDR), found.page.start().get());
        self.write(
            Self::tfh(slot, tfh::FILL),
            tfh::DIRTY.put(fill, writable.into()),
        );
        self.write(Self::tfh(slot, tfh::PFN), found.frame.0);
        writable || !modify
    }

    /// Begins a purge of pages of an ASID.
    pub(super) fn purge(&self, handle: u64, asid: u64, vaddr: u64, page: PageSize, pages: u64) {
        let what = tgh::PAGE_SIZE.put(asid, page_code(page.shift()).into());
        self.write(Self::tgh(handle, tgh::VADDR), vaddr);
        self.write(
            Self::tgh(handle, tgh::WHAT),
            tgh::COUNT.put(what, pages - 1),
        );
        self.write(Self::tgh(handle, tgh::WHERE), tgh::CONTEXTS.mask());
        self.write(
            Self::tgh(handle, 0),
            1 | STATUS.put(OPCODE.put(0, tgh::TLBINV), ACTIVE),
        );
    }

    /// Begins a purge of everything.
    pub(super) fn purge_all(&self, handle: u64) {
        self.write(
            Self::tgh(handle, tgh::WHAT),
            tgh::GLOBAL.put(tgh::COUNT.put(0, 1023), 1),
        );
        self.write(Self::tgh(handle, tgh::WHERE), tgh::CONTEXTS.mask());
        self.write(
            Self::tgh(handle, 0),
            1 | STATUS.put(OPCODE.put(0, tgh::TLBINV), ACTIVE),
        );
    }

    pub(super) fn purge_status(&self, handle: u64) -> u64 {
        STATUS.get(self.read(Self::tgh(handle, 0)))
    }

    pub(super) fn await_purge(&self, handle: u64) {
        until("a purge is acknowledged", || {
            self.purge_status(handle) == IDLE
        });
    }

    pub(super) fn await_reset(&self) {
        until("a reset is done", || self.read(MANAGEMENT + RESET) == 0);
    }

    /// Whether the TLB has an entry of `asid` for `vaddr`.
    pub(super) fn holds(&self, asid: u32, vaddr: u64) -> bool {
        self.chiplet.tlb_holds(asid, Range::new(vaddr, 1).unwrap())
    }

    /// The application's memory. Nothing of the chiplet may be running in it.
    pub(super) fn peek(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        // SAFETY: the tests name mapped and readable bytes of the arena, and no other thread of theirs writes to them.
        unsafe { std::ptr::copy_nonoverlapping(addr as *const u8, bytes.as_mut_ptr(), len) };
        bytes
    }

    pub(super) fn poke(&self, addr: u64, bytes: &[u8]) {
        // SAFETY: as above, for writable bytes.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), addr as *mut u8, bytes.len()) };
    }

    pub(super) fn dsr_bytes(&self, context: u64, len: u64) -> Vec<u8> {
        (0..len / 8)
            .flat_map(|i| self.read(Self::dsr(context, i * 8)).to_le_bytes())
            .collect()
    }

    pub(super) fn assert_no_stale_access(&self) {
        let findings = self.bus.oracle().findings();
        assert!(findings.is_empty(), "{}", findings[0]);
    }
}

/// Whether the block waits for its user.
pub(super) fn calls_os(rig: &Rig, context: u64, number: u64) -> bool {
    rig.status(context, number) == CALL_OS
}
