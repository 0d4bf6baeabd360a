//! The first phase: who is hit is taken in use, with its devices.

use std::ops::ControlFlow;

use super::desk::{Desk, Work};
use super::device_op::Known;
use super::escalate::{GONE, dead};
use super::{Hit, Mode, Used};
use crate::addr::Range;
use crate::notes::Note;
use crate::notifier::Cause;
use crate::recorder::Kind;
use crate::registration::{Inner, Use};
use crate::registry::Found;
use crate::space::Space;
use crate::stats::Counter;

impl Desk<'_> {
    /// States what it is, for those who are called.
    #[inline]
    pub(super) fn begin(&mut self, range: Range, cause: Cause, mode: Mode, keeps: bool) {
        let (space, claim) = (self.space, self.claim);
        let work: &mut Work = self;
        work.busy = true;
        work.trouble.keeps = keeps;
        let core = &mut work.core;
        (core.id, core.range, core.cause) = (claim.id(), range, cause);
        core.may_block = mode == Mode::Blocking;
        space.watch.is_at(core.post);
    }

    /// Takes every overlapping registration in use; false when the pools have no room.
    #[inline(always)]
    pub(super) fn collect(&mut self) -> bool {
        let (space, claim, range) = (self.space, self.claim, self.core.range);
        let (work, known) = self.work();
        let mut found = Collected {
            space,
            work,
            known,
            count: 0,
            room: true,
        };
        space.registry.walk(claim, range, |one| found.add(&one));
        let Collected { count, room, .. } = found;
        if space.ghosts.are_there() {
            let (ghosts, trouble) = (&space.ghosts, &mut self.trouble);
            ghosts.find(range, |device| trouble.device(device, GONE));
        }
        if count > 0 && room {
            let (start, last) = (range.start().get(), range.last().get());
            let (quick, id) = (self.devices.is_empty(), self.core.id);
            let recorder = &space.recorder;
            self.started = recorder.record_quick(quick, Kind::Start, id, start, last);
            space.stats.add(Counter::Hits, count);
        }
        room
    }
}

/// What a walk has collected so far.
struct Collected<'a> {
    space: &'a Space,
    work: &'a mut Work,
    known: Option<&'a mut Known>,
    count: u64,
    /// There is still some.
    room: bool,
}

impl Collected<'_> {
    /// Takes one in use.
    #[inline]
    fn add(&mut self, found: &Found<'_, Inner>) -> ControlFlow<()> {
        let space = self.space;
        let Some(place) = self.work.hits.room(&space.hits) else {
            self.room = planted!("r19-hit");
            return ControlFlow::Break(());
        };
        let Some((used, word)) = Use::enter(found) else {
            // It is over, but not yet among the ghosts.
            if let Some(device) = dead(found) {
                self.work.trouble.device(device, GONE);
            }
            return ControlFlow::Continue(());
        };
        if word.is_asked() {
            let note = Note {
                registration: found.id(),
                number: word.started(),
                range: self.work.core.range,
            };
            space.registry.active().note(self.work.claim, note);
        }
        let device = match found.targets() {
            [] => Some(0),
            targets => {
                let (known, devices) = (self.known.as_deref_mut(), &mut self.work.devices);
                known.and_then(|known| known.place_all(devices, &space.device_ops, targets))
            }
        };
        place.fill_with(|| {
            Hit::Used(Used {
                used,
                device: device.unwrap_or(0) as u32,
                quiesced: false,
                polled: false,
                failed: false,
            })
        });
        self.count += 1;
        if device.is_none() {
            self.room = false;
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }
}
