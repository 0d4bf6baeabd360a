//! The TLB, and what a purge covers.
//!
//! The TLB really caches: an entry stays until a purge of exactly its ASID and page size, a complete purge, an eviction
//! or a reset removes it, whatever happens to the page tables. It is looked up by (ASID, page-size code, page), so a
//! purge of 4 KiB pages never removes a 2 MiB entry that spans them.

use std::collections::{HashMap, VecDeque};

use rand::Rng;
use rand::rngs::SmallRng;
use shootdown::{Addr, Range};

use super::config::Eviction;
use super::layout::page_shift;
use crate::shadow::Stamp;

/// What an entry translates.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct TlbKey {
    /// Address-space identifier.
    pub asid: u32,
    /// Page-size code.
    pub code: u8,
    /// First address of the page.
    pub page: u64,
}

impl TlbKey {
    /// The key of the page of size `code` that holds `vaddr`.
    pub fn of(asid: u32, code: u8, vaddr: u64) -> Self {
        let page = vaddr & !((1 << page_shift(code)) - 1);
        Self { asid, code, page }
    }

    /// The addresses of the page.
    pub fn range(&self) -> Range {
        let last = self.page | ((1 << page_shift(self.code)) - 1);
        Range::inclusive(Addr::new(self.page), Addr::new(last)).expect("a page is never empty")
    }
}

/// One entry of the TLB.
#[derive(Clone, Copy, Debug)]
pub struct TlbEntry {
    /// What it translates.
    pub key: TlbKey,
    /// The first frame behind the page, in units of 4 KiB.
    pub frame: u64,
    /// Whether stores are allowed.
    pub writable: bool,
    /// The address kind of the page.
    pub kind: u64,
    /// When, in the oracle's time, it was installed.
    pub stamp: Stamp,
}

impl TlbEntry {
    /// The 4 KiB frame behind `vaddr`, which lies in the page.
    pub(super) fn frame_of(&self, vaddr: u64) -> u64 {
        let pages = 1 << (page_shift(self.key.code) - 12);
        (self.frame & !(pages - 1)) + ((vaddr - self.key.page) >> 12)
    }
}

/// What one purge covers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Purge {
    /// `None`: any ASID.
    pub(super) asid: Option<u32>,
    /// Page-size code; without meaning for a complete purge.
    pub(super) code: u8,
    /// First address.
    pub(super) first: u64,
    /// Last address.
    pub(super) last: u64,
    /// Whatever size and address.
    pub(super) complete: bool,
    /// The contexts whose misses and accesses in flight it concerns. Entries belong to none.
    pub(super) contexts: u16,
}

impl Purge {
    /// The 4 KiB page of `asid` that holds `vaddr`.
    pub(super) fn page(asid: u32, vaddr: u64) -> Self {
        let page = TlbKey::of(asid, 0, vaddr).range();
        Self {
            asid: Some(asid),
            code: 0,
            first: page.start().get(),
            last: page.last().get(),
            complete: false,
            contexts: u16::MAX,
        }
    }

    /// Whether it concerns a context.
    pub(super) fn concerns(&self, context: usize) -> bool {
        self.contexts & (1 << context) != 0
    }

    fn of_asid(&self, asid: u32) -> bool {
        self.asid.is_none_or(|own| own == asid)
    }

    /// Whether it removes the entry `key`.
    pub(super) fn covers(&self, key: TlbKey) -> bool {
        let inside = key.code == self.code && (self.first..=self.last).contains(&key.page);
        self.of_asid(key.asid) && (self.complete || inside)
    }

    /// Whether a miss of `asid` at `vaddr` lies in it.
    pub(super) fn covers_miss(&self, asid: u32, vaddr: u64) -> bool {
        self.of_asid(asid) && (self.complete || (self.first..=self.last).contains(&vaddr))
    }
}

/// The entries, protected by the chiplet's lock.
#[derive(Debug)]
pub(super) struct Tlb {
    entries: HashMap<TlbKey, TlbEntry>,
    /// The keys of `entries`, the oldest first.
    order: VecDeque<TlbKey>,
    capacity: usize,
    eviction: Eviction,
}

impl Tlb {
    pub(super) fn new(capacity: usize, eviction: Eviction) -> Self {
        let capacity = capacity.max(2);
        Self {
            // Twice as many as there can be: what was removed leaves its place used until the table is made anew, which
            // takes more memory unless half of it is free.
            entries: HashMap::with_capacity(2 * capacity),
            order: VecDeque::with_capacity(capacity),
            capacity,
            eviction,
        }
    }

    /// The entry for `vaddr` among the page sizes that `sizes` allows, the smallest first.
    pub(super) fn lookup(&self, asid: u32, sizes: u16, vaddr: u64) -> Option<&TlbEntry> {
        let mut left = sizes;
        while left != 0 {
            let code = left.trailing_zeros() as u8;
            left &= left - 1;
            if let Some(entry) = self.entries.get(&TlbKey::of(asid, code, vaddr)) {
                return Some(entry);
            }
        }
        None
    }

    /// Installs `entry`, in the place of one with the same key if there is one. Returns whether another had to go.
    pub(super) fn install(&mut self, entry: TlbEntry, rng: &mut SmallRng) -> bool {
        if let Some(old) = self.entries.get_mut(&entry.key) {
            *old = entry;
            return false;
        }
        let full = self.entries.len() >= self.capacity;
        if full {
            let victim = match self.eviction {
                Eviction::Fifo => 0,
                Eviction::Random => rng.random_range(0..self.order.len()),
            };
            if let Some(key) = self.order.remove(victim) {
                self.entries.remove(&key);
            }
        }
        self.order.push_back(entry.key);
        self.entries.insert(entry.key, entry);
        full
    }

    /// Removes what `purge` covers.
    pub(super) fn purge(&mut self, purge: &Purge) {
        self.order.retain(|key| !purge.covers(*key));
        self.entries.retain(|key, _| !purge.covers(*key));
    }

    pub(super) fn clear(&mut self) {
        self.order.clear();
        self.entries.clear();
    }

    /// The entries, the oldest first.
    pub(super) fn entries(&self) -> impl Iterator<Item = &TlbEntry> {
        self.order.iter().filter_map(|key| self.entries.get(key))
    }
}
