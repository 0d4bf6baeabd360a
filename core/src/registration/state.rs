//! The state word: one owner of each edge.
//!
//! ```text
//!            insert              it is in the index
//! Prepared ─────────▶ Inserting ─────────▶ Live
//!                         │ detach           │ detach, last put, exit
//!                         └───────┬──────────┘
//!                                 ▼   uses = 0          release returned
//!                             Detached ────▶ (completed) ─────────▶ Released
//! ```
//! Besides the state the word counts the *uses* (callbacks that run or will run: from `start` to the return of `end`; and the
//! insertion itself, which may be put off), the *shares* (segments that hold the registration through get / put), and the invalidations
//! that have *started*. All are in one word so that each race has one winner:
//! * a use is only taken while Inserting or Live; after Detached the count can only fall, so exactly one party sees
//!   "Detached with no uses" for the first time: who detached, or the last to leave. That party *completes*. (R1-R3)
//! * the last put goes to Detached in the same step; a get that comes later finds it so and makes a new one. (R31)
//! * an invalidation takes its use and is counted as started in the same step, so that begin and retry each read the word once: who finds
//!   it live, unused and as often started as before has been disturbed by nobody. (R9)
//!
//! Every step of what others can see is an AcqRel read-modify-write of this one word, so they are totally ordered, and who completes has
//! seen everything that the callbacks did. No other location takes part in the argument.

use crate::primitive::atomic::{AtomicU64, Ordering};

/// Where a registration stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum State {
    Prepared = 0,
    Inserting = 1,
    Live = 2,
    Detached = 3,
    Released = 4,
}

const STATE: u64 = 0b111;
/// A fault has begun: from then on somebody asks which ranges its invalidations were of.
const ASKED: u64 = 1 << 3;
/// Somebody asked for it by name, as against exit: a second time is a mistake of the caller.
const UNREGISTERED: u64 = 1 << 4;
/// It was made to be shared.
const SHARED: u64 = 1 << 5;
/// Invalidations that were in progress when it was published may not have found it.
const MISSED: u64 = 1 << 6;
/// At most one for each invalidation that can be in progress, and one for the insertion.
const USE: u64 = 1 << 8;
const USES: u64 = 0x7f << 8;
const SHARE: u64 = 1 << 15;
const SHARES: u64 = 0x7fff << 15;
/// At the top, where it wraps and disturbs nothing. 34 bits. A fault would have to wait, between begin and retry, for exactly as many
/// invalidations of its registration, half an hour of nothing else at 100 ns each. A note is as old as its slot is unused: one that is
/// exactly as many invalidations old has a number of today, and can hide that another of that number was overwritten.
const STARTED: u64 = 1 << 30;
const STARTED_SHIFT: u32 = 30;
const _: () = assert!(crate::active::SLOTS < 0x7f);

/// How many of `started` came after `seen`.
pub(crate) fn started_since(started: u64, seen: u64) -> u64 {
    started.wrapping_sub(seen) & (u64::MAX >> STARTED_SHIFT)
}

/// A copy of the word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Snapshot(u64);

impl Snapshot {
    #[inline]
    pub(crate) fn state(self) -> State {
        match self.0 & STATE {
            0 => State::Prepared,
            1 => State::Inserting,
            2 => State::Live,
            3 => State::Detached,
            _ => State::Released,
        }
    }

    pub(crate) fn uses(self) -> u64 {
        (self.0 & USES) / USE
    }

    fn shares(self) -> u64 {
        (self.0 & SHARES) / SHARE
    }

    /// How many invalidations have started.
    #[inline]
    pub(crate) fn started(self) -> u64 {
        self.0 >> STARTED_SHIFT
    }

    /// Live, and no invalidation is in progress that it would have to know of.
    #[inline]
    pub(crate) fn is_calm(self) -> bool {
        self.0 & (STATE | USES | MISSED) == State::Live as u64
    }

    /// The same, and it is known that faults ask.
    #[inline]
    pub(crate) fn is_calm_and_asked(self) -> bool {
        self.0 & (STATE | USES | MISSED | ASKED) == State::Live as u64 | ASKED
    }

    /// Somebody wants to know of what range its invalidations were.
    #[inline]
    pub(crate) fn is_asked(self) -> bool {
        self.0 & ASKED != 0
    }

    /// Invalidations that are older than it may be in progress.
    pub(crate) fn has_missed(self) -> bool {
        self.0 & MISSED != 0
    }

    /// Made by get, ended by the last put.
    pub(crate) fn is_shared(self) -> bool {
        self.0 & SHARED != 0
    }

