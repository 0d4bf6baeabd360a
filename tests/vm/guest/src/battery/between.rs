//! What can stand between windows and a container.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};

use shootdown::{DeviceError, DmaWindow, Range, Rights};
use shootdown_vfio::{Container, Reuse};

use super::rig::{Rig, unmapping};
use crate::check::Failure;

/// Counts the calls that reach the container, and may lie.
pub(crate) struct Between {
    container: Arc<Container>,
    maps: AtomicU64,
    unmaps: AtomicU64,
    lies: AtomicBool,
}

impl Between {
    pub(crate) fn new(container: Arc<Container>) -> Arc<Self> {
        Arc::new(Self {
            container,
            maps: AtomicU64::new(0),
            unmaps: AtomicU64::new(0),
            lies: AtomicBool::new(false),
        })
    }

    /// A rig, and what stands between its windows and the kernel.
    pub(crate) fn rig() -> Result<(Rig, Arc<Self>), Failure> {
        let mut between = None;
        let rig = Rig::with(Reuse::Late, |container| {
            between.insert(Self::new(container)).clone()
        })?;
        Ok((rig, between.expect("the rig has asked for it")))
    }

    /// From here on it says that it unmaps, and does not; or no more.
    pub(crate) fn lie(&self, lies: bool) {
        self.lies.store(lies, SeqCst);
    }

    /// How many maps and unmaps there were since it was last asked.
    pub(crate) fn calls(&self) -> (u64, u64) {
        (self.maps.swap(0, SeqCst), self.unmaps.swap(0, SeqCst))
    }
}

impl DmaWindow for Between {
    fn iova_ranges(&self) -> Vec<Range> {
        self.container.iova_ranges()
    }

    fn map(&self, iova: Range, memory: Range, rights: Rights) -> Result<(), DeviceError> {
        self.maps.fetch_add(1, SeqCst);
        self.container.map(iova, memory, rights)
    }

    fn unmap(&self, iova: Range) -> Result<(), DeviceError> {
        self.unmaps.fetch_add(1, SeqCst);
        if self.lies.load(SeqCst) {
            return Ok(());
        }
        self.container.unmap(iova)
    }
}

/// Tells the witness of each unmap, for drivers that do not know of it.
pub(crate) struct Telling<E> {
    inner: Arc<E>,
    mapped: Mutex<Vec<Range>>,
    unmapped: Mutex<Vec<Range>>,
}

impl<E: DmaWindow> Telling<E> {
    pub(crate) fn new(inner: Arc<E>) -> Arc<Self> {
        Arc::new(Self {
            inner,
            mapped: Mutex::default(),
            unmapped: Mutex::default(),
        })
    }

    /// Each range that was unmapped since it was last asked, once.
    pub(crate) fn take_unmapped(&self) -> Vec<Range> {
        let mut ranges = std::mem::take(&mut *lock(&self.unmapped));
        ranges.sort_by_key(|range| range.start());
        ranges.dedup();
        ranges
    }
}

fn lock(ranges: &Mutex<Vec<Range>>) -> std::sync::MutexGuard<'_, Vec<Range>> {
    ranges.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<E: DmaWindow> DmaWindow for Telling<E> {
    fn iova_ranges(&self) -> Vec<Range> {
        self.inner.iova_ranges()
    }

    fn page(&self) -> u64 {
        self.inner.page()
    }

    fn map(&self, iova: Range, memory: Range, rights: Rights) -> Result<(), DeviceError> {
        self.inner.map(iova, memory, rights)?;
        lock(&self.mapped).push(iova);
        Ok(())
    }

    fn unmap(&self, iova: Range) -> Result<(), DeviceError> {
        let mut mapped = lock(&self.mapped);
        let going: Vec<Range> = mapped.extract_if(.., |one| iova.contains(*one)).collect();
        let done = unmapping(&going, || self.inner.unmap(iova));
        lock(&self.unmapped).extend(going);
        done
    }
}
