//! Message queues between processors, in memory of the driver's own.
//!
//! # Layout, in cache lines
//! ```text
//! 0: {head: 32, limit: 32}   1: half 0 is free   2: half 1 is free   3: not used
//! 4 .. 4 + n: half 0         4 + n .. 4 + 2n: half 1
//! ```
//! A chiplet claims lines at the head, below the limit, and stores the message there. Its first word says that it is there, how
//! many lines and how many words it has.
//!
//! # Halves
//! Where a message does not fit below the limit, its sender flips the halves: it takes the other one (an atomic clear of its word
//! finds it free), fills what is left of the old one with a message of nothing, and moves head and limit. Whoever loses on the way
//! gives the half back and tries again. The receiver, who goes through the lines in order, frees a half when it is through.
//!
//! # Messages that software stores
//! Claimed lines in another page than the head, or whose store was refused, are stored by the sender, line by line.

use shootdown_primitive::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use shootdown_primitive::thread;
use shootdown_primitive::time::{Duration, Instant};

use shootdown::Addr;

use crate::error::GruError;
use crate::instruction::{Atomic, Element, Instruction};
use crate::kernel::{Kernel, Pending};
use crate::segment::Delivery;
use crate::shared::Shared;
use crate::stats::Counters;

const LINE: u64 = 64;
const HEADER: u32 = 4;
const WORDS_PER_LINE: usize = 8;
/// Lines of one message, at most.
const LINES: usize = 2;
/// Words of one message, at most; its first line has one less.
const WORDS: usize = LINES * WORDS_PER_LINE - 1;
/// How long a congested receiver is tried.
const PATIENCE: Duration = Duration::from_secs(1);

/// A message's first word: that it is there, its lines, its words.
const PRESENT: u64 = 1;

fn header(lines: u64, words: usize) -> u64 {
    PRESENT | lines << 8 | (words as u64) << 16
}

/// Where the receiver is.
#[derive(Debug)]
struct Receiver {
    line: u32,
    half: usize,
}

/// A queue for messages from any blade's processors.
pub struct Queue<'k> {
    kernel: &'k Kernel,
    shared: Shared,
    /// Lines of a half.
    half: u32,
    receiver: Mutex<Receiver>,
    /// Messages that were sent: what stands in for the interrupt of the receiving processor.
    sent: Mutex<u64>,
    arrived: Condvar,
}

impl std::fmt::Debug for Queue<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue")
            .field("lines_of_a_half", &self.half)
            .finish_non_exhaustive()
    }
}

/// A message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Message {
    words: [u64; WORDS],
    len: usize,
}

impl Message {
    /// Its words.
    pub fn words(&self) -> &[u64] {
        &self.words[..self.len]
    }
}

/// What came of one try to send.
enum Try {
    Sent,
    Again,
    Full,
}

impl<'k> Queue<'k> {
    pub(crate) fn new(kernel: &'k Kernel, lines: u32) -> Result<Self, GruError> {
        let half = lines.saturating_sub(HEADER) / 2;
        if !(2..=1 << 15).contains(&half) || !lines.is_multiple_of(2) {
            return Err(GruError::QueueLines { lines });
        }
        let queue = Self {
            kernel,
            shared: kernel.shared(u64::from(lines) * LINE)?,
            half,
            receiver: Mutex::new(Receiver {
                line: HEADER,
                half: 0,
            }),
            sent: Mutex::new(0),
            arrived: Condvar::new(),
        };
        queue.shared.store(Self::free(1), 1);
        queue.shared.store(0, queue.limits(0));
        Ok(queue)
    }

    /// Byte offset of the word that says that a half is free.
    fn free(half: usize) -> u64 {
        (1 + half as u64) * LINE
    }

    /// The queue's first word when a half has just been flipped to.
    fn limits(&self, half: usize) -> u64 {
        let start = HEADER + self.half * half as u32;
        u64::from(start) | u64::from(start + self.half) << 32
    }

    fn counters(&self) -> &Counters {
        self.kernel.gru().counters()
    }

    fn physical(&self, offset: u64) -> Result<Addr, GruError> {
        self.kernel.physical(self.shared.at(offset))
    }

    /// Sends a message by the kernel context of `blade`. A congested receiver is tried for a second.
    ///
    /// # Errors
    /// [`GruError::QueueFull`], [`GruError::MessageLength`], [`GruError::Congested`]; as [`Kernel::reserve`] and of the
    /// instructions.
    pub fn send(&self, blade: u32, words: &[u64]) -> Result<(), GruError> {
        let (len, most) = (words.len(), WORDS);
        if !(1..=most).contains(&len) {
            return Err(GruError::MessageLength { words: len, most });
        }
        let block = self.kernel.reserve(blade, 1)?;
        let lines = (1 + len).div_ceil(WORDS_PER_LINE) as u64;
        let mut data = [0; LINES * WORDS_PER_LINE];
        data[0] = header(lines, len);
        data[1..=len].copy_from_slice(words);
        let begun = Instant::now();
        loop {
            match self.try_send(&block, &data, lines)? {
                Try::Sent => {
                    self.counters().messages_sent.hit();
                    *lock(&self.sent) += 1;
                    self.arrived.notify_all();
                    return Ok(());
                }
                Try::Full => {
                    self.counters().messages_full.hit();
                    return Err(GruError::QueueFull);
                }
                Try::Again => {
                    self.counters().messages_congested.hit();
                    let waited = begun.elapsed();
                    if waited > PATIENCE {
                        return Err(GruError::Congested { waited });
                    }
                    thread::yield_now();
                }
            }
        }
    }

