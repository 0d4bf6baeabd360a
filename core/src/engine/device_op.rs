//! One device in one invalidation: its commands, its doorbell, its acknowledgement, its deadline.

use std::time::Duration;

use arrayvec::ArrayVec;

use super::DEVICES;
use crate::pool::{Chain, Pool};
use crate::primitive::{Backoff, Instant, now};
use crate::registration::Target;
use crate::tlb::{BATCH, Completion, Device, FlushCommand, Health, Issue, Scope, Ticket};

/// One device in one invalidation.
pub(crate) struct DeviceOp {
    pub(super) device: Device,
    commands: ArrayVec<FlushCommand, BATCH>,
    /// The first command that is not issued yet, and whether one before it was queued.
    next: usize,
    queued: bool,
    ticket: Option<Ticket>,
    pub(super) state: Ack,
    /// It missed the deadline of its flush, and something wider was tried.
    pub(super) missed: bool,
    /// Where it is among the [`Known`], if it is.
    known: u16,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Ack {
    /// There was no room yet for all of its commands.
    Issuing,
    Waiting,
    Done,
    Missed,
}

impl DeviceOp {
    #[inline]
    pub(super) fn new(device: Device) -> Self {
        Self {
            device,
            commands: ArrayVec::new_const(),
            next: 0,
            queued: false,
            ticket: None,
            state: Ack::Waiting,
            missed: false,
            known: u16::MAX,
        }
    }

    /// More commands than a batch holds become one for the whole device.
    pub(super) fn add(&mut self, command: FlushCommand) {
        let most = self.device.limits().commands_per_batch.clamp(1, BATCH);
        if self.commands.contains(&command) || self.is_whole() {
            return;
        }
        if self.commands.len() < most {
            self.commands.push(command);
        } else if !planted!("r19-command") {
            self.set_whole();
        }
    }

    fn is_whole(&self) -> bool {
        matches!(self.commands[..], [one] if one.scope == Scope::Device)
    }

    pub(super) fn set_whole(&mut self) {
        self.commands.clear();
        self.commands.push(FlushCommand {
            tag: 0,
            scope: Scope::Device,
        });
    }

    /// Nothing of it is to be flushed.
    pub(super) fn is_idle(&self) -> bool {
        self.commands.is_empty()
    }

    /// Queues the commands and rings the doorbell. Where there is no room [`sync`] goes on with it: others are not kept waiting.
    pub(super) fn issue(&mut self) {
        self.state = Ack::Issuing;
        (self.next, self.queued, self.ticket) = (0, false, None);
        self.go_on();
    }

    fn go_on(&mut self) {
        while let Some(command) = self.commands.get(self.next) {
            match self.device.issue(*command) {
                Issue::Queued => self.queued = true,
                Issue::NothingCached => {}
                // It has panicked.
                Issue::Busy if self.device.health() == Health::Quarantined => {
                    self.state = Ack::Missed;
                    return;
                }
                Issue::Busy => {
                    self.device.dispatch();
                    return;
                }
            }
            self.next += 1;
        }
        self.state = if self.queued {
            self.ticket = self.device.dispatch();
            self.ticket.map_or(Ack::Missed, |_| Ack::Waiting)
        } else if self.missed && !planted!("r20-cached") {
            // "Nothing cached" cannot answer for commands that were accepted before.
            Ack::Missed
        } else {
            Ack::Done
        };
    }

    fn poll(&mut self) {
        if self.state == Ack::Issuing {
            self.go_on();
        }
        if let (Ack::Waiting, Some(ticket)) = (self.state, self.ticket) {
            self.state = match self.device.poll(ticket) {
                Completion::Done => Ack::Done,
                Completion::Failed => Ack::Missed,
                Completion::Pending => Ack::Waiting,
            };
        }
    }
}

/// Room for as many devices as can be found without going through the list; what is beyond is looked for there.
const KNOWN: usize = if cfg!(loom) { 8 } else { 2048 };

/// Where devices are in the list, found by their key: open-addressed, 1 more than the place, and empty between two invalidations.
pub(super) struct Known([u16; KNOWN]);

impl Known {
    /// Where the first of the devices of `targets` is, with all of them added that are not there; `None` without room.
    #[inline(never)]
    pub(super) fn place_all(
        &mut self,
        devices: &mut Chain<DeviceOp, DEVICES>,
        pool: &Pool<DeviceOp, DEVICES>,
        targets: &[Target],
    ) -> Option<usize> {
        let mut first = None;
        for target in targets {
            let place = self.place(devices, pool, &target.device)?;
            first.get_or_insert(place);
        }
        first
    }

    /// Where `device` is; with room, it is added if it is not there. `None` if it is not, and there is none.
    fn place(
        &mut self,
        devices: &mut Chain<DeviceOp, DEVICES>,
        pool: &Pool<DeviceOp, DEVICES>,
        device: &Device,
    ) -> Option<usize> {
        const MOST: usize = KNOWN / 2;
        let hash = (device.key() as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut at = (hash >> 32) as usize % KNOWN;
        while let Some(place) = usize::from(self.0[at]).checked_sub(1) {
            if devices
                .get_mut(place)
                .is_some_and(|one| one.device.same(device))
            {
                return Some(place);
            }
            at = (at + 1) % KNOWN;
        }
        let place = devices.len();
        let is_known = place < MOST;
        if !is_known {
            let mut beyond = devices.iter().skip(MOST);
            if let Some(nth) = beyond.position(|one| one.device.same(device)) {
                return Some(MOST + nth);
            }
        }
        let op = devices.room(pool)?;
        let op = op.fill_with(|| DeviceOp::new(device.clone()));
        if is_known {
            op.known = at as u16;
            self.0[at] = place as u16 + 1;
        }
        Some(place)
    }

    /// Forgets all of them.
    pub(super) fn forget(&mut self, devices: &mut Chain<DeviceOp, DEVICES>) {
        devices.for_each(|one| {
            if let Some(place) = self.0.get_mut(usize::from(one.known)) {
                *place = 0;
            }
        });
    }
}

/// A deadline that reads no clock before the quick part of a wait is over.
pub(super) struct Deadline {
    time: Duration,
    begun: Option<Instant>,
}

impl Deadline {
    pub(super) fn new(time: Duration) -> Self {
        Self { time, begun: None }
    }

    pub(super) fn is_over(&mut self, backoff: &Backoff) -> bool {
        if !backoff.is_slow() {
            return false;
        }
        let begun = *self.begun.get_or_insert_with(now);
        begun.elapsed() >= self.time
    }
}

/// Waits for all devices together, until each has acknowledged or the deadline is over. Of those that have everything that they are to do,
/// only the first that is not done is looked at: when it is, most of the others are too, and nobody goes on before all are. False if
/// all had acknowledged at once.
pub(super) fn sync(devices: &mut Chain<DeviceOp, DEVICES>, deadline: &mut Deadline) -> bool {
    if planted!("r21-sync") {
        devices.for_each(|one| one.state = Ack::Done);
        return false;
    }
    let mut has_waited = false;
    let mut backoff = Backoff::new();
    loop {
        let over = deadline.is_over(&backoff);
        let mut waiting = false;
        let mut behind = false;
        devices.for_each(|one| {
            if behind && one.state == Ack::Waiting && !over {
                return;
            }
            one.poll();
            behind |= one.state == Ack::Waiting;
            if matches!(one.state, Ack::Issuing | Ack::Waiting) {
                waiting = true;
                if over {
                    one.state = Ack::Missed;
                }
            }
        });
        if !waiting || over {
            return has_waited;
        }
        has_waited = true;
        backoff.wait();
    }
}
