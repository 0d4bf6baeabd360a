//! The register layout of a chiplet: offsets, strides and bit fields, and nothing that acts.
//!
//! All offsets are in bytes from the start of the chiplet's window; every register has 64 bits.

/// The size of a chiplet's window.
pub const WINDOW_BYTES: u64 = 128 << 20;
/// Contexts of a chiplet.
pub const CONTEXTS: usize = 16;
/// Control blocks of a chiplet, shared out to its contexts; TFH and CBE have the same index.
pub const SLOTS: usize = 128;
/// TLB-global handles (purges) of a chiplet.
pub const TGHS: usize = 24;
/// Fault maps of a chiplet, which is also how many interrupt vectors it has.
pub const TFMS: usize = 16;

/// From one context's segment to the next.
pub const GSEG_STRIDE: u64 = 4 << 20;
/// Where the data segment begins in a context's segment.
pub const DSR_OFFSET: u64 = 0x2_0000;
/// The data segment of a chiplet, and the most that one context can have.
pub const DSR_BYTES: u64 = 32 << 10;
/// Data segment bytes of one allocation unit.
pub const DSR_UNIT: u64 = 1 << 10;
/// Control blocks of one allocation unit.
pub const CB_UNIT: usize = 2;
/// From one control block, or handle, to the next.
pub const HANDLE_STRIDE: u64 = 256;
/// 64-bit words of a control block.
pub const CB_WORDS: usize = 8;
/// 64-bit words of a handle that mean anything; the others read 0.
pub const HANDLE_WORDS: usize = 12;

/// Where the management registers begin: after the contexts' segments.
pub const MANAGEMENT: u64 = GSEG_STRIDE * CONTEXTS as u64;
/// Fault maps, from [`MANAGEMENT`].
pub const TFM: u64 = 0;
/// TLB-global handles, from [`MANAGEMENT`].
pub const TGH: u64 = 0x8000;
/// Extended control blocks, from [`MANAGEMENT`].
pub const CBE: u64 = 0x1_0000;
/// TLB fault handles, from [`MANAGEMENT`].
pub const TFH: u64 = 0x1_8000;
/// Context configuration handles, from [`MANAGEMENT`].
pub const CCH: u64 = 0x2_0000;
/// The reset register, from [`MANAGEMENT`]: write 1 to reset the chiplet; reads 1 until that is done.
pub const RESET: u64 = 0x3_0000;

/// A bit field of a register.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    shift: u32,
    bits: u32,
}

impl Field {
    const fn new(shift: u32, bits: u32) -> Self {
        Self { shift, bits }
    }

    /// The field's bits within the register.
    pub const fn mask(self) -> u64 {
        (u64::MAX >> (64 - self.bits)) << self.shift
    }

    /// The field of `word`.
    pub const fn get(self, word: u64) -> u64 {
        (word & self.mask()) >> self.shift
    }

    /// `word` with the field replaced; what does not fit is cut.
    pub const fn put(self, word: u64, value: u64) -> u64 {
        (word & !self.mask()) | ((value << self.shift) & self.mask())
    }
}

/// DW0 of handles and control blocks: writing 1, with status ACTIVE, starts the operation.
pub const COMMAND: Field = Field::new(0, 1);
/// DW0 of handles: the operation.
pub const OPCODE: Field = Field::new(8, 3);
/// DW0 of handles and control blocks: one of [`IDLE`], [`EXCEPTION`], [`ACTIVE`], [`CALL_OS`].
pub const STATUS: Field = Field::new(16, 2);
/// DW0 of handles: why it ended with [`EXCEPTION`], and the cause of a TFH's miss.
pub const CAUSE: Field = Field::new(20, 4);

/// Status: nothing to do, or done.
pub const IDLE: u64 = 0;
/// Status: ended with an error.
pub const EXCEPTION: u64 = 1;
/// Status: at work.
pub const ACTIVE: u64 = 2;
/// Status of a control block only: waits until its user calls the system to resolve a TLB miss.
pub const CALL_OS: u64 = 3;

/// Handle cause: no such operation.
pub const CAUSE_BAD_OPCODE: u8 = 1;

/// The context configuration handle.
pub mod cch {
    use super::Field;

