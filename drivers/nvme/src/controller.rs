//! The controller: how it is brought up, its queues, and what a shootdown does to them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use shootdown::{AddressSpace, DeviceError, Interrupts, Range, Registers, Target, WouldBlock};
use shootdown_vfio::{DeviceWork, InFlight, Iommu, Window, WindowError, WindowOptions};

use crate::error::{NvmeError, Status};
use crate::identify::{Controller, Namespace};
use crate::memory::Pages;
use crate::queue::{ENTRIES, Ended, Entry, Queue, SLOTS};
use crate::registers::{
    ACQ, AQA, ASQ, CAP, CC, CC_ENABLE, CC_ON, CSTS, CSTS_FATAL, CSTS_READY, Capabilities,
};

pub(crate) const PAGE: u64 = 4096;

/// The driver's pages, in this order: two queue pairs, identify data, and a PRP list a command.
pub(crate) mod page {
    pub(crate) const ADMIN_SUBMISSION: usize = 0;
    pub(crate) const ADMIN_COMPLETION: usize = 1;
    pub(crate) const IO_SUBMISSION: usize = 2;
    pub(crate) const IO_COMPLETION: usize = 3;
    pub(crate) const IDENTIFY: usize = 4;
    pub(crate) const LISTS: usize = 5;
}
const PAGES: u64 = page::LISTS as u64 + SLOTS as u64;

/// Opcodes of the admin queue. Source: NVMe 1.4, figure 139.
pub(crate) mod admin {
    pub(crate) const CREATE_SUBMISSION: u8 = 0x01;
    pub(crate) const CREATE_COMPLETION: u8 = 0x05;
    pub(crate) const IDENTIFY: u8 = 0x06;
    pub(crate) const ABORT: u8 = 0x08;
}

/// Deadlines.
#[derive(Clone, Copy, Debug)]
pub struct NvmeConfig {
    /// For a command to end.
    pub deadline: Duration,
    /// The namespace.
    pub namespace: u32,
}

impl Default for NvmeConfig {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(10),
            namespace: 1,
        }
    }
}

/// What the driver needs of the controller's surroundings.
#[derive(Clone)]
pub struct NvmePorts {
    /// BAR 0.
    pub registers: Arc<dyn Registers>,
    /// At least one interrupt vector.
    pub interrupts: Arc<dyn Interrupts>,
    /// The IOMMU that the controller is behind.
    pub iommu: Arc<Iommu>,
    /// Where memory for the queues is mapped.
    pub space: AddressSpace,
    /// What is reset when work does not drain: [`shootdown_vfio::FunctionReset`].
    pub targets: Vec<Target>,
}

pub(crate) struct Queues {
    admin: Queue,
    io: Queue,
    /// The controller was reset and not restarted.
    lost: bool,
}

/// A queue of the two.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Which {
    Admin,
    Io,
}

impl Queues {
    fn of(&mut self, which: Which) -> &mut Queue {
        match which {
            Which::Admin => &mut self.admin,
            Which::Io => &mut self.io,
        }
    }
}

/// An NVMe controller with one I/O queue. Dropping it switches it off.
pub struct Nvme {
    ports: NvmePorts,
    pub(crate) config: NvmeConfig,
    capabilities: Capabilities,
    queues: Mutex<Queues>,
    /// By whoever waited for a command.
    interrupts_taken: AtomicU64,
    controller: Controller,
    namespace: Namespace,
    // In this order: the window goes before its pages.
    window: Window,
    pub(crate) pages: Pages,
}

impl std::fmt::Debug for Nvme {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nvme")
            .field("controller", &self.controller)
            .field("namespace", &self.namespace)
            .finish_non_exhaustive()
    }
}

