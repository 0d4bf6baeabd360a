//! Everything behind the registers, and how commands move on.
//!
//! A command goes on a page at a time: its translations are looked up in the device TLB, or read from the page table, or asked for; then
//! it has *latched* them, and the access is performed when its time has come. Things that take time have a time when they are due;
//! whoever takes the lock at or after it carries them out ([`State::settle`]).

use shootdown_primitive::time::Instant;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use shootdown::{PageSize, Range, Rights};

use super::command::{is_possible, needs};
use super::config::{Plant, PtaConfig};
use super::invalidate::Invalidations;
use super::layout::{
    ACTIVE, BAD_COMMAND, CAUSE, CHECKSUM, COMMAND, COMPARE, DESTINATION, DISABLED, DONE,
    DONE_BYTES, ERROR, FAULT, IDLE, LENGTH, OPCODE, OPERAND, PASIDS, QUEUES, RESULT, SLOTS, SOURCE,
    STATUS, TOUCH,
};
use super::request::Requests;
use super::stats::Counts;
use super::table::Tables;
use super::tlb::{Covers, Tlb, TlbEntry};

/// Queue and slot.
pub(super) type Place = (usize, usize);

/// A translation that is under way: what was read from the page table, if there was anything.
#[derive(Clone, Copy)]
pub(super) struct Walk {
    due: Instant,
    addr: u64,
    needed: Rights,
    found: Option<TlbEntry>,
}

/// One side of an access.
#[derive(Clone, Copy)]
pub(super) struct Side {
    pub(super) entry: TlbEntry,
    pub(super) addr: u64,
}

/// An access that has its translations.
#[derive(Clone, Copy)]
pub(super) struct Latch {
    pub(super) opcode: u64,
    pub(super) space: u64,
    pub(super) source: Option<Side>,
    pub(super) destination: Option<Side>,
    pub(super) len: usize,
    /// Bytes of the command that were done before.
    pub(super) done: u64,
    pub(super) operand: u64,
    due: Instant,
    /// Its number among all.
    number: u64,
    performing: bool,
}

impl Latch {
    fn sides(&self) -> impl Iterator<Item = Side> {
        [self.source, self.destination].into_iter().flatten()
    }
}

/// What a command is at.
#[derive(Clone, Copy, Default)]
pub(super) enum Phase {
    #[default]
    Idle,
    Ready,
    Walking(Walk),
    /// Waits for an answer, at most until then.
    Asked(Instant),
    /// Its page request found no room: it goes on then.
    Again(Instant),
    Latched(Latch),
}

/// A command.
#[derive(Clone, Copy, Default)]
pub(super) struct Slot {
    words: [u64; 8],
    pub(super) phase: Phase,
}

impl Slot {
    /// It has its translations, and will access memory.
    fn is_in_flight(&self) -> bool {
        matches!(self.phase, Phase::Latched(_))
    }

    fn is_performing(&self) -> bool {
        matches!(self.phase, Phase::Latched(latch) if latch.performing)
    }
}

#[derive(Clone, Copy, Default)]
pub(super) struct Queue {
    pub(super) enabled: bool,
    pub(super) pasid: u64,
    slots: [Slot; SLOTS],
}

/// An entry of the PASID table.
#[derive(Clone, Copy, Default)]
pub(super) struct Pasid {
    pub(super) enabled: bool,
    pub(super) root: u64,
    pub(super) space: u64,
}

/// What the device's lock protects.
pub(super) struct State {
    pub(super) config: PtaConfig,
    pub(super) rng: SmallRng,
    pub(super) tables: Tables,
    pub(super) pasids: [Pasid; PASIDS],
    pub(super) queues: Box<[Queue]>,
    /// The commands that are not idle, in the order of their turns.
    active: Vec<Place>,
    pub(super) tlb: Tlb,
    pub(super) requests: Requests,
    pub(super) invalidations: Invalidations,
    /// Latches so far.
    pub(super) latches: u64,
    /// The interrupt is to be fired.
    pub(super) interrupt: bool,
    /// When a reset takes effect, at the earliest.
    resetting: Option<Instant>,
    /// One was not heeded.
    survived: bool,
    /// No access ends.
    pub(super) held: bool,
    pub(super) stopping: bool,
    pub(super) counts: Counts,
}

