//! What a thread has the devices do.

use shootdown::{Addr, PageSize};
use shootdown_gru::{Atomic, Element, GruError, Instruction};

use super::{Hand, Held, SMALL, Work, value};
use crate::sim::program::Number;
use crate::worker::{BLOCKS, CHUNK};

impl Hand {
    /// Whether a device may be writing it.
    pub(super) fn is_written(&self, buffer: Number) -> bool {
        let work = self
            .segments
            .values()
            .flat_map(|held| held.work.into_iter().flatten());
        work.into_iter()
            .any(|work| work.writes && work.buffer == buffer)
    }

    /// Waits for those that write a buffer.
    pub(super) fn settle_writers(&mut self, buffer: Number) {
        let writes = |held: &Held| {
            let mut work = held.work.iter().flatten();
            work.any(|work| work.writes && work.buffer == buffer)
        };
        let writers = self.segments.iter().filter(|(_, held)| writes(held));
        let writers: Vec<_> = writers.map(|(number, _)| *number).collect();
        writers.into_iter().for_each(|segment| self.settle(segment));
    }

    /// Waits for work that may end with the data or with an exception, as its memory changed meanwhile.
    pub(super) fn settle(&mut self, number: Number) {
        for block in 0..BLOCKS {
            let Some(held) = self.segments.get_mut(&number) else {
                return;
            };
            if held.work[block].is_none() {
                continue;
            }
            match self.shared.wait(&held.segment, block) {
                Ok(_) | Err(GruError::Exception { .. }) => held.work[block] = None,
                Err(error) => self.lose(number, &error, "work beside a change"),
            }
        }
    }

    /// A control block of a segment that is not at work.
    fn free_block(&mut self, number: Number) -> Option<usize> {
        let free = |held: &Held| held.work.iter().position(Option::is_none);
        if let Some(block) = free(self.segments.get(&number)?) {
            return Some(block);
        }
        self.settle(number);
        free(self.segments.get(&number)?)
    }

    /// Runs instructions one after the other, which end well: whether they did.
    fn device(&mut self, segment: Number, buffer: Number, instructions: &[Instruction]) -> bool {
        let Some(block) = self.free_block(segment) else {
            return false;
        };
        for instruction in instructions {
            let Some(held) = self.segments.get_mut(&segment) else {
                return false;
            };
            let result = held.segment.submit(block, instruction);
            if let Err(error) = result.and_then(|()| self.shared.wait(&held.segment, block)) {
                held.work[block] = Some(Work {
                    buffer,
                    writes: true,
                });
                self.lose(segment, &error, "an instruction");
                return false;
            }
        }
        true
    }

    /// Where an instruction of a segment may write, and be checked.
    fn target(&mut self, segment: Number, buffer: Number, at: u64) -> Option<Addr> {
        self.settle_writers(buffer);
        let (found, page) = self.part(buffer, at)?;
        let held = self.segments.get(&segment)?;
        (held.space == found.space && !found.tainted).then(|| page.start())
    }

    pub(super) fn write(&mut self, number: Number, segment: Number, buffer: Number, at: u64) {
        let Some(from) = self.target(segment, buffer, at) else {
            return;
        };
        let to = Addr::new(from.get() + SMALL / 2);
        let set = Instruction::vset(from, value(number), Element::Double, CHUNK);
        let copy = Instruction::bcopy(from, to, 0, Element::Double, CHUNK);
        if self.device(segment, buffer, &[set, copy]) {
            self.matches(from, CHUNK, value(number), "a vset");
            self.matches(to, CHUNK, value(number), "a copy");
        }
    }

    pub(super) fn count(&mut self, number: Number, segment: Number, buffer: Number, at: u64) {
        let Some(word) = self.target(segment, buffer, at) else {
            return;
        };
        let set = Instruction::vset(word, value(number), Element::Double, 1);
        let increment = Instruction::atomic(word, Atomic::Increment, Element::Double);
        if self.device(segment, buffer, &[set, increment, increment]) {
            self.matches(word, 1, value(number) + 2, "increments");
        }
    }

    /// One access a page, from a page on and over the whole, and many to that page.
    pub(super) fn sweep(&mut self, number: Number, segment: Number, work: Work, at: u64) {
        let Some((buffer, page)) = self.part(work.buffer, at) else {
            return;
        };
        if self
            .segments
            .get(&segment)
            .is_none_or(|held| held.space != buffer.space)
        {
            return;
        }
        let (all, stride) = (buffer.range.pages(PageSize::FourKiB), SMALL as i64);
        let pieces = [
            (page.start(), all - at, stride),
            (page.start(), u64::from(CHUNK) * 8, 0),
            (buffer.range.start(), all, stride),
        ];
        for (from, count, stride) in pieces {
            let count = count as u32;
            let instruction = if work.writes {
                Instruction::vset(from, value(number), Element::Double, count).stride(stride / 8)
            } else {
                Instruction::vload(from, 0, Element::Byte, count).stride(stride)
            };
            let Some(block) = self.free_block(segment) else {
                return;
            };
            let Some(held) = self.segments.get_mut(&segment) else {
                return;
            };
            held.work[block] = Some(work);
            if let Err(error) = held.segment.submit(block, &instruction) {
                return self.lose(segment, &error, "a sweep");
            }
        }
    }
}
