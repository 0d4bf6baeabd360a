//! What there is to see of a driver that is at work: chiplets, the contexts that are loaded, ASIDs, faults that wait for an answer.

use shootdown_primitive::time::Duration;

use crate::chiplet::{Chiplet, Slot};
use crate::config::MissMode;
use crate::error::GruError;
use crate::layout::{fault, slots, tfh};
use crate::stats::SegmentStats;

/// How a chiplet is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Condition {
    /// It takes segments.
    Well,
    /// It is being reset.
    Resetting,
    /// It did not come back from its last reset.
    Dead,
}

/// One chiplet, as its driver sees it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ChipletStatus {
    /// Its name.
    pub name: String,
    /// The blade that it sits on.
    pub blade: u32,
    /// How it is.
    pub condition: Condition,
    /// Segments that it serves, and contexts of the driver's own; loaded or not.
    pub segments: usize,
    /// The contexts that are loaded.
    pub contexts: Vec<ContextStatus>,
    /// Address spaces that have an ASID.
    pub asids: u64,
    /// The generation of ASIDs.
    pub generation: u32,
    /// The next ASID that is handed out in it.
    pub next_asid: u32,
    /// How often ASIDs were used up.
    pub wraps: u64,
    /// Purges at work.
    pub purges_open: u64,
}

/// One loaded context.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct ContextStatus {
    /// Its number on the chiplet.
    pub index: usize,
    /// The address space that it works for; `None` for one of the driver's own.
    pub space: Option<u64>,
    /// Its ASID; 0 for one of the driver's own.
    pub asid: u32,
    /// How many control blocks it has.
    pub control_blocks: usize,
    /// How many data bytes it has.
    pub data_bytes: usize,
    /// Who resolves its misses.
    pub misses: MissMode,
    /// For how long it has been loaded.
    pub loaded_for: Duration,
    /// Misses that wait for an answer.
    pub pending_faults: usize,
    /// Dead hardware did not give it back.
    pub leaked: bool,
    /// What has been counted of its segment.
    pub stats: SegmentStats,
}

impl ContextStatus {
    fn new(chiplet: &Chiplet, slot: &Slot) -> Result<Self, GruError> {
        let (context, loaded) = (&slot.context, &slot.loaded);
        let mut pending_faults = 0;
        for slot in slots(loaded.cb_map) {
            let state = tfh::state(chiplet.registers.read(fault(slot))?);
            pending_faults += usize::from(matches!(state, tfh::MISS_MAP | tfh::MISS_USER));
        }
        Ok(Self {
            index: loaded.index,
            space: context.user.as_ref().map(|user| user.binding.space),
            asid: loaded.asid,
            control_blocks: context.control_blocks(),
            data_bytes: context.data_bytes(),
            misses: context.options.misses,
            loaded_for: loaded.since.elapsed(),
            pending_faults,
            leaked: slot.leaked,
            stats: context.counters.read(),
        })
    }
}

impl ChipletStatus {
    /// # Errors
    /// The chiplet is gone.
    pub(crate) fn new(chiplet: &Chiplet) -> Result<Self, GruError> {
        let state = chiplet.lock();
        let taken = state.slots.iter().flatten();
        let contexts: Result<_, _> = taken
            .map(|slot| ContextStatus::new(chiplet, slot))
            .collect();
        let (generation, next_asid) = state.asids.position();
        Ok(Self {
            name: chiplet.name.clone(),
            blade: chiplet.blade,
            condition: chiplet.condition(),
            segments: chiplet.segments(),
            contexts: contexts?,
            asids: chiplet.words.in_use(),
            generation,
            next_asid,
            wraps: state.asids.wraps(),
            purges_open: chiplet.unended().open,
        })
    }
}