/// Bytes from `addr` to the end of its 4 KiB page.
fn rest(addr: u64) -> u64 {
    PageSize::FourKiB.bytes() - addr % PageSize::FourKiB.bytes()
}

impl State {
    pub(super) fn new(config: PtaConfig) -> Self {
        Self {
            rng: SmallRng::seed_from_u64(config.faults.seed),
            tables: Tables::new(config.tables.max(1)),
            pasids: [Pasid::default(); PASIDS],
            queues: vec![Queue::default(); QUEUES].into_boxed_slice(),
            active: Vec::new(),
            tlb: Tlb::new(config.tlb_entries),
            requests: Requests::new(config.requests),
            invalidations: Invalidations::default(),
            latches: 0,
            interrupt: false,
            resetting: None,
            survived: false,
            held: false,
            stopping: false,
            counts: Counts::default(),
            config,
        }
    }

    /// True with `probability`.
    pub(super) fn draw(&mut self, probability: f64) -> bool {
        probability > 0.0 && self.rng.random_bool(probability.min(1.0))
    }

    pub(super) fn slot(&mut self, (queue, slot): Place) -> &mut Slot {
        &mut self.queues[queue].slots[slot]
    }

    fn runs(&self, queue: &Queue) -> bool {
        let pasid = self.pasids.get(queue.pasid as usize);
        queue.enabled && pasid.is_some_and(|pasid| pasid.enabled)
    }

    /// A word of a slot.
    pub(super) fn read_slot(&self, (queue, slot): Place, word: usize) -> u64 {
        self.queues[queue].slots[slot].words[word]
    }

    /// Software writes a word of a slot; writing the first may begin a command. What is at work takes nothing.
    pub(super) fn write_slot(&mut self, place: Place, word: usize, value: u64) {
        let runs = self.runs(&self.queues[place.0]);
        let slot = self.slot(place);
        if STATUS.get(slot.words[COMMAND]) == ACTIVE {
            return;
        }
        if word != COMMAND {
            if word < RESULT {
                slot.words[word] = value;
            }
            return;
        }
        slot.words[COMMAND] = CAUSE.put(STATUS.put(value, IDLE), 0);
        if STATUS.get(value) != ACTIVE {
            return;
        }
        slot.words[COMMAND] = STATUS.put(slot.words[COMMAND], ACTIVE);
        for word in [RESULT, FAULT, DONE_BYTES] {
            slot.words[word] = 0;
        }
        slot.phase = Phase::Ready;
        let cause = if !runs {
            Some(DISABLED)
        } else if !is_possible(&slot.words) {
            Some(BAD_COMMAND)
        } else {
            None
        };
        self.active.push(place);
        if let Some(cause) = cause {
            self.fail(place, cause);
        }
    }

    /// A command ends.
    fn end(&mut self, place: Place, status: u64, cause: u64) {
        self.requests.forget(place);
        self.active.retain(|one| *one != place);
        let slot = self.slot(place);
        slot.phase = Phase::Idle;
        let command = STATUS.put(slot.words[COMMAND], status);
        slot.words[COMMAND] = CAUSE.put(command, cause);
    }

    pub(super) fn fail(&mut self, place: Place, cause: u64) {
        self.counts.errors += 1;
        self.end(place, ERROR, cause);
    }

    /// Ends the commands of queues that may not run any more, but for those that have an access in flight.
    pub(super) fn stop_disabled(&mut self) {
        for place in self.active.clone() {
            let queue = &self.queues[place.0];
            if !self.runs(queue) && !queue.slots[place.1].is_in_flight() {
                self.fail(place, DISABLED);
            }
        }
    }

    /// Whether an access is in flight for a queue that `of` says so of.
    pub(super) fn is_busy(&self, of: impl Fn(usize, &Queue) -> bool) -> bool {
        self.active.iter().any(|&(number, slot)| {
            let queue = &self.queues[number];
            of(number, queue) && queue.slots[slot].is_in_flight()
        })
    }

