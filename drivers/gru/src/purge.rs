//! TLB-global handles: purges in flight, several at a time, without a lock.
//!
//! # Handles
//! Every purge has a sequence number. A handle's word says which purge it carries, and how far: FREE → STARTING (claimed, fields
//! being written) → RUNNING → FREE. A ticket is the last number that had been given; it is acknowledged once no handle
//! carries a purge of that number or a lower one. Whoever sees that a RUNNING handle has become idle frees it; as no number
//! comes twice, a slow observer cannot free its next purge.
//!
//! Sixteen handles belong to a processor each, the rest to everybody: whoever issues takes its own first, so that purges of several
//! processors meet at no handle.
//!
//! # Wider purges
//! A purge of the whole device does what every purge with a lower number was asked for: its acknowledgement counts for those
//! too. Handles that still carry one are put out of service (OUT) until the hardware lets go of them or is reset. The last
//! handle is kept for purges of the whole device, so that there is one when all others are stuck. Once they are, the handles are
//! *exhausted*, which only a reset mends.
//!
//! # Which purges never ended
//! A handle that has become idle by itself still holds its opcode; one that a reset has taken off its work does not. So it is counted,
//! once for each purge, what stood in for an end that never came: a wider purge, or a reset.

use std::cell::Cell;

use shootdown::{Completion, DeviceError, Registers};
use shootdown_primitive::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use shootdown_primitive::thread_local;
use shootdown_primitive::time::{Duration, Instant};

use crate::handle::Timing;
use crate::layout::{PURGES, purge, start, status, tgh};

const FREE: u64 = 0;
const STARTING: u64 = 1;
const RUNNING: u64 = 2;
const OUT: u64 = 3;
const PHASE: u64 = 3;
const WHOLE: u64 = 4;
const SHIFT: u32 = 3;

/// Handles that belong to a processor each. The others are everybody's.
const PRIVATE: usize = 16;

/// The handle of the processor that this thread is taken to run on: two threads meet at one only where there are more than 16.
fn home() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static HOME: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    HOME.with(|home| {
        if home.get() == usize::MAX {
            // Relaxed: the number orders nothing.
            home.set(NEXT.fetch_add(1, Ordering::Relaxed) % PRIVATE);
        }
        home.get()
    })
}

/// The fields of one purge.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Purge {
    pub(crate) address: u64,
    pub(crate) what: u64,
    pub(crate) contexts: u64,
    /// Everything of the device.
    pub(crate) whole: bool,
}

impl Purge {
    /// Everything of the device.
    pub(crate) fn whole() -> Self {
        Self {
            address: 0,
            what: tgh::what(None, 0, tgh::PAGES),
            contexts: tgh::contexts(u16::MAX),
            whole: true,
        }
    }
}

/// The handles of a chiplet.
#[derive(Debug, Default)]
pub(crate) struct Purges {
    last: AtomicU64,
    /// Purges up to this number are covered by a wider one, or by a reset.
    covered: AtomicU64,
    handles: [AtomicU64; PURGES],
    /// No handle is left in service but the one for the whole device.
    exhausted: AtomicBool,
    /// Purges that never ended and that a wider purge stood in for, as far as a reset has shown them.
    never_ended: AtomicU64,
    /// Purges that a reset ended.
    reset: AtomicU64,
    /// When each handle's purge was started, in nanoseconds of the clock.
    started: [AtomicU64; PURGES],
    clock: Clock,
    /// What purges that ended by themselves took, from their start to when that was seen.
    pub(crate) timing: Timing,
}

/// Counts from when it was made.
#[derive(Debug)]
struct Clock(Instant);

impl Default for Clock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock {
    fn nanos(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// What became of purges that did not end by themselves.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(crate) struct Unended {
    /// A wider purge stood in for them.
    pub(crate) covered: u64,
    /// A reset ended them.
    pub(crate) reset: u64,
    /// They are at work.
    pub(crate) open: u64,
}

impl Purges {
    /// Starts a purge: whether there was a handle for it.
    ///
    /// # Errors
    /// The chiplet is gone; the handle is out of service then.
    pub(crate) fn issue(
        &self,
        registers: &dyn Registers,
        what: &Purge,
    ) -> Result<bool, DeviceError> {
        self.issue_by(home(), registers, what)
    }