impl Nvme {
    /// Brings up the controller behind these ports. Whatever it did before is lost. It must be allowed to master the bus. Waits,
    /// as long as the controller says that it may take.
    ///
    /// # Errors
    /// It cannot do what is needed, does not come up, or is gone.
    pub fn probe(ports: NvmePorts, config: NvmeConfig) -> Result<Arc<Self>, NvmeError> {
        let capabilities = Capabilities(ports.registers.read(CAP)?);
        let unfit = |what, found, needed| NvmeError::Unfit {
            what,
            found,
            needed,
        };
        if capabilities.page_shift() != 12 {
            let found = 1 << capabilities.page_shift();
            return Err(unfit("pages of at least", found, "4096 bytes"));
        }
        if capabilities.entries() < ENTRIES {
            let found = capabilities.entries().into();
            return Err(unfit("queue entries:", found, "16"));
        }
        let pages = Pages::new(&ports.space, PAGES * PAGE)?;
        let options = WindowOptions {
            granule: PAGE,
            targets: ports.targets.clone(),
            ..WindowOptions::default()
        };
        // The queues' memory is the driver's own: nobody unmaps it but after the controller is off.
        let window = Window::open(
            &ports.iommu,
            &ports.space,
            pages.range(),
            Arc::new(()),
            options,
        )?;
        let at = |page| page * PAGE as usize;
        let mut this = Self {
            queues: Mutex::new(Queues {
                admin: Queue::new(0, at(page::ADMIN_SUBMISSION), at(page::ADMIN_COMPLETION)),
                io: Queue::new(1, at(page::IO_SUBMISSION), at(page::IO_COMPLETION)),
                lost: true,
            }),
            interrupts_taken: AtomicU64::new(0),
            controller: Controller::default(),
            namespace: Namespace::default(),
            capabilities,
            ports,
            config,
            window,
            pages,
        };
        this.restart()?;
        this.controller = this.identify_controller()?;
        this.namespace = this.identify_namespace()?;
        Ok(Arc::new(this))
    }

    /// What the controller says of itself.
    pub fn controller(&self) -> &Controller {
        &self.controller
    }

    /// What it says of the namespace.
    pub fn namespace(&self) -> Namespace {
        self.namespace
    }

    /// Whether the end of a command raises an interrupt. Waits for one command, and for its interrupt.
    ///
    /// # Errors
    /// The command failed, or the device is gone.
    pub fn check_interrupt(&self) -> Result<bool, NvmeError> {
        let interrupts = &*self.ports.interrupts;
        // What is left of earlier ones. A storm has no end.
        let begun = Instant::now();
        while interrupts.wait(0, Duration::ZERO)? > 0 {
            if begun.elapsed() >= self.config.deadline {
                return Err(NvmeError::Timeout {
                    what: "the end of its interrupts",
                    deadline: self.config.deadline,
                });
            }
        }
        let before = self.interrupts_taken.load(Ordering::Relaxed);
        self.identify(0, 1)?;
        let taken = self.interrupts_taken.load(Ordering::Relaxed) > before;
        Ok(taken || interrupts.wait(0, self.config.deadline)? > 0)
    }

    /// A window of this controller on `memory`.
    ///
    /// # Errors
    /// As [`Window::open`].
    pub fn window(
        self: &Arc<Self>,
        memory: Range,
        options: WindowOptions,
    ) -> Result<Window, WindowError> {
        let options = WindowOptions {
            targets: self.ports.targets.clone(),
            ..options
        };
        let NvmePorts { iommu, space, .. } = &self.ports;
        Window::open(iommu, space, memory, self.clone(), options)
    }

