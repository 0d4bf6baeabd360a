//! The driver. Source of the registers: QEMU's `docs/specs/edu.rst`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use shootdown::{Interrupts, Range, Registers};
use shootdown_vfio::{DeviceWork, Window};

use crate::error::EduError;

/// Byte offsets of registers.
mod register {
    pub(super) const IDENTIFICATION: u64 = 0x00;
    pub(super) const LIVENESS: u64 = 0x04;
    pub(super) const FACTORIAL: u64 = 0x08;
    pub(super) const STATUS: u64 = 0x20;
    pub(super) const INTERRUPT_STATUS: u64 = 0x24;
    pub(super) const INTERRUPT_RAISE: u64 = 0x60;
    pub(super) const INTERRUPT_ACKNOWLEDGE: u64 = 0x64;
    pub(super) const DMA_SOURCE: u64 = 0x80;
    pub(super) const DMA_DESTINATION: u64 = 0x88;
    pub(super) const DMA_COUNT: u64 = 0x90;
    pub(super) const DMA_COMMAND: u64 = 0x98;
}

const IDENTIFICATION: u32 = 0x0100_00ed;
const COMPUTING: u32 = 0x01;
const DMA_RUN: u64 = 1;
const DMA_TO_MEMORY: u64 = 2;
const DMA_INTERRUPT: u64 = 4;
const INTERRUPT_DMA: u32 = 0x100;
/// Bits that nothing in the device raises by itself.
const INTERRUPT_SOFTWARE: u32 = 0x8000;

/// Where the buffer begins, as the DMA engine counts.
const BUFFER: u64 = 0x40000;
const BUFFER_BYTES: u64 = 4096;
/// The most that one transfer carries, in bytes. QEMU 7.2 aborts on the whole buffer.
const MOST: u64 = BUFFER_BYTES / 2;

/// Deadlines.
#[derive(Clone, Copy, Debug)]
pub struct EduConfig {
    /// For a transfer, or a factorial, to end. A transfer takes 100 ms.
    pub deadline: Duration,
}

impl Default for EduConfig {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(5),
        }
    }
}

/// Which way a transfer goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// From memory into the buffer.
    ToDevice,
    /// From the buffer into memory.
    ToMemory,
}

/// An edu device.
pub struct Edu {
    registers: Arc<dyn Registers>,
    interrupts: Arc<dyn Interrupts>,
    config: EduConfig,
    /// The DMA engine does one thing at a time. Never taken by a handler.
    engine: Mutex<()>,
}

/// Nothing can be stopped, and nothing be waited for: the IOMMU cuts it off.
impl DeviceWork for Edu {}

/// A transfer that was armed. The engine is its own until it is waited for or dropped.
#[must_use = "the engine is busy until the transfer is waited for"]
pub struct Transfer<'e> {
    edu: &'e Edu,
    _engine: MutexGuard<'e, ()>,
}

impl Edu {
    /// The device behind these registers and this interrupt.
    ///
    /// # Errors
    /// It is another device, or none.
    pub fn probe(
        registers: Arc<dyn Registers>,
        interrupts: Arc<dyn Interrupts>,
        config: EduConfig,
    ) -> Result<Arc<Self>, EduError> {
        let found = registers.read32(register::IDENTIFICATION)?;
        if found != IDENTIFICATION {
            return Err(EduError::NotEdu {
                found,
                expected: IDENTIFICATION,
            });
        }
        Ok(Arc::new(Self {
            registers,
            interrupts,
            config,
            engine: Mutex::new(()),
        }))
    }

    /// Whether the device answers.
    ///
    /// # Errors
    /// It does not, or wrongly.
    pub fn check_liveness(&self, wrote: u32) -> Result<(), EduError> {
        self.registers.write32(register::LIVENESS, wrote)?;
        let found = self.registers.read32(register::LIVENESS)?;
        if found == !wrote {
            Ok(())
        } else {
            Err(EduError::NotAlive { wrote, found })
        }
    }

