//! How a range is flushed on a device: the fewest commands that its declared limits allow, or one full flush where that is cheaper.
//!
//! What is mapped in the range comes in pieces, in the order of their addresses, each with the sizes that entries of it can have.
//! For each size the pages are points on a line, and a command is an interval of at most so many pages that may also cover pages
//! of which nothing is cached. Whoever begins an interval at the first page that is not covered, and makes it as long as it may be,
//! needs the fewest.

use arrayvec::ArrayVec;

use crate::addr::{PageSize, PageSizes, Range};
use crate::tlb::{BATCH, Device, Limits, Scope};

/// Calls with each piece of a range, and the sizes that its pages have.
type Walk<'a> = &'a dyn Fn(Range, &mut dyn FnMut(Range, PageSizes));

/// What is mapped in a range.
#[derive(Clone, Copy)]
pub(crate) enum Pieces<'a> {
    /// Something everywhere, of these sizes.
    All(PageSizes),
    /// What this walks.
    Of(Walk<'a>),
}

impl Pieces<'_> {
    /// Nothing is known but that pages of any size may be in it.
    pub(crate) const UNKNOWN: Self = Self::All(PageSizes::all());

    fn each(self, range: Range, each: &mut dyn FnMut(Range, PageSizes)) {
        match self {
            Self::All(sizes) => each(range, sizes),
            Self::Of(walk) => walk(range, each),
        }
    }

    /// The sizes of all pages in `range`.
    #[inline]
    pub(crate) fn sizes(self, range: Range) -> PageSizes {
        match self {
            Self::All(sizes) => sizes,
            Self::Of(walk) => {
                let mut all = PageSizes::empty();
                walk(range, &mut |_, sizes| all |= sizes);
                all
            }
        }
    }
}

/// A command that is being made: the first page, and the last one so far that is to be covered, by number.
#[derive(Clone, Copy, Debug)]
struct Open {
    first: u64,
    last: u64,
}

/// What of a device its plans depend on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Abilities {
    entry_sizes: PageSizes,
    splits_pages: bool,
    per_command: u64,
    /// More commands than this are dearer than a full flush, or more than a batch holds.
    most: usize,
}

impl Abilities {
    pub(crate) fn new(limits: &Limits, splits_pages: bool) -> Self {
        let dear = usize::try_from(limits.full_flush_cost.max(1)).unwrap_or(usize::MAX);
        Self {
            entry_sizes: limits.entry_sizes,
            splits_pages,
            per_command: limits.pages_per_command,
            most: limits.commands_per_batch.clamp(1, BATCH).min(dear),
        }
    }

    /// Where large pages may have been `cut` it is as if the device did that.
    fn with(mut self, cut: bool) -> Self {
        self.splits_pages |= cut;
        self
    }

    /// The sizes that entries of pages of `sizes` can have.
    fn entries(&self, sizes: PageSizes) -> PageSizes {
        let smaller = |size: &PageSize| self.splits_pages && sizes.bits() > size.bytes();
        let own = |size: &PageSize| sizes.contains((*size).into()) || smaller(size);
        let all: PageSizes = (PageSize::ALL.into_iter().filter(own).map(PageSizes::from)).collect();
        // Entries are never larger than the page; where the device has none of its sizes it must be using smaller ones.
        match all & self.entry_sizes {
            none if none.is_empty() => self.entry_sizes,
            possible => possible,
        }
    }
}

/// The commands of one range for one device, or for all that are alike.
#[derive(Debug)]
pub(crate) struct FlushPlan {
    /// Of what; none before the first.
    of: Option<(Range, Abilities)>,
    open: [Option<Open>; PageSize::ALL.len()],
    scopes: ArrayVec<Scope, BATCH>,
    full: bool,
}

impl FlushPlan {
    /// For nothing yet. It is large, and stays where it is.
    pub(crate) fn new() -> Self {
        Self {
            of: None,
            open: [None; PageSize::ALL.len()],
            scopes: ArrayVec::new_const(),
            full: false,
        }
    }

    /// Becomes the plan for `range` on `device`, unless it is. Where others change pages too large ones may have been `cut`.
    #[inline]
    pub(crate) fn make(&mut self, range: Range, pieces: Pieces<'_>, device: &Device, cut: bool) {
        if !self.fits(range, device, cut) {
            self.make_anew(range, pieces, device.abilities().with(cut));
        }
    }

    /// Whether it does for this device as well, with the same in the range.
    #[inline]
    fn fits(&self, range: Range, device: &Device, cut: bool) -> bool {
        self.of == Some((range, device.abilities().with(cut)))
    }

    #[inline(never)]
    fn make_anew(&mut self, range: Range, pieces: Pieces<'_>, abilities: Abilities) {
        self.of = Some((range, abilities));
        self.scopes.clear();
        self.full = false;
        pieces.each(range, &mut |piece, sizes| {
            if let Some(part) = piece.intersect(range) {
                self.add(part, sizes, &abilities);
            }
        });
        for (nth, size) in PageSize::ALL.into_iter().enumerate() {
            if let Some(open) = self.open[nth].take() {
                self.close(open, size, abilities.most);
            }
        }
    }

    fn add(&mut self, piece: Range, sizes: PageSizes, abilities: &Abilities) {
        let sizes = abilities.entries(sizes);
        for (nth, size) in PageSize::ALL.into_iter().enumerate() {
            if !sizes.contains(size.into()) {
                continue;
            }
            let page = |addr: crate::addr::Addr| addr.get() >> size.shift();
            let (mut first, last) = (page(piece.start()), page(piece.last()));
            while !self.full {
                let open = *self.open[nth].get_or_insert(Open { first, last: first });
                let reach = open.first.saturating_add(abilities.per_command - 1);
                if last <= reach {
                    self.open[nth] = Some(Open { last, ..open });
                    break;
                }
                let covered = if first <= reach { reach } else { open.last };
                self.open[nth] = None;
                let last = covered;
                self.close(Open { last, ..open }, size, abilities.most);
                first = first.max(covered + 1);
            }
        }
    }

    fn close(&mut self, open: Open, size: PageSize, most: usize) {
        if self.scopes.len() == most {
            self.full = true;
        }
        if self.full {
            return;
        }
        let start = open.first << size.shift();
        let last = (open.last << size.shift()) | (size.bytes() - 1);
        self.scopes.push(Scope::Pages {
            range: Range::inclusive(start, last).expect("a command has a page"),
            page_size: size,
        });
    }

    /// The scopes to issue, one a command.
    pub(crate) fn scopes(&self) -> &[Scope] {
        if self.full {
            &[Scope::Tag]
        } else {
            &self.scopes
        }
    }
}

#[cfg(test)]
#[path = "plan/tests.rs"]
mod tests;
