//! What an author writes: how a model of the device is built and looked at, how the driver is opened on an address space, and what
//! the device can be made to do.

use std::sync::Arc;

use shootdown::{Addr, AddressSpace, Device, Range};
use shootdown_hw_model::{Bus, ModelMemory};

/// Why a driver, or a device, did not do what it was asked for.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// What the kit has a device do at a moment that it chooses. Called with the page that is about to be installed.
pub type Hook = Arc<dyn Fn(Range) + Send + Sync>;

/// What a model of a device does wrong, as broken hardware does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Fault {
    /// Flushes are done, and their completions lost.
    Lost,
    /// Completions come after the deadline.
    Late,
    /// Completions come twice.
    Duplicated,
    /// Later flushes are done before earlier ones.
    Reordered,
    /// Completions come for flushes that nobody has issued.
    Unissued,
    /// Flushes never begin; the device can be reset.
    Stuck,
    /// Work in flight never ends; the device can be reset.
    Endless,
    /// Flushes never begin, and the device goes on through a reset.
    Dead,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Lost,
        Self::Late,
        Self::Duplicated,
        Self::Reordered,
        Self::Unissued,
        Self::Stuck,
        Self::Endless,
        Self::Dead,
    ];

    /// As it reads in a report.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lost => "completions are lost",
            Self::Late => "completions are late",
            Self::Duplicated => "completions come twice",
            Self::Reordered => "completions come out of order",
            Self::Unissued => "completions come for flushes that nobody issued",
            Self::Stuck => "flushes never begin",
            Self::Endless => "work never ends",
            Self::Dead => "flushes never begin and a reset does nothing",
        }
    }
}

/// What a model of a device is built into. Each scenario has its own.
#[derive(Clone)]
pub struct Setup {
    /// How the device reaches memory. The oracle looks on.
    pub bus: Bus,
    /// The memory of the space that will be opened.
    pub memory: Arc<ModelMemory>,
    /// For whatever the model draws.
    pub seed: u64,
    /// What it does wrong: one of [`Hardware::FAULTS`].
    pub fault: Option<Fault>,
    /// How long completions are late with [`Fault::Late`]: longer than the flush deadline of the space.
    pub late_by: std::time::Duration,
}

/// What had been asked of the device's TLB since the operation began that an entry has survived.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Asked {
    /// The model does not know.
    Unknown,
    /// Nothing.
    Nothing,
    /// To flush something else.
    Elsewhere,
    /// To flush it, which is not done.
    Pending,
}

/// How a device could still reach a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reach {
    /// An entry of its TLB, or a mapping of its IOMMU, that a loaded context can use.
    Entry {
        /// What it translates.
        page: Range,
        /// Why it may still be there.
        asked: Asked,
    },
    /// Work in flight that has read its translation already: no flush takes it away.
    Work {
        /// The page that it is at.
        page: Range,
    },
}

/// A model of the device, which the kit builds, disturbs and looks into. The kit brings one, [`Accelerator`](crate::Accelerator);
/// who has a model of their own device implements this for it.
///
/// What a model says of itself is the truth: it is no part of the driver.
pub trait Hardware: Send + Sync + Sized + 'static {
    /// What it can do wrong. The others are left out, and the report says so.
    const FAULTS: &'static [Fault];

    /// Builds one.
    ///
    /// # Errors
    /// Whatever kept it from being built; the scenario fails.
    fn build(setup: &Setup) -> Result<Self, Failure>;

    /// How the device could still reach part of `part` of `space`; `None` if it could not. Entries that no loaded context can
    /// use do not count. Called at the moment when the pages change, by the thread that changes them.
    fn reach(&self, space: u64, part: Range) -> Option<Reach>;

    /// An invalidation begins: [`Asked`] counts from here.
    fn operation(&self) {}

    /// Keeps work that is in flight from ending (true), or lets it go on. Whether the model can do that.
    fn hold(&self, held: bool) -> bool {
        let _ = held;
        false
    }

    /// Has `hook` called whenever an entry is about to be installed, in the call that installs it; `None` for never again.
    /// Whether the model can do that.
    fn on_install(&self, hook: Option<Hook>) -> bool {
        let _ = hook;
        false
    }
}

/// A driver under test.
pub trait Driver: Send + Sync + Sized + 'static {
    /// The model that it drives.
    type Hardware: Hardware;
    /// What a process holds of it.
    type Session: Session;

    /// Whatever it takes for a process to use the device on `data`, which is mapped in `space` and may come to have holes: a
    /// registration, a context, a segment, a window.
    ///
    /// # Errors
    /// It cannot be had.
    fn open(&self, space: &AddressSpace, data: Range) -> Result<Self::Session, Failure>;

    /// Its devices, so that the kit can try to recover those in quarantine.
    fn devices(&self) -> Vec<Device> {
        Vec::new()
    }
}

/// What became of an access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// It is done, and memory has the value.
    Done,
    /// The device was told that it may not: nothing is mapped there, or not with the rights.
    Fault,
    /// The device was reset, or the session is over. Another has to be opened.
    Lost,
}

/// What a process holds of a driver. Several threads use it at once. **Dropping it gives it up**, from whatever place: an ordinary
/// thread, with the map lock held, inside a callback, during a release.
pub trait Session: Send + Sync + 'static {
    /// Has the device write 8 bytes at `at`, a multiple of 8, and waits until that is done; misses are resolved on the way. Has a
    /// deadline of its own, of some seconds.
    ///
    /// # Errors
    /// The deadline is over, or whatever else is neither of [`Access`].
    fn write(&self, at: Addr, value: u64) -> Result<Access, Failure>;

    /// Has the device begin work that writes to each 4 KiB page of `part`, and does not wait for it.
    ///
    /// # Errors
    /// It could not be begun.
    fn start(&self, part: Range) -> Result<(), Failure>;

    /// Waits until all that was started has ended, well or not. Has a deadline of its own.
    ///
    /// # Errors
    /// The deadline is over.
    fn settle(&self) -> Result<(), Failure>;

    /// Its own addresses, if it is a segment.
    fn segment(&self) -> Option<Range> {
        None
    }

    /// Has the driver's handler give the session up inside its next callback, if the driver is made to do such a thing. Whether
    /// it is.
    fn give_up_in_callback(&self) -> bool {
        false
    }
}
