//! Messages: lines of the data segment into a queue in memory.
//!
//! The queue's first word is {head: 32, limit: 32}, both counted in lines from the queue's own address. One atomic moves the head
//! past the lines that are claimed, where they fit below the limit; then the lines are stored there. A queue has two halves, and
//! its software moves head and limit to the other one when one is full: the chiplet knows nothing of that.

use shootdown::Addr;
use shootdown_primitive::sync::atomic::{Ordering, fence};

use super::control::Core;
use super::exec::{Outcome, Step};
use super::instruction::Illegal;
use super::layout::{cb, cbe};

/// Bytes of a line.
const LINE: u64 = 64;

/// The fields of a queue's first word.
fn head_and_limit(word: u64) -> (u32, u32) {
    (word as u32, (word >> 32) as u32)
}

impl Core {
    /// Claims lines and stores the message there.
    pub(super) fn message(&self, step: &Step) -> Outcome {
        let instruction = &step.instruction;
        let lines = instruction.count;
        let mut outcome = Outcome {
            elements: 1,
            bytes: 0,
            old: None,
            substatus: 0,
            illegal: None,
        };
        if let Some(nack @ (cb::LB_OVERFLOW | cb::AMO_NACKED)) = step.nack {
            outcome.substatus = nack;
            return outcome;
        }
        let fits = |word| {
            let (head, limit) = head_and_limit(word);
            u64::from(limit.wrapping_sub(head)) >= lines && limit != 0
        };
        let old = self.update(step, 8, &mut |word| {
            let head = (word as u32).wrapping_add(lines as u32);
            fits(word).then_some((word & !0xffff_ffff) | u64::from(head))
        });
        let (head, limit) = head_and_limit(old);
        outcome.bytes += 8;
        outcome.old = Some(old);
        if limit == 0 {
            outcome.illegal = Some(Illegal {
                cause: cbe::INVALID_INSTRUCTION,
                detail: cbe::WRONG_QUEUE,
            });
            return outcome;
        }
        let bytes = lines * instruction.size;
        let first = instruction
            .base0
            .wrapping_add(u64::from(head) * instruction.size);
        let page = step.entry.key.range();
        let inside = |addr| page.holds(Addr::new(addr));
        if !fits(old) {
            outcome.substatus = cb::QUEUE_LIMIT;
        } else if !inside(first) || !inside(first.wrapping_add(bytes - 1)) {
            outcome.substatus = cb::PAGE_OVERFLOW;
        } else if let Some(nack) = step.nack {
            outcome.substatus = nack;
        } else {
            self.store_lines(step, first, lines);
            self.counters.messages.hit();
            outcome.bytes += bytes;
        }
        outcome
    }

    /// A line arrives whole: who sees its first word sees the rest, and of several the last one arrives first.
    fn store_lines(&self, step: &Step, first: u64, lines: u64) {
        for line in (0..lines).rev() {
            for part in [8..LINE, 0..8] {
                let mut bytes = [0; LINE as usize];
                let bytes = &mut bytes[..(part.end - part.start) as usize];
                let offset = line * LINE + part.start;
                self.segment
                    .load(step.dsr_map, step.instruction.tri0 + offset, bytes);
                // Release: pairs with the acquire load of whoever looks for the line.
                fence(Ordering::Release);
                self.write(step, &step.entry, first + offset, bytes);
            }
        }
    }
}