    /// DW0: state of the context.
    pub const STATE: Field = Field::new(24, 2);
    /// DW0: unmapped accesses are allowed.
    pub const UNMAP_ENABLE: Field = Field::new(32, 1);
    /// DW0: completions that ask for it interrupt.
    pub const CB_INTERRUPT: Field = Field::new(33, 1);
    /// DW0: TLB misses go to the fault map, and interrupt.
    pub const TLB_INTERRUPT: Field = Field::new(34, 1);
    /// DW0: TLB misses go to the fault map; with neither this nor the one before they wait for user polling.
    pub const FAULT_BITS: Field = Field::new(35, 1);
    /// DW0: the fault map, and with it the interrupt vector.
    pub const FAULT_MAP: Field = Field::new(36, 4);
    /// DW0: software asks for the units of the maps; kept for it, as the maps say the same.
    pub const ALLOCATION_REQUEST: Field = Field::new(40, 1);
    /// The bits of DW0 that software writes.
    pub const SOFTWARE: u64 = UNMAP_ENABLE.mask()
        | CB_INTERRUPT.mask()
        | TLB_INTERRUPT.mask()
        | FAULT_BITS.mask()
        | FAULT_MAP.mask()
        | ALLOCATION_REQUEST.mask();
    /// Word with the data-segment map, one bit an allocation unit.
    pub const DSR_MAP: usize = 1;
    /// Word with the control-block map, one bit an allocation unit.
    pub const CB_MAP: usize = 2;
    /// The first of the words with a region's ASID and page sizes.
    pub const REGION: usize = 3;
    /// How many regions there are.
    pub const REGIONS: usize = 8;
    /// Word with the owner, which software defines.
    pub const OWNER: usize = 11;
    /// In a region's word: its ASID.
    pub const ASID: Field = Field::new(0, 24);
    /// In a region's word: bit k allows the page-size code k.
    pub const SIZES: Field = Field::new(32, 16);

    /// Opcode: (re)start the context with the ASIDs, sizes and enables of the handle.
    pub const START: u64 = 1;
    /// Opcode: claim the control blocks and the data segment of the maps.
    pub const ALLOCATE: u64 = 2;
    /// Opcode: stop the context's instructions.
    pub const INTERRUPT: u64 = 3;
    /// Opcode: give the control blocks and the data segment back.
    pub const DEALLOCATE: u64 = 4;
    /// Opcode: stop the context's instructions, for software that waits for it before it unloads the context.
    pub const INTERRUPT_SYNC: u64 = 5;

    /// Cause: not in this state.
    pub const CAUSE_STATE: u8 = 2;
    /// Cause: a map overlaps that of another context.
    pub const CAUSE_RESOURCES: u8 = 3;
    /// Cause: no control blocks in the map.
    pub const CAUSE_ZERO_MAP: u8 = 4;
    /// Cause: an unresolved fault locks the context.
    pub const CAUSE_LOCKED: u8 = 5;
}

/// The TLB-global handle.
pub mod tgh {
    use super::Field;

    /// DW0: state of the purge.
    pub const STATE: Field = Field::new(24, 4);
    /// Word with the first address.
    pub const VADDR: usize = 1;
    /// Word with what is purged.
    pub const WHAT: usize = 2;
    /// Word with where it is purged.
    pub const WHERE: usize = 3;
    /// In DW2: ASID.
    pub const ASID: Field = Field::new(0, 24);
    /// In DW2: page-size code.
    pub const PAGE_SIZE: Field = Field::new(24, 5);
    /// In DW2: any ASID.
    pub const GLOBAL: Field = Field::new(29, 1);
    /// In DW3: the address bits that are compared, from bit 25 on. The model compares all, as every driver asks it to.
    pub const ADDRESS_MASK: Field = Field::new(0, 39);
    /// In DW3: the contexts whose misses and accesses in flight are concerned, a bit each.
    pub const CONTEXTS: Field = Field::new(40, 16);
    /// In DW2: pages less one.
    pub const COUNT: Field = Field::new(32, 10);
    /// The count that makes a purge complete: every page of the ASID, whatever size and address.
    pub const COUNT_ALL: u64 = 1023;

    /// Opcode: nothing.
    pub const NOP: u64 = 0;
    /// Opcode: purge.
    pub const TLBINV: u64 = 1;

    /// State: nothing to do.
    pub const STATE_IDLE: u64 = 0;
    /// State: entries are being removed.
    pub const STATE_INVALIDATING: u64 = 1;
    /// State: entries are gone, accesses through them are being waited for.
    pub const STATE_WAIT_DONE: u64 = 3;
}

