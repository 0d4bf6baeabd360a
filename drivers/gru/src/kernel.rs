//! Services of the driver's own, for whoever works for no user: copies, message queues between processors, work that ends later.
//!
//! Each blade has a *kernel context*, on one of its chiplets. It is loaded when it is first used, and stolen as any other. It has no
//! ASID: its instructions name memory itself, so they never miss. Their memory is that of a space which is the driver's own, so
//! that no frame behind it changes. Threads share the context's control blocks, each with a part of its data.

use std::marker::PhantomData;

use shootdown_primitive::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use shootdown_primitive::time::{Duration, Instant};

use shootdown::{Addr, AddressSpace, Deadlines, Device, Memory};

use crate::chiplet::Chiplet;
use crate::config::{MissMode, SegmentOptions};
use crate::context::Context;
use crate::error::{Ended, GruError};
use crate::gru::Gru;
use crate::instruction::{Element, Instruction};
use crate::queue::Queue;
use crate::segment::Status;
use crate::shared::Shared;

/// Control blocks of a kernel context.
const BLOCKS: usize = 16;
/// Data bytes that belong to each.
pub(crate) const DATA: usize = 256;
/// For an instruction, and for a control block.
const PATIENCE: Duration = Duration::from_secs(5);

/// A kernel context, and its control blocks that nobody uses.
struct Pool {
    context: Arc<Context>,
    free: Mutex<Vec<usize>>,
    returned: Condvar,
}

impl Pool {
    fn new(chiplet: &Arc<Chiplet>, device: &Device) -> Arc<Self> {
        let options = SegmentOptions {
            control_blocks: BLOCKS,
            data_bytes: BLOCKS * DATA,
            misses: MissMode::UserPolling,
            // Its addresses are unmapped.
            preload: 0,
        };
        Arc::new(Self {
            context: Context::new(chiplet, device, None, options),
            free: Mutex::new((0..BLOCKS).collect()),
            returned: Condvar::new(),
        })
    }

    fn free(&self) -> MutexGuard<'_, Vec<usize>> {
        // Changed by push and pop only.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, blade: u32, count: usize) -> Result<Vec<usize>, GruError> {
        let begun = Instant::now();
        let mut free = self.free();
        while free.len() < count {
            let waited = begun.elapsed();
            let Some(left) = PATIENCE.checked_sub(waited).filter(|_| count <= BLOCKS) else {
                return Err(GruError::NoFreeBlocks {
                    blade,
                    count,
                    waited,
                });
            };
            let woken = self.returned.wait_timeout(free, left);
            free = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        let from = free.len() - count;
        Ok(free.split_off(from))
    }

    fn end(&self) {
        if let Err(error) = self.context.discard(Ended::Unmapped) {
            tracing::warn!(%error, "a kernel context stays");
        }
    }
}

/// One blade's kernel context. Where a reset has cost it its state, the next who wants it makes another.
struct Blade {
    number: u32,
    pool: Mutex<Arc<Pool>>,
}

impl Blade {
    fn pool(&self) -> MutexGuard<'_, Arc<Pool>> {
        // Changed by one assignment.
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The driver's own services. Dropping it ends its contexts.
pub struct Kernel {
    gru: Arc<Gru>,
    space: AddressSpace,
    blades: Vec<Blade>,
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernel")
            .field("blades", &self.blades.len())
            .finish_non_exhaustive()
    }
}

impl Kernel {
    /// The services of `gru`, over memory that nobody else uses or changes.
    pub fn new<M: Memory>(gru: &Arc<Gru>, memory: Arc<M>) -> Self {
        let blades = gru.blades().map(|(number, (chiplet, device))| Blade {
            number,
            pool: Mutex::new(Pool::new(chiplet, device)),
        });
        Self {
            gru: Arc::clone(gru),
            space: AddressSpace::managed(memory, Deadlines::default()),
            blades: blades.collect(),
        }
    }

    /// The driver.
    pub fn gru(&self) -> &Arc<Gru> {
        &self.gru
    }

