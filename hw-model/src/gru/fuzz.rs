//! What holds for whatever is written into a chiplet's registers: a function for each fuzz target of `tests/fuzz`.

use std::time::{Duration, Instant};

use arbitrary::{Result, Unstructured};
use shootdown::{Interrupts, Memory, PageSize, Range, Registers, Rights};

use super::instruction::{Instruction, Kind, Transfer};
use super::layout::{
    ACTIVE, CALL_OS, CBE, CCH, DSR_OFFSET, GSEG_STRIDE, HANDLE_STRIDE, IDLE, MANAGEMENT, RESET,
    STATUS, TFH, TFM, TGH, cb, cbe, cch, page_code, tfh,
};
use super::{Chiplet, ChipletConfig};
use crate::bus::Bus;
use crate::memory::ModelMemory;

/// The words of a control block: what is carried out lies inside of the data segment, and what is refused is wrong.
pub fn control_block(bytes: &[u8]) {
    let word = |nth: usize| -> u64 {
        let own = bytes.iter().skip(2 + 8 * nth).take(8);
        own.rev().fold(0, |word, byte| word << 8 | u64::from(*byte))
    };
    let words = std::array::from_fn(word);
    let dsr_bytes = u64::from(bytes.first().copied().unwrap_or(0) % 33) * 1024;
    let size = match words[0] >> 12 & 7 {
        6 => 64,
        code => 1_u128 << code,
    };
    let (opcode, count) = (words[0] >> 8 & 0xf, u128::from(words[3] & 0xffff_ffff));
    let (data, index) = (
        u128::from(words[3] >> 32 & 0xffff),
        u128::from(words[3] >> 48),
    );
    let decoded = Instruction::decode(&words, dsr_bytes, false);
    let instruction = match decoded {
        Ok(instruction) => instruction,
        Err(wrong) => {
            let known =
                cbe::INVALID_INSTRUCTION | cbe::UNMAPPED_MODE_FORBIDDEN | cbe::DATA_SEGMENT_LIMIT;
            assert!(
                wrong.cause.is_power_of_two() && wrong.cause & known != 0,
                "{wrong:?}"
            );
            assert_eq!(wrong.detail != 0, wrong.cause == cbe::INVALID_INSTRUCTION);
            return;
        }
    };
    if instruction.kind == Kind::Nop {
        return;
    }
    assert_ne!(words[0] >> 4 & 2, 2, "unmapped accesses are for nobody");
    assert!(matches!(words[0] >> 12 & 7, 0..=3 | 6));
    assert_eq!(u128::from(instruction.size), size);
    assert!(u128::from(instruction.base0).is_multiple_of(size));
    let transfers = match instruction.kind {
        Kind::Vector { transfer, .. } => matches!(transfer, Transfer::Load | Transfer::Store),
        Kind::Message => true,
        _ => false,
    };
    if transfers {
        assert!(data.is_multiple_of(size) && data + count * size <= dsr_bytes.into());
    }
    if let Kind::Vector { indexed: true, .. } = instruction.kind {
        assert!(index.is_multiple_of(8) && index + 8 * count <= dsr_bytes.into());
    }
    if let Kind::Atomic(_) = instruction.kind {
        assert!(size <= 8 && (9..=13).contains(&opcode));
    } else {
        assert!(count > 0 && (opcode <= 8 || opcode >= 14));
    }
}

/// Enough to be waited for by anybody.
const PATIENCE: Duration = Duration::from_secs(20);

/// A register that does something, and a value that may be meant.
fn register(bytes: &mut Unstructured<'_>) -> Result<(u64, u64)> {
    let handle =
        |base: u64, nth: u64, word: u64| MANAGEMENT + base + nth * HANDLE_STRIDE + word * 8;
    let nth = u64::from(bytes.int_in_range(0..=3_u8)?);
    let word = u64::from(bytes.int_in_range(0..=7_u8)?);
    let offset = match bytes.int_in_range(0..=7_u8)? {
        0 => handle(CCH, nth, word + nth),
        1 => handle(TFH, nth, word % 6),
        2 => handle(TGH, nth, word % 3),
        3 => handle(TFM, nth, word % 2),
        4 => handle(CBE, nth, word % 5),
        5 => nth * GSEG_STRIDE + DSR_OFFSET + word * 8,
        6 => nth % 2 * GSEG_STRIDE + nth * HANDLE_STRIDE + word * 8,
        _ => bytes.arbitrary()?,
    };
    let value = match bytes.int_in_range(0..=3_u8)? {
        // A start, of any operation.
        0 => 1 | u64::from(bytes.int_in_range(0..=15_u8)?) << 8 | ACTIVE << 16,
        1 => bytes.int_in_range(0..=16_u64)?,
        2 => u64::MAX - u64::from(bytes.arbitrary::<u8>()?),
        _ => bytes.arbitrary()?,
    };
    Ok((offset, value))
}

