//! The driver, as the kit opens it and has it work.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use conformance::{Access, Driver, Failure, Session};
use shootdown::{Addr, AddressSpace, Device, Range};
use shootdown_pta::{Command, Config, Pta, PtaError, Queue};

use crate::device::{Broken, Hardware};

const LONG: Duration = Duration::from_secs(5);

pub(crate) struct OnPta(Arc<Pta>);

impl OnPta {
    pub(crate) fn probe(hardware: Arc<Hardware>) -> Result<Self, Failure> {
        Self::attach(hardware, Broken::Nothing, Config::default())
    }

    pub(crate) fn attach(
        hardware: Arc<Hardware>,
        broken: Broken,
        config: Config,
    ) -> Result<Self, Failure> {
        let (registers, interrupts) = (hardware.registers(broken), hardware.model.clone());
        Ok(Self(Pta::probe("pta0", registers, interrupts, config)?))
    }
}

impl Driver for OnPta {
    type Hardware = Hardware;
    type Session = OnQueue;

    fn open(&self, space: &AddressSpace, _: Range) -> Result<OnQueue, Failure> {
        let queue = self.0.queue(space)?;
        Ok(OnQueue {
            free: Mutex::new((0..queue.slots()).collect()),
            freed: Condvar::new(),
            started: Mutex::default(),
            queue,
        })
    }

    fn devices(&self) -> Vec<Device> {
        vec![self.0.device().clone()]
    }
}

/// A queue, and who has which of its slots.
pub(crate) struct OnQueue {
    queue: Queue,
    free: Mutex<Vec<usize>>,
    freed: Condvar,
    started: Mutex<Vec<usize>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl OnQueue {
    fn take(&self) -> Result<usize, Failure> {
        let none = |free: &mut Vec<usize>| free.is_empty();
        let waited = self.freed.wait_timeout_while(lock(&self.free), LONG, none);
        let (mut free, _) = waited.unwrap_or_else(PoisonError::into_inner);
        free.pop().ok_or_else(|| "all slots are at work".into())
    }

    fn give(&self, slot: usize) {
        lock(&self.free).push(slot);
        self.freed.notify_one();
    }
}

fn said(result: Result<u64, PtaError>) -> Result<Access, Failure> {
    match result {
        Ok(_) => Ok(Access::Done),
        Err(PtaError::PageFault { .. }) => Ok(Access::Fault),
        Err(PtaError::QueueEnded | PtaError::QueueLost) => Ok(Access::Lost),
        Err(error) => Err(error.into()),
    }
}

impl Session for OnQueue {
    fn write(&self, at: Addr, value: u64) -> Result<Access, Failure> {
        let slot = self.take()?;
        let range = Range::new(at, 8)?;
        let fill = Command::Fill { range, word: value };
        let said = said(self.queue.run(slot, &fill, LONG));
        // One that is still at work is nobody's.
        if said.is_ok() {
            self.give(slot);
        }
        said
    }

    fn start(&self, part: Range) -> Result<(), Failure> {
        let slot = self.take()?;
        let fill = Command::Fill {
            range: part,
            word: 0x5a5a,
        };
        self.queue.submit(slot, &fill)?;
        lock(&self.started).push(slot);
        Ok(())
    }

    fn settle(&self) -> Result<(), Failure> {
        for slot in std::mem::take(&mut *lock(&self.started)) {
            said(self.queue.wait(slot, LONG))?;
            self.give(slot);
        }
        Ok(())
    }

    fn segment(&self) -> Option<Range> {
        Some(self.queue.range())
    }
}
