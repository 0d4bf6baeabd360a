//! QEMU's edu device, at register level, behind an IOMMU.
//!
//! A teaching device with one DMA engine and one interrupt. What makes it worth a model is what it lacks: it has neither a reset
//! nor a stop, reports no DMA error, and begins a transfer long after its doorbell. Whatever is cut off between the two
//! is a race on demand. Source of the registers: QEMU's `docs/specs/edu.rst`.

mod iommu;
#[cfg(test)]
mod tests;

use shootdown::{Addr, DeviceError, Interrupts, Registers};
use shootdown_primitive::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use shootdown_primitive::thread::{self, JoinHandle};
use shootdown_primitive::time::{Duration, Instant};

pub use iommu::{IommuFault, ModelIommu};

/// The size of the register window in bytes.
pub const WINDOW_BYTES: u64 = 1 << 20;
/// Where the device's own buffer begins, as its DMA engine counts.
pub const BUFFER: u64 = 0x40000;
/// How large that is in bytes.
pub const BUFFER_BYTES: u64 = 4096;
/// What the identification register holds.
pub const IDENTIFICATION: u32 = 0x0100_00ed;

/// Below are 32-bit registers only.
const WIDE: u64 = 0x80;

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

/// Bit of the status register: an interrupt when the factorial is done. Bit 0, "computing", is never seen here.
const STATUS_INTERRUPT: u32 = 0x80;
/// Bits of the DMA command.
const DMA_RUN: u64 = 1;
const DMA_TO_MEMORY: u64 = 2;
const DMA_INTERRUPT: u64 = 4;
/// Bits of the interrupt status.
const INTERRUPT_FACTORIAL: u32 = 0x1;
const INTERRUPT_DMA: u32 = 0x100;

/// How a model is built.
#[derive(Clone, Copy, Debug)]
pub struct EduConfig {
    /// From the doorbell to the transfer; 100 ms in QEMU.
    pub dma_delay: Duration,
    /// Address bits that the DMA engine forms; QEMU's default is 28. The others are dropped.
    pub dma_mask: u64,
}

impl Default for EduConfig {
    fn default() -> Self {
        Self {
            dma_delay: Duration::from_millis(100),
            dma_mask: (1 << 40) - 1,
        }
    }
}

struct State {
    liveness: u32,
    factorial: u32,
    status: u32,
    interrupt_status: u32,
    pending: u64,
    source: u64,
    destination: u64,
    count: u64,
    command: u64,
    /// When the transfer begins.
    due: Option<Instant>,
    stopping: bool,
    buffer: [u8; BUFFER_BYTES as usize],
}

struct Core {
    iommu: Arc<ModelIommu>,
    config: EduConfig,
    state: Mutex<State>,
    /// A doorbell, an interrupt, or the end.
    changed: Condvar,
}

/// One edu device.
pub struct Edu {
    core: Arc<Core>,
    thread: Option<JoinHandle<()>>,
}

impl Edu {
    /// A device behind `iommu`.
    ///
    /// # Panics
    /// If the process cannot have a thread for its DMA engine.
    pub fn new(iommu: &Arc<ModelIommu>, config: EduConfig) -> Arc<Self> {
        let core = Arc::new(Core {
            iommu: iommu.clone(),
            config,
            state: Mutex::new(State {
                liveness: 0,
                factorial: 0,
                status: 0,
                interrupt_status: 0,
                pending: 0,
                source: 0,
                destination: 0,
                count: 0,
                command: 0,
                due: None,
                stopping: false,
                buffer: [0; BUFFER_BYTES as usize],
            }),
            changed: Condvar::new(),
        });
        let engine = core.clone();
        let thread = thread::Builder::new()
            .name("edu".to_owned())
            .spawn(move || engine.run())
            .expect("a thread for the DMA engine");
        Arc::new(Self {
            core,
            thread: Some(thread),
        })
    }
}

impl Drop for Edu {
    fn drop(&mut self) {
        self.core.lock().stopping = true;
        self.core.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic of the engine has been reported by its thread.
            let _ = thread.join();
        }
    }
}

