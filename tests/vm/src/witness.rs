//! Holds what the guest said against what its IOMMU did.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::protocol::{Iova, Line, Requester};
use crate::trace::Event;

/// Faults come one for each four bytes of a DMA; they are counted by page.
const PAGE: u64 = 4096;

/// A thing that the guest said and the IOMMU's trace does not bear out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Complaint {
    /// A range was said to be unmapped, but a part was never invalidated.
    #[error(
        "{range} was said to be unmapped, but invalidated in {invalidated} domains instead of {wanted}, elsewhere not at {missing:#x} ({seen})"
    )]
    NotInvalidated {
        /// What the guest said.
        range: Bytes,
        /// In how many domains all of it was invalidated.
        invalidated: u64,
        /// In how many it was mapped.
        wanted: u64,
        /// How far the best of the other domains' descriptors came: the first address that they left.
        missing: u64,
        /// What was seen instead.
        seen: Seen,
    },
    /// A range was invalidated, but nobody waited for the IOMMU.
    #[error(
        "{range} was invalidated, but no wait descriptor completed before the guest said that it was unmapped"
    )]
    NotWaited {
        /// What the guest said.
        range: Bytes,
    },
    /// A device's ATS cache was not flushed, or nobody waited for it.
    #[error(
        "{range} was said to be unmapped, but the device TLB of {requester} was not flushed and waited for at {missing:#x}"
    )]
    DeviceTlbNotFlushed {
        /// What the guest said.
        range: Bytes,
        /// The device.
        requester: Requester,
        /// The first address that was not covered.
        missing: u64,
    },
    /// The guest began to unmap and never said that it was done, or the other way round.
    #[error("{range} has one of UNMAP and UNMAPPED without the other")]
    Unpaired {
        /// The range.
        range: Bytes,
    },
    /// DMA was announced to fault, and none did.
    #[error("DMA of {requester} to {range} was to fault, and no fault was seen")]
    NoFault {
        /// Who was to try it.
        requester: Requester,
        /// Where.
        range: Bytes,
    },
    /// A DMA faulted that nobody announced.
    #[error("unexpected fault: {requester}, page {page:#x}: {count}")]
    UnexpectedFault {
        /// Who tried it.
        requester: Requester,
        /// The page.
        page: u64,
        /// How often.
        count: FaultCount,
    },
    /// A line came at a place where it means nothing.
    #[error("`{0}` outside of a check, or a check inside another")]
    OutOfPlace(String),
}

/// A range, printed as first and last address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub Iova);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..={:#x}", self.0.start, self.0.last())
    }
}

/// What the IOMMU did while a range was being unmapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Invalidations of the IOMMU's own translations.
    pub iotlb: u64,
    /// Invalidations of devices' ATS caches.
    pub device_tlb: u64,
    /// Completed waits.
    pub waits: u64,
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "seen: {} IOTLB, {} device TLB, {} waits",
            self.iotlb, self.device_tlb, self.waits
        )
    }
}

/// Faults in one page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultCount {
    /// Reads that were refused.
    pub reads: u64,
    /// Writes that were refused.
    pub writes: u64,
}

impl fmt::Display for FaultCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} reads and {} writes refused", self.reads, self.writes)
    }
}

/// What the witness found in one check.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Empty if all that the guest said is borne out.
    pub complaints: Vec<Complaint>,
    /// Ranges that were unmapped as they should be.
    pub unmapped: u64,
    /// What the IOMMU did from the first mark to the last.
    pub seen: Seen,
    /// Pages that DMA faulted in.
    pub fault_pages: u64,
}

/// Reads lines and events in the order in which they happened.
#[derive(Debug, Default)]
pub struct Witness {
    section: Option<Section>,
    stray: Vec<Complaint>,
}

#[derive(Debug, Default)]
struct Section {
    pending: Vec<Pending>,
    /// How many domains each range is mapped in, if not in one.
    domains: Option<u64>,
    ats: Vec<Requester>,
    announced: Vec<(Requester, Iova)>,
    allowed: Vec<(Requester, Iova)>,
    faults: BTreeMap<(Requester, u64), FaultCount>,
    findings: Findings,
}

