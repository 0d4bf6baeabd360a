//! The phases of an invalidation, each over all that it has hit at once.

use std::ops::ControlFlow;

use super::desk::{Desk, Work};
use super::device_op::{Ack, Deadline, DeviceOp, Known, sync};
use super::escalate::{GONE, call, dead, reset_all};
use super::{Ended, Hit, SinkError, Used, part};
use crate::context;
use crate::notes::Note;
use crate::notifier::{Gather, Op, Outcome, WouldBlock};
use crate::plan::{FlushPlan, Pieces};
use crate::primitive::Backoff;
use crate::recorder::Kind;
use crate::registration::{Inner, Use};
use crate::stats::Counter;
use crate::tlb::{FlushCommand, Health};
use crate::watch::Stage;

impl<'s> Desk<'s> {
    /// Takes every overlapping registration in use; false when the pools have no room.
    pub(super) fn collect(&mut self) -> bool {
        let mut room = true;
        let (space, claim) = (self.space, self.claim);
        let registry = &space.registry;
        let (work, mut known) = self.work();
        let Work {
            core,
            hits,
            devices,
            trouble,
            ..
        } = work;
        let range = core.range;
        let mut count = 0;
        registry.walk(claim, range, |found| {
            let inner: &Inner = &found;
            let Some(place) = hits.room(&space.hits) else {
                room = planted!("r19-hit");
                return ControlFlow::Break(());
            };
            let Some((used, number)) = Use::enter(&found) else {
                // It is over, but not yet among the ghosts.
                if let Some(device) = dead(inner) {
                    trouble.device(device, GONE);
                }
                return ControlFlow::Continue(());
            };
            let note = Note {
                registration: inner.id(),
                number,
                range,
            };
            registry.active().note(claim, note);
            let hit = place.fill(Hit::Used(Used {
                used,
                device: 0,
                quiesced: false,
                polled: false,
                failed: false,
            }));
            count += 1;
            for (nth, target) in inner.targets().iter().enumerate() {
                let place =
                    |known: &mut Known| known.place(devices, &space.device_ops, &target.device);
                let Some(at) = known.as_deref_mut().and_then(place) else {
                    room = false;
                    break;
                };
                if nth == 0
                    && let Some(hit) = hit.used()
                {
                    hit.device = at as u32;
                }
            }
            if room {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        });
        if space.ghosts.are_there() {
            let ghosts = &space.ghosts;
            ghosts.find(range, |device| trouble.device(device, GONE));
        }
        if count > 0 && room {
            let (start, last) = (range.start().get(), range.last().get());
            let quick = devices.is_empty();
            let recorder = &space.recorder;
            recorder.record_quick(quick, Kind::Start, core.id, start, last);
            space.stats.add(Counter::Hits, count);
        }
        room
    }

    pub(super) fn quiesce(&mut self) {
        let space = self.space;
        let Work {
            core,
            hits,
            trouble,
            ..
        } = &mut **self;
        hits.for_each(|hit| {
            let Some(hit) = hit.used() else { return };
            let used = &hit.used;
            if trouble.would_block || planted!("r22-others") && trouble.panicked {
                return;
            }
            hit.quiesced = true;
            let op = Op::new(core, part(used, core));
            match call(space, used, core, Stage::Quiesce, || {
                used.notifier.quiesce(&op).map(|drain| drain.is_polled())
            }) {
                Some(Ok(polled)) => hit.polled = polled,
                Some(Err(WouldBlock)) if core.may_block => {
                    hit.failed = true;
                    trouble.not_drained(used);
                }
                Some(Err(WouldBlock)) => {
                    space.recorder.record(Kind::Refused, core.id, used.id(), 0);
                    space.stats.add(Counter::Refused, 1);
                    trouble.would_block();
                }
                None => hit.failed = trouble.panicked(used),
            }
        });
    }

    pub(super) fn drain(&mut self) {
        let space = self.space;
        let Work {
            core,
            hits,
            devices,
            trouble,
            ..
        } = &mut **self;
        let mut deadline = Deadline::new(space.deadlines.drain);
        let mut backoff = Backoff::new();
        let mut waited_for = false;
        loop {
            let mut waiting = false;
            let over = deadline.is_over(&backoff);
            hits.for_each(|hit| {
                let Some(hit) = hit.used().filter(|hit| hit.polled) else {
                    return;
                };
                let used = &hit.used;
                waited_for = true;
                let op = Op::new(core, part(used, core));
                match call(space, used, core, Stage::Drained, || {
                    used.notifier.drained(&op)
                }) {
                    Some(true) => hit.polled = false,
                    // A dead device is not waited for again.
                    Some(false) if !over && dead(used).is_none() => waiting = true,
                    Some(false) => {
                        hit.polled = false;
                        space.recorder.record(Kind::Deadline, core.id, 0, 0);
                        if !reset_all(space, core, used) {
                            hit.failed = used.targets().is_empty();
                            trouble.not_drained(used);
                        }
                    }
                    None => {
                        hit.polled = false;
                        hit.failed = trouble.panicked(used);
                    }
                }
            });
            if !waiting {
                break;
            }
            backoff.wait();
        }
        // Without any of it the phases between start and end are a few calls.
        if waited_for || !devices.is_empty() {
            let recorder = &space.recorder;
            recorder.record_quick(!waited_for, Kind::Quiesced, core.id, 0, 0);
        }
    }

    pub(super) fn flush(&mut self, pieces: Pieces<'_>) {
        let space = self.space;
        let Work {
            core,
            hits,
            devices,
            trouble,
            ..
        } = &mut **self;
        let cut = space.sources.may_be_cut();
        // That of the last device, which mostly does for the next. What is mapped in the range is the same for all: who cuts a page from here
        // on does it with everybody quiesced, who installs nothing of it any more.
        let mut plan: Option<FlushPlan> = None;
        hits.for_each(|hit| {
            let Some(hit) = hit.used() else { return };
            let used = &hit.used;
            let op = Op::new(core, part(used, core));
            let asked = call(space, used, core, Stage::Flush, || {
                used.notifier.flush(&op, Gather::new(&op)).range()
            });
            let Some(asked) = asked else {
                hit.failed = trouble.panicked(used);
                return;
            };
            let Some(range) = asked else { return };
            for (nth, target) in used.targets().iter().enumerate() {
                // Mostly they lie side by side.
                let same = |one: &DeviceOp| one.device.same(&target.device);
                let mut at = hit.device as usize + nth;
                if nth > 0 && !devices.get_mut(at).is_some_and(|one| same(one)) {
                    at = devices.position(same).unwrap_or(usize::MAX);
                }
                let Some(one) = devices.get_mut(at) else {
                    continue;
                };
                let fits = |plan: &FlushPlan| plan.fits(range, &target.device, cut);
                if !plan.as_ref().is_some_and(fits) {
                    plan = Some(FlushPlan::new(range, pieces, &target.device, cut));
                }
                for &scope in plan.iter().flat_map(FlushPlan::scopes) {
                    one.add(FlushCommand {
                        tag: target.tag,
                        scope,
                    });
                }
            }
        });
        if devices.is_empty() {
            return;
        }
        let mut deadline = Deadline::new(space.deadlines.flush);
        devices.for_each(|one| {
            if one.len == 0 {
                one.state = Ack::Done;
            } else if one.device.health() == Health::Quarantined && !planted!("r20-twice") {
                one.state = Ack::Missed; // It is not waited for again.
            } else {
                one.issue();
            }
        });
        space.recorder.record(Kind::Dispatched, core.id, 0, 0);
        sync(devices, &mut deadline);
        self.escalate();
        space.recorder.record(Kind::Flushed, self.core.id, 0, 0);
    }

    pub(super) fn cut_off(&mut self) {
        let space = self.space;
        let Work {
            core,
            hits,
            trouble,
            ..
        } = &mut **self;
        hits.for_each(|hit| {
            let Some(hit) = hit.used() else { return };
            let used = &hit.used;
            let op = Op::new(core, part(used, core));
            match call(space, used, core, Stage::CutOff, || {
                used.notifier.cut_off(&op)
            }) {
                Some(Ok(())) => {}
                Some(Err(_)) => {
                    hit.failed = true;
                    trouble.not_drained(used);
                }
                None => hit.failed = trouble.panicked(used),
            }
        });
    }

    /// What the trouble is.
    pub(super) fn error(&self) -> SinkError {
        let range = self.core.range;
        let trouble = &self.trouble;
        let handler = trouble.handler;
        if trouble.panicked {
            SinkError::HandlerPanicked {
                range,
                handler,
                changed: false,
            }
        } else if trouble.would_block {
            SinkError::WouldBlock { range }
        } else if let Some(reason) = trouble.reached {
            SinkError::Reached { range, reason }
        } else {
            SinkError::NotDrained { range, handler }
        }
    }

    /// `end` for whoever was started, and everything is given back. What is left, where there was trouble.
    pub(super) fn end(mut self, outcome: Outcome) -> Option<Ended<'s>> {
        let space = self.space;
        let (work, known) = self.work();
        let Work {
            core,
            hits,
            devices,
            trouble,
            missed_deadline,
            busy,
            change: _,
        } = work;
        *busy = false;
        let hit_any = !hits.is_empty();
        let quick = devices.is_empty();
        let quarantined = outcome == Outcome::Quarantined;
        let kept = quarantined && trouble.keeps;
        if let Some(known) = known {
            known.forget(devices);
        }
        if !kept {
            // Before the uses are given back: while they last, a registration holds each device, and no count here is the last.
            devices.clear(&space.device_ops);
        }
        hits.for_each(|hit| {
            let Hit::Used(mut one) = std::mem::replace(hit, Hit::Over) else {
                return;
            };
            let used = one.used;
            if one.quiesced && !(planted!("r13") && trouble.would_block) {
                let op = Op::new(core, part(&used, core));
                let end = || used.notifier.end(&op, outcome);
                if call(space, &used, core, Stage::End, end).is_none() {
                    one.failed |= trouble.panicked(&used);
                }
            }
            if kept && one.failed {
                *hit = Hit::Kept(used.count());
            }
            used.leave();
        });
        let mut ended = None;
        let mut spoilt = None;
        if trouble.any || *missed_deadline || quarantined {
            let noteworthy = quarantined || *missed_deadline || trouble.panicked;
            let ended = ended.insert(Ended::without_trouble(space));
            if kept {
                ended.first = trouble.device.take();
                ended.devices = std::mem::take(devices);
                ended.hits = std::mem::take(hits);
            }
            ended.panicked = trouble.panicked.then_some((trouble.handler, core.range));
            *missed_deadline = false;
            spoilt = Some(std::mem::take(trouble));
            if noteworthy {
                space.recorder.want_dump();
                context::put_off(space);
            }
        }
        hits.clear(&space.hits);
        let id = core.id;
        self.leave();
        space.stats.add(Counter::Invalidations, 1);
        if quarantined {
            space.stats.add(Counter::Quarantined, 1);
        }
        if hit_any {
            let number = match outcome {
                Outcome::Changed => 0,
                Outcome::Unchanged => 1,
                Outcome::Quarantined => 2,
            };
            space.recorder.record_quick(quick, Kind::End, id, number, 0);
        }
        space.events.ended_and_fenced();
        drop(spoilt);
        ended
    }
}
