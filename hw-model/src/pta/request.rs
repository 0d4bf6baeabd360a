//! Page requests: what the device asks for when the page table has not what a command needs, and the answers.
//!
//! A request goes into a ring of two words an entry, and fires the interrupt. Software takes it by moving the head on, does what it
//! takes, and answers its *group*. The device believes no answer: told to retry it walks the page table again. A request that finds no
//! room is dropped, which the status register says; its device asks again after a while. One that is not answered in time
//! ends its command.

use shootdown_primitive::time::{Duration, Instant};

use shootdown::Rights;

use super::layout::{
    GROUP, INVALID, NO_ANSWER, PAGE_FAULT, PASID, READ, REQUESTS, RESPONSE, RETRY, WRITE,
};
use super::state::{Phase, Place, State};

/// When a request that found no room is made again.
const AGAIN: Duration = Duration::from_micros(200);

/// One that waits for its answer.
struct Waiting {
    pasid: u64,
    group: u64,
    place: Place,
}

pub(super) struct Requests {
    ring: [[u64; 2]; REQUESTS],
    size: u64,
    pub(super) head: u64,
    tail: u64,
    pub(super) overflowed: bool,
    waiting: Vec<Waiting>,
    /// Groups are numbered on across resets: an answer to an old one is none to a new one.
    group: u64,
}

impl Requests {
    pub(super) fn new(size: usize) -> Self {
        Self {
            ring: [[0; 2]; REQUESTS],
            size: size.clamp(2, REQUESTS) as u64,
            head: 0,
            tail: 0,
            overflowed: false,
            waiting: Vec::new(),
            group: 0,
        }
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn tail(&self) -> u64 {
        self.tail
    }

    pub(super) fn set_head(&mut self, head: u64) {
        if head < self.size {
            self.head = head;
        }
    }

    pub(super) fn word(&self, index: usize, word: usize) -> u64 {
        self.ring.get(index).map_or(0, |entry| entry[word])
    }

    /// The command waits no longer.
    pub(super) fn forget(&mut self, place: Place) {
        self.waiting.retain(|one| one.place != place);
    }

    pub(super) fn reset(&mut self) {
        (self.head, self.tail, self.overflowed) = (0, 0, false);
        self.waiting.clear();
    }
}

impl State {
    /// The command at `place` cannot go on without the page at `addr`. What it waits for then.
    pub(super) fn request(
        &mut self,
        place: Place,
        pasid: u64,
        addr: u64,
        needed: Rights,
        now: Instant,
    ) -> Phase {
        let requests = &mut self.requests;
        let next = (requests.tail + 1) % requests.size;
        if next == requests.head {
            requests.overflowed = true;
            self.counts.requests_dropped += 1;
            self.interrupt = true;
            return Phase::Again(now + AGAIN);
        }
        requests.group = (requests.group + 1) & 0xffff;
        let group = requests.group;
        let waiting = Waiting {
            pasid,
            group,
            place,
        };
        requests.waiting.push(waiting);
        if self.draw(self.config.faults.request_lost) {
            self.counts.requests_lost += 1;
        } else {
            let word = GROUP.put(PASID.put(0, pasid), group);
            let word = READ.put(word, needed.contains(Rights::READ).into());
            let word = WRITE.put(word, needed.contains(Rights::WRITE).into());
            let requests = &mut self.requests;
            requests.ring[requests.tail as usize] = [word, addr & !0xfff];
            requests.tail = next;
            self.counts.requests += 1;
            self.interrupt = true;
        }
        Phase::Asked(now + self.config.request_timeout)
    }

    /// An answer.
    pub(super) fn respond(&mut self, value: u64) {
        let (pasid, group) = (PASID.get(value), GROUP.get(value));
        let mut waiting = self.requests.waiting.iter();
        let of = |one: &Waiting| one.pasid == pasid && one.group == group;
        let Some(at) = waiting.position(of) else {
            self.counts.responses_ignored += 1;
            return;
        };
        match RESPONSE.get(value) {
            RETRY => {
                self.counts.responses += 1;
                let place = self.requests.waiting.swap_remove(at).place;
                self.slot(place).phase = Phase::Ready;
            }
            INVALID => {
                self.counts.responses += 1;
                let place = self.requests.waiting.swap_remove(at).place;
                self.fail(place, PAGE_FAULT);
            }
            _ => self.counts.responses_ignored += 1,
        }
    }

    /// Nobody has answered in time.
    pub(super) fn unanswered(&mut self, place: Place) {
        self.counts.requests_unanswered += 1;
        self.fail(place, NO_ANSWER);
    }
}