    /// No callback begins any more.
    #[inline]
    pub(crate) fn is_detached(self) -> bool {
        matches!(self.state(), State::Detached | State::Released)
    }

    /// No callback runs or will run.
    pub(crate) fn is_quiet(self) -> bool {
        self.is_detached() && self.uses() == 0
    }

    /// Whoever gives a use back completes it.
    fn has_one_use_and_is_detached(self) -> bool {
        debug_assert!(self.uses() > 0, "a use is given back once");
        self.uses() == 1 && self.state() == State::Detached && !planted!("r5")
    }

    fn with(self, state: State) -> Self {
        Self(self.0 & !STATE | state as u64)
    }
}

/// What a detach found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Detach {
    /// This call detached it, and nobody uses it: the caller completes.
    Complete,
    /// This call detached it; the last to leave completes.
    InUse,
    /// Other segments still share it: nothing was detached.
    Shared,
    /// It was never inserted.
    NotInserted,
    /// Exit or a last put was first.
    Already,
    /// An earlier unregister was first.
    AlreadyUnregistered,
}

#[derive(Debug)]
pub(crate) struct StateWord(AtomicU64);

impl StateWord {
    pub(crate) fn new() -> Self {
        Self(AtomicU64::new(State::Prepared as u64))
    }

    /// One that a first share already holds.
    pub(crate) fn shared() -> Self {
        Self(AtomicU64::new(State::Prepared as u64 | SHARED | SHARE))
    }

    #[inline]
    pub(crate) fn load(&self) -> Snapshot {
        Snapshot(self.0.load(Ordering::Acquire))
    }

    /// Applies `step` until it sticks or declines.
    fn update(
        &self,
        mut step: impl FnMut(Snapshot) -> Option<Snapshot>,
    ) -> Result<Snapshot, Snapshot> {
        let mut seen = self.load();
        loop {
            let Some(next) = step(seen) else {
                return Err(seen);
            };
            if planted!("r1") {
                self.0.store(next.0, Ordering::Release);
                return Ok(seen);
            }
            match self
                .0
                .compare_exchange_weak(seen.0, next.0, Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(_) => return Ok(seen),
                Err(now) => seen = Snapshot(now),
            }
        }
    }

    /// Prepared → Inserting, with a use for whoever inserts; nothing if that had happened before. Nobody else has it yet, so a store does:
    /// what shows it to others releases.
    pub(crate) fn begin_insert(&self) {
        let word = self.load();
        if word.state() == State::Prepared {
            self.0
                .store(word.with(State::Inserting).0 + USE, Ordering::Relaxed);
        }
    }

    /// The last step of whoever inserts: Inserting → Live, unless it was detached meanwhile, and its use is given back; as
    /// [`StateWord::leave`].
    pub(crate) fn go_live(&self) -> bool {
        let before = self.update(|word| {
            let state = match word.state() {
                State::Inserting => State::Live,
                other => other,
            };
            Some(Snapshot(word.with(state).0 - USE))
        });
        before.is_ok_and(Snapshot::has_one_use_and_is_detached)
    }

    /// Takes a use for an invalidation that starts, if callbacks may still begin: the word with it.
    #[inline]
    pub(crate) fn enter(&self) -> Option<Snapshot> {
        let next = |word: Snapshot| Snapshot(word.0.wrapping_add(STARTED) + USE);
        let before = self.update(|word| {
            matches!(word.state(), State::Inserting | State::Live).then(|| next(word))
        });
        before.ok().map(next)
    }

    /// A fault begins. An invalidation that started before may not see it, and leaves no note: then it counts as overlapping.
    pub(crate) fn note_asked(&self) {
        self.0.fetch_or(ASKED, Ordering::AcqRel);
    }

    /// Before it goes live: older invalidations are in progress.
    pub(crate) fn note_missed(&self) {
        self.0.fetch_or(MISSED, Ordering::AcqRel);
    }

    /// They have ended.
    pub(crate) fn clear_missed(&self) {
        self.0.fetch_and(!MISSED, Ordering::AcqRel);
    }

    /// Gives a use back; true if the caller was the last one of a detached registration: it completes.
    #[inline]
    pub(crate) fn leave(&self) -> bool {
        Snapshot(self.0.fetch_sub(USE, Ordering::AcqRel)).has_one_use_and_is_detached()
    }