/// The TLB fault handle.
pub mod tfh {
    use super::Field;

    /// DW0: state of the fault.
    pub const STATE: Field = Field::new(24, 3);
    /// Word with the address that missed.
    pub const MISS_VADDR: usize = 1;
    /// Word with the ASID that missed.
    pub const MISS_ASID: usize = 2;
    /// The first word that software may write, with the address to fill.
    pub const FILL_VADDR: usize = 3;
    /// Word with the entry's attributes.
    pub const FILL: usize = 4;
    /// Word with the frame, in units of 4 KiB.
    pub const PFN: usize = 5;
    /// In DW2 and DW4: ASID.
    pub const ASID: Field = Field::new(0, 24);
    /// In DW4: page-size code.
    pub const PAGE_SIZE: Field = Field::new(32, 5);
    /// In DW4: stores are allowed.
    pub const DIRTY: Field = Field::new(37, 1);
    /// In DW4: the address kind of the page.
    pub const GAA: Field = Field::new(38, 2);
    /// In DW5: the frame.
    pub const PFN_FIELD: Field = Field::new(0, 41);

    /// Opcode: nothing.
    pub const NOOP: u64 = 0;
    /// Opcode: the control block tries again.
    pub const RESTART: u64 = 1;
    /// Opcode: install an entry.
    pub const WRITE_ONLY: u64 = 2;
    /// Opcode: install an entry; the control block tries again.
    pub const WRITE_RESTART: u64 = 3;
    /// Opcode: the control block ends with an exception.
    pub const EXCEPTION: u64 = 4;
    /// Opcode: the fault waits for its user instead of the fault map.
    pub const USER_POLLING: u64 = 7;

    /// State: no context owns the control block.
    pub const STATE_INACTIVE: u64 = 0;
    /// State: no fault.
    pub const STATE_IDLE: u64 = 1;
    /// State: a fault that its user has to report.
    pub const STATE_MISS_UPM: u64 = 2;
    /// State: a fault that the fault map reports.
    pub const STATE_MISS_FMM: u64 = 3;
    /// State: a drop-in is on its way.
    pub const STATE_WRITE_TLB: u64 = 5;
    /// State: a restart is on its way.
    pub const STATE_RESTART: u64 = 6;

    /// Cause: no entry.
    pub const CAUSE_MISS: u8 = 1;
    /// Cause: a store through an entry that does not allow it.
    pub const CAUSE_MOD: u8 = 2;
}

/// The extended control block.
pub mod cbe {
    use super::Field;

    /// Word with state and execution status.
    pub const STATE: usize = 0;
    /// Word with the exception causes, one bit each.
    pub const CAUSE: usize = 1;
    /// Word that says more of the cause: what is wrong with an instruction, or the cause of the miss.
    pub const DETAIL: usize = 2;
    /// Word with the address of the exception.
    pub const VADDR: usize = 3;
    /// Word with the next element to be done: where an interrupted instruction goes on after START. ALLOCATE clears it,
    /// so software that does not restore it has the instruction run from its first element.
    pub const ELEMENT: usize = 4;
    /// How many words belong to the state of an instruction.
    pub const WORDS: usize = 5;
    /// Word with a copy of the instruction's opcode and element type, in the fields of a control block's DW0. This and the words that
    /// follow are made when they are read; writes to them are ignored. Linux reads them to know what a block copy will miss next.
    pub const COPY: usize = 5;
    /// Word with the first address, where the next element is.
    pub const BASE0: usize = 6;
    /// Word with a copy's second address, where the next element goes.
    pub const BASE1: usize = 7;
    /// Word with what is left.
    pub const LEFT: usize = 8;
    /// In DW8: elements that are not done.
    pub const ELEMENTS: Field = Field::new(0, 32);
    /// In DW8: cache lines of the first address that they lie in; as many as fit in the field.
    pub const LINES: Field = Field::new(32, 32);

    /// In DW0: the state.
    pub const CBR_STATE: Field = Field::new(0, 4);
    /// In DW0: the execution status, one bit each.
    pub const STATUS: Field = Field::new(8, 7);

