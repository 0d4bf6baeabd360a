//! One device in one invalidation: its commands, its doorbell, its acknowledgement, its deadline.

use std::time::{Duration, Instant};

use crate::pool::Chain;
use crate::primitive::{Backoff, now};
use crate::tlb::{BATCH, Completion, Device, FlushCommand, Health, Issue, Scope, Ticket};

/// One device in one invalidation.
pub(crate) struct DeviceOp {
    pub(super) device: Device,
    commands: [FlushCommand; BATCH],
    pub(super) len: usize,
    ticket: Option<Ticket>,
    pub(super) state: Ack,
    /// It missed its deadline, and its commands became one for the whole device.
    pub(super) widened: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Ack {
    Waiting,
    Done,
    Missed,
}

impl DeviceOp {
    pub(super) fn new(device: Device) -> Self {
        let nothing = FlushCommand {
            tag: 0,
            scope: Scope::Device,
        };
        Self {
            device,
            commands: [nothing; BATCH],
            len: 0,
            ticket: None,
            state: Ack::Waiting,
            widened: false,
        }
    }

    pub(super) fn widen(&mut self) {
        self.set_whole();
        self.widened = true;
    }

    /// More commands than a batch holds become one for the whole device.
    pub(super) fn add(&mut self, command: FlushCommand) {
        let most = self.device.limits().commands_per_batch.clamp(1, BATCH);
        if self.commands[..self.len].contains(&command) || self.is_whole() {
            return;
        }
        if self.len == most {
            if planted!("r19-command") {
                return;
            }
            self.set_whole();
        } else {
            self.commands[self.len] = command;
            self.len += 1;
        }
    }

    fn is_whole(&self) -> bool {
        self.len == 1 && self.commands[0].scope == Scope::Device
    }

    fn set_whole(&mut self) {
        self.commands[0] = FlushCommand {
            tag: 0,
            scope: Scope::Device,
        };
        self.len = 1;
    }

    /// Queues the commands and rings the doorbell, waiting for room where there is none.
    pub(super) fn issue(&mut self, deadline: &mut Deadline) {
        let mut queued = false;
        self.state = Ack::Waiting;
        self.ticket = None;
        for nth in 0..self.len {
            let mut backoff = Backoff::new();
            loop {
                match self.device.issue(self.commands[nth]) {
                    Issue::Queued => queued = true,
                    Issue::NothingCached => {}
                    Issue::Busy => {
                        // One that has panicked is in quarantine.
                        let dead = self.device.health() == Health::Quarantined;
                        if dead || deadline.is_over(&backoff) {
                            self.state = Ack::Missed;
                            return;
                        }
                        self.device.dispatch();
                        backoff.wait();
                        continue;
                    }
                }
                break;
            }
        }
        if queued {
            self.ticket = Some(self.device.dispatch());
        } else {
            self.state = Ack::Done;
        }
    }

    fn poll(&mut self) {
        if let (Ack::Waiting, Some(ticket)) = (self.state, self.ticket) {
            self.state = match self.device.poll(ticket) {
                Completion::Done => Ack::Done,
                Completion::Failed => Ack::Missed,
                Completion::Pending => Ack::Waiting,
            };
        }
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

/// Polls all devices together until each has acknowledged or the deadline is over.
pub(super) fn sync(devices: &mut Chain<'_, DeviceOp>, deadline: &mut Deadline) {
    if planted!("r21-sync") {
        devices.for_each(|one| one.state = Ack::Done);
        return;
    }
    let mut backoff = Backoff::new();
    loop {
        let over = deadline.is_over(&backoff);
        let mut waiting = false;
        devices.for_each(|one| {
            one.poll();
            if one.state == Ack::Waiting {
                waiting = true;
                if over {
                    one.state = Ack::Missed;
                }
            }
        });
        if !waiting || over {
            return;
        }
        backoff.wait();
    }
}
