//! The driver: the device, its service thread, and the spaces that use it.

use shootdown_primitive::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use shootdown_primitive::sync::{Arc, Mutex, Weak};
use shootdown_primitive::thread::{self, JoinHandle};
use shootdown_primitive::time::Duration;

use shootdown::{AddressSpace, Device, DeviceError, DeviceTlb, Interrupts, Registers};

use crate::device::{Attached, Core, lock};
use crate::error::PtaError;
use crate::fault;
use crate::flush::Tlb;
use crate::layout::{IDENTIFICATION, PASID_LIMIT, TABLES, WHO};
use crate::queue::{Queue, Work};
use crate::space::Space;
use crate::stats::PtaStats;

/// Deadlines and choices.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// For the device to stop a queue, to come back from its first reset, and to acknowledge a flush outside of the shootdown path.
    pub deadline: Duration,
    /// For invalidations to end that keep a page request waiting; then its command ends with a page fault, as one of nothing. Less
    /// than what the device gives it.
    pub fault_deadline: Duration,
    /// Page requests that are resolved together at most, where they lie side by side; 0 or 1: each by itself. What is declared here is
    /// all that one round takes from the device's ring.
    pub fault_batch: usize,
    /// The window, in pages of 4 KiB, whose other pages are installed along with one that was asked for, as far as they are mapped:
    /// rounded up to a power of two, at most 512, and aligned to its size. 0 or 1: only what was asked for. None is made writable for a
    /// read, and none that the device has already is touched.
    pub fault_around: u64,
}

impl Default for Config {
    /// The window of Linux's own fault-around, 64 KiB.
    fn default() -> Self {
        Self {
            deadline: Duration::from_millis(500),
            fault_deadline: Duration::from_secs(1),
            fault_batch: 64,
            fault_around: 16,
        }
    }
}

/// The driver. Queues keep it; when the last reference is gone its thread ends.
pub struct Pta {
    attached: Attached,
    /// Those that have a registration, held by that registration.
    spaces: Mutex<Vec<Weak<Space>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Pta {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pta")
            .field("device", &self.attached.device)
            .finish_non_exhaustive()
    }
}

impl Pta {
    /// Attaches to a device called `name` in reports. It is reset first: whoever had it before left nothing. Waits for that.
    ///
    /// # Errors
    /// [`PtaError::NotPta`], [`PtaError::Reset`], [`PtaError::Device`].
    pub fn probe(
        name: &str,
        registers: Arc<dyn Registers>,
        interrupts: Arc<dyn Interrupts>,
        config: Config,
    ) -> Result<Arc<Self>, PtaError> {
        // Keys of drivers in this process. Relaxed: only that they differ matters.
        static KEY: AtomicU64 = AtomicU64::new(0x7074_6100_0000_0000);
        let (found, expected) = (registers.read(IDENTIFICATION)?, WHO);
        if found != expected {
            return Err(PtaError::NotPta { found, expected });
        }
        let (pasids, tables) = (registers.read(PASID_LIMIT)?, registers.read(TABLES)?);
        let core = Arc::new(Core::new(registers, config, pasids, tables));
        Tlb(Arc::clone(&core)).reset(config.deadline)?;
        let stop = Arc::new(AtomicBool::new(false));
        let (served, stopped) = (Arc::clone(&core), Arc::clone(&stop));
        let thread = thread::Builder::new()
            .name(format!("{name}-faults"))
            .spawn(move || fault::serve(&served, &*interrupts, &stopped))
            .map_err(|error| DeviceError::System {
                call: "clone",
                errno: error.raw_os_error().unwrap_or(0),
            })?;
        Ok(Arc::new(Self {
            attached: Attached {
                device: Device::new(name, Tlb(Arc::clone(&core))),
                core,
                // Relaxed: as above.
                key: KEY.fetch_add(1, Ordering::Relaxed),
            },
            spaces: Mutex::new(Vec::new()),
            stop,
            thread: Some(thread),
        }))
    }

    /// The device, as the framework knows it.
    pub fn device(&self) -> &Device {
        &self.attached.device
    }

    /// Opens a work queue for `space`, its portal mapped anywhere in it. Queues of one space share its PASID, its page table and its
    /// registration. Waits for the hardware, then for the map lock.
    ///
    /// # Errors
    /// [`PtaError::NoPasid`], [`PtaError::NoQueue`], [`PtaError::NoTables`]; the space exits or has no room; the hardware.
    pub fn queue(self: &Arc<Self>, space: &AddressSpace) -> Result<Queue, PtaError> {
        let attached = &self.attached;
        let (own, share) = {
            let mut spaces = lock(&self.spaces);
            spaces.retain(|one| one.strong_count() > 0);
            let mut known = spaces.iter().filter_map(Weak::upgrade);
            let known = known.find(|one| one.id == space.id());
            let is_new = known.is_none();
            let (own, share) = Space::join(attached, space, known)?;
            if is_new {
                spaces.push(Arc::downgrade(&own));
            }
            (own, share)
        };
        let work = Work::load(attached, own, share)?;
        Queue::map(space, work, Arc::clone(self))
    }

    /// What has been counted.
    pub fn stats(&self) -> PtaStats {
        self.attached.core.counters.read()
    }
}

impl Drop for Pta {
    fn drop(&mut self) {
        // Release, with the acquire of the thread.
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been printed by it.
            drop(thread.join());
        }
    }
}
