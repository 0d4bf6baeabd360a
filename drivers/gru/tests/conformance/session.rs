//! The driver, as the kit opens it and has it work.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use conformance::{Access, Driver, Failure, Session};
use shootdown::{Addr, AddressSpace, Device, PageSize, Range};
use shootdown_gru::{Config, Element, Gru, GruError, Instruction, Segment};

use crate::chiplets::Chiplets;

const LONG: Duration = Duration::from_secs(5);

pub(crate) struct OnGru {
    gru: Arc<Gru>,
    chiplets: Arc<Chiplets>,
}

impl OnGru {
    pub(crate) fn probe(chiplets: Arc<Chiplets>) -> Result<Self, Failure> {
        Self::attach(chiplets, Config::default())
    }

    pub(crate) fn attach(chiplets: Arc<Chiplets>, config: Config) -> Result<Self, Failure> {
        let gru = Gru::attach(chiplets.ports(), config);
        Ok(Self { gru, chiplets })
    }
}

impl Driver for OnGru {
    type Hardware = Chiplets;
    type Session = OnSegment;

    fn open(&self, space: &AddressSpace, _: Range) -> Result<OnSegment, Failure> {
        let segment = Arc::new(self.gru.segment(space)?);
        self.chiplets.add(space.id(), &segment);
        Ok(OnSegment {
            free: Mutex::new((0..segment.control_blocks()).collect()),
            freed: Condvar::new(),
            started: Mutex::default(),
            segment,
        })
    }

    fn devices(&self) -> Vec<Device> {
        self.gru.devices().to_vec()
    }
}

/// A segment, and who has which of its control blocks.
pub(crate) struct OnSegment {
    segment: Arc<Segment>,
    free: Mutex<Vec<usize>>,
    freed: Condvar,
    started: Mutex<Vec<usize>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl OnSegment {
    fn take(&self) -> Result<usize, Failure> {
        let none = |free: &mut Vec<usize>| free.is_empty();
        let waited = self.freed.wait_timeout_while(lock(&self.free), LONG, none);
        let (mut free, _) = waited.unwrap_or_else(PoisonError::into_inner);
        free.pop()
            .ok_or_else(|| "all control blocks are at work".into())
    }

    fn give(&self, cb: usize) {
        lock(&self.free).push(cb);
        self.freed.notify_one();
    }
}

fn said(result: Result<u64, GruError>) -> Result<Access, Failure> {
    match result {
        Ok(_) => Ok(Access::Done),
        Err(GruError::Exception { .. }) => Ok(Access::Fault),
        Err(GruError::SegmentEnded { .. } | GruError::ContextLost { .. }) => Ok(Access::Lost),
        Err(error) => Err(error.into()),
    }
}

impl Session for OnSegment {
    fn write(&self, at: Addr, value: u64) -> Result<Access, Failure> {
        let cb = self.take()?;
        let set = Instruction::vset(at, value, Element::Double, 1);
        let said = said(self.segment.run(cb, &set, LONG));
        // One that is still at work is nobody's.
        if said.is_ok() {
            self.give(cb);
        }
        said
    }

    fn start(&self, part: Range) -> Result<(), Failure> {
        let cb = self.take()?;
        let pages = part.pages(PageSize::FourKiB) as u32;
        let set = Instruction::vset(part.start(), 0x5a5a, Element::Double, pages).stride(512);
        self.segment.submit(cb, &set)?;
        lock(&self.started).push(cb);
        Ok(())
    }

    fn settle(&self) -> Result<(), Failure> {
        for cb in std::mem::take(&mut *lock(&self.started)) {
            said(self.segment.wait(cb, LONG))?;
            self.give(cb);
        }
        Ok(())
    }

    fn segment(&self) -> Option<Range> {
        Some(self.segment.range())
    }
}