    /// Translations that were read before what `what` covers changed are read again.
    pub(super) fn cancel_walks(&mut self, what: &Covers) {
        if self.config.plants.contains(Plant::STALE_FILL) {
            return;
        }
        for place in self.active.clone() {
            let slot = self.slot(place);
            if let Phase::Walking(Walk {
                found: Some(found), ..
            }) = slot.phase
                && what.covers(found.key)
            {
                slot.phase = Phase::Ready;
                self.counts.walks_cancelled += 1;
            }
        }
    }

    /// Whether an access that began before the one with the number `before` goes through what `what` covers.
    pub(super) fn in_flight(&self, what: &Covers, before: u64) -> bool {
        self.active.iter().any(|&(queue, slot)| {
            let Phase::Latched(latch) = self.queues[queue].slots[slot].phase else {
                return false;
            };
            latch.number <= before && latch.sides().any(|side| what.covers(side.entry.key))
        })
    }

    /// Where work of `space` is that has its translation for part of `part`.
    pub(super) fn works_at(&self, space: u64, part: Range) -> Option<Range> {
        self.active.iter().find_map(|&(queue, slot)| {
            let Phase::Latched(latch) = self.queues[queue].slots[slot].phase else {
                return None;
            };
            let mut pages = latch
                .sides()
                .filter(|_| latch.space == space)
                .map(|side| Range::page(side.addr.into(), PageSize::FourKiB));
            pages.find(|page| page.overlaps(part))
        })
    }

    /// A write of 1 to the reset register. One that comes while a reset is in progress is part of it; the first is always heeded.
    pub(super) fn reset(&mut self, now: Instant) {
        if self.resetting.is_some() {
            return;
        }
        let first = self.counts.resets == 0;
        self.survived = !first && self.draw(self.config.faults.survives_reset);
        if self.survived {
            self.counts.resets_survived += 1;
        } else {
            self.resetting = Some(now + self.config.latency.reset);
        }
    }

    pub(super) fn is_resetting(&self) -> bool {
        self.resetting.is_some() || self.survived
    }

    /// Carries out what is due.
    pub(super) fn settle(&mut self, now: Instant) {
        self.settle_invalidations(now);
        let due = self.resetting.is_some_and(|due| due <= now);
        // What has not begun by now never does.
        let mut places = self.active.iter();
        let performing =
            places.any(|&(queue, slot)| self.queues[queue].slots[slot].is_performing());
        if due && !performing {
            self.resetting = None;
            self.active.clear();
            self.queues.fill(Queue::default());
            self.pasids.fill(Pasid::default());
            self.tables.clear();
            self.tlb.invalidate(&Covers::Everything);
            self.requests.reset();
            self.invalidations = Invalidations::default();
            self.counts.resets += 1;
        }
    }

    /// Moves commands on: one whose access is to be performed now, and until when there is nothing to do.
    pub(super) fn step(&mut self, now: Instant) -> (Option<(Place, Latch)>, Option<Instant>) {
        let mut wake: Option<Instant> = None;
        let mut by = |due: Instant| wake = Some(wake.map_or(due, |wake| wake.min(due)));
        if let Some(due) = self.resetting {
            // What is being performed ends; nothing begins.
            return (None, Some(due));
        }
        let mut nth = 0;
        while let Some(&place) = self.active.get(nth) {
            let held = self.held;
            let slot = self.slot(place);
            match slot.phase {
                Phase::Idle => {}
                Phase::Ready => {
                    let phase = self.advance(place, now);
                    self.slot(place).phase = phase;
                    // It is looked at again, if it is still there.
                    continue;
                }
                Phase::Walking(walk) if walk.due <= now => {
                    let phase = self.walked(place, walk, now);
                    self.slot(place).phase = phase;
                    continue;
                }
                Phase::Again(due) if due <= now => {
                    slot.phase = Phase::Ready;
                    continue;
                }
                Phase::Asked(due) if due <= now => {
                    self.unanswered(place);
                    continue;
                }
                Phase::Walking(Walk { due, .. }) | Phase::Again(due) | Phase::Asked(due) => by(due),
                // While it is held nothing becomes due.
                Phase::Latched(_) if held => {}
                Phase::Latched(mut latch) if latch.due <= now => {
                    latch.performing = true;
                    slot.phase = Phase::Latched(latch);
                    // The others come first the next time.
                    self.active[nth..].rotate_left(1);
                    return (Some((place, latch)), None);
                }
                Phase::Latched(latch) => by(latch.due),
            }
            nth += 1;
        }
        if let Some(due) = self.invalidations.next_due() {
            by(due);
        }
        (None, wake)
    }