    /// [`Purges::issue`] by the processor whose handle is `home`.
    fn issue_by(
        &self,
        home: usize,
        registers: &dyn Registers,
        what: &Purge,
    ) -> Result<bool, DeviceError> {
        // AcqRel, with the load in `ticket`: a ticket that is taken after this has at least this number.
        let number = self.last.fetch_add(1, Ordering::AcqRel) + 1;
        let word = (number << SHIFT) | if what.whole { WHOLE } else { 0 };
        let Some(index) = self.claim(home, registers, word | STARTING, what.whole) else {
            return Ok(false);
        };
        let base = purge(index);
        // Relaxed: ordered by the store of RUNNING, and a statistic.
        self.started[index].store(self.clock.nanos(), Ordering::Relaxed);
        let started = registers
            .write(base + tgh::ADDRESS, what.address)
            .and_then(|()| registers.write(base + tgh::WHAT, what.what))
            .and_then(|()| registers.write(base + tgh::WHERE, what.contexts))
            .and_then(|()| registers.write(base, start(tgh::INVALIDATE)));
        let phase = if started.is_ok() { RUNNING } else { OUT };
        // Release, with the acquire loads of observers: who sees RUNNING reads the handle's status after the start.
        self.handles[index].store(word | phase, Ordering::Release);
        started.map(|()| true)
    }

