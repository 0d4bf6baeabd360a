//! The phases from quiesce to end, each over all that was hit at once.

use std::cell::Cell;
use std::mem::ManuallyDrop;

use super::call::Caller;
use super::desk::{Desk, Work};
use super::device_op::{Ack, Deadline, DeviceOp, sync};
use super::escalate::{dead, reset_all};
use super::{DEVICES, Ended, Hit, SinkError, Trouble, Used};
use crate::addr::Range;
use crate::context;
use crate::notifier::{CutOffFailed, Gather, Op, OpCore, Outcome, WouldBlock};
use crate::plan::{FlushPlan, Pieces};
use crate::pool::Chain;
use crate::primitive::Backoff;
use crate::recorder::Kind;
use crate::space::Space;
use crate::stats::Counter;
use crate::tlb::{FlushCommand, Health};
use crate::watch::Stage;

/// The phase that comes next, where somebody `polled` has work in flight or nobody.
fn after_quiesce(polled: bool) -> Stage {
    if polled { Stage::Drained } else { Stage::Flush }
}

impl<'s> Desk<'s> {
    /// Phases 2 to 4, but for the contexts of segments.
    #[inline]
    pub(super) fn handlers(&mut self, pieces: Pieces<'_>) {
        let next = if self.hits.len() == 1 {
            self.alone(pieces)
        } else {
            self.quiesce()
        };
        if self.trouble.would_block {
            return;
        }
        if matches!(next, Stage::Drained | Stage::Flush) {
            let waits = next == Stage::Drained;
            if waits {
                self.drain();
            }
            // Without any of it the phases between start and end are a few calls.
            if waits || !self.devices.is_empty() {
                let (recorder, id) = (&self.space.recorder, self.core.id);
                recorder.record_quick(!waits, Kind::Quiesced, id, 0, 0);
            }
            self.flush(pieces);
        }
        if next != Stage::End {
            self.cut_off();
        }
    }

    /// One handler that nobody is hit beside: a phase that awaits nothing is over when its call has returned, so that the next call
    /// follows at once. Gives the phase that comes next where that was not so.
    #[inline]
    fn alone(&mut self, pieces: Pieces<'_>) -> Stage {
        let space = self.space;
        let Work {
            core,
            hits,
            devices,
            trouble,
            ..
        } = &mut **self;
        let Some(hit) = hits.first_mut().and_then(Hit::used) else {
            return Stage::End;
        };
        hit.quiesced = true;
        let used = &hit.used;
        let has_devices = !devices.is_empty();
        let called = Cell::new(Stage::Quiesce);
        let (mut asked, mut cut_off) = (None, Ok(()));
        let caller = Caller::new(space, core);
        let result = caller.call(used, Stage::Quiesce, |op, calling| {
            let next = |stage| {
                calling.next(stage);
                called.set(stage);
            };
            if used.notifier.quiesce(op)?.is_polled() {
                return Ok(true);
            }
            if has_devices {
                let recorder = &space.recorder;
                recorder.record_quick(true, Kind::Quiesced, core.id, 0, 0);
            }
            next(Stage::Flush);
            asked = used.notifier.flush(op, Gather::new(op.range())).range();
            if !has_devices {
                next(Stage::CutOff);
                cut_off = used.notifier.cut_off(op);
            }
            Ok(false)
        });
        match called.get() {
            Stage::Quiesce => {
                hit.quiesced(space, core, result, trouble);
                return after_quiesce(hit.polled);
            }
            Stage::Flush if result.is_none() => hit.failed |= trouble.panicked(used),
            Stage::CutOff => {
                hit.was_cut_off(result.map(|_| cut_off), trouble);
                return Stage::End;
            }
            _ => {}
        }
        if has_devices {
            if let Some(range) = asked {
                let cut = space.sources.may_be_cut();
                hit.ask(devices, range, &mut FlushPlan::new(), pieces, cut);
            }
            self.flush_devices();
        }
        Stage::CutOff
    }

    /// Gives the phase that comes next.
    fn quiesce(&mut self) -> Stage {
        let space = self.space;
        let Work {
            core,
            hits,
            trouble,
            ..
        } = &mut **self;
        let caller = Caller::new(space, core);
        let mut polled = false;
        hits.for_each(|hit| {
            let Some(hit) = hit.used() else { return };
            let used = &hit.used;
            if trouble.would_block || planted!("r22-others") && trouble.panicked {
                return;
            }
            hit.quiesced = true;
            let result = caller.call(used, Stage::Quiesce, |op, _| {
                used.notifier.quiesce(op).map(|drain| drain.is_polled())
            });
            hit.quiesced(space, core, result, trouble);
            polled |= hit.polled;
        });
        after_quiesce(polled)
    }