/// A range between `UNMAP` and `UNMAPPED`.
#[derive(Debug)]
struct Pending {
    range: Iova,
    done: Vec<(Cache, Iova)>,
    /// So many of them, from the first on, were waited for: the queue is worked off in order.
    waited: usize,
    seen: Seen,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cache {
    AllDomains,
    Domain(u16),
    Device(Requester),
}

impl Witness {
    /// The guest said `line`. At the end of a check, what was found in it.
    pub fn guest(&mut self, line: &Line) -> Option<Findings> {
        match (line, &mut self.section) {
            (Line::Begin(_), None) => self.section = Some(Section::default()),
            (Line::End(_), Some(_)) => return self.section.take().map(Section::finish),
            (Line::Unmap(range), Some(section)) => section.pending.push(Pending {
                range: *range,
                done: Vec::new(),
                waited: 0,
                seen: Seen::default(),
            }),
            (Line::Unmapped(range), Some(section)) => section.unmapped(*range),
            (Line::Domains(count), Some(section)) => section.domains = Some(*count),
            (Line::Ats(requester), Some(section)) => section.ats.push(*requester),
            (Line::Faults(requester, range), Some(section)) => {
                section.announced.push((*requester, *range));
            }
            (Line::MayFault(requester, range), Some(section)) => {
                section.allowed.push((*requester, *range));
            }
            (Line::Begin(_) | Line::End(_) | Line::Unmap(_) | Line::Unmapped(_), _)
            | (Line::Domains(_) | Line::Ats(_) | Line::Faults(..) | Line::MayFault(..), None) => {
                self.stray.push(Complaint::OutOfPlace(line.to_string()));
            }
            (
                Line::Plan(_)
                | Line::Ok(_)
                | Line::Fail(..)
                | Line::Figure(..)
                | Line::Output(..)
                | Line::Note(_),
                _,
            ) => {}
        }
        None
    }

    /// The IOMMU did this.
    pub fn iommu(&mut self, event: Event) {
        match (&mut self.section, event) {
            (Some(section), _) => section.iommu(event),
            (
                None,
                Event::Fault {
                    requester,
                    address,
                    write,
                },
            ) => {
                let mut count = FaultCount::default();
                count.add(write);
                let page = address & !(PAGE - 1);
                self.stray.push(Complaint::UnexpectedFault {
                    requester,
                    page,
                    count,
                });
            }
            (None, _) => {}
        }
    }

    /// What was wrong outside of any check.
    pub fn stray(&self) -> &[Complaint] {
        &self.stray
    }
}

impl FaultCount {
    fn add(&mut self, write: bool) {
        if write {
            self.writes += 1;
        } else {
            self.reads += 1;
        }
    }
}

impl Seen {
    fn add(&mut self, event: Event) {
        match event {
            Event::IotlbGlobal | Event::IotlbDomain(_) | Event::IotlbPages(..) => self.iotlb += 1,
            Event::DeviceTlb(..) => self.device_tlb += 1,
            Event::Wait => self.waits += 1,
            Event::Fault { .. } => {}
        }
    }
}

impl Section {
    fn iommu(&mut self, event: Event) {
        const ALL: Iova = Iova {
            start: 0,
            len: u64::MAX,
        };
        self.findings.seen.add(event);
        let invalidation = match event {
            Event::IotlbGlobal => Some((Cache::AllDomains, ALL)),
            Event::IotlbDomain(domain) => Some((Cache::Domain(domain), ALL)),
            Event::IotlbPages(domain, range) => Some((Cache::Domain(domain), range)),
            Event::DeviceTlb(requester, range) => Some((Cache::Device(requester), range)),
            Event::Wait => None,
            Event::Fault {
                requester,
                address,
                write,
            } => {
                let page = address & !(PAGE - 1);
                self.faults.entry((requester, page)).or_default().add(write);
                return;
            }
        };
        for pending in &mut self.pending {
            pending.seen.add(event);
            match invalidation {
                Some(invalidation) => pending.done.push(invalidation),
                None => pending.waited = pending.done.len(),
            }
        }
    }

