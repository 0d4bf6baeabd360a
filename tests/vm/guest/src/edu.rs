//! QEMU's edu device, by bare registers (QEMU's docs/specs/edu): a DMA begins 100 ms after it is asked for, cannot be stopped
//! and does not report errors. That is a race window on demand.

use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use shootdown::{DeviceError, Registers};

use crate::check::{Failure, Outcome};

const LIVENESS: u64 = 0x04;
const INTERRUPTS: u64 = 0x24;
const RAISE: u64 = 0x60;
const ACKNOWLEDGE: u64 = 0x64;
const SOURCE: u64 = 0x80;
const DESTINATION: u64 = 0x88;
const COUNT: u64 = 0x90;
const COMMAND: u64 = 0x98;

/// The device's own buffer, as its DMA engine sees it.
const BUFFER: u64 = 0x4_0000;
const RUN: u64 = 1;
const TO_MEMORY: u64 = 2;

/// Bytes of a DMA here: less than a page, since QEMU 7.2 aborts on exactly 4096.
pub(crate) const CHUNK: usize = 2048;

/// Far above the 100 ms that a DMA waits, in a guest whose CPU is emulated.
const LIMIT: Duration = Duration::from_secs(5);

/// The device, however its registers are reached.
pub(crate) struct Edu {
    registers: Box<dyn Registers>,
    /// The byte that its buffer is full of, if it is known: above `u8::MAX` it is not.
    holds: AtomicU16,
}

impl Edu {
    /// Waits for what an earlier driver may have left running.
    pub(crate) fn new(registers: impl Registers + 'static) -> Result<Self, Failure> {
        let edu = Self {
            registers: Box::new(registers),
            holds: AtomicU16::new(u16::MAX),
        };
        edu.finish()?;
        Ok(edu)
    }

    /// What the liveness register makes of a value.
    pub(crate) fn liveness(&self, value: u32) -> Result<u32, DeviceError> {
        self.registers.write32(LIVENESS, value)?;
        self.registers.read32(LIVENESS)
    }

    /// Raises an interrupt.
    pub(crate) fn raise(&self, bits: u32) -> Result<(), DeviceError> {
        self.registers.write32(RAISE, bits)
    }

    /// Which interrupts are pending.
    pub(crate) fn pending(&self) -> Result<u32, DeviceError> {
        self.registers.read32(INTERRUPTS)
    }

    /// Takes pending interrupts away.
    pub(crate) fn acknowledge(&self, bits: u32) -> Result<(), DeviceError> {
        self.registers.write32(ACKNOWLEDGE, bits)
    }

    /// Whether its buffer is known to be full of this byte: each DMA costs 100 ms.
    pub(crate) fn holds(&self, byte: u8) -> bool {
        // Relaxed: one thread uses the device.
        self.holds.load(Ordering::Relaxed) == byte.into()
    }

    /// Its buffer is full of this byte now.
    pub(crate) fn loaded(&self, byte: u8) {
        self.holds.store(byte.into(), Ordering::Relaxed);
    }

    /// Asks for a DMA of `len` bytes from memory to the device's buffer; it begins 100 ms later.
    pub(crate) fn arm_read(&self, iova: u64, len: usize) -> Result<(), DeviceError> {
        self.holds.store(u16::MAX, Ordering::Relaxed);
        self.arm(iova, BUFFER, len, RUN)
    }

    /// Asks for a DMA of `len` bytes from the device's buffer to memory; it begins 100 ms later.
    pub(crate) fn arm_write(&self, iova: u64, len: usize) -> Result<(), DeviceError> {
        self.arm(BUFFER, iova, len, RUN | TO_MEMORY)
    }

    fn arm(
        &self,
        source: u64,
        destination: u64,
        len: usize,
        command: u64,
    ) -> Result<(), DeviceError> {
        self.registers.write(SOURCE, source)?;
        self.registers.write(DESTINATION, destination)?;
        self.registers.write(COUNT, len as u64)?;
        self.registers.write(COMMAND, command)
    }

    /// Whether a DMA was asked for and has not ended.
    pub(crate) fn busy(&self) -> Result<bool, DeviceError> {
        Ok(self.registers.read(COMMAND)? & RUN != 0)
    }

    /// Waits until no DMA is under way.
    pub(crate) fn finish(&self) -> Outcome {
        let begun = Instant::now();
        while self.busy()? {
            if begun.elapsed() > LIMIT {
                return Err(Failure::Error(format!(
                    "edu: a DMA did not end within {LIMIT:?}"
                )));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// A whole DMA from memory.
    pub(crate) fn read(&self, iova: u64, len: usize) -> Outcome {
        self.arm_read(iova, len)?;
        self.finish()
    }

    /// A whole DMA to memory.
    pub(crate) fn write(&self, iova: u64, len: usize) -> Outcome {
        self.arm_write(iova, len)?;
        self.finish()
    }
}