    fn drain(&mut self) {
        let space = self.space;
        let Work {
            core,
            hits,
            trouble,
            ..
        } = &mut **self;
        let caller = Caller::new(space, core);
        let mut deadline = Deadline::new(space.deadlines.drain);
        let mut backoff = Backoff::new();
        loop {
            let mut waiting = false;
            let over = deadline.is_over(&backoff);
            hits.for_each(|hit| {
                let Some(hit) = hit.used().filter(|hit| hit.polled) else {
                    return;
                };
                let used = &hit.used;
                match caller.call(used, Stage::Drained, |op, _| used.notifier.drained(op)) {
                    Some(true) => hit.polled = false,
                    // A dead device is not waited for again.
                    Some(false) if !over && dead(used).is_none() => waiting = true,
                    Some(false) => {
                        hit.polled = false;
                        space.recorder.record(Kind::Deadline, core.id, 0, 0);
                        if !reset_all(space, core, used) {
                            hit.failed |= used.targets().is_empty();
                            trouble.not_drained(used);
                        }
                    }
                    None => {
                        hit.polled = false;
                        hit.failed |= trouble.panicked(used);
                    }
                }
            });
            if !waiting {
                return;
            }
            backoff.wait();
        }
    }

    fn flush(&mut self, pieces: Pieces<'_>) {
        let space = self.space;
        let Work {
            core,
            hits,
            devices,
            trouble,
            ..
        } = &mut **self;
        let cut = space.sources.may_be_cut();
        // What is mapped in the range is the same for all: who cuts a page from here on does it with everybody quiesced, who installs
        // nothing of it any more.
        let mut plan = FlushPlan::new();
        let caller = Caller::new(space, core);
        hits.for_each(|hit| {
            let Some(hit) = hit.used() else { return };
            let used = &hit.used;
            let asked = caller.call(used, Stage::Flush, |op, _| {
                used.notifier.flush(op, Gather::new(op.range())).range()
            });
            let Some(asked) = asked else {
                hit.failed |= trouble.panicked(used);
                return;
            };
            if let Some(range) = asked {
                hit.ask(devices, range, &mut plan, pieces, cut);
            }
        });
        if !self.devices.is_empty() {
            self.flush_devices();
        }
    }

    fn flush_devices(&mut self) {
        let space = self.space;
        let Work { core, devices, .. } = &mut **self;
        let mut deadline = Deadline::new(space.deadlines.flush);
        devices.for_each(|one| {
            if one.is_idle() {
                one.state = Ack::Done;
            } else if one.device.health() == Health::Quarantined && !planted!("r20-twice") {
                one.state = Ack::Missed; // It is not waited for again.
            } else {
                one.issue();
            }
        });
        space.recorder.record(Kind::Dispatched, core.id, 0, 0);
        let at_once = !sync(devices, &mut deadline);
        let escalated = self.escalate();
        let (quick, id) = (at_once && !escalated, self.core.id);
        space.recorder.record_quick(quick, Kind::Flushed, id, 0, 0);
    }

    fn cut_off(&mut self) {
        let space = self.space;
        let Work {
            core,
            hits,
            trouble,
            ..
        } = &mut **self;
        let caller = Caller::new(space, core);
        hits.for_each(|hit| {
            let Some(hit) = hit.used() else { return };
            let used = &hit.used;
            let result = caller.call(used, Stage::CutOff, |op, _| used.notifier.cut_off(op));
            hit.was_cut_off(result, trouble);
        });
    }