    /// The blades that there are.
    pub fn blades(&self) -> impl Iterator<Item = u32> + '_ {
        self.blades.iter().map(|blade| blade.number)
    }

    /// Memory of its own.
    pub(crate) fn shared(&self, bytes: u64) -> Result<Shared, GruError> {
        Shared::map(&self.space, bytes)
    }

    /// Gives memory back, which no instruction is at work on.
    pub(crate) fn unmap(&self, shared: &Shared) {
        // At exit it is gone.
        if let Err(error) = self.space.unmap(shared.range()) {
            tracing::warn!(%error, "memory of the driver's own stays");
        }
    }

    /// The address that memory at `address` itself has.
    pub(crate) fn physical(&self, address: Addr) -> Result<Addr, GruError> {
        let found = self.space.translate(address);
        let found = found.ok_or(GruError::NotTranslated { address })?;
        let offset = address.get() - found.page.start().get();
        Ok(Addr::new((found.frame.0 << 12) + offset))
    }

    /// `count` control blocks of a blade's context, for work that ends later.
    ///
    /// # Errors
    /// [`GruError::NoBlade`], [`GruError::NoFreeBlocks`].
    pub fn reserve(&self, blade: u32, count: usize) -> Result<Pending<'_>, GruError> {
        let blades = self.blades.len();
        let own = self.blades.iter().find(|own| own.number == blade);
        let own = own.ok_or(GruError::NoBlade { blade, blades })?;
        let pool = Arc::clone(&*self.renew(own));
        Ok(Pending {
            blocks: pool.take(blade, count)?,
            pool,
            _kernel: PhantomData,
        })
    }

    fn renew<'b>(&self, blade: &'b Blade) -> MutexGuard<'b, Arc<Pool>> {
        let mut pool = blade.pool();
        if pool.context.is_lost() {
            pool.end();
            let own = self
                .gru
                .blades()
                .find(|(number, _)| *number == blade.number);
            if let Some((_, (chiplet, device))) = own {
                *pool = Pool::new(chiplet, device);
            }
        }
        pool
    }

    /// A queue for messages of any blade's processors to whoever receives: `lines` cache lines, its header of four included.
    ///
    /// # Errors
    /// [`GruError::QueueLines`]; no memory.
    pub fn queue(&self, lines: u32) -> Result<Queue<'_>, GruError> {
        Queue::new(self, lines)
    }

    /// `count` words of its own memory, all zero, for [`Kernel::copy`], [`Kernel::read`] and work that ends later.
    ///
    /// # Errors
    /// No memory.
    pub fn words(&self, count: usize) -> Result<Words<'_>, GruError> {
        Ok(Words {
            kernel: self,
            shared: self.shared(count as u64 * 8)?,
            count,
        })
    }

    /// The word at `from`, read by a chiplet of `blade`.
    ///
    /// # Errors
    /// As [`Kernel::reserve`]; the instruction's.
    pub fn read(&self, blade: u32, from: Addr) -> Result<u64, GruError> {
        let block = self.reserve(blade, 1)?;
        let load = Instruction::vload(self.physical(from)?, block.data(0), Element::Double, 1);
        block.run(0, &load)?;
        let mut word = [0];
        block.read_data(0, &mut word)?;
        Ok(word[0])
    }

    /// Copies `bytes` by a chiplet of `blade`.
    ///
    /// # Errors
    /// As [`Kernel::read`].
    pub fn copy(&self, blade: u32, from: Addr, to: Addr, bytes: u64) -> Result<(), GruError> {
        let block = self.reserve(blade, 1)?;
        let mut done = 0;
        while done < bytes {
            let at = |base: Addr| Addr::new(base.get() + done);
            let (from, to) = (at(from), at(to));
            // Frames of neighbouring pages need not be neighbours.
            let part = (bytes - done)
                .min(4096 - from.get() % 4096)
                .min(4096 - to.get() % 4096);
            let (from, to) = (self.physical(from)?, self.physical(to)?);
            let copy = Instruction::bcopy(from, to, block.data(0), Element::Byte, part as u32);
            block.run(0, &copy)?;
            done += part;
        }
        Ok(())
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        for blade in &self.blades {
            blade.pool().end();
        }
    }
}

/// Words of the driver's own memory, shared with its chiplets. Dropping them gives them back: no work on them may be left.
#[derive(Debug)]
pub struct Words<'k> {
    kernel: &'k Kernel,
    shared: Shared,
    count: usize,
}

