//! The device's registers and what is behind them, under its lock.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use shootdown::{Addr, FlushCommand, Frame, PageSize, Range, Rights, Scope, Translation};
use shootdown_hw_model::Stamp;

use super::{QUEUE, SLOTS, WorkId, WorkState};
use crate::author::{Asked, Fault, Reach, Setup};

/// Entries of the TLB; the oldest makes room.
const ENTRIES: usize = 512;
/// A flush, from its doorbell to its completion.
const FLUSH: Duration = Duration::from_micros(30);
/// Work that is at a page is at it so long, unless it is a single access.
const STAY: Duration = Duration::from_micros(60);

#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) context: u64,
    pub(super) page: Range,
    size: PageSize,
    frame: Frame,
    writable: bool,
    pub(super) stamp: Stamp,
}

impl Entry {
    pub(super) fn new(context: u64, of: &Translation, stamp: Stamp) -> Self {
        Self {
            context,
            page: of.page,
            size: of.page_size,
            frame: of.frame,
            writable: of.rights.contains(Rights::WRITE),
            stamp,
        }
    }

    /// The 4 KiB frame behind `at`, which lies in the page.
    pub(super) fn frame_of(&self, at: Addr) -> Frame {
        Frame(self.frame.0 + ((at.get() - self.page.start().get()) >> PageSize::FourKiB.shift()))
    }

    fn is_covered(&self, command: &FlushCommand) -> bool {
        match command.scope {
            Scope::Device => true,
            Scope::Tag => command.tag == self.context,
            Scope::Pages { range, page_size } => {
                command.tag == self.context && page_size == self.size && range.overlaps(self.page)
            }
        }
    }
}

struct Context {
    number: u64,
    space: u64,
    unloading: bool,
}

struct Block {
    context: u64,
    range: Range,
    number: u64,
}

/// What a piece of work has read for the page that it is at.
#[derive(Clone, Copy)]
pub(super) struct Latch {
    pub(super) entry: Entry,
    pub(super) at: Addr,
    due: Instant,
    /// The engine is writing.
    writing: bool,
}

pub(super) struct Work {
    pub(super) id: u64,
    pub(super) context: u64,
    pub(super) space: u64,
    range: Range,
    pub(super) value: u64,
    /// Where it goes on.
    next: Option<Addr>,
    pub(super) latch: Option<Latch>,
    state: WorkState,
}

impl Work {
    fn is_single(&self) -> bool {
        self.range.len() <= 8
    }
}

struct Flush {
    number: u64,
    commands: Vec<FlushCommand>,
    /// When the entries go; `None`: never.
    due: Option<Instant>,
    /// When completions are sent.
    tells: [Option<Instant>; 2],
}

pub(super) struct State {
    fault: Option<Fault>,
    late_by: Duration,
    rng: SmallRng,
    contexts: Vec<Context>,
    entries: VecDeque<Entry>,
    blocks: Vec<Block>,
    pub(super) works: Vec<Work>,
    queued: Vec<FlushCommand>,
    flushes: Vec<Flush>,
    completions: VecDeque<u64>,
    /// Commands that were queued since the last mark.
    asked: u64,
    resetting: bool,
    numbers: u64,
    pub(super) held: bool,
    pub(super) stopping: bool,
}

/// The first address of the 4 KiB page after `at`, if the range has any of it.
fn next_page(range: Range, at: Addr) -> Option<Addr> {
    let next = Range::page(at, PageSize::FourKiB).end()?;
    range.holds(next).then_some(next)
}

impl State {
    pub(super) fn new(setup: &Setup) -> Self {
        Self {
            fault: setup.fault,
            late_by: setup.late_by,
            rng: SmallRng::seed_from_u64(setup.seed),
            contexts: Vec::new(),
            entries: VecDeque::new(),
            blocks: Vec::new(),
            works: Vec::new(),
            queued: Vec::new(),
            flushes: Vec::new(),
            completions: VecDeque::new(),
            asked: 0,
            resetting: false,
            numbers: 0,
            held: false,
            stopping: false,
        }
    }