    /// What the trouble is.
    #[cold]
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
        let quick = self.devices.is_empty();
        if !quick {
            self.end_devices(outcome);
        }
        let kept = self.is_kept(outcome);
        let Work {
            core,
            hits,
            trouble,
            missed_deadline,
            busy,
            started,
            ..
        } = &mut *self;
        *busy = false;
        let caller = Caller::new(space, core);
        let hit_any = !hits.is_empty();
        hits.for_each(|hit| {
            let Some(one) = hit.used() else { return };
            let used = &one.used;
            if one.quiesced && !(planted!("r13") && trouble.would_block) {
                let end = |op: &Op<'_>| used.notifier.end(op, outcome);
                if caller.call(used, Stage::End, |op, _| end(op)).is_none() {
                    one.failed |= trouble.panicked(used);
                }
            }
            let left = if kept && one.failed {
                Hit::Kept(ManuallyDrop::new(used.count()))
            } else {
                Hit::Over
            };
            // Not before: what was just written in pieces would be read as a whole.
            if let Hit::Used(one) = std::mem::replace(hit, left) {
                one.used.leave();
            }
        });
        let (id, started) = (core.id, *started);
        let noteworthy = trouble.any || *missed_deadline || outcome == Outcome::Quarantined;
        let left = noteworthy.then(|| self.left_over(outcome, kept));
        self.hits.clear(&space.hits);
        self.leave();
        space.stats.add(Counter::Invalidations, 1);
        let recorder = &space.recorder;
        let passes = quick && outcome == Outcome::Changed && left.is_none();
        if hit_any && !(passes && recorder.passed(started)) {
            let number = match outcome {
                Outcome::Changed => 0,
                Outcome::Unchanged => 1,
                Outcome::Quarantined => 2,
            };
            recorder.record_quick(quick, Kind::End, id, number, 0);
        }
        space.events.ended_and_fenced();
        // Dropped when it is over: a device may be among it.
        left.map(|(ended, _trouble)| ended)
    }

    /// Whether who may still reach the pages is told to the caller.
    fn is_kept(&self, outcome: Outcome) -> bool {
        outcome == Outcome::Quarantined && self.trouble.keeps
    }

    /// Gives the devices back, before the uses: while those last, a registration holds each device, and no count here is the last.
    #[inline(never)]
    fn end_devices(&mut self, outcome: Outcome) {
        let pool = &self.space.device_ops;
        let kept = self.is_kept(outcome);
        let (work, known) = self.work();
        if let Some(known) = known {
            known.forget(&mut work.devices);
        }
        if !kept {
            work.devices.clear(pool);
        }
    }

    /// What the caller is told of one that was not as it should be, and the trouble that there was.
    #[cold]
    fn left_over(&mut self, outcome: Outcome, kept: bool) -> (Ended<'s>, Trouble) {
        let space = self.space;
        let Work {
            core,
            hits,
            devices,
            trouble,
            missed_deadline,
            ..
        } = &mut **self;
        let quarantined = outcome == Outcome::Quarantined;
        let mut ended = Ended::without_trouble(space);
        if kept {
            ended.first = trouble.device.take();
            ended.devices = std::mem::take(devices);
            ended.hits = std::mem::take(hits);
        }
        ended.panicked = trouble.panicked.then_some((trouble.handler, core.range));
        if quarantined {
            space.stats.add(Counter::Quarantined, 1);
        }
        if quarantined || *missed_deadline || trouble.panicked {
            space.recorder.want_dump();
            context::put_off(space);
        }
        *missed_deadline = false;
        (ended, std::mem::take(trouble))
    }
}

impl Used {
    /// Gives each of its devices the commands that flush `range`; `plan` is that of the last device, which mostly does for the next.
    fn ask(
        &self,
        devices: &mut Chain<DeviceOp, DEVICES>,
        range: Range,
        plan: &mut FlushPlan,
        pieces: Pieces<'_>,
        cut: bool,
    ) {
        for (nth, target) in self.used.targets().iter().enumerate() {
            // Mostly they lie side by side.
            let same = |one: &DeviceOp| one.device.same(&target.device);
            let mut at = self.device as usize + nth;
            if nth > 0 && !devices.get_mut(at).is_some_and(|one| same(one)) {
                at = devices.position(same).unwrap_or(usize::MAX);
            }
            let Some(one) = devices.get_mut(at) else {
                continue;
            };
            plan.make(range, pieces, &target.device, cut);
            for &scope in plan.scopes() {
                one.add(FlushCommand {
                    tag: target.tag,
                    scope,
                });
            }
        }
    }

    /// Whether it is polled, or why not; `None` where it has panicked.
    fn quiesced(
        &mut self,
        space: &Space,
        core: &OpCore,
        result: Option<Result<bool, WouldBlock>>,
        trouble: &mut Trouble,
    ) {
        let used = &self.used;
        match result {
            Some(Ok(polled)) => self.polled = polled,
            Some(Err(WouldBlock)) if core.may_block => {
                self.failed = true;
                trouble.not_drained(used);
            }
            Some(Err(WouldBlock)) => {
                space.recorder.record(Kind::Refused, core.id, used.id(), 0);
                space.stats.add(Counter::Refused, 1);
                trouble.would_block();
            }
            None => self.failed |= trouble.panicked(used),
        }
    }

    /// How its mappings have gone; `None` where it has panicked.
    #[inline]
    fn was_cut_off(&mut self, result: Option<Result<(), CutOffFailed>>, trouble: &mut Trouble) {
        match result {
            Some(Ok(())) => {}
            Some(Err(_)) => {
                self.failed = true;
                trouble.not_drained(&self.used);
            }
            None => self.failed |= trouble.panicked(&self.used),
        }
    }
}