    /// A command looks for its next translations.
    fn advance(&mut self, place: Place, now: Instant) -> Phase {
        let queue = &self.queues[place.0];
        let pasid = queue.pasid;
        let words = queue.slots[place.1].words;
        let (opcode, done) = (OPCODE.get(words[COMMAND]), words[DONE_BYTES]);
        let (reads, writes) = needs(&words);
        let left = words[LENGTH] - done;
        let at =
            |word: usize, needed: Option<Rights>| needed.map(|needed| (words[word] + done, needed));
        let (source, destination) = (at(SOURCE, reads), at(DESTINATION, writes));
        let mut len = left;
        let mut sides = [None; 2];
        for (side, wanted) in sides.iter_mut().zip([source, destination]) {
            let Some((addr, needed)) = wanted else {
                continue;
            };
            len = len.min(rest(addr));
            let found = self.tlb.lookup(pasid, addr);
            match found.filter(|found| found.rights.contains(needed)) {
                Some(entry) => *side = Some(Side { entry, addr }),
                None => {
                    self.counts.misses += 1;
                    let root = self.pasids[pasid as usize].root as usize;
                    return Phase::Walking(Walk {
                        due: now + self.config.latency.walk,
                        addr,
                        needed,
                        found: self.tables.walk(root, pasid, addr),
                    });
                }
            }
        }
        if opcode == TOUCH {
            self.progress(place, len);
            return self.slot(place).phase;
        }
        self.latches += 1;
        Phase::Latched(Latch {
            opcode,
            space: self.pasids[pasid as usize].space,
            source: sides[0],
            destination: sides[1],
            len: len as usize,
            done,
            operand: words[OPERAND],
            due: now + self.config.latency.access,
            number: self.latches,
            performing: false,
        })
    }

    /// A translation is done.
    fn walked(&mut self, place: Place, walk: Walk, now: Instant) -> Phase {
        let found = walk
            .found
            .filter(|found| found.rights.contains(walk.needed));
        let Some(entry) = found else {
            self.slot(place).words[FAULT] = walk.addr;
            let pasid = self.queues[place.0].pasid;
            return self.request(place, pasid, walk.addr, walk.needed, now);
        };
        self.counts.fills += 1;
        let evicted = self.tlb.install(entry);
        self.counts.evictions += u64::from(evicted);
        Phase::Ready
    }

    /// `len` more bytes of a command are done.
    fn progress(&mut self, place: Place, len: u64) {
        let slot = self.slot(place);
        slot.words[DONE_BYTES] += len;
        slot.phase = Phase::Ready;
        if slot.words[DONE_BYTES] >= slot.words[LENGTH] {
            slot.words[FAULT] = 0;
            self.counts.commands += 1;
            self.end(place, DONE, 0);
        }
    }

    /// The access was performed; `result` is what it came to.
    pub(super) fn performed(&mut self, place: Place, latch: &Latch, result: Option<u64>) {
        self.counts.bytes += latch.len as u64;
        let runs = self.runs(&self.queues[place.0]);
        let slot = self.slot(place);
        match (latch.opcode, result) {
            (CHECKSUM, Some(sum)) => slot.words[RESULT] = slot.words[RESULT].wrapping_add(sum),
            (COMPARE, Some(at)) => {
                // The rest makes no difference.
                slot.words[RESULT] = at;
                let left = slot.words[LENGTH] - latch.done;
                return self.progress(place, left);
            }
            (COMPARE, None) => slot.words[RESULT] = u64::MAX,
            (_, Some(value)) => slot.words[RESULT] = value,
            (_, None) => {}
        }
        self.progress(place, latch.len as u64);
        if !runs && matches!(self.slot(place).phase, Phase::Ready) {
            self.fail(place, DISABLED);
        }
    }
}