    /// Does what is due: flushes, completions, unloads, a reset.
    pub(super) fn settle(&mut self) {
        let now = Instant::now();
        let due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        // In the order of their times, which is not that of their doorbells.
        self.flushes.sort_by_key(|flush| flush.due);
        for flush in &mut self.flushes {
            if due(flush.due) {
                flush.due = None;
                for command in std::mem::take(&mut flush.commands) {
                    self.entries.retain(|entry| !entry.is_covered(&command));
                }
            }
            for tell in &mut flush.tells {
                if due(*tell) {
                    *tell = None;
                    self.completions.push_back(flush.number);
                }
            }
        }
        // What never begins stays: whoever asks what is pending is told of it.
        self.flushes
            .retain(|flush| !flush.commands.is_empty() || flush.tells.iter().any(Option::is_some));
        let writing = |work: &Work| work.latch.is_some_and(|latch| latch.writing);
        if self.resetting && self.fault != Some(Fault::Dead) {
            self.works.retain(writing);
            if self.works.is_empty() {
                self.contexts.clear();
                self.entries.clear();
                self.blocks.clear();
                self.queued.clear();
                self.flushes.clear();
                self.completions.clear();
                self.resetting = false;
            }
        }
        let unloading = |number: u64, contexts: &[Context]| {
            contexts
                .iter()
                .any(|one| one.number == number && one.unloading)
        };
        self.works
            .retain(|work| writing(work) || !unloading(work.context, &self.contexts));
        let works = &self.works;
        self.contexts
            .retain(|one| !one.unloading || works.iter().any(|work| work.context == one.number));
        let contexts = &self.contexts;
        let loaded = |number: u64| contexts.iter().any(|one| one.number == number);
        self.entries.retain(|entry| loaded(entry.context));
        self.blocks.retain(|block| loaded(block.context));
    }

    pub(super) fn load(&mut self, number: u64, space: u64) -> bool {
        let free = !self.resetting && !self.is_loaded(number);
        if free {
            self.contexts.push(Context {
                number,
                space,
                unloading: false,
            });
        }
        free
    }

    pub(super) fn unload(&mut self, number: u64) {
        for one in self.contexts.iter_mut().filter(|one| one.number == number) {
            one.unloading = true;
        }
        self.settle();
    }

    pub(super) fn is_loaded(&self, number: u64) -> bool {
        self.contexts.iter().any(|one| one.number == number)
    }

    pub(super) fn space_of(&self, number: u64) -> Option<u64> {
        let loaded = self
            .contexts
            .iter()
            .find(|one| one.number == number && !one.unloading);
        loaded.map(|one| one.space)
    }

    pub(super) fn submit(&mut self, context: u64, range: Range, value: u64) -> Option<WorkId> {
        let space = self.space_of(context)?;
        if self.works.len() == SLOTS {
            return None;
        }
        self.numbers += 1;
        self.works.push(Work {
            id: self.numbers,
            context,
            space,
            range,
            value,
            next: Some(range.start()),
            latch: None,
            state: WorkState::Running,
        });
        Some(WorkId(self.numbers))
    }

    fn work(&mut self, id: u64) -> Option<&mut Work> {
        self.works.iter_mut().find(|work| work.id == id)
    }

    pub(super) fn state_of(&mut self, WorkId(id): WorkId) -> WorkState {
        let Some(at) = self.works.iter().position(|work| work.id == id) else {
            return WorkState::Gone;
        };
        let state = self.works[at].state;
        if matches!(state, WorkState::Done | WorkState::Aborted) {
            self.works.swap_remove(at);
        }
        state
    }

    pub(super) fn restart(&mut self, WorkId(id): WorkId) {
        if let Some(work) = self.work(id)
            && matches!(work.state, WorkState::Miss(_))
        {
            work.state = WorkState::Running;
        }
    }

    pub(super) fn abort(&mut self, WorkId(id): WorkId) {
        if let Some(work) = self.work(id)
            && matches!(work.state, WorkState::Miss(_))
        {
            work.state = WorkState::Aborted;
        }
    }

    pub(super) fn install(&mut self, entry: Entry) {
        let replaced = |old: &Entry| old.context == entry.context && old.page.overlaps(entry.page);
        self.entries.retain(|old| !replaced(old));
        if self.entries.len() == ENTRIES {
            self.entries.pop_front();
        }
        self.entries.push_back(entry);
    }

    pub(super) fn block(&mut self, context: u64, range: Range, number: u64) {
        self.blocks.push(Block {
            context,
            range,
            number,
        });
    }

    pub(super) fn unblock(&mut self, context: u64, number: u64) {
        self.blocks
            .retain(|block| block.context != context || block.number != number);
    }

    pub(super) fn is_idle(&self, context: u64, range: Range) -> bool {
        let mut own = self.works.iter().filter(|work| work.context == context);
        own.all(|work| work.latch.is_none_or(|latch| !range.holds(latch.at)))
    }

    pub(super) fn mark(&mut self) {
        self.asked = 0;
    }

    pub(super) fn queue(&mut self, command: FlushCommand) -> bool {
        if self.queued.len() == QUEUE {
            return false;
        }
        self.asked += 1;
        self.queued.push(command);
        true
    }