    /// Switches the controller off and on again, with empty queues: after a reset, or a fatal error. What was in flight ends with
    /// [`NvmeError::Reset`].
    ///
    /// # Errors
    /// It does not come up, or is gone.
    pub fn restart(&self) -> Result<(), NvmeError> {
        let registers = &*self.ports.registers;
        self.disable()?;
        {
            let mut queues = self.queues();
            queues.admin.restart(&self.pages);
            queues.io.restart(&self.pages);
            queues.lost = false;
        }
        registers.write32(AQA, (ENTRIES - 1) << 16 | (ENTRIES - 1))?;
        registers.write(ASQ, self.iova(page::ADMIN_SUBMISSION))?;
        registers.write(ACQ, self.iova(page::ADMIN_COMPLETION))?;
        registers.write32(CC, CC_ON)?;
        self.await_ready(CSTS_READY, "the start of the controller")?;
        let queue = |entry| self.admin("the creation of a queue", entry).map(drop);
        queue(Entry {
            opcode: admin::CREATE_COMPLETION,
            data: [self.iova(page::IO_COMPLETION), 0],
            // Contiguous, with interrupts, on vector 0.
            words: [(ENTRIES - 1) << 16 | 1, 3, 0],
            ..Entry::default()
        })?;
        queue(Entry {
            opcode: admin::CREATE_SUBMISSION,
            data: [self.iova(page::IO_SUBMISSION), 0],
            // Contiguous, completed in queue 1.
            words: [(ENTRIES - 1) << 16 | 1, 1 << 16 | 1, 0],
            ..Entry::default()
        })
    }

    fn disable(&self) -> Result<(), NvmeError> {
        let registers = &*self.ports.registers;
        let configuration = registers.read32(CC)?;
        registers.write32(CC, configuration & !CC_ENABLE)?;
        self.await_ready(0, "the stop of the controller")
    }