    /// To Detached. `explicit`: by an unregister of this registration, not by exit or a drop.
    pub(crate) fn detach(&self, explicit: bool) -> Detach {
        let mark = if explicit { UNREGISTERED } else { 0 };
        let step = self.update(|word| match word.state() {
            State::Inserting | State::Live => Some(Snapshot(word.with(State::Detached).0 | mark)),
            State::Prepared => None,
            State::Detached | State::Released => {
                (word.0 & UNREGISTERED == 0 && explicit).then_some(Snapshot(word.0 | mark))
            }
        });
        match step {
            Ok(before)
                if matches!(before.state(), State::Detached | State::Released)
                    && !planted!("r2") =>
            {
                Detach::Already
            }
            Ok(before) if before.uses() == 0 || planted!("r5") => Detach::Complete,
            Ok(_) => Detach::InUse,
            Err(found) if found.state() == State::Prepared => Detach::NotInserted,
            Err(_) if explicit => Detach::AlreadyUnregistered,
            Err(_) => Detach::Already,
        }
    }

    /// The release has returned.
    pub(crate) fn released(&self) {
        let _ = self.update(|word| Some(word.with(State::Released)));
    }

    /// Joins the segments that share it, unless the last has left.
    pub(crate) fn get(&self) -> bool {
        self.update(|word| {
            let joinable = matches!(
                word.state(),
                State::Prepared | State::Inserting | State::Live
            );
            // With as many shares as can be counted the newcomer makes a registration of its own.
            (joinable && (1..SHARES / SHARE).contains(&word.shares()) || planted!("r31"))
                .then_some(Snapshot(word.0 + SHARE))
        })
        .is_ok()
    }

    /// Leaves; the last one detaches in the same step.
    pub(crate) fn put(&self) -> Detach {
        let step = self.update(|word| {
            let less = Snapshot(word.0 - SHARE);
            let last = less.shares() == 0;
            Some(match word.state() {
                State::Inserting | State::Live if last => less.with(State::Detached),
                _ => less,
            })
        });
        let before = step.unwrap_or_else(|seen| seen);
        match before.state() {
            State::Prepared => Detach::NotInserted,
            State::Detached | State::Released => Detach::Already,
            _ if before.shares() > 1 => Detach::Shared,
            _ if before.uses() == 0 => Detach::Complete,
            _ => Detach::InUse,
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn live() -> StateWord {
        let word = StateWord::new();
        word.begin_insert();
        assert!(!word.go_live());
        word
    }

    #[test]
    fn who_detaches_an_unused_one_completes() {
        let word = live();
        assert_eq!(word.detach(true), Detach::Complete);
        assert!(word.load().is_quiet());
        assert!(word.enter().is_none(), "nobody enters after detach");
    }

    #[test]
    fn the_last_to_leave_a_detached_one_completes() {
        let word = live();
        let enter = || word.enter().map(Snapshot::started);
        assert_eq!([enter(), enter()], [Some(1), Some(2)]);
        assert_eq!(word.detach(true), Detach::InUse);
        assert!(!word.leave());
        assert!(word.leave());
    }

    #[test]
    fn it_is_calm_while_nothing_runs_and_counts_what_has_started() {
        let word = live();
        assert!(word.load().is_calm());
        word.note_missed();
        assert!(!word.load().is_calm());
        word.clear_missed();
        assert!(word.enter().is_some());
        assert!(!word.load().is_calm());
        assert!(!word.leave());
        assert!(word.load().is_calm());
        assert_eq!(word.load().started(), 1);
    }

    #[test]
    fn counts_of_the_started_wrap_and_leave_the_rest_alone() {
        let word = live();
        let most = u64::MAX >> STARTED_SHIFT;
        word.0.fetch_or(most << STARTED_SHIFT, Ordering::Relaxed);
        let seen = word.load();
        assert!(seen.is_calm() && seen.started() == most);
        assert_eq!(word.enter().map(Snapshot::started), Some(0));
        assert_eq!(word.load().uses(), 1);
        assert_eq!(started_since(word.load().started(), seen.started()), 1);
    }

    #[test]
    fn an_insertion_that_is_put_off_completes_what_was_detached_meanwhile() {
        let word = StateWord::new();
        word.begin_insert();
        assert_eq!(word.detach(true), Detach::InUse);
        assert!(word.go_live());
    }

    #[test]
    fn the_loser_of_a_detach_sees_that_it_lost() {
        let word = live();
        assert_eq!(word.detach(false), Detach::Complete);
        assert_eq!(word.detach(true), Detach::Already, "exit was first");
        assert_eq!(word.detach(true), Detach::AlreadyUnregistered);
    }

    #[test]
    fn the_last_put_detaches_and_a_later_get_is_refused() {
        let word = StateWord::shared();
        word.begin_insert();
        assert!(word.get());
        assert!(!word.go_live());
        assert_eq!(word.put(), Detach::Shared);
        assert_eq!(word.put(), Detach::Complete);
        assert!(!word.get());
    }
}
