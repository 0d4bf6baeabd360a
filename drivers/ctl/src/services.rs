//! What the run has the driver's own services do: messages between processors, copies, work that ends later.

use std::sync::atomic::Ordering;

use rand::Rng;
use shootdown_gru::{Element, GruError, Instruction, Kernel};

use crate::worker::Worker;

/// Lines of a queue: two halves of some messages, so that they are flipped. The larger one has lines in another page.
const LINES: [u32; 2] = [16, 164];
/// Words that are copied, and that are set later.
const WORDS: usize = 32;

impl Worker<'_> {
    /// Uses the services from two blades, and checks what they did.
    pub(crate) fn services(&mut self) {
        let Some(kernel) = &self.shared.kernel else {
            return;
        };
        let blades: Vec<u32> = kernel.blades().collect();
        let [from, to] = [0, 1].map(|_| blades[self.rng.random_range(0..blades.len())]);
        for result in [self.messages(kernel, from, to), self.copies(kernel, from)] {
            match result {
                Ok(()) => {}
                Err(error) if self.shared.is_lost(&error) => {}
                Err(error) => self.find(format!("a service of the driver: {error}")),
            }
        }
    }

    /// Messages of two blades' processors: as many as the queue takes, received in their order, again and again.
    fn messages(&mut self, kernel: &Kernel, one: u32, other: u32) -> Result<(), GruError> {
        let queue = kernel.queue(LINES[self.rng.random_range(0..LINES.len())])?;
        let (mut sent, mut received) = (0u64, 0u64);
        for _ in 0..4 {
            let most = self.rng.random_range(1..24);
            for nth in 0..most {
                let len = self.rng.random_range(2..=15);
                let mut words = vec![sent; len];
                words[len - 1] = len as u64;
                match queue.send(if nth % 2 == 0 { one } else { other }, &words) {
                    Ok(()) => sent += 1,
                    Err(GruError::QueueFull) => break,
                    Err(error) => return Err(error),
                }
            }
            while let Some(message) = queue.receive() {
                let words = message.words();
                let last = words.len() - 1;
                let whole = words[last] == words.len() as u64
                    && words[..last].iter().all(|word| *word == received);
                if !whole {
                    self.shared.data_mismatches.fetch_add(1, Ordering::Relaxed);
                    self.find(format!("message {received} came as {words:x?}"));
                    return Ok(());
                }
                received += 1;
            }
            if received != sent {
                self.find(format!("{sent} messages were sent, {received} received"));
                return Ok(());
            }
        }
        Ok(())
    }

    /// Words that are set while this thread does something else, then copied.
    fn copies(&mut self, kernel: &Kernel, blade: u32) -> Result<(), GruError> {
        let words = kernel.words(2 * WORDS)?;
        let value: u64 = self.rng.random();
        let blocks = kernel.reserve(blade, 4)?;
        let part = WORDS / 4;
        for nth in 0..4 {
            let at = words.physical(nth * part)?;
            let set = Instruction::vset(at, value, Element::Double, part as u32);
            blocks.submit(nth, &set)?;
        }
        for nth in 0..4 {
            blocks.wait(nth)?;
        }
        if blocks.count()? > 0 {
            self.find("work of the driver's own goes on after its end".to_owned());
        }
        drop(blocks);
        let (from, to) = (words.address(0), words.address(WORDS));
        kernel.copy(blade, from, to, WORDS as u64 * 8)?;
        let wrong = (0..2 * WORDS).find(|nth| words.load(*nth) != value);
        if let Some(nth) = wrong {
            self.shared.data_mismatches.fetch_add(1, Ordering::Relaxed);
            let found = words.load(nth);
            self.find(format!(
                "word {nth} of the driver's own holds {found:#x}, not {value:#x}"
            ));
        }
        self.shared
            .bytes_verified
            .fetch_add(2 * WORDS as u64 * 8, Ordering::Relaxed);
        Ok(())
    }
}