    /// n!, modulo 2^32. Waits.
    ///
    /// # Errors
    /// The deadline is over, or the device is gone.
    pub fn factorial(&self, n: u32) -> Result<u32, EduError> {
        self.registers.write32(register::FACTORIAL, n)?;
        let begun = Instant::now();
        while self.registers.read32(register::STATUS)? & COMPUTING != 0 {
            if begun.elapsed() >= self.config.deadline {
                return Err(self.timeout("a factorial"));
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(self.registers.read32(register::FACTORIAL)?)
    }

    /// Has the device raise its interrupt, and waits for it.
    ///
    /// # Errors
    /// It does not come by the deadline, or the device is gone.
    pub fn check_interrupt(&self) -> Result<(), EduError> {
        let _engine = self.engine();
        // What is left of earlier ones. A storm has no end.
        let begun = Instant::now();
        while self.interrupts.wait(0, Duration::ZERO)? > 0 {
            if begun.elapsed() >= self.config.deadline {
                return Err(self.timeout("the end of its interrupts"));
            }
        }
        self.registers
            .write32(register::INTERRUPT_RAISE, INTERRUPT_SOFTWARE)?;
        let fired = self.interrupts.wait(0, self.config.deadline);
        let status = self.registers.read32(register::INTERRUPT_STATUS)?;
        self.registers
            .write32(register::INTERRUPT_ACKNOWLEDGE, status)?;
        if fired? == 0 || status & INTERRUPT_SOFTWARE == 0 {
            return Err(self.timeout("an interrupt"));
        }
        Ok(())
    }

    /// Arms a transfer between `memory`, which lies in `window`, and byte `buffer` of the device's buffer. What of the memory is
    /// not mapped is mapped. Waits for an earlier transfer, and for invalidations of the memory.
    ///
    /// # Errors
    /// [`EduError::Transfer`]; the window's; the device is gone. Nothing was armed then.
    pub fn arm(
        &self,
        window: &Window,
        memory: Range,
        buffer: u64,
        direction: Direction,
    ) -> Result<Transfer<'_>, EduError> {
        let count = u64::try_from(memory.len()).unwrap_or(u64::MAX);
        let end = buffer.checked_add(count);
        if count > MOST || end.is_none_or(|end| end > BUFFER_BYTES) {
            return Err(EduError::Transfer {
                memory,
                buffer,
                most: MOST,
            });
        }
        let engine = self.engine();
        self.wait_idle()?;
        window.with_mapped(memory, self.config.deadline, |iova| {
            let (memory, buffer) = (iova.start().get(), BUFFER + buffer);
            let (source, destination, way) = match direction {
                Direction::ToDevice => (memory, buffer, 0),
                Direction::ToMemory => (buffer, memory, DMA_TO_MEMORY),
            };
            let registers = &self.registers;
            registers.write(register::DMA_SOURCE, source)?;
            registers.write(register::DMA_DESTINATION, destination)?;
            registers.write(register::DMA_COUNT, count)?;
            registers.write(register::DMA_COMMAND, DMA_RUN | DMA_INTERRUPT | way)
        })??;
        Ok(Transfer {
            edu: self,
            _engine: engine,
        })
    }

    fn engine(&self) -> MutexGuard<'_, ()> {
        // There is nothing in it that could be half done.
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn timeout(&self, what: &'static str) -> EduError {
        EduError::Timeout {
            what,
            deadline: self.config.deadline,
        }
    }

    fn is_running(&self) -> Result<bool, EduError> {
        Ok(self.registers.read(register::DMA_COMMAND)? & DMA_RUN != 0)
    }

    /// Waits for the engine: by its interrupt, and as one that was lost must not hang anybody, by its register too.
    fn wait_idle(&self) -> Result<(), EduError> {
        let begun = Instant::now();
        while self.is_running()? {
            if begun.elapsed() >= self.config.deadline {
                return Err(self.timeout("a transfer"));
            }
            self.interrupts.wait(0, Duration::from_millis(10))?;
        }
        let status = self.registers.read32(register::INTERRUPT_STATUS)?;
        if status & INTERRUPT_DMA != 0 {
            self.registers
                .write32(register::INTERRUPT_ACKNOWLEDGE, INTERRUPT_DMA)?;
        }
        Ok(())
    }
}

impl Transfer<'_> {
    /// Whether it has not ended yet.
    ///
    /// # Errors
    /// The device is gone.
    pub fn is_running(&self) -> Result<bool, EduError> {
        self.edu.is_running()
    }

    /// Waits for its end. A transfer that the IOMMU stopped ends as any other: the device does not tell.
    ///
    /// # Errors
    /// The deadline is over, or the device is gone.
    pub fn wait(self) -> Result<(), EduError> {
        self.edu.wait_idle()
    }
}