    /// State: no context owns the control block.
    pub const INACTIVE: u64 = 0;
    /// State: nothing to do, or ended.
    pub const IDLE: u64 = 1;
    /// State: waits for its turn.
    pub const QUEUED: u64 = 3;
    /// State: an access is in flight.
    pub const WAIT_RESPONSE: u64 = 4;
    /// State: its context has been interrupted.
    pub const INTERRUPTED: u64 = 5;
    /// State: stopped by a miss that the fault map reports.
    pub const INTERRUPTED_MISS_FMM: u64 = 6;
    /// State: as before, and its context is being interrupted.
    pub const BUSY_INTERRUPT_MISS_FMM: u64 = 7;
    /// State: stopped by a miss that its user has to report.
    pub const INTERRUPTED_MISS_UPM: u64 = 8;
    /// State: as before, and its context is being interrupted.
    pub const BUSY_INTERRUPT_MISS_UPM: u64 = 9;
    /// State: its context is being interrupted.
    pub const BUSY_INTERRUPT: u64 = 11;

    /// Execution status: ended before all elements were done.
    pub const ABORTED: u64 = 1 << 0;
    /// Execution status: interrupted before it ended.
    pub const WAS_INTERRUPTED: u64 = 1 << 1;
    /// Execution status: an access is in flight.
    pub const IS_PENDING: u64 = 1 << 2;
    /// Execution status: waits for its turn.
    pub const IS_QUEUED: u64 = 1 << 3;
    /// Execution status: a purge came for the pending miss.
    pub const TLB_INVALIDATED: u64 = 1 << 4;
    /// Execution status: ended with an exception.
    pub const HAS_EXCEPTION: u64 = 1 << 5;
    /// Execution status: its done bit is set in the fault map.
    pub const INTERRUPT_PENDING: u64 = 1 << 6;

    /// Cause: register error.
    pub const REGISTER: u64 = 1 << 0;
    /// Cause: no such instruction; [`DETAIL`] says what of it is wrong.
    pub const INVALID_INSTRUCTION: u64 = 1 << 1;
    /// Cause: unmapped addresses in a context without [`cch::UNMAP_ENABLE`](super::cch::UNMAP_ENABLE).
    pub const UNMAPPED_MODE_FORBIDDEN: u64 = 1 << 2;
    /// Cause: the check of the instruction's data failed.
    pub const CHECK_DATA: u64 = 1 << 3;
    /// Cause: the instruction's address kind is not that of the page.
    pub const ADDRESS_KIND_MISMATCH: u64 = 1 << 4;
    /// Cause: past the end of the context's data segment.
    pub const DATA_SEGMENT_LIMIT: u64 = 1 << 5;
    /// Cause: the fault handler answered a miss with an exception; [`DETAIL`] has the miss's cause.
    pub const TLB_FATAL: u64 = 1 << 6;
    /// Cause, worth another try: execution hardware.
    pub const EXECUTION_ERROR: u64 = 1 << 7;
    /// Cause, worth another try: TLB hardware.
    pub const TLB_ERROR: u64 = 1 << 8;
    /// Cause, worth another try: a request to a remote agent has timed out.
    pub const REMOTE_TIMEOUT: u64 = 1 << 9;
    /// Cause, worth another try: a request to the home agent has timed out.
    pub const HOME_TIMEOUT: u64 = 1 << 10;
    /// Cause: a fatal response of a remote agent.
    pub const REMOTE_FATAL: u64 = 1 << 11;
    /// Cause, worth another try: a response of a remote agent that is not fatal.
    pub const REMOTE_NON_FATAL: u64 = 1 << 12;
    /// Cause: a fatal response of the home agent.
    pub const HOME_FATAL: u64 = 1 << 13;
    /// Cause, worth another try: a response of the home agent that is not fatal.
    pub const HOME_NON_FATAL: u64 = 1 << 14;
    /// Cause: an address that nobody decodes.
    pub const ADDRESS_DECODE: u64 = 1 << 15;
    /// Cause: the coherence protocol was violated.
    pub const PROTOCOL: u64 = 1 << 16;
    /// Cause, worth another try: bad data in the response of a remote agent.
    pub const REMOTE_DATA: u64 = 1 << 17;
    /// Cause, worth another try: bad data in the response of the home agent.
    pub const HOME_DATA: u64 = 1 << 18;
    /// Cause: an error that software forced.
    pub const FORCED: u64 = 1 << 19;
    /// The causes that are worth another try.
    pub const RETRYABLE: [u64; 8] = [
        EXECUTION_ERROR,
        TLB_ERROR,
        REMOTE_TIMEOUT,
        HOME_TIMEOUT,
        REMOTE_NON_FATAL,
        HOME_NON_FATAL,
        REMOTE_DATA,
        HOME_DATA,
    ];

