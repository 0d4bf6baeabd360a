//! The rules that a driver can break: what the framework's traits ask of it.

use std::fmt;

/// What a driver has to keep to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
#[non_exhaustive]
pub enum Rule {
    /// What the TLBs of a registration may hold of the range is flushed.
    Flush,
    /// A handler narrows the flush to no less than what can be cached.
    Narrow,
    /// A flush counts as acknowledged when the device has acknowledged that flush.
    Acknowledge,
    /// `drained` says true when the work in flight is done.
    Drain,
    /// Nothing is installed when `retry` says so.
    Retry,
    /// `begin` is given the whole entry that is installed.
    WholeEntry,
    /// Nothing is installed between start and end of an invalidation.
    Begin,
    /// `quiesce` takes the lock under which entries are installed.
    Install,
    /// After a refused operation all is as before it.
    Balance,
    /// A handler of a non-blocking operation refuses instead of waiting.
    Refuse,
    /// A context that was unloaded does not run.
    Unload,
    /// When it is released, nothing of the registration is left on the device.
    Release,
    /// When the space has exited, no device reaches it.
    Exit,
    /// Callbacks neither allocate nor free.
    Allocation,
    /// Callbacks wait for nothing but the work in their own range.
    Blocks,
    /// Callbacks do not panic.
    Panics,
    /// A device that does not acknowledge is given up in time, and not before it is harmless.
    Escalate,
    /// No device access is stale.
    Stale,
    /// The device works on memory that is mapped, and on no other.
    Works,
    /// Everything ends.
    Hangs,
}

impl Rule {
    /// The rule, as the framework's documentation has it.
    pub const fn text(self) -> &'static str {
        match self {
            Self::Flush => {
                "before pages change, everything that a device TLB may hold of them is flushed: `Notifier::flush` may say \
                 `nothing_cached`, and `DeviceTlb::issue` `NothingCached`, only where nothing is cached and nothing can come to be \
                 before `end`"
            }
            Self::Narrow => {
                "`Gather::only` leaves out nothing that can be cached: what is left out is not flushed"
            }
            Self::Acknowledge => {
                "`DeviceTlb::poll` says `Done` only when the device has acknowledged everything of the ticket: the entries are gone, \
                 and accesses through them have drained"
            }
            Self::Drain => {
                "after `drained` has said true no work that uses the range is running, other than through entries that the flush \
                 takes away"
            }
            Self::Retry => {
                "a translation is installed only if `Fault::retry` said false, under the lock that `quiesce` takes"
            }
            Self::WholeEntry => {
                "`Registration::begin` is given the whole entry that is to be installed: a large entry beside a small unmap has to \
                 see it"
            }
            Self::Begin => {
                "between start and end of an invalidation nothing of its range is installed: `Registration::begin` waits for it"
            }
            Self::Install => {
                "`quiesce` takes the NotifierLock under which entries are installed, so that one is installed either before the \
                 flush or not at all"
            }
            Self::Balance => {
                "whoever got `quiesce` gets `end`, also when a non-blocking operation was refused: then all is as it was before"
            }
            Self::Refuse => {
                "in a non-blocking operation (`Op::may_block` is false) a handler that would have to wait returns `WouldBlock`"
            }
            Self::Unload => {
                "after `DeviceContext::unload` nothing of the context runs, and no translation is installed for it"
            }
            Self::Release => {
                "giving a session up ends its registration, once, and when that is released the device does not reach its memory"
            }
            Self::Exit => "when `AddressSpace::exit` has returned no device reaches the space",
            Self::Allocation => {
                "callbacks and device TLBs neither allocate nor free: the thread that unmaps may hold the allocator's lock"
            }
            Self::Blocks => {
                "callbacks wait for nothing but their own hardware, in their own range: others wait for them"
            }
            Self::Panics => "callbacks do not panic: the device is put into quarantine",
            Self::Escalate => {
                "a device that does not acknowledge is flushed as a whole, then reset; `DeviceTlb::reset` succeeds only when no \
                 access through an old entry can happen any more"
            }
            Self::Stale => {
                "no device access goes to a page that has changed since it was translated"
            }
            Self::Works => "the device works on memory that is mapped, whatever happened before",
            Self::Hangs => "everything ends",
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}