    fn try_send(&self, block: &Pending<'_>, data: &[u64], lines: u64) -> Result<Try, GruError> {
        block.write_data(0, data)?;
        let send = Instruction::message(self.physical(0)?, block.data(0), lines as u32);
        block.run(0, &send)?;
        match block.delivery(0)? {
            Delivery::Delivered => Ok(Try::Sent),
            Delivery::QueueFull { queue } => self.flip(block, queue),
            Delivery::Unstored { line } => {
                self.counters().messages_stored.hit();
                // The line that says that it is there last.
                for nth in (0..lines).rev() {
                    self.store_line(block, nth, u64::from(line) + nth)?;
                }
                Ok(Try::Sent)
            }
            _ => Ok(Try::Again),
        }
    }

    /// Stores the `nth` line of the block's data where `line` of the queue is, its first word last.
    fn store_line(&self, block: &Pending<'_>, nth: u64, line: u64) -> Result<(), GruError> {
        let (from, to) = (
            block.data(0) + (nth * LINE) as u16,
            self.physical(line * LINE)?,
        );
        let double = Element::Double;
        let rest = Addr::new(to.get() + 8);
        block.run(0, &Instruction::vstore(from + 8, rest, double, 7))?;
        block.run(0, &Instruction::vstore(from, to, double, 1))?;
        Ok(())
    }

    /// A message does not fit below the limit of `queue`, the queue's first word.
    fn flip(&self, block: &Pending<'_>, queue: u64) -> Result<Try, GruError> {
        let limit = (queue >> 32) as u32;
        let other = usize::from(limit == HEADER + self.half);
        let free = self.physical(Self::free(other))?;
        let atomic = |at, atomic| block.run(0, &Instruction::atomic(at, atomic, Element::Double));
        if atomic(free, Atomic::Clear)? == 0 {
            // Its receiver is not through, or somebody else flips just now, who has moved the limit then.
            let now = self.shared.load(0);
            return Ok(if now == queue { Try::Full } else { Try::Again });
        }
        // With this half taken nobody else flips.
        let flipped = self.flip_to(block, queue, other);
        if !matches!(flipped, Ok(true)) {
            atomic(free, Atomic::Increment)?;
        }
        flipped.map(|_| Try::Again)
    }

    /// Moves head and limit to the half `other`, which is the caller's: whether nobody has claimed a line since `queue` was read.
    fn flip_to(&self, block: &Pending<'_>, queue: u64, other: usize) -> Result<bool, GruError> {
        let first = self.physical(0)?;
        let exchange = |expected, new| {
            let swap = Atomic::CompareSwap { expected, new };
            let found = block.run(0, &Instruction::atomic(first, swap, Element::Double))?;
            Ok::<_, GruError>(found == expected)
        };
        let (head, limit) = (queue as u32, (queue >> 32) as u32);
        let mut now = queue;
        for line in head..limit {
            block.write_data(0, &[header(1, 0), 0, 0, 0, 0, 0, 0, 0])?;
            if !exchange(now, now + 1)? {
                return Ok(false);
            }
            now += 1;
            self.store_line(block, 0, line.into())?;
        }
        let flipped = exchange(now, self.limits(other))?;
        if flipped {
            self.counters().queue_flips.hit();
        }
        Ok(flipped)
    }

    /// The next message, if there is one. In the order in which lines were claimed.
    pub fn receive(&self) -> Option<Message> {
        let mut receiver = lock(&self.receiver);
        loop {
            let offset = u64::from(receiver.line) * LINE;
            let first = self.shared.load(offset);
            if first & PRESENT == 0 {
                return None;
            }
            let (lines, len) = ((first >> 8) as u32 & 0xff, (first >> 16) as usize & 0xff);
            let mut message = Message {
                words: [0; WORDS],
                len: len.min(WORDS),
            };
            for (nth, word) in message.words[..message.len].iter_mut().enumerate() {
                *word = self.shared.load(offset + 8 + nth as u64 * 8);
            }
            for line in 0..u64::from(lines) {
                self.shared.store(offset + line * LINE, 0);
            }
            receiver.line += lines.max(1);
            let half = receiver.half;
            if receiver.line >= HEADER + self.half * (half as u32 + 1) {
                receiver.half = 1 - half;
                receiver.line = HEADER + self.half * receiver.half as u32;
                self.shared.store(Self::free(half), 1);
            }
            if len > 0 {
                self.counters().messages_received.hit();
                return Some(message);
            }
        }
    }

    /// As [`Queue::receive`], asleep until a message arrives, for `time` at most.
    pub fn receive_within(&self, time: Duration) -> Option<Message> {
        let begun = Instant::now();
        loop {
            let seen = *lock(&self.sent);
            if let Some(message) = self.receive() {
                return Some(message);
            }
            let left = time.checked_sub(begun.elapsed())?;
            let sent = lock(&self.sent);
            let woken = self
                .arrived
                .wait_timeout_while(sent, left, |now| *now == seen);
            drop(woken.unwrap_or_else(PoisonError::into_inner));
        }
    }
}

impl Drop for Queue<'_> {
    fn drop(&mut self) {
        self.kernel.unmap(&self.shared);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Numbers, whole at any time.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