    /// What is wrong with an instruction: opcode or extended opcode.
    pub const WRONG_OPCODE: u64 = 1;
    /// What is wrong with an instruction: there is no such element type, or not with this opcode.
    pub const WRONG_ELEMENT: u64 = 2;
    /// What is wrong with an instruction: no elements.
    pub const WRONG_COUNT: u64 = 3;
    /// What is wrong with an instruction: an address or data-segment offset is no multiple of the element size.
    pub const WRONG_ALIGNMENT: u64 = 4;
    /// What is wrong with an instruction: its stride leads out of the 64-bit address space.
    pub const WRONG_STRIDE: u64 = 5;
    /// What is wrong with an instruction: the message queue has no lines.
    pub const WRONG_QUEUE: u64 = 6;
}

/// The control block.
pub mod cb {
    use super::Field;

    /// DW0: modifiers.
    pub const MODIFIERS: Field = Field::new(4, 3);
    /// DW0: instruction.
    pub const OPCODE: Field = Field::new(8, 4);
    /// DW0: element type.
    pub const ELEMENT: Field = Field::new(12, 3);
    /// DW0: which atomic.
    pub const EXTENDED: Field = Field::new(24, 8);
    /// DW0: the kind of the first address.
    pub const KIND0: Field = Field::new(40, 2);
    /// DW0: the kind of the second address.
    pub const KIND1: Field = Field::new(42, 2);
    /// DW0: result of a message.
    pub const SUBSTATUS: Field = Field::new(32, 6);
    /// First address.
    pub const BASE0: usize = 1;
    /// Second address, or the value of a set.
    pub const BASE1: usize = 2;
    /// Word with the element count and the data-segment offsets.
    pub const SHAPE: usize = 3;
    /// In DW3: elements.
    pub const COUNT: Field = Field::new(0, 32);
    /// In DW3: data-segment offset of the data.
    pub const TRI0: Field = Field::new(32, 16);
    /// In DW3: data-segment offset of the index vector.
    pub const TRI1: Field = Field::new(48, 16);
    /// Stride in elements, signed.
    pub const STRIDE: usize = 4;
    /// First operand of an atomic.
    pub const OPERAND1: usize = 5;
    /// Second operand of an atomic.
    pub const OPERAND2: usize = 6;
    /// Result of an atomic: the old value.
    pub const RESULT: usize = 7;

    /// Modifier: responses may be held back; that changes when an instruction ends, not what it does.
    pub const DELAYED: u64 = 1;
    /// Modifier: unmapped addresses.
    pub const UNMAPPED: u64 = 2;
    /// Modifier: set the done bit on completion, and interrupt where the context allows it.
    pub const INTERRUPT: u64 = 4;

    /// Address kind: memory. All of the model's memory is.
    pub const RAM: u64 = 0;
    /// Address kind: memory-mapped I/O.
    pub const MMIO: u64 = 1;
    /// Address kind: memory that is not coherent.
    pub const NCRAM: u64 = 2;
    /// Address kind: registers.
    pub const REG: u64 = 3;

    /// Message result: the receiver's buffer is full; nothing has happened.
    pub const LB_OVERFLOW: u64 = 1;
    /// Message result: the lines do not fit below the limit; nothing has happened.
    pub const QUEUE_LIMIT: u64 = 2;
    /// Message result: the slot is claimed, but lies in another page than the head; software stores the lines.
    pub const PAGE_OVERFLOW: u64 = 3;
    /// Message result: the claim was not answered; nothing has happened.
    pub const AMO_NACKED: u64 = 4;
    /// Message result: the slot is claimed, the lines were not taken; software stores them.
    pub const PUT_NACKED: u64 = 5;
}

/// log2 of the page size with this code, in bytes.
pub const fn page_shift(code: u8) -> u32 {
    if code <= 4 {
        12 + 2 * code as u32
    } else {
        11 + 2 * code as u32
    }
}

/// The page-size code of pages of 2^`shift` bytes.
pub const fn page_code(shift: u32) -> u8 {
    (((if shift > 20 { shift + 2 } else { shift }) >> 1) - 6) as u8
}