    pub(super) fn ring(&mut self, number: u64) {
        let commands = std::mem::take(&mut self.queued);
        let now = Instant::now();
        let wrong = self.fault.filter(|_| self.rng.random_bool(0.5));
        let (due, tells) = match wrong {
            Some(Fault::Stuck) => (None, [None; 2]),
            _ if self.fault == Some(Fault::Dead) => (None, [None; 2]),
            Some(Fault::Lost) => (Some(now + FLUSH), [None; 2]),
            Some(Fault::Late) => {
                let late = now + self.late_by;
                (Some(late), [Some(late), None])
            }
            Some(Fault::Duplicated) => {
                let due = now + FLUSH;
                (Some(due), [Some(due), Some(due + 5 * FLUSH)])
            }
            Some(Fault::Reordered) => {
                let due = now + FLUSH * self.rng.random_range(1..40);
                (Some(due), [Some(due), None])
            }
            Some(Fault::Unissued) => {
                // Long before the flush itself is done: numbers far ahead, far behind, and of no doorbell.
                self.completions
                    .extend([number.wrapping_add(1 << 20), 0, u64::MAX]);
                let due = now + 40 * FLUSH;
                (Some(due), [Some(due), None])
            }
            _ => (Some(now + FLUSH), [Some(now + FLUSH), None]),
        };
        self.flushes.push(Flush {
            number,
            commands,
            due,
            tells,
        });
    }

    pub(super) fn completion(&mut self) -> Option<u64> {
        self.completions.pop_front()
    }

    pub(super) fn reset(&mut self) {
        self.resetting = true;
        self.settle();
    }

    pub(super) fn is_resetting(&self) -> bool {
        self.resetting
    }

    /// How part of `part` could still be reached.
    pub(super) fn reach(&self, space: u64, part: Range) -> Option<Reach> {
        let mut latches = self.works.iter().filter(|work| work.space == space);
        let at = latches.find_map(|work| work.latch.filter(|latch| part.holds(latch.at)));
        if let Some(latch) = at {
            let page = Range::page(latch.at, PageSize::FourKiB);
            return Some(Reach::Work { page });
        }
        let own = |entry: &&Entry| {
            self.space_of(entry.context) == Some(space) && entry.page.overlaps(part)
        };
        let entry = self.entries.iter().find(own)?;
        let pending = self
            .flushes
            .iter()
            .flat_map(|flush| &flush.commands)
            .chain(&self.queued);
        let asked = if pending.into_iter().any(|command| entry.is_covered(command)) {
            Asked::Pending
        } else if self.asked > 0 {
            Asked::Elsewhere
        } else {
            Asked::Nothing
        };
        Some(Reach::Entry {
            page: entry.page,
            asked,
        })
    }

    /// Moves work on: what is to be written now, and until when there is nothing to do.
    pub(super) fn step(&mut self) -> (Option<u64>, Option<Instant>) {
        let now = Instant::now();
        let mut wake: Option<Instant> = None;
        for nth in 0..self.works.len() {
            let work = &self.works[nth];
            if work.state != WorkState::Running {
                continue;
            }
            let (context, single, next) = (work.context, work.is_single(), work.next);
            if let Some(latch) = &mut self.works[nth].latch {
                if latch.due <= now && !self.held {
                    latch.writing = true;
                    return (Some(self.works[nth].id), None);
                }
                let due = latch.due;
                wake = Some(wake.map_or(due, |wake| wake.min(due)));
                continue;
            }
            let Some(at) = next else { continue };
            if self.space_of(context).is_none() {
                continue;
            }
            let page = Range::page(at, PageSize::FourKiB);
            let of_it = |block: &Block| block.context == context && block.range.overlaps(page);
            let blocked = self.blocks.iter().any(of_it);
            let usable =
                |entry: &&Entry| entry.context == context && entry.writable && entry.page.holds(at);
            let entry = self.entries.iter().find(usable).copied();
            let work = &mut self.works[nth];
            match entry {
                None => work.state = WorkState::Miss(at),
                Some(_) if blocked => {}
                Some(entry) => {
                    let due = if single { now } else { now + STAY };
                    work.latch = Some(Latch {
                        entry,
                        at,
                        due,
                        writing: false,
                    });
                    wake = Some(wake.map_or(due, |wake| wake.min(due)));
                }
            }
        }
        // While it is held nothing becomes due.
        (None, wake.filter(|_| !self.held))
    }

    /// What was to be written has been.
    pub(super) fn written(&mut self, id: u64) {
        let Some(work) = self.work(id) else { return };
        let Some(latch) = work.latch.take() else {
            return;
        };
        work.next = next_page(work.range, latch.at);
        if work.next.is_none() {
            work.state = WorkState::Done;
        }
    }
}
