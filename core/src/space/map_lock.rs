//! The map lock: mmap_sem of this project.
//!
//! Guards prove that it is held. Their holder edits the map; an invalidation of the plain forms takes it only to claim its
//! span and runs its phases without it, so that disjoint ones run in parallel. Writers are not overtaken by readers.
//! A thread holds at most one map lock.

use crate::context::{self, HoldsMapLock, Refused};
use crate::primitive::{Condvar, Mutex};

#[derive(Debug, Default)]
struct Holders {
    writer: bool,
    readers: u32,
    waiting_writers: u32,
    waiting_readers: u32,
}

#[derive(Debug, Default)]
pub(crate) struct MapLock {
    holders: Mutex<Holders>,
    freed: Condvar,
}

/// Held until dropped.
#[derive(Debug)]
pub(crate) struct Held<'a> {
    lock: &'a MapLock,
    write: bool,
    _mark: HoldsMapLock,
}

impl MapLock {
    pub(crate) fn new() -> Self {
        Self {
            holders: Mutex::new(Holders::default()),
            freed: Condvar::new(),
        }
    }

    pub(crate) fn write(&self, call: &'static str) -> Result<Held<'_>, Refused> {
        context::map_lock_refusal(call)?;
        let mut holders = self.holders.lock();
        holders.waiting_writers += 1;
        while holders.writer || holders.readers > 0 {
            holders = self.freed.wait(holders);
        }
        holders.waiting_writers -= 1;
        holders.writer = true;
        Ok(self.held(true))
    }

    pub(crate) fn try_write(&self, call: &'static str) -> Result<Option<Held<'_>>, Refused> {
        context::map_lock_refusal(call)?;
        let mut holders = self.holders.lock();
        if holders.writer || holders.readers > 0 {
            return Ok(None);
        }
        holders.writer = true;
        Ok(Some(self.held(true)))
    }

    pub(crate) fn read(&self, call: &'static str) -> Result<Held<'_>, Refused> {
        context::map_lock_refusal(call)?;
        let mut holders = self.holders.lock();
        holders.waiting_readers += 1;
        while holders.writer || holders.waiting_writers > 0 {
            holders = self.freed.wait(holders);
        }
        holders.waiting_readers -= 1;
        holders.readers += 1;
        Ok(self.held(false))
    }

    pub(crate) fn try_read(&self, call: &'static str) -> Result<Option<Held<'_>>, Refused> {
        context::map_lock_refusal(call)?;
        let mut holders = self.holders.lock();
        if holders.writer || holders.waiting_writers > 0 {
            return Ok(None);
        }
        holders.readers += 1;
        Ok(Some(self.held(false)))
    }

    fn held(&self, write: bool) -> Held<'_> {
        Held {
            lock: self,
            write,
            _mark: HoldsMapLock::enter(),
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut holders = self.lock.holders.lock();
        if self.write {
            holders.writer = false;
        } else {
            holders.readers -= 1;
        }
        // To wake is a system call, whoever sleeps.
        let wanted = holders.waiting_writers + holders.waiting_readers > 0;
        drop(holders);
        if wanted {
            self.lock.freed.notify_all();
        }
    }
}
