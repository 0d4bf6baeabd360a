//! The driver's four self tests: whether chiplets do what the driver needs them to.

use thiserror::Error;

use crate::error::GruError;
use crate::instruction::{Element, Instruction};
use crate::kernel::Kernel;

/// A self test that did not come out as it has to.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum SelfTestFailed {
    /// An instruction, or a service.
    #[error("self test {test} on blade {blade}: {error}")]
    Error {
        /// Which test.
        test: u32,
        /// On which blade.
        blade: u32,
        /// What it said.
        error: GruError,
    },
    /// Something else than expected was found.
    #[error("self test {test} on blade {blade}: {what} is {found:#x}, not {expected:#x}")]
    Wrong {
        /// Which test.
        test: u32,
        /// On which blade.
        blade: u32,
        /// What was looked at.
        what: &'static str,
        /// What was found.
        found: u64,
        /// What was to be found.
        expected: u64,
    },
}

const MAGIC: u64 = 0x1234_5678_8765_4321;

/// One test on one blade.
struct Test<'k> {
    kernel: &'k Kernel,
    test: u32,
    blade: u32,
}

impl Test<'_> {
    fn check(&self, what: &'static str, found: u64, expected: u64) -> Result<(), SelfTestFailed> {
        let Self { test, blade, .. } = *self;
        if found == expected {
            return Ok(());
        }
        Err(SelfTestFailed::Wrong {
            test,
            blade,
            what,
            found,
            expected,
        })
    }

    fn ok<T>(&self, result: Result<T, GruError>) -> Result<T, SelfTestFailed> {
        let Self { test, blade, .. } = *self;
        result.map_err(|error| SelfTestFailed::Error { test, blade, error })
    }

    /// A word goes to the data segment and back to memory.
    fn round_trip(&self) -> Result<(), SelfTestFailed> {
        let words = self.ok(self.kernel.words(2))?;
        words.store(0, MAGIC);
        let block = self.ok(self.kernel.reserve(self.blade, 1))?;
        let [from, to] = [self.ok(words.physical(0))?, self.ok(words.physical(1))?];
        let data = block.data(0);
        let load = Instruction::vload(from, data, Element::Double, 1);
        self.ok(block.run(0, &load))?;
        let mut found = [0];
        self.ok(block.read_data(0, &mut found))?;
        self.check("the data segment's word", found[0], MAGIC)?;
        let store = Instruction::vstore(data, to, Element::Double, 1);
        self.ok(block.run(0, &store))?;
        self.check("the word in memory", words.load(1), MAGIC)
    }

    /// A queue of 8 lines takes 4 messages, refuses the fifth, and gives them back in order.
    fn messages(&self) -> Result<(), SelfTestFailed> {
        let queue = self.ok(self.kernel.queue(8))?;
        let mut sent = 0;
        for nth in 0..6 {
            match queue.send(self.blade, &[MAGIC + nth]) {
                Err(GruError::QueueFull) => break,
                result => self.ok(result)?,
            }
            sent += 1;
        }
        self.check("the number of messages that fit", sent, 4)?;
        for nth in 0..4 {
            let found = queue.receive().map_or(0, |message| message.words()[0]);
            self.check("a message", found, MAGIC + nth)?;
        }
        let left = queue.receive().map_or(0, |message| message.words()[0]);
        self.check("the message after the last", left, 0)
    }

    /// Four instructions end by themselves, and are then not pending.
    fn asynchronous(&self) -> Result<(), SelfTestFailed> {
        let words = self.ok(self.kernel.words(4))?;
        let blocks = self.ok(self.kernel.reserve(self.blade, 4))?;
        for nth in 0..4 {
            let to = self.ok(words.physical(nth))?;
            let set = Instruction::vset(to, MAGIC + nth as u64, Element::Double, 1);
            self.ok(blocks.submit(nth, &set))?;
        }
        for nth in 0..4 {
            self.ok(blocks.wait(nth))?;
        }
        let left = self.ok(blocks.count())?;
        self.check("the number of instructions at work", left as u64, 0)?;
        (0..4).try_for_each(|nth| self.check("a word", words.load(nth), MAGIC + nth as u64))
    }

    /// 200 bytes are copied, and not one more.
    fn copy(&self) -> Result<(), SelfTestFailed> {
        const WORDS: usize = 25;
        let words = self.ok(self.kernel.words(2 * WORDS + 1))?;
        (0..WORDS).for_each(|nth| words.store(nth, MAGIC ^ nth as u64));
        let (from, to) = (words.address(0), words.address(WORDS));
        self.ok(self.kernel.copy(self.blade, from, to, 200))?;
        for nth in 0..WORDS {
            self.check(
                "a word of the copy",
                words.load(WORDS + nth),
                MAGIC ^ nth as u64,
            )?;
        }
        self.check("the word after the copy", words.load(2 * WORDS), 0)
    }
}

impl Kernel {
    /// Runs the four self tests on every blade: a word to the data segment and back; a message queue until it is full; four
    /// instructions that end later; a copy of 200 bytes. How many have passed.
    ///
    /// # Errors
    /// The first that fails.
    pub fn self_test(&self) -> Result<u32, SelfTestFailed> {
        let mut passed = 0;
        for blade in self.blades() {
            let tests = [
                Test::round_trip,
                Test::messages,
                Test::asynchronous,
                Test::copy,
            ];
            for (test, run) in (0..).zip(tests) {
                run(&Test {
                    kernel: self,
                    test,
                    blade,
                })?;
                passed += 1;
            }
        }
        Ok(passed)
    }
}