impl Words<'_> {
    /// Where the `nth` is, for the processors.
    ///
    /// # Panics
    /// If there is no such word.
    pub fn address(&self, nth: usize) -> Addr {
        assert!(nth < self.count, "word {nth} of {}", self.count);
        self.shared.at(nth as u64 * 8)
    }

    /// Where the `nth` is, for [unmapped](Instruction::unmapped) instructions. Those of one instruction lie in one 4 KiB page.
    ///
    /// # Errors
    /// [`GruError::NotTranslated`].
    ///
    /// # Panics
    /// If there is no such word.
    pub fn physical(&self, nth: usize) -> Result<Addr, GruError> {
        self.kernel.physical(self.address(nth))
    }

    /// The `nth`.
    ///
    /// # Panics
    /// If there is no such word.
    pub fn load(&self, nth: usize) -> u64 {
        assert!(nth < self.count, "word {nth} of {}", self.count);
        self.shared.load(nth as u64 * 8)
    }

    /// Stores the `nth`.
    ///
    /// # Panics
    /// If there is no such word.
    pub fn store(&self, nth: usize, value: u64) {
        assert!(nth < self.count, "word {nth} of {}", self.count);
        self.shared.store(nth as u64 * 8, value);
    }
}

impl Drop for Words<'_> {
    fn drop(&mut self) {
        self.kernel.unmap(&self.shared);
    }
}

/// Control blocks of a kernel context that are one thread's own. Dropping it gives them back, once what is at work has ended.
pub struct Pending<'k> {
    pool: Arc<Pool>,
    blocks: Vec<usize>,
    _kernel: PhantomData<&'k Kernel>,
}

impl std::fmt::Debug for Pending<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pending")
            .field("blocks", &self.blocks)
            .finish()
    }
}

impl Pending<'_> {
    fn block(&self, nth: usize) -> Result<usize, GruError> {
        let count = self.blocks.len();
        let block = self.blocks.get(nth).copied();
        block.ok_or(GruError::NoControlBlock { cb: nth, count })
    }

    /// Byte offset of the data of the `nth` block, of which it has 256 bytes.
    pub fn data(&self, nth: usize) -> u16 {
        self.blocks
            .get(nth)
            .map_or(0, |block| (block * DATA) as u16)
    }

    /// Starts an instruction on the `nth` block, which interrupts when it is done. Its addresses are those of memory itself.
    ///
    /// # Errors
    /// As [`Segment::submit`](crate::Segment::submit).
    pub fn submit(&self, nth: usize, instruction: &Instruction) -> Result<(), GruError> {
        let instruction = instruction.unmapped().interrupting();
        self.pool.context.submit(self.block(nth)?, &instruction)
    }

    /// How many instructions have not ended.
    ///
    /// # Errors
    /// As [`Segment::poll`](crate::Segment::poll).
    pub fn count(&self) -> Result<usize, GruError> {
        let mut count = 0;
        for block in &self.blocks {
            let found = self.pool.context.poll(*block)?;
            count += usize::from(matches!(found, Status::Active | Status::CallOs));
        }
        Ok(count)
    }

    /// Sleeps until the `nth` block's instruction has ended: what an atomic found.
    ///
    /// # Errors
    /// As [`Segment::wait_asleep`](crate::Segment::wait_asleep).
    pub fn wait(&self, nth: usize) -> Result<u64, GruError> {
        self.pool.context.wait_asleep(self.block(nth)?, PATIENCE)
    }

    /// [`Pending::submit`], then waits for it by polling.
    ///
    /// # Errors
    /// As those.
    pub fn run(&self, nth: usize, instruction: &Instruction) -> Result<u64, GruError> {
        let block = self.block(nth)?;
        self.pool.context.submit(block, &instruction.unmapped())?;
        self.pool.context.wait(block, PATIENCE)
    }

    /// What became of the `nth` block's message.
    pub(crate) fn delivery(&self, nth: usize) -> Result<crate::Delivery, GruError> {
        self.pool.context.delivery(self.block(nth)?)
    }

    /// Reads the data of the `nth` block.
    ///
    /// # Errors
    /// As [`Segment::read_data`](crate::Segment::read_data).
    pub fn read_data(&self, nth: usize, into: &mut [u64]) -> Result<(), GruError> {
        self.block(nth)?;
        let offset = self.data(nth).into();
        self.pool.context.read_data(offset, into)
    }

    /// Writes the data of the `nth` block.
    ///
    /// # Errors
    /// As [`Segment::write_data`](crate::Segment::write_data).
    pub fn write_data(&self, nth: usize, from: &[u64]) -> Result<(), GruError> {
        self.block(nth)?;
        let offset = self.data(nth).into();
        self.pool.context.write_data(offset, from)
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        let mut left = std::mem::take(&mut self.blocks);
        // One that is stuck is nobody's any more.
        left.retain(|block| {
            let ended = self.pool.context.wait(*block, PATIENCE);
            !matches!(ended, Err(GruError::Timeout { .. }))
        });
        self.pool.free().extend(left);
        self.pool.returned.notify_all();
    }
}
