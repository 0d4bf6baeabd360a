//! Reads and writes.

use shootdown::Range;
use shootdown_vfio::Window;

use crate::controller::{Nvme, Which};
use crate::error::NvmeError;
use crate::queue::Entry;

/// Which way a transfer goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// From blocks into memory.
    Read,
    /// From memory onto blocks.
    Write,
}

impl Direction {
    /// Source: NVMe 1.4, figure 346.
    fn opcode(self) -> u8 {
        match self {
            Self::Read => 0x02,
            Self::Write => 0x01,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Read => "a read",
            Self::Write => "a write",
        }
    }
}

/// A command in flight. Dropped without being waited for it goes on; its memory is guarded by its window all the same.
#[derive(Debug)]
#[must_use = "how a command ended is known by waiting for it"]
pub struct Command<'n> {
    nvme: &'n Nvme,
    slot: usize,
    direction: Direction,
    waited: bool,
}

impl Nvme {
    /// Starts a transfer between `memory`, which lies in `window`, and the blocks from `block` on. What of the memory is not mapped
    /// is mapped. Waits for invalidations of the memory, for no other command.
    ///
    /// # Errors
    /// [`NvmeError::Transfer`], [`NvmeError::Busy`], [`NvmeError::Reset`]; the window's; the device is gone.
    pub fn submit(
        &self,
        window: &Window,
        memory: Range,
        block: u64,
        direction: Direction,
    ) -> Result<Command<'_>, NvmeError> {
        let namespace = self.namespace();
        let most = self.controller().max_transfer;
        let block_bytes = namespace.block_bytes;
        let bytes = u64::try_from(memory.len()).unwrap_or(u64::MAX);
        let count = bytes / block_bytes;
        let end = block.checked_add(count);
        let fits = bytes.is_multiple_of(block_bytes)
            && memory.start().get().is_multiple_of(4)
            && bytes <= most
            && end.is_some_and(|end| end <= namespace.blocks);
        if !fits {
            return Err(NvmeError::Transfer {
                memory,
                block,
                block_bytes,
                most,
                blocks: namespace.blocks,
            });
        }
        let config = self.config;
        let slot = window.with_mapped(memory, config.deadline, |iova| {
            self.queue(Which::Io, Some(iova), |slot| Entry {
                opcode: direction.opcode(),
                namespace: config.namespace,
                data: self.describe(slot, iova),
                words: [block as u32, (block >> 32) as u32, count as u32 - 1],
            })
        })??;
        Ok(Command {
            nvme: self,
            slot,
            direction,
            waited: false,
        })
    }
}

impl Command<'_> {
    /// Waits for its end.
    ///
    /// # Errors
    /// How it failed; [`NvmeError::Reset`] if the controller was reset meanwhile, [`NvmeError::Timeout`] after the deadline.
    pub fn wait(mut self) -> Result<(), NvmeError> {
        self.waited = true;
        let name = self.direction.name();
        self.nvme.wait(Which::Io, self.slot, name).map(drop)
    }

    /// Asks the controller to abort it. It may comply, or not: waiting tells.
    ///
    /// # Errors
    /// The device is gone.
    pub fn abort(&self) -> Result<(), NvmeError> {
        self.nvme.abort(self.slot)
    }
}

impl Drop for Command<'_> {
    fn drop(&mut self) {
        if !self.waited {
            self.nvme.leave(Which::Io, self.slot);
        }
    }
}