    fn unmapped(&mut self, range: Iova) {
        let complaints = &mut self.findings.complaints;
        let Some(at) = self
            .pending
            .iter()
            .position(|pending| pending.range == range)
        else {
            complaints.push(Complaint::Unpaired {
                range: Bytes(range),
            });
            return;
        };
        let pending = self.pending.swap_remove(at);
        let before = complaints.len();
        if let Err(complaint) = pending.iotlb(self.domains.unwrap_or(1)) {
            complaints.push(complaint);
        }
        for &requester in &self.ats {
            if let Some(missing) = pending.gap(&[Cache::Device(requester)], true) {
                let range = Bytes(range);
                complaints.push(Complaint::DeviceTlbNotFlushed {
                    range,
                    requester,
                    missing,
                });
            }
        }
        if complaints.len() == before {
            self.findings.unmapped += 1;
        }
    }

    fn finish(mut self) -> Findings {
        let complaints = &mut self.findings.complaints;
        for pending in &self.pending {
            complaints.push(Complaint::Unpaired {
                range: Bytes(pending.range),
            });
        }
        for &(requester, range) in &self.announced {
            let hit = |&(who, page): &(Requester, u64)| who == requester && in_page(range, page);
            if !self.faults.keys().any(hit) {
                complaints.push(Complaint::NoFault {
                    requester,
                    range: Bytes(range),
                });
            }
        }
        self.findings.fault_pages = self.faults.len() as u64;
        for (&(requester, page), &count) in &self.faults {
            let announced =
                |&(who, range): &(Requester, Iova)| who == requester && in_page(range, page);
            if !self.announced.iter().chain(&self.allowed).any(announced) {
                complaints.push(Complaint::UnexpectedFault {
                    requester,
                    page,
                    count,
                });
            }
        }
        self.findings
    }
}

/// Whether a part of the range lies in the page that begins at `page`.
fn in_page(range: Iova, page: u64) -> bool {
    page <= range.last() && range.start <= page + (PAGE - 1)
}

impl Pending {
    /// Whether the translations of the whole range were invalidated, and waited for, in so many domains.
    fn iotlb(&self, wanted: u64) -> Result<(), Complaint> {
        let range = Bytes(self.range);
        let all = [Cache::AllDomains];
        if self.gap(&all, true).is_none() {
            return Ok(());
        }
        let domains: BTreeSet<u16> = self
            .done
            .iter()
            .filter_map(|(cache, _)| match *cache {
                Cache::Domain(domain) => Some(domain),
                Cache::AllDomains | Cache::Device(_) => None,
            })
            .collect();
        let (mut missing, mut invalidated, mut waited) = (self.range.start, 0, 0);
        for domain in domains {
            let caches = [Cache::AllDomains, Cache::Domain(domain)];
            match self.gap(&caches, false) {
                Some(gap) => missing = missing.max(gap),
                None => {
                    invalidated += 1;
                    waited += u64::from(self.gap(&caches, true).is_none());
                }
            }
        }
        if waited >= wanted {
            return Ok(());
        }
        Err(
            if self.gap(&all, false).is_none() || invalidated >= wanted {
                Complaint::NotWaited { range }
            } else {
                Complaint::NotInvalidated {
                    range,
                    missing,
                    invalidated,
                    wanted,
                    seen: self.seen,
                }
            },
        )
    }

    /// The first address of the range that no invalidation of these caches covers (with `waited`: and was waited for).
    fn gap(&self, caches: &[Cache], waited: bool) -> Option<u64> {
        let done = if waited {
            &self.done[..self.waited]
        } else {
            &self.done[..]
        };
        let of = |(cache, range): &(Cache, Iova)| caches.contains(cache).then_some(*range);
        let mut ranges: Vec<Iova> = done.iter().filter_map(of).collect();
        ranges.sort_unstable();
        let mut next = self.range.start;
        for range in ranges {
            if range.start > next {
                break;
            }
            if range.last() >= self.range.last() {
                return None;
            }
            next = next.max(range.last() + 1);
        }
        Some(next)
    }
}

#[cfg(test)]
mod tests;