/// Any registers, in any order. A chiplet that is reset afterwards works as a new one: nobody has panicked, and nothing is left.
pub fn registers(bytes: &[u8]) {
    let bus = Bus::new(64).expect("64 frames");
    let memory = ModelMemory::new(&bus, 1 << 20).expect("1 MiB of addresses");
    let page = Range::new(memory.arena().start(), 4096).expect("a page");
    memory
        .map(page, PageSize::FourKiB, Rights::READ_WRITE)
        .expect("a free page");
    let chiplet = Chiplet::new(bus.clone(), ChipletConfig::default());
    start(&chiplet, memory.id());
    let mut bytes = Unstructured::new(bytes);
    while !bytes.is_empty() {
        let Ok((offset, value)) = register(&mut bytes) else {
            break;
        };
        let legal = offset < chiplet.len() && offset.is_multiple_of(8);
        let read = chiplet.read(offset);
        assert!(legal || read.is_err(), "there is nothing at {offset:#x}");
        let written = chiplet.write(offset, value);
        assert_eq!(read.is_ok(), written.is_ok());
        let _ = chiplet.wait(0, Duration::ZERO);
    }
    chiplet.write(MANAGEMENT + RESET, 1).expect("a register");
    until("a reset", || chiplet.read(MANAGEMENT + RESET) == Ok(0));
    assert!(chiplet.tlb_entries().is_empty());
    start(&chiplet, memory.id());
    works(&chiplet, &bus, &memory, page);
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE, "{what}: never");
        std::thread::yield_now();
    }
}

/// Context 0 with everything that one needs.
fn start(chiplet: &Chiplet, space: u64) {
    let at = |word: usize| MANAGEMENT + CCH + word as u64 * 8;
    let operate = |opcode: u64, bits: u64| {
        let dw0 = bits | 1 | opcode << 8 | ACTIVE << 16;
        chiplet.write(at(0), dw0).expect("a register");
        until("an operation of a context", || {
            STATUS.get(chiplet.read(at(0)).expect("a register")) == IDLE
        });
    };
    let sizes = 1 << page_code(12);
    for (word, value) in [(cch::DSR_MAP, 1), (cch::CB_MAP, 1), (cch::OWNER, space)]
        .into_iter()
        .chain((0..cch::REGIONS).map(|region| (cch::REGION + region, 8 | sizes << 32)))
    {
        chiplet.write(at(word), value).expect("a register");
    }
    operate(cch::ALLOCATE, 0);
    operate(cch::START, 0);
}

/// One store, with its miss.
fn works(chiplet: &Chiplet, bus: &Bus, memory: &ModelMemory, page: Range) {
    let words = [
        1 | 6 << 8 | 3 << 12 | ACTIVE << 16,
        page.start().get(),
        0x5ec2,
        1,
        1,
    ];
    for (word, value) in words.into_iter().enumerate().skip(1) {
        chiplet.write(word as u64 * 8, value).expect("a register");
    }
    chiplet.write(0, words[0]).expect("a register");
    let frame = memory.translate(page.start()).expect("mapped").frame.0;
    let fault = |word: usize| MANAGEMENT + TFH + word as u64 * 8;
    until("a store", || {
        match STATUS.get(chiplet.read(0).expect("a register")) {
            CALL_OS => {
                let fill = tfh::DIRTY.put(tfh::PAGE_SIZE.put(8, page_code(12).into()), 1);
                let words = [
                    (tfh::FILL_VADDR, page.start().get()),
                    (tfh::FILL, fill),
                    (tfh::PFN, frame),
                ];
                for (word, value) in words {
                    chiplet.write(fault(word), value).expect("a register");
                }
                let restart = 1 | tfh::WRITE_RESTART << 8 | ACTIVE << 16;
                chiplet.write(fault(0), restart).expect("a register");
                false
            }
            status => status == IDLE,
        }
    });
    let mut bytes = [0; 8];
    bus.physical().read(shootdown::Frame(frame), 0, &mut bytes);
    assert_eq!(u64::from_ne_bytes(bytes), 0x5ec2);
    assert_eq!(cb::SUBSTATUS.get(chiplet.read(0).expect("a register")), 0);
}
