//! What the driver has for one address space: a PASID, a page table, the handler of its one registration.
//!
//! `quiesce` takes pages out of the page table, under the lock under which the fault path puts them in: what is in there is flushed
//! afterwards, and what comes later sees the invalidation in its retry. Work in flight is the device's own business: its
//! acknowledgement of the flush says that accesses through old entries have drained. So nothing is polled, and `end` has nothing to do:
//! the next access faults.

use shootdown_primitive::sync::Arc;

use shootdown::{
    AddressSpace, Device, Drain, Notifier, NotifierLock, Op, Range, Share, SpacePin, Target,
    WouldBlock,
};

use crate::device::{Attached, Core};
use crate::error::PtaError;
use crate::flush::Tlb;
use crate::mirror::Mirror;

/// A space that uses the device.
pub(crate) struct Space {
    pub(crate) core: Arc<Core>,
    pub(crate) pin: SpacePin,
    /// Its number.
    pub(crate) id: u64,
    pub(crate) pasid: u64,
    /// Held while a retry is checked and an entry written.
    pub(crate) mirror: NotifierLock<Mirror>,
}

impl Space {
    fn new(core: &Arc<Core>, space: &AddressSpace) -> Result<Self, PtaError> {
        let limit = core.pasid_limit;
        let tables = core.table_limit;
        let mirror = Mirror::new(core).ok_or(PtaError::NoTables { limit: tables })?;
        Ok(Self {
            pasid: core.take_pasid().ok_or(PtaError::NoPasid { limit })?,
            core: Arc::clone(core),
            pin: space.pin(),
            id: space.id(),
            mirror: NotifierLock::new(mirror),
        })
    }

    /// A share of the registration of `space`, and what belongs to it, which is `known` if the driver has it. Not by two threads at a
    /// time.
    pub(crate) fn join(
        attached: &Attached,
        space: &AddressSpace,
        known: Option<Arc<Self>>,
    ) -> Result<(Arc<Self>, Share), PtaError> {
        let core = &attached.core;
        let is_known = known.is_some();
        let this = match known {
            Some(known) => known,
            None => Arc::new(Self::new(core, space)?),
        };
        let mut registered = false;
        let share = space.share(attached.key, || {
            registered = true;
            let target = Target {
                device: Device::clone(&attached.device),
                tag: this.pasid,
            };
            (
                Range::ALL,
                Arc::new(Handler(Arc::clone(&this))),
                vec![target],
            )
        })?;
        if registered && is_known {
            // The last registration is over, and what has changed since then nobody told: nothing of it may be left.
            this.mirror.lock().recycle()?;
            if !Tlb(Arc::clone(core)).empty(Some(this.pasid), core.config.deadline) {
                let limit = core.pasid_limit;
                return Err(PtaError::NoPasid { limit });
            }
        }
        Ok((this, share))
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        // No queue has it: each holds the space.
        self.core.retire_pasid(self.pasid);
    }
}

/// The handler.
struct Handler(Arc<Space>);

impl Notifier for Handler {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        let core = &self.0.core;
        let removed = self.0.mirror.lock_for(op)?.clear(op.range());
        core.counters
            .pages_removed
            .add(*removed.as_ref().unwrap_or(&0));
        core.note(removed.map(drop));
        Ok(op.idle())
    }
}
