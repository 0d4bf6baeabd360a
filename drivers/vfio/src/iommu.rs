//! An IOMMU as windows see it: one or more endpoints, all of which translate the same IOVAs to the same memory.
//!
//! An endpoint is a container of VFIO, a model, or whatever else implements [`DmaWindow`]; each keeps its own account of what is
//! mapped in it, which follows what was done and not what was asked for. Here they are all visited: a range is
//! mapped in all of them or in none, and is gone when it is gone from all.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use shootdown::{Addr, DeviceError, DmaWindow, Range, Rights};
use thiserror::Error;

use crate::faults::{DmaFault, FaultSource};
use crate::history::{Attribution, Entry, History};
use crate::iova::{Iovas, Reuse};

/// Why no IOMMU could be made of these endpoints.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[non_exhaustive]
pub enum IommuError {
    /// There is none.
    #[error("an IOMMU has at least one endpoint: nothing would be mapped")]
    NoEndpoint,
    /// They have no IOVA in common.
    #[error("the {endpoints} endpoints translate no IOVA in common: use an IOMMU for each")]
    NothingInCommon {
        /// How many there are.
        endpoints: usize,
    },
}

/// One or more endpoints that translate alike.
pub struct Iommu {
    endpoints: Vec<Arc<dyn DmaWindow>>,
    ranges: Vec<Range>,
    page: u64,
    iovas: Mutex<Iovas>,
    history: Mutex<History>,
    windows: AtomicU64,
    faults: OnceLock<Arc<dyn FaultSource>>,
}

impl fmt::Debug for Iommu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Iommu")
            .field("endpoints", &self.endpoints.len())
            .field("ranges", &self.ranges)
            .field("page", &self.page)
            .finish_non_exhaustive()
    }
}

impl Iommu {
    /// An IOMMU of `endpoints`, in which nothing is mapped.
    ///
    /// # Errors
    /// There is none, or they have no IOVA in common.
    pub fn new(endpoints: Vec<Arc<dyn DmaWindow>>, reuse: Reuse) -> Result<Arc<Self>, IommuError> {
        let mut each = endpoints.iter().map(|one| one.iova_ranges());
        let first = each.next().ok_or(IommuError::NoEndpoint)?;
        let ranges = each.fold(first, |common, next| {
            let meet = |one: Range| next.iter().filter_map(move |other| one.intersect(*other));
            common.into_iter().flat_map(meet).collect()
        });
        if ranges.is_empty() {
            return Err(IommuError::NothingInCommon {
                endpoints: endpoints.len(),
            });
        }
        Ok(Arc::new(Self {
            page: endpoints.iter().map(|one| one.page()).fold(4096, u64::max),
            iovas: Mutex::new(Iovas::new(ranges.iter().copied(), reuse)),
            ranges,
            history: Mutex::new(History::new()),
            windows: AtomicU64::new(0),
            faults: OnceLock::new(),
            endpoints,
        }))
    }

    /// Whose IOVA this is, or was last, and what was done to it: for a fault that the IOMMU reports.
    ///
    /// Type1 of VFIO reports none; [`Iommu::faults`] has those that somebody else tells of. `None` if the last operation on it is too
    /// long ago, or there was none.
    pub fn attribute(&self, iova: Addr) -> Option<Attribution> {
        self.history().last(iova)
    }

    /// From now on faults are learned of from `source`; the first one that is given stays.
    pub fn watch(&self, source: Arc<dyn FaultSource>) {
        // A second one would share the faults with the first, and neither have all.
        let _ = self.faults.set(source);
    }

    /// The faults since the last call, as far as anybody tells, and whose IOVAs they were. Does not wait. None does not mean that
    /// there was none, see [`KernelLog`](crate::KernelLog).
    pub fn faults(&self) -> Vec<(DmaFault, Option<Attribution>)> {
        let taken = self.faults.get().map(|source| source.take());
        let taken = taken.into_iter().flatten();
        taken
            .map(|fault| (fault, self.attribute(fault.iova)))
            .collect()
    }

    pub(crate) fn record(&self, entry: Entry) {
        self.history().record(entry);
    }

    pub(crate) fn next_window(&self) -> u64 {
        // Relaxed: only different numbers are wanted.
        self.windows.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn iovas(&self) -> MutexGuard<'_, Iovas> {
        // Never taken in the shootdown path: it allocates.
        self.iovas.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn history(&self) -> MutexGuard<'_, History> {
        // Entries are whole at any time, and nothing is allocated under it.
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DmaWindow for Iommu {
    fn iova_ranges(&self) -> Vec<Range> {
        self.ranges.clone()
    }

    fn page(&self) -> u64 {
        self.page
    }

    fn map(&self, iova: Range, memory: Range, rights: Rights) -> Result<(), DeviceError> {
        for (nth, endpoint) in self.endpoints.iter().enumerate() {
            let Err(error) = endpoint.map(iova, memory, rights) else {
                continue;
            };
            let undone = self.endpoints[..nth].iter();
            // What could not be undone is worse than what could not be done: it is mapped there still, and an unmap will visit it.
            return Err(undone.fold(error, |worst, one| one.unmap(iova).err().unwrap_or(worst)));
        }
        Ok(())
    }

    fn unmap(&self, iova: Range) -> Result<(), DeviceError> {
        let mut worst = None;
        let mut any = false;
        for endpoint in &self.endpoints {
            if any && planted!("r26") {
                // The first one's answer is taken for that of all.
                break;
            }
            match endpoint.unmap(iova) {
                Ok(()) => any = true,
                Err(DeviceError::NotMapped { .. }) => {}
                Err(error) => worst = worst.or(Some(error)),
            }
        }
        match worst {
            Some(error) => Err(error),
            None if any => Ok(()),
            None => Err(DeviceError::NotMapped { iova }),
        }
    }
}