impl Core {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic is a driver's fault that QEMU would abort on; the tests that plan it look at nothing afterwards.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn raise(&self, state: &mut State, bits: u32) {
        state.interrupt_status |= bits;
        if state.interrupt_status != 0 {
            state.pending += 1;
            self.changed.notify_all();
        }
    }

    /// The DMA engine's thread.
    fn run(&self) {
        let mut state = self.lock();
        while !state.stopping {
            let now = Instant::now();
            state = match state.due {
                Some(due) if due <= now => {
                    state.due = None;
                    self.transfer(&mut state);
                    state
                }
                Some(due) => {
                    let waited = self.changed.wait_timeout(state, due - now);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => {
                    let waited = self.changed.wait(state);
                    waited.unwrap_or_else(PoisonError::into_inner)
                }
            };
        }
    }

    /// Part `count` bytes from `at` in the buffer.
    fn part(at: u64, count: u64) -> std::ops::Range<usize> {
        let into = at.checked_sub(BUFFER);
        let end = into.and_then(|into| into.checked_add(count));
        match (into, end) {
            (Some(into), Some(end)) if end <= BUFFER_BYTES => into as usize..end as usize,
            _ => panic!("edu: DMA of {count:#x} bytes at {at:#x} leaves the buffer; QEMU aborts"),
        }
    }

    fn transfer(&self, state: &mut State) {
        let mask = self.config.dma_mask;
        if state.command & DMA_TO_MEMORY != 0 {
            let part = Self::part(state.source, state.count);
            let to = Addr::new(state.destination & mask);
            self.iommu.write(to, &state.buffer[part]);
        } else {
            let part = Self::part(state.destination, state.count);
            let from = Addr::new(state.source & mask);
            self.iommu.read(from, &mut state.buffer[part]);
        }
        state.command &= !DMA_RUN;
        if state.command & DMA_INTERRUPT != 0 {
            self.raise(state, INTERRUPT_DMA);
        }
    }

    fn read(&self, offset: u64) -> u64 {
        let state = self.lock();
        match offset {
            register::IDENTIFICATION => IDENTIFICATION.into(),
            register::LIVENESS => state.liveness.into(),
            register::FACTORIAL => state.factorial.into(),
            register::STATUS => state.status.into(),
            register::INTERRUPT_STATUS => state.interrupt_status.into(),
            register::DMA_SOURCE => state.source,
            register::DMA_DESTINATION => state.destination,
            register::DMA_COUNT => state.count,
            register::DMA_COMMAND => state.command,
            _ => u64::MAX,
        }
    }

    fn write(&self, offset: u64, value: u64) {
        let mut state = self.lock();
        let low = value as u32;
        match offset {
            register::LIVENESS => state.liveness = !low,
            register::FACTORIAL => {
                // From 34! on nothing of the product is left in 32 bits.
                state.factorial = (1..=low.min(34)).fold(1, u32::wrapping_mul);
                if state.status & STATUS_INTERRUPT != 0 {
                    self.raise(&mut state, INTERRUPT_FACTORIAL);
                }
            }
            register::STATUS => state.status = low & STATUS_INTERRUPT,
            register::INTERRUPT_RAISE => self.raise(&mut state, low),
            register::INTERRUPT_ACKNOWLEDGE => state.interrupt_status &= !low,
            // The engine takes nothing while it runs.
            _ if state.command & DMA_RUN != 0 => {}
            register::DMA_SOURCE => state.source = value,
            register::DMA_DESTINATION => state.destination = value,
            register::DMA_COUNT => state.count = value,
            register::DMA_COMMAND => {
                state.command = value;
                if value & DMA_RUN != 0 {
                    state.due = Some(Instant::now() + self.config.dma_delay);
                    self.changed.notify_all();
                }
            }
            _ => {}
        }
    }
}

/// Refuses what the device does not answer to.
fn check(offset: u64, width: u8) -> Result<(), DeviceError> {
    let inside = offset
        .checked_add(width.into())
        .is_some_and(|end| end <= WINDOW_BYTES);
    if inside && offset.is_multiple_of(width.into()) && (width == 4 || offset >= WIDE) {
        Ok(())
    } else {
        Err(DeviceError::NoRegister { offset, width })
    }
}

impl Registers for Edu {
    fn len(&self) -> u64 {
        WINDOW_BYTES
    }

    fn read(&self, offset: u64) -> Result<u64, DeviceError> {
        check(offset, 8)?;
        Ok(self.core.read(offset))
    }

    fn write(&self, offset: u64, value: u64) -> Result<(), DeviceError> {
        check(offset, 8)?;
        self.core.write(offset, value);
        Ok(())
    }

    fn read32(&self, offset: u64) -> Result<u32, DeviceError> {
        check(offset, 4)?;
        Ok(self.core.read(offset) as u32)
    }

    fn write32(&self, offset: u64, value: u32) -> Result<(), DeviceError> {
        check(offset, 4)?;
        self.core.write(offset, value.into());
        Ok(())
    }
}

impl Interrupts for Edu {
    fn vectors(&self) -> u32 {
        1
    }

    fn wait(&self, vector: u32, timeout: Duration) -> Result<u64, DeviceError> {
        if vector != 0 {
            return Err(DeviceError::NoVector { vector, vectors: 1 });
        }
        let state = self.core.lock();
        let quiet = |state: &mut State| state.pending == 0;
        let (mut state, _) = (self.core.changed)
            .wait_timeout_while(state, timeout, quiet)
            .unwrap_or_else(PoisonError::into_inner);
        Ok(std::mem::take(&mut state.pending))
    }
}
