//! The device TLB, and what an invalidation covers.

use std::collections::{HashMap, VecDeque};

use shootdown::{Frame, PageSize, Range, Rights};

use crate::oracle::Stamp;

/// What an entry translates.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Key {
    /// The PASID.
    pub pasid: u64,
    /// Whether the page is of 2 MiB, not 4 KiB.
    pub huge: bool,
    /// The first address of the page.
    pub page: u64,
}

impl Key {
    pub(super) fn of(pasid: u64, huge: bool, addr: u64) -> Self {
        let page = addr & !(size(huge).bytes() - 1);
        Self { pasid, huge, page }
    }

    /// The addresses of the page.
    pub fn range(&self) -> Range {
        Range::page(self.page.into(), size(self.huge))
    }
}

fn size(huge: bool) -> PageSize {
    if huge {
        PageSize::TwoMiB
    } else {
        PageSize::FourKiB
    }
}

/// An entry of the device TLB.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TlbEntry {
    /// What it translates.
    pub key: Key,
    /// The first frame behind the page, in units of 4 KiB.
    pub frame: Frame,
    /// What is allowed.
    pub rights: Rights,
    /// When, in the oracle's time, software wrote it into its page table.
    pub stamp: Stamp,
}

impl TlbEntry {
    /// The 4 KiB frame behind `addr`, which lies in the page.
    pub(super) fn frame_of(&self, addr: u64) -> Frame {
        Frame(self.frame.0 + ((addr - self.key.page) >> PageSize::FourKiB.shift()))
    }
}

/// What an invalidation covers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Covers {
    Pages {
        pasid: u64,
        huge: bool,
        first: u64,
        last: u64,
    },
    Pasid(u64),
    Everything,
}

impl Covers {
    pub(super) fn covers(&self, key: Key) -> bool {
        match *self {
            Self::Pages {
                pasid,
                huge,
                first,
                last,
            } => pasid == key.pasid && huge == key.huge && (first..=last).contains(&key.page),
            Self::Pasid(pasid) => pasid == key.pasid,
            Self::Everything => true,
        }
    }
}

/// The entries; the oldest makes room.
pub(super) struct Tlb {
    entries: HashMap<Key, TlbEntry>,
    /// The keys of `entries`, the oldest first.
    order: VecDeque<Key>,
    capacity: usize,
}

impl Tlb {
    pub(super) fn new(capacity: usize) -> Self {
        let capacity = capacity.max(16);
        Self {
            // Twice as many as there can be: what was removed leaves its place used until the table is made anew, which
            // takes more memory unless half of it is free.
            entries: HashMap::with_capacity(2 * capacity),
            order: VecDeque::with_capacity(capacity),
            capacity,
        }
    }

    pub(super) fn lookup(&self, pasid: u64, addr: u64) -> Option<TlbEntry> {
        let of = |huge| self.entries.get(&Key::of(pasid, huge, addr)).copied();
        of(false).or_else(|| of(true))
    }

    /// Installs `entry`, in the place of one with the same key if there is one. Returns whether another had to go.
    pub(super) fn install(&mut self, entry: TlbEntry) -> bool {
        if let Some(old) = self.entries.get_mut(&entry.key) {
            *old = entry;
            return false;
        }
        let full = self.entries.len() >= self.capacity;
        if full && let Some(oldest) = self.order.pop_front() {
            self.entries.remove(&oldest);
        }
        self.order.push_back(entry.key);
        self.entries.insert(entry.key, entry);
        full
    }

    pub(super) fn invalidate(&mut self, what: &Covers) {
        self.order.retain(|key| !what.covers(*key));
        self.entries.retain(|key, _| !what.covers(*key));
    }

    /// The entries, the oldest first.
    pub(super) fn entries(&self) -> impl Iterator<Item = &TlbEntry> {
        self.order.iter().filter_map(|key| self.entries.get(key))
    }
}