    fn await_ready(&self, wanted: u32, what: &'static str) -> Result<(), NvmeError> {
        let deadline = Duration::from_millis(self.capabilities.timeout_ms().max(500));
        let begun = Instant::now();
        loop {
            let status = self.ports.registers.read32(CSTS)?;
            if status == u32::MAX {
                return Err(DeviceError::Gone {
                    reason: "its registers read as ones",
                }
                .into());
            }
            if status & CSTS_FATAL != 0 && wanted != 0 {
                return Err(NvmeError::Fatal);
            }
            if status & CSTS_READY == wanted {
                return Ok(());
            }
            if begun.elapsed() >= deadline {
                return Err(NvmeError::Timeout { what, deadline });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Where the controller sees one of the driver's pages.
    pub(crate) fn iova(&self, page: usize) -> u64 {
        self.window.iova().start().get() + page as u64 * PAGE
    }

    fn queues(&self) -> MutexGuard<'_, Queues> {
        // Each command is one assignment; what a panic in between leaves is a command that is lost.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One admin command, to its end.
    pub(crate) fn admin(&self, command: &'static str, entry: Entry) -> Result<u32, NvmeError> {
        let slot = self.queue(Which::Admin, None, |_| entry)?;
        self.wait(Which::Admin, slot, command)
    }

    /// Queues a command, made for its place.
    pub(crate) fn queue(
        &self,
        which: Which,
        reaches: Option<Range>,
        entry: impl FnOnce(usize) -> Entry,
    ) -> Result<usize, NvmeError> {
        let mut queues = self.queues();
        if queues.lost {
            return Err(NvmeError::Reset);
        }
        let queue = queues.of(which);
        let slot = queue.free().ok_or(NvmeError::Busy { limit: SLOTS })?;
        let registers = &*self.ports.registers;
        queue.submit(
            slot,
            entry(slot),
            reaches,
            &self.pages,
            registers,
            self.capabilities,
        )?;
        Ok(slot)
    }

    /// Takes what has completed; learns of a reset by whoever it was.
    fn reap(&self, queues: &mut Queues) -> Result<(), DeviceError> {
        let registers = &*self.ports.registers;
        for which in [Which::Admin, Which::Io] {
            let queue = queues.of(which);
            queue.reap(&self.pages, registers, self.capabilities)?;
        }
        if registers.read32(CC)? & CC_ENABLE == 0 && !queues.lost {
            queues.lost = true;
            queues.admin.lose();
            queues.io.lose();
        }
        Ok(())
    }

    /// Waits for a command: by the interrupt, and as one can be lost, or be taken by another who waits, by looking too.
    pub(crate) fn wait(
        &self,
        which: Which,
        slot: usize,
        command: &'static str,
    ) -> Result<u32, NvmeError> {
        let begun = Instant::now();
        loop {
            {
                let mut queues = self.queues();
                self.reap(&mut queues)?;
                match queues.of(which).take(slot) {
                    Some(Ended::Done {
                        status: Status::SUCCESS,
                        result,
                    }) => return Ok(result),
                    Some(Ended::Done { status, .. }) => {
                        return Err(NvmeError::Command { command, status });
                    }
                    Some(Ended::Lost) => return Err(NvmeError::Reset),
                    None => {}
                }
                if begun.elapsed() >= self.config.deadline {
                    queues.of(which).leave(slot);
                    return Err(NvmeError::Timeout {
                        what: command,
                        deadline: self.config.deadline,
                    });
                }
            }
            if self.ports.registers.read32(CSTS)? & CSTS_FATAL != 0 {
                self.queues().of(which).leave(slot);
                return Err(NvmeError::Fatal);
            }
            let fired = self.ports.interrupts.wait(0, Duration::from_millis(5))?;
            self.interrupts_taken.fetch_add(fired, Ordering::Relaxed);
        }
    }

    /// Nobody will wait for this command.
    pub(crate) fn leave(&self, which: Which, slot: usize) {
        self.queues().of(which).leave(slot);
    }

    /// Asks for the end of a command; nobody waits for the answer. Allocates nothing.
    fn ask_abort(&self, queues: &mut Queues, slot: usize) -> Result<(), DeviceError> {
        // With as many aborts under way as there are places, those have to do.
        let Some(place) = queues.admin.free() else {
            return Ok(());
        };
        let entry = Entry {
            opcode: admin::ABORT,
            words: [u32::from(queues.io.number()) | (slot as u32) << 16, 0, 0],
            ..Entry::default()
        };
        let registers = &*self.ports.registers;
        let capabilities = self.capabilities;
        queues
            .admin
            .submit(place, entry, None, &self.pages, registers, capabilities)?;
        queues.admin.leave(place);
        Ok(())
    }

    /// Asks the controller to abort an I/O command. It may comply, or not.
    pub(crate) fn abort(&self, slot: usize) -> Result<(), NvmeError> {
        Ok(self.ask_abort(&mut self.queues(), slot)?)
    }

    /// PRP entries for `iova`, with the rest of them in the list of a command's place.
    pub(crate) fn describe(&self, slot: usize, iova: Range) -> [u64; 2] {
        let first = iova.start().get();
        let second = (first & !(PAGE - 1)) + PAGE;
        let after = iova.last().get();
        if second > after {
            return [first, 0];
        }
        if second + PAGE > after {
            return [first, second];
        }
        let list = page::LISTS + slot;
        let pages = (second..=after).step_by(PAGE as usize);
        for (nth, page) in pages.enumerate() {
            self.pages.write64(list * PAGE as usize + 8 * nth, page);
        }
        [first, self.iova(list)]
    }
}

impl DeviceWork for Nvme {
    fn stop(&self, iova: Range, may_block: bool) -> Result<InFlight, WouldBlock> {
        let mut queues = match self.queues.try_lock() {
            Ok(queues) => queues,
            Err(_) if may_block => self.queues(),
            Err(_) => return Err(WouldBlock),
        };
        // A controller that is gone completes nothing: the deadline leads to its reset.
        let _ = self.reap(&mut queues);
        let mut any = false;
        for slot in 0..SLOTS {
            if queues.io.reaches(slot, iova) {
                any = true;
                let _ = self.ask_abort(&mut queues, slot);
            }
        }
        Ok(if any {
            InFlight::Work
        } else {
            InFlight::Nothing
        })
    }

    fn drained(&self, iova: Range) -> bool {
        let Ok(mut queues) = self.queues.try_lock() else {
            return false;
        };
        self.reap(&mut queues).is_ok() && !queues.io.any_reaches(iova)
    }
}

impl Drop for Nvme {
    fn drop(&mut self) {
        // Failing that the window's end cuts it off.
        let _ = self.disable();
    }
}
