//! edu through the transport crate, its memory in windows over a managed address space.

use std::sync::Arc;
use std::time::Duration;

use shootdown::{AddressSpace, Deadlines, DmaWindow, Map, Memory, ProcessMemory, Range};
use shootdown_vfio::{Container, Device, DeviceWork, Iommu, Reuse, Window, WindowOptions};
use shootdown_vm::protocol::{Iova, Line, Requester};

use crate::check::{Failure, Outcome, demand};
use crate::edu::{CHUNK, Edu};
use crate::memory::{PAGE, View};
use crate::pci::{EDU, Function};
use crate::port::say;

pub(crate) const SECOND: Duration = Duration::from_secs(1);
pub(crate) const SIZE: u64 = PAGE as u64;
/// What memory is full of before a DMA, and what the DMA writes.
pub(crate) const BEFORE: u8 = 0x5a;
pub(crate) const DMA: u8 = 0xa5;
/// edu can form 40 bits of address here.
const REACH: u64 = (1 << 40) - 1;

/// A device, an IOMMU, an address space.
pub(crate) struct Rig {
    // Dropped first: closed while there is a container.
    scratch: Window,
    pub(crate) edu: Arc<Edu>,
    pub(crate) device: Arc<Device>,
    pub(crate) container: Arc<Container>,
    pub(crate) iommu: Arc<Iommu>,
    pub(crate) space: AddressSpace,
    pub(crate) function: Function,
}

impl Rig {
    pub(crate) fn new() -> Result<Self, Failure> {
        Self::with(Reuse::Late, |container| container)
    }

    /// With whatever `endpoint` makes of the container between windows and kernel.
    pub(crate) fn with<E: DmaWindow + 'static>(
        reuse: Reuse,
        endpoint: impl FnOnce(Arc<Container>) -> Arc<E>,
    ) -> Result<Self, Failure> {
        Self::over(Arc::new(ProcessMemory::reserve(1 << 30)?), reuse, endpoint)
    }

    /// With memory of any kind behind the space.
    pub(crate) fn over<E: DmaWindow + 'static>(
        memory: Arc<dyn Memory>,
        reuse: Reuse,
        endpoint: impl FnOnce(Arc<Container>) -> Arc<E>,
    ) -> Result<Self, Failure> {
        let function = Function::find(EDU)?;
        let device = shootdown_vfio::open(&function.address)?;
        device.set_bus_master(true)?;
        let edu = Arc::new(Edu::new(device.region(0)?)?);
        let container = device.container().expect("it was opened with one").clone();
        let iommu = Iommu::new(vec![endpoint(container.clone())], reuse)?;
        let space = AddressSpace::managed(memory, Deadlines::default());
        let page = space.map(Map::anonymous(SIZE))?;
        let scratch = Window::open(&iommu, &space, page, Arc::new(()), options(SIZE))?;
        Ok(Self {
            scratch,
            edu,
            device: Arc::new(device),
            container,
            iommu,
            space,
            function,
        })
    }

    /// So many pages, full of [`BEFORE`].
    pub(crate) fn pages(&self, count: u64) -> Result<Range, Failure> {
        let memory = self.space.map(Map::anonymous(count * SIZE))?;
        self.view(memory).fill(BEFORE);
        Ok(memory)
    }

    /// Access to memory of the space.
    pub(crate) fn view(&self, memory: Range) -> View {
        // SAFETY: the checks look only at what they mapped, with rights that they know, and make no references.
        unsafe { View::of(memory) }
    }

    /// A window whose device can neither be stopped nor asked.
    pub(crate) fn window(&self, memory: Range, granule: u64) -> Result<Window, Failure> {
        self.window_of(memory, granule, Arc::new(()))
    }

    pub(crate) fn window_of(
        &self,
        memory: Range,
        granule: u64,
        work: Arc<dyn DeviceWork>,
    ) -> Result<Window, Failure> {
        Ok(Window::open(
            &self.iommu,
            &self.space,
            memory,
            work,
            options(granule),
        )?)
    }

    /// Fills the device's buffer with one byte.
    pub(crate) fn load(&self, byte: u8) -> Outcome {
        if self.edu.holds(byte) {
            return Ok(());
        }
        let page = self.scratch.memory();
        self.view(page).fill(byte);
        let armed = self.scratch.with_mapped(page, SECOND, |iova| {
            self.edu.arm_read(iova.start().get(), CHUNK)
        });
        armed??;
        self.edu.finish()?;
        self.edu.loaded(byte);
        Ok(())
    }

    /// Arms a DMA of the device's buffer to a part of a window, as a driver does it.
    pub(crate) fn arm(&self, window: &Window, part: Range) -> Result<Range, Failure> {
        let armed = window.with_mapped(part, SECOND, |iova| {
            self.edu.arm_write(iova.start().get(), CHUNK).map(|()| iova)
        });
        Ok(armed??)
    }

    /// A whole DMA to a part of a window; it is demanded to land.
    pub(crate) fn lands(&self, window: &Window, part: Range) -> Outcome {
        self.view(part).fill(BEFORE);
        self.load(DMA)?;
        self.arm(window, part)?;
        self.edu.finish()?;
        let differs = self.view(part).differs(0, CHUNK, DMA);
        demand!(
            differs.is_none(),
            "a DMA to {part} did not land: {differs:x?}"
        );
        Ok(())
    }

    /// After `at` was unmapped: whether a DMA to it is still to come, and so must fault.
    pub(crate) fn in_flight(&self, at: Range) -> Result<bool, Failure> {
        in_flight(&self.edu, self.function.requester(), iova(at))
    }
}

pub(crate) fn options(granule: u64) -> WindowOptions {
    WindowOptions {
        granule,
        last: REACH.into(),
        ..WindowOptions::default()
    }
}

/// The `nth` page of a range.
pub(crate) fn page(range: Range, nth: u64) -> Range {
    Range::new(range.start().get() + nth * SIZE, SIZE).expect("inside of the range")
}

/// As the witness knows it.
pub(crate) fn iova(range: Range) -> Iova {
    Iova {
        start: range.start().get(),
        len: range.len() as u64,
    }
}

/// Does what unmaps `ranges`, between the marks.
pub(crate) fn unmapping<T>(ranges: &[Range], act: impl FnOnce() -> T) -> T {
    ranges
        .iter()
        .for_each(|range| say(&Line::Unmap(iova(*range))));
    let done = act();
    ranges
        .iter()
        .for_each(|range| say(&Line::Unmapped(iova(*range))));
    done
}

/// After `at` was unmapped: whether a DMA to it is still to come, and so must fault. If it was quicker it landed, or faulted.
pub(crate) fn in_flight(edu: &Edu, requester: Requester, at: Iova) -> Result<bool, Failure> {
    let busy = edu.busy()?;
    let announce = if busy { Line::Faults } else { Line::MayFault };
    say(&announce(requester, at));
    Ok(busy)
}

/// A race against a DMA that was armed 100 ms ahead. On a machine that stops for as long the device wins: `None`, and the race
/// is run again.
pub(crate) fn race<T>(mut run: impl FnMut() -> Result<Option<T>, Failure>) -> Result<T, Failure> {
    const TRIES: usize = 5;
    for _ in 0..TRIES {
        if let Some(won) = run()? {
            return Ok(won);
        }
    }
    Err(Failure::Error(format!(
        "of {TRIES} races the device won each: this machine is too busy to prove anything"
    )))
}