    fn claim(
        &self,
        home: usize,
        registers: &dyn Registers,
        word: u64,
        whole: bool,
    ) -> Option<usize> {
        let usable = if whole { PURGES } else { PURGES - 1 };
        // Its own, those that everybody shares, then those of others.
        let others = (0..PRIVATE).filter(|index| *index != home);
        let order = std::iter::once(home).chain(PRIVATE..usable).chain(others);
        let free = |index: &usize| {
            // AcqRel: the fields are written after the claim, and after what the last owner did.
            self.handles[*index]
                .compare_exchange(FREE, word, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        };
        order.clone().find(free).or_else(|| {
            for index in 0..usable {
                self.observe(registers, index);
            }
            order.clone().find(free)
        })
    }

    /// Everything that was issued so far.
    pub(crate) fn ticket(&self) -> u64 {
        self.last.load(Ordering::Acquire)
    }

    /// Whether everything of `ticket` is acknowledged. Takes no lock and waits for nothing.
    pub(crate) fn poll(&self, registers: &dyn Registers, ticket: u64) -> Completion {
        loop {
            // Acquire, with the update in `cover`.
            let covered = self.covered.load(Ordering::Acquire);
            let answer = self.scan(registers, covered, ticket);
            // A wider purge that was found done on the way may cover what was not.
            if answer == Completion::Done || self.covered.load(Ordering::Acquire) == covered {
                return answer;
            }
        }
    }

    fn scan(&self, registers: &dyn Registers, covered: u64, ticket: u64) -> Completion {
        let mut answer = Completion::Done;
        for (index, handle) in self.handles.iter().enumerate() {
            // Acquire: with the stores of `issue`.
            let number = handle.load(Ordering::Acquire) >> SHIFT;
            if number <= covered || number > ticket {
                continue;
            }
            match self.observe(registers, index) {
                Completion::Done => {}
                Completion::Pending if answer == Completion::Done => answer = Completion::Pending,
                Completion::Pending => {}
                Completion::Failed => answer = Completion::Failed,
            }
        }
        answer
    }

    /// Looks at a handle, and frees it if its purge is done.
    fn observe(&self, registers: &dyn Registers, index: usize) -> Completion {
        let handle = &self.handles[index];
        // Acquire: with the stores of `issue`.
        let word = handle.load(Ordering::Acquire);
        match word & PHASE {
            FREE => return Completion::Done,
            STARTING => return Completion::Pending,
            _ => {}
        }
        let Ok(dw0) = registers.read(purge(index)) else {
            return Completion::Failed;
        };
        let running = word & PHASE == RUNNING;
        match status::of(dw0) {
            status::IDLE => {
                let ended = tgh::has_ended(dw0);
                let began = self.started[index].load(Ordering::Relaxed);
                if ended && running && word & WHOLE != 0 {
                    self.cover(word >> SHIFT);
                }
                // Release: the next owner's claim comes after what was seen here. A failure means that somebody else
                // has freed it.
                let freed =
                    handle.compare_exchange(word, FREE, Ordering::AcqRel, Ordering::Relaxed);
                if freed.is_ok() && ended && running {
                    let took = self.clock.nanos().saturating_sub(began);
                    self.timing.record(Duration::from_nanos(took));
                }
                if freed.is_ok() && !ended {
                    let counter = if running {
                        &self.reset
                    } else {
                        &self.never_ended
                    };
                    counter.fetch_add(1, Ordering::Relaxed);
                }
                if freed.is_ok() && !running {
                    self.exhausted.store(false, Ordering::Relaxed);
                }
                Completion::Done
            }
            status::ACTIVE if running => Completion::Pending,
            _ => Completion::Failed,
        }
    }

    /// The purge of the whole device with this number is acknowledged.
    fn cover(&self, number: u64) {
        // AcqRel, with the load in `poll`.
        self.covered.fetch_max(number, Ordering::AcqRel);
        for handle in &self.handles {
            let word = handle.load(Ordering::Acquire);
            if word & PHASE == RUNNING && word >> SHIFT < number {
                // A failure means that it was freed.
                let _ = handle.compare_exchange(
                    word,
                    (word & !PHASE) | OUT,
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                );
            }
        }
        // Relaxed: it hastens a reset, and nothing else is concluded from it.
        if self.out_of_service() == PURGES - 1 {
            self.exhausted.store(true, Ordering::Relaxed);
        }
    }

    /// Whether no handle is left in service but the one for the whole device.
    pub(crate) fn is_exhausted(&self) -> bool {
        self.exhausted.load(Ordering::Relaxed)
    }

    /// What became of purges that did not end by themselves.
    pub(crate) fn unended(&self, registers: &dyn Registers) -> Unended {
        for index in 0..PURGES {
            self.observe(registers, index);
        }
        let mut unended = Unended {
            covered: self.never_ended.load(Ordering::Relaxed),
            reset: self.reset.load(Ordering::Relaxed),
            open: 0,
        };
        for handle in &self.handles {
            match handle.load(Ordering::Acquire) & PHASE {
                OUT => unended.covered += 1,
                RUNNING => unended.open += 1,
                _ => {}
            }
        }
        unended
    }

    /// The chiplet was reset after `ticket` had been taken: all of that is done, and its handles are idle.
    pub(crate) fn reset(&self, registers: &dyn Registers, ticket: u64) {
        self.covered.fetch_max(ticket, Ordering::AcqRel);
        for index in 0..PURGES {
            self.observe(registers, index);
        }
        self.exhausted.store(false, Ordering::Relaxed);
    }

    /// How many handles are out of service.
    fn out_of_service(&self) -> usize {
        let out = |handle: &&AtomicU64| handle.load(Ordering::Acquire) & PHASE == OUT;
        self.handles.iter().filter(out).count()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Mutex;

    use super::*;

    /// Handles that stay active until the test lets go of them.
    #[derive(Default)]
    struct Fake(Mutex<HashMap<u64, u64>>);

    impl Registers for Fake {
        fn len(&self) -> u64 {
            128 << 20
        }
        fn read(&self, offset: u64) -> Result<u64, DeviceError> {
            Ok(self.0.lock().unwrap().get(&offset).copied().unwrap_or(0))
        }
        fn write(&self, offset: u64, value: u64) -> Result<(), DeviceError> {
            self.0.lock().unwrap().insert(offset, value);
            Ok(())
        }
    }

    /// The first word of a handle whose purge has ended.
    const ENDED: u64 = tgh::INVALIDATE << 8;

    fn some() -> Purge {
        Purge {
            address: 0,
            what: tgh::what(Some(8), 0, 1),
            contexts: tgh::contexts(1),
            whole: false,
        }
    }

    #[test]
    fn a_ticket_waits_for_its_purges_and_for_no_later_one() {
        let (fake, purges) = (Fake::default(), Purges::default());
        assert!(purges.issue_by(0, &fake, &some()).unwrap());
        let ticket = purges.ticket();
        assert!(purges.issue_by(0, &fake, &some()).unwrap());
        assert_eq!(purges.poll(&fake, ticket), Completion::Pending);
        fake.write(purge(0), ENDED).unwrap();
        assert_eq!(purges.poll(&fake, ticket), Completion::Done);
        assert_eq!(purges.poll(&fake, purges.ticket()), Completion::Pending);
        assert_eq!(purges.timing.count(), 1, "one has ended");
    }

    #[test]
    fn a_processor_takes_its_own_handle_then_those_of_everybody_then_others() {
        let (fake, purges) = (Fake::default(), Purges::default());
        let mut taken = Vec::new();
        while purges.issue_by(5, &fake, &some()).unwrap() {
            let active = |index: &usize| {
                status::of(fake.read(purge(*index)).unwrap()) == status::ACTIVE
                    && !taken.contains(index)
            };
            taken.extend((0..PURGES).find(active));
        }
        let others = (0..PRIVATE).filter(|index| *index != 5);
        let want: Vec<_> = [5]
            .into_iter()
            .chain(PRIVATE..PURGES - 1)
            .chain(others)
            .collect();
        assert_eq!(taken, want);
    }

    #[test]
    fn stuck_handles_are_covered_by_a_wider_purge_and_come_back_when_idle() {
        let (fake, purges) = (Fake::default(), Purges::default());
        while purges.issue_by(0, &fake, &some()).unwrap() {}
        let ticket = purges.ticket();
        assert!(
            purges.issue_by(0, &fake, &Purge::whole()).unwrap(),
            "one handle is kept for it"
        );
        assert_eq!(purges.poll(&fake, ticket), Completion::Pending);
        fake.write(purge(PURGES - 1), ENDED).unwrap();
        assert_eq!(purges.poll(&fake, purges.ticket()), Completion::Done);
        assert_eq!(purges.poll(&fake, ticket), Completion::Done);
        assert_eq!(purges.out_of_service(), PURGES - 1);
        assert!(purges.is_exhausted());
        fake.write(purge(3), ENDED).unwrap();
        assert!(purges.issue_by(0, &fake, &some()).unwrap());
        assert!(!purges.issue_by(0, &fake, &some()).unwrap());
        assert!(!purges.is_exhausted());
    }

    #[test]
    fn each_purge_that_never_ended_is_counted_once_with_what_stood_in_for_it() {
        let (fake, purges) = (Fake::default(), Purges::default());
        for _ in 0..3 {
            assert!(purges.issue_by(0, &fake, &some()).unwrap());
        }
        fake.write(purge(0), ENDED).unwrap();
        assert!(purges.issue_by(0, &fake, &Purge::whole()).unwrap());
        let unended = |covered, reset, open| Unended {
            covered,
            reset,
            open,
        };
        assert_eq!(purges.unended(&fake), unended(0, 0, 3));
        let whole = (0..PURGES).find(|&index| {
            index != 16
                && index != 17
                && status::of(fake.read(purge(index)).unwrap()) != status::IDLE
        });
        fake.write(purge(whole.unwrap()), ENDED).unwrap();
        assert_eq!(purges.unended(&fake), unended(2, 0, 0));
        // One comes late after all, the other is shown by a reset, as is a third that nothing stood in for.
        fake.write(purge(16), ENDED).unwrap();
        assert_eq!(purges.unended(&fake), unended(1, 0, 0));
        assert!(purges.issue_by(0, &fake, &some()).unwrap());
        let ticket = purges.ticket();
        (0..PURGES).for_each(|index| fake.write(purge(index), 0).unwrap());
        purges.reset(&fake, ticket);
        assert_eq!(purges.unended(&fake), unended(1, 1, 0));
    }

    #[test]
    fn an_exception_fails_the_ticket() {
        let (fake, purges) = (Fake::default(), Purges::default());
        purges.issue_by(0, &fake, &some()).unwrap();
        fake.write(purge(0), status::EXCEPTION << 16).unwrap();
        assert_eq!(purges.poll(&fake, purges.ticket()), Completion::Failed);
    }
}
