//! QEMU's edu device, by bare registers (QEMU's docs/specs/edu): a DMA begins 100 ms after it is asked for, cannot be stopped
//! and does not report errors. That is a race window on demand.

use std::io;
use std::time::{Duration, Instant};

use crate::check::{Failure, Outcome, demand};
use crate::memory::{Memory, PAGE};
use crate::pci::{EDU, Function};
use crate::raw::{Container, Device, Rights};

const LIVENESS: usize = 0x04;
const INTERRUPTS: usize = 0x24;
const RAISE: usize = 0x60;
const ACKNOWLEDGE: usize = 0x64;
const SOURCE: usize = 0x80;
const DESTINATION: usize = 0x88;
const COUNT: usize = 0x90;
const COMMAND: usize = 0x98;

/// The device's own buffer, as its DMA engine sees it.
const BUFFER: u64 = 0x4_0000;
const RUN: u64 = 1;
const TO_MEMORY: u64 = 2;

/// Bytes of a DMA here: less than a page, since QEMU 7.2 aborts on exactly 4096.
pub(crate) const CHUNK: usize = 2048;

/// Far above the 100 ms that a DMA waits, in a guest whose CPU is emulated.
const LIMIT: Duration = Duration::from_secs(5);

/// The device with a container of its own.
#[derive(Debug)]
pub(crate) struct Edu {
    registers: Memory,
    pub(crate) device: Device,
    pub(crate) container: Container,
    pub(crate) function: Function,
}

impl Edu {
    /// Opens it, and waits for what an earlier driver may have left running.
    pub(crate) fn open() -> Result<Self, Failure> {
        let function = Function::find(EDU)?;
        let container = Container::of(&function)?;
        let device = container.device(&function)?;
        device.enable()?;
        let registers = device.bar(0)?;
        let edu = Self {
            registers,
            device,
            container,
            function,
        };
        edu.finish()?;
        Ok(edu)
    }

    /// What the liveness register makes of a value.
    pub(crate) fn liveness(&self, value: u32) -> u32 {
        self.registers.write_u32(LIVENESS, value);
        self.registers.read_u32(LIVENESS)
    }

    /// Raises an interrupt.
    pub(crate) fn raise(&self, bits: u32) {
        self.registers.write_u32(RAISE, bits);
    }

    /// Which interrupts are pending.
    pub(crate) fn pending(&self) -> u32 {
        self.registers.read_u32(INTERRUPTS)
    }

    /// Takes pending interrupts away.
    pub(crate) fn acknowledge(&self, bits: u32) {
        self.registers.write_u32(ACKNOWLEDGE, bits);
    }

    /// Asks for a DMA of [`CHUNK`] bytes from memory to the device's buffer; it begins 100 ms later.
    pub(crate) fn arm_read(&self, iova: u64) {
        self.arm(iova, BUFFER, RUN);
    }

    /// Asks for a DMA of [`CHUNK`] bytes from the device's buffer to memory; it begins 100 ms later.
    pub(crate) fn arm_write(&self, iova: u64) {
        self.arm(BUFFER, iova, RUN | TO_MEMORY);
    }

    fn arm(&self, source: u64, destination: u64, command: u64) {
        self.registers.write_u64(SOURCE, source);
        self.registers.write_u64(DESTINATION, destination);
        self.registers.write_u64(COUNT, CHUNK as u64);
        self.registers.write_u64(COMMAND, command);
    }

    /// Whether a DMA was asked for and has not ended.
    pub(crate) fn busy(&self) -> bool {
        self.registers.read_u64(COMMAND) & RUN != 0
    }

    /// Waits until no DMA is under way.
    pub(crate) fn finish(&self) -> Result<(), Failure> {
        let begun = Instant::now();
        while self.busy() {
            if begun.elapsed() > LIMIT {
                return Err(Failure::Error(format!(
                    "edu: a DMA did not end within {LIMIT:?}"
                )));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Fills the device's buffer with one byte, by a DMA of its own.
    pub(crate) fn load(&self, byte: u8) -> Outcome {
        const IOVA: u64 = 0x7000_0000;
        let memory = Memory::anonymous(PAGE)?;
        memory.fill(byte);
        self.container
            .map(IOVA, &memory, Rights::Read)
            .map_err(os)?;
        self.arm_read(IOVA);
        let finished = self.finish();
        let unmapped = self.container.unmap(IOVA, PAGE as u64);
        demand!(
            unmapped == Ok(PAGE as u64),
            "unmapping edu's pattern: {unmapped:?}"
        );
        finished
    }

    /// The first byte of the device's buffer that is not `byte`, fetched by a DMA of its own.
    pub(crate) fn differs(&self, byte: u8) -> Result<Option<(usize, u8)>, Failure> {
        const IOVA: u64 = 0x7000_0000;
        let memory = Memory::anonymous(PAGE)?;
        memory.fill(!byte);
        self.container
            .map(IOVA, &memory, Rights::ReadWrite)
            .map_err(os)?;
        self.arm_write(IOVA);
        self.finish()?;
        let unmapped = self.container.unmap(IOVA, PAGE as u64);
        demand!(
            unmapped == Ok(PAGE as u64),
            "unmapping edu's copy: {unmapped:?}"
        );
        Ok(memory.differs(0, CHUNK, byte))
    }
}

/// The kernel's error, as text.
pub(crate) fn os(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}
