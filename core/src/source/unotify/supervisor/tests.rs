//! What one call begins for several spaces, and ends.

use std::sync::Mutex;

use super::*;
use crate::notifier::{Drain, Notifier, Op, WouldBlock};
use crate::source::{Needs, service};
use crate::{AddressSpace, Deadlines};

const PAGE: u64 = 4096;

/// Writes down what it is told.
#[derive(Default)]
struct Log {
    started: Mutex<Vec<Range>>,
    ended: Mutex<Vec<Outcome>>,
    panics: bool,
}

impl Notifier for Log {
    fn needs(&self) -> Needs {
        Needs::TOLERATES_FAULTS
    }

    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        assert!(!self.panics, "as it shall");
        lock(&self.started).push(op.range());
        Ok(op.idle())
    }

    fn end(&self, _: &Op<'_>, outcome: Outcome) {
        lock(&self.ended).push(outcome);
    }
}

fn watched() -> Range {
    Range::new(1u64 << 30, 64 * PAGE).unwrap()
}

/// A space of which all that is watched is registered.
fn rig(log: &Arc<Log>) -> (Sink, crate::Registration, AddressSpace) {
    let space = AddressSpace::without_memory(Deadlines::default());
    let registration = space.register(watched(), log.clone(), &[]).unwrap();
    let sink = Sink {
        pin: space.pin(),
        range: watched(),
        service: service::start().unwrap(),
    };
    (sink, registration, space)
}

/// What a call changes that was given so many ranges.
fn changes(count: usize) -> Changes {
    let ranges: Vec<libc::iovec> = (0..count)
        .map(|nth| libc::iovec {
            iov_base: (watched().start().get() + nth as u64 * 2 * PAGE) as *mut _,
            iov_len: PAGE as usize,
        })
        .collect();
    let [at, advice] = [ranges.as_ptr() as u64, libc::MADV_DONTNEED as u64];
    let data = libc::seccomp_data {
        nr: libc::SYS_process_madvise as i32,
        arch: 0,
        instruction_pointer: 0,
        args: [0, at, count as u64, advice, 0, 0],
    };
    let mut changes = Changes::default();
    Call::new(&data).changes(&StandIn::AsItIs, &Maps::open().unwrap(), &mut changes);
    changes
}

#[test]
fn what_there_is_no_room_for_becomes_everything_and_what_was_begun_ends_first() {
    let logs = [(); 2].map(|()| Arc::new(Log::default()));
    let rigs = logs.each_ref().map(rig);
    let sinks = rigs.iter().map(|(sink, ..)| sink);
    let count = CHANGES / 2 + 1;
    let mut open = Open::new();
    assert_eq!(begin(sinks, &changes(count), 0, &mut open), Ok(()));
    assert_eq!(open.len(), 2, "one for each space");
    for log in &logs {
        let started = lock(&log.started);
        assert_eq!(started.last(), Some(&watched()));
        let ended = lock(&log.ended);
        assert_eq!(*ended, vec![Outcome::Unchanged; started.len() - 1]);
    }
    end(&mut open, Outcome::Changed);
    for log in &logs {
        assert_eq!(lock(&log.ended).last(), Some(&Outcome::Changed));
        assert_eq!(lock(&log.ended).len(), lock(&log.started).len());
    }
}

#[test]
fn where_one_space_refuses_the_others_are_told_that_nothing_changed() {
    let (good, bad) = (
        Log::default(),
        Log {
            panics: true,
            ..Log::default()
        },
    );
    let logs = [good, bad].map(Arc::new);
    let rigs = logs.each_ref().map(rig);
    for everything in [false, true] {
        let mut changes = changes(1);
        changes.everything = everything;
        let sinks = rigs.iter().map(|(sink, ..)| sink);
        let mut open = Open::new();
        assert_eq!(begin(sinks, &changes, 0, &mut open), Err(libc::EBUSY));
        assert!(open.is_empty());
    }
    assert_eq!(*lock(&logs[0].ended), [Outcome::Unchanged; 2]);
}

#[test]
fn what_waits_is_bounded_and_waits_only_for_somebody_who_will_look() {
    let supervisor = Supervisor::new(service::start().unwrap());
    let seat = Seat {
        // None: answers go nowhere.
        listener: -1,
        maps: &Maps::open().unwrap(),
        known: Known::new(),
    };
    // SAFETY: integers only.
    let notification: Notification = unsafe { std::mem::zeroed() };
    let leave = || supervisor.leave_to_others(&seat, &notification, Caller::Own);
    let others = SUPERVISORS as isize - 1;
    supervisor.relieved.store(others - 1, Ordering::Relaxed);
    assert!(!leave(), "one has looked, and found nothing");
    supervisor.relieved.store(others, Ordering::Relaxed);
    let room = lock(&supervisor.waiting).capacity();
    assert!((0..=WAITING).all(|_| leave()));
    let waiting = lock(&supervisor.waiting);
    assert_eq!((waiting.len(), waiting.capacity()), (WAITING, room));
}
