//! A pair of queues, and what is in flight in it. Nothing here waits or allocates.
//!
//! A submission queue has one entry more than commands can be in flight, so that it is never full. A completion is told from an old
//! entry by its phase, which changes with each round. Source: NVMe 1.4, chapter 4.

use shootdown::{DeviceError, Range, Registers};

use crate::error::Status;
use crate::memory::Pages;
use crate::registers::Capabilities;

/// Commands in flight at most, in each pair.
pub(crate) const SLOTS: usize = 15;
/// Entries of each queue.
pub(crate) const ENTRIES: u32 = SLOTS as u32 + 1;
const SUBMISSION_BYTES: usize = 64;
const COMPLETION_BYTES: usize = 16;

/// Where an entry's words are.
mod completion {
    pub(super) const RESULT: usize = 0;
    pub(super) const IDENTIFIER: usize = 12;
}

/// A command that is ready to be queued.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Entry {
    pub(crate) opcode: u8,
    pub(crate) namespace: u32,
    /// The first two PRP entries.
    pub(crate) data: [u64; 2],
    /// Dwords 10 to 12.
    pub(crate) words: [u32; 3],
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Slot {
    Free,
    /// The IOVAs that it reaches; none for a command without data.
    InFlight(Option<Range>),
    Done {
        status: Status,
        result: u32,
    },
    /// The controller was reset.
    Lost,
}

/// How a command ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Ended {
    Done { status: Status, result: u32 },
    Lost,
}

/// A submission queue with its completion queue.
#[derive(Debug)]
pub(crate) struct Queue {
    number: u16,
    /// Where in the driver's pages they begin.
    submission: usize,
    completion: usize,
    tail: u32,
    head: u32,
    phase: u32,
    slots: [Slot; SLOTS],
    /// Commands that nobody waits for, one bit each: their place is free when they end.
    unattended: u32,
}

impl Queue {
    pub(crate) fn new(number: u16, submission: usize, completion: usize) -> Self {
        Self {
            number,
            submission,
            completion,
            tail: 0,
            head: 0,
            phase: 1,
            slots: [Slot::Free; SLOTS],
            unattended: 0,
        }
    }

    /// After a reset of the controller: empty, and what was in flight is lost.
    pub(crate) fn restart(&mut self, pages: &Pages) {
        (self.tail, self.head, self.phase) = (0, 0, 1);
        self.lose();
        for word in 0..ENTRIES as usize * COMPLETION_BYTES / 4 {
            pages.write32(self.completion + 4 * word, 0);
        }
    }

    /// Nobody will complete what is in flight.
    pub(crate) fn lose(&mut self) {
        for slot in &mut self.slots {
            if let Slot::InFlight(_) = slot {
                *slot = Slot::Lost;
            }
        }
        self.forget_unattended();
    }

    /// Nobody will ask for the end of this command.
    pub(crate) fn leave(&mut self, slot: usize) {
        self.unattended |= 1 << slot;
        self.forget_unattended();
    }

    fn forget_unattended(&mut self) {
        for (nth, slot) in self.slots.iter_mut().enumerate() {
            let ended = !matches!(slot, Slot::InFlight(_));
            if ended && self.unattended & 1 << nth != 0 {
                *slot = Slot::Free;
                self.unattended &= !(1 << nth);
            }
        }
    }

    /// A place for a command.
    pub(crate) fn free(&self) -> Option<usize> {
        self.slots.iter().position(|slot| *slot == Slot::Free)
    }

    /// Queues a command in a free place and rings the doorbell.
    pub(crate) fn submit(
        &mut self,
        slot: usize,
        entry: Entry,
        reaches: Option<Range>,
        pages: &Pages,
        registers: &dyn Registers,
        capabilities: Capabilities,
    ) -> Result<(), DeviceError> {
        let at = self.submission + self.tail as usize * SUBMISSION_BYTES;
        pages.write32(at, u32::from(entry.opcode) | (slot as u32) << 16);
        pages.write32(at + 4, entry.namespace);
        pages.write64(at + 8, 0);
        pages.write64(at + 16, 0);
        pages.write64(at + 24, entry.data[0]);
        pages.write64(at + 32, entry.data[1]);
        for (nth, word) in entry.words.into_iter().chain([0; 3]).enumerate() {
            pages.write32(at + 40 + 4 * nth, word);
        }
        self.tail = (self.tail + 1) % ENTRIES;
        self.slots[slot] = Slot::InFlight(reaches);
        registers.write32(capabilities.doorbell(self.number, false), self.tail)
    }

    /// Takes what has completed: one round of the queue at most, so that a controller which completes without end keeps nobody
    /// here, who may hold the map lock.
    pub(crate) fn reap(
        &mut self,
        pages: &Pages,
        registers: &dyn Registers,
        capabilities: Capabilities,
    ) -> Result<(), DeviceError> {
        let mut taken = false;
        for _ in 0..ENTRIES {
            let at = self.completion + self.head as usize * COMPLETION_BYTES;
            let last = pages.read32(at + completion::IDENTIFIER);
            if last >> 16 & 1 != self.phase {
                break;
            }
            // A number that was never given out is a controller's fault, and nobody's completion.
            if let Some(slot) = self.slots.get_mut((last & 0xffff) as usize)
                && matches!(slot, Slot::InFlight(_))
            {
                *slot = Slot::Done {
                    status: Status((last >> 17 & 0x7ff) as u16),
                    result: pages.read32(at + completion::RESULT),
                };
            }
            self.head = (self.head + 1) % ENTRIES;
            if self.head == 0 {
                self.phase ^= 1;
            }
            taken = true;
        }
        if taken {
            self.forget_unattended();
            registers.write32(capabilities.doorbell(self.number, true), self.head)?;
        }
        Ok(())
    }

    /// Gives the place of a command back, if it has ended: how.
    pub(crate) fn take(&mut self, slot: usize) -> Option<Ended> {
        let ended = match self.slots[slot] {
            Slot::Done { status, result } => Ended::Done { status, result },
            Slot::Lost => Ended::Lost,
            Slot::Free | Slot::InFlight(_) => return None,
        };
        self.slots[slot] = Slot::Free;
        Some(ended)
    }

    /// Whether this command is in flight and reaches `iova`.
    pub(crate) fn reaches(&self, slot: usize, iova: Range) -> bool {
        matches!(self.slots[slot], Slot::InFlight(Some(range)) if range.overlaps(iova))
    }

    /// Whether any is.
    pub(crate) fn any_reaches(&self, iova: Range) -> bool {
        (0..SLOTS).any(|slot| self.reaches(slot, iova))
    }

    pub(crate) fn number(&self) -> u16 {
        self.number
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use shootdown::{AddressSpace, Deadlines, ProcessMemory};

    use super::*;

    /// Doorbells, as they were rung.
    #[derive(Default)]
    struct Doorbells(Mutex<Vec<(u64, u32)>>);

    impl Registers for Doorbells {
        fn len(&self) -> u64 {
            0x2000
        }
        fn read(&self, offset: u64) -> Result<u64, DeviceError> {
            Err(DeviceError::NoRegister { offset, width: 8 })
        }
        fn write(&self, offset: u64, _: u64) -> Result<(), DeviceError> {
            Err(DeviceError::NoRegister { offset, width: 8 })
        }
        fn write32(&self, offset: u64, value: u32) -> Result<(), DeviceError> {
            self.0.lock().unwrap().push((offset, value));
            Ok(())
        }
    }

    const CAP: Capabilities = Capabilities(15);

    struct Rig {
        pages: Pages,
        doorbells: Doorbells,
        queue: Queue,
        /// The controller's side.
        tail: u32,
        phase: u32,
    }

    impl Rig {
        fn new() -> Self {
            let memory = ProcessMemory::reserve(1 << 20).unwrap();
            let space = AddressSpace::managed(Arc::new(memory), Deadlines::default());
            Self {
                pages: Pages::new(&space, 2 * 4096).unwrap(),
                doorbells: Doorbells::default(),
                queue: Queue::new(1, 0, 4096),
                tail: 0,
                phase: 1,
            }
        }

        fn submit(&mut self, reaches: Option<Range>) -> usize {
            let slot = self.queue.free().unwrap();
            let entry = Entry {
                opcode: 2,
                ..Entry::default()
            };
            let (pages, doorbells) = (&self.pages, &self.doorbells);
            self.queue
                .submit(slot, entry, reaches, pages, doorbells, CAP)
                .unwrap();
            slot
        }

        /// The controller completes a command.
        fn complete(&mut self, slot: u32, status: u32) {
            let at = 4096 + self.tail as usize * COMPLETION_BYTES;
            self.pages.write32(at, 77);
            self.pages
                .write32(at + 12, status << 17 | self.phase << 16 | slot);
            self.tail = (self.tail + 1) % ENTRIES;
            if self.tail == 0 {
                self.phase ^= 1;
            }
        }

        fn reap(&mut self) {
            self.queue.reap(&self.pages, &self.doorbells, CAP).unwrap();
        }
    }

    #[test]
    fn completions_are_told_from_old_ones_over_many_rounds() {
        let mut rig = Rig::new();
        for round in 0..100_u32 {
            let slot = rig.submit(None);
            rig.reap();
            assert_eq!(rig.queue.take(slot), None, "round {round}");
            rig.complete(slot as u32, round % 3);
            rig.reap();
            let ended = Ended::Done {
                status: Status((round % 3) as u16),
                result: 77,
            };
            assert_eq!(rig.queue.take(slot), Some(ended));
        }
        let rung = rig.doorbells.0.lock().unwrap();
        assert_eq!(rung.last(), Some(&(0x100c, 100 % ENTRIES)));
    }

    #[test]
    fn a_full_queue_has_no_place_and_no_completion_of_nobody_makes_one() {
        let mut rig = Rig::new();
        for _ in 0..SLOTS {
            rig.submit(None);
        }
        assert_eq!(rig.queue.free(), None);
        rig.complete(0xffff, 0);
        rig.complete(SLOTS as u32, 0);
        rig.reap();
        assert_eq!(rig.queue.free(), None);
    }

    #[test]
    fn a_command_that_nobody_waits_for_gives_its_place_back_when_it_ends() {
        let mut rig = Rig::new();
        let iova = Range::new(0x10000, 0x1000).unwrap();
        let slot = rig.submit(Some(iova));
        rig.queue.leave(slot);
        assert!(rig.queue.any_reaches(iova), "it is in flight all the same");
        rig.complete(slot as u32, 0);
        rig.reap();
        assert!(!rig.queue.any_reaches(iova));
        assert_eq!(rig.queue.free(), Some(slot));
    }

    #[test]
    fn a_reset_loses_what_was_in_flight() {
        let mut rig = Rig::new();
        let iova = Range::new(0x10000, 0x1000).unwrap();
        let (waited, left) = (rig.submit(Some(iova)), rig.submit(Some(iova)));
        rig.queue.leave(left);
        rig.queue.restart(&rig.pages);
        assert!(!rig.queue.any_reaches(iova));
        assert_eq!(rig.queue.take(waited), Some(Ended::Lost));
        assert_eq!(
            (0..SLOTS)
                .filter(|slot| rig.queue.slots[*slot] != Slot::Free)
                .count(),
            0
        );
    }
}
