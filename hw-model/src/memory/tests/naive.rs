//! Random changes, compared after each with a model that keeps one small record a page: page table, shadow, the kernel's
//! view, frames, and what the CPU reads.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const ARENA: u64 = 4 * HUGE;
const FRAMES: u64 = 3 * HUGE;

/// A mapped page. Frames are not predicted, but must stay the same unless the page is replaced.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Page {
    size: PageSize,
    rights: Rights,
    frame: Option<u64>,
    content: u64,
}

#[derive(Clone, Debug)]
enum Step {
    Map(PageSize, u64, u64, Rights),
    Unmap(u64, u64),
    Discard(u64, u64),
    Protect(u64, u64, Rights),
    Remap(u64, u64, u64),
    Store(u64),
}

/// First page and number of pages, often those of large pages.
fn place() -> impl Strategy<Value = (u64, u64)> {
    prop_oneof![
        (0..ARENA, 1..40_u64),
        (0..ARENA / 16, 1..8_u64).prop_map(|(first, count)| (first * 16, count * 16)),
        (0..4_u64, 1..3_u64).prop_map(|(first, count)| (first * HUGE, count * HUGE)),
        (0..4_u64, 0..20_u64, 1..HUGE)
            .prop_map(|(first, skip, count)| (first * HUGE + skip, count)),
    ]
    .prop_map(|(first, count)| (first, count.min(ARENA - first)))
}

fn rights() -> impl Strategy<Value = Rights> {
    (0..4_u8).prop_map(Rights::from_bits_truncate)
}

fn step() -> impl Strategy<Value = Step> {
    let size = prop::sample::select(PageSize::ALL.as_slice());
    prop_oneof![
        4 => (size, place(), rights()).prop_map(|(size, (first, count), rights)| {
            let unit = size.bytes() / PAGE;
            let first = first / unit * unit;
            Step::Map(size, first, count.next_multiple_of(unit).min(ARENA - first), rights)
        }),
        2 => place().prop_map(|(first, count)| Step::Unmap(first, count)),
        2 => place().prop_map(|(first, count)| Step::Discard(first, count)),
        2 => (place(), rights()).prop_map(|((first, count), rights)| Step::Protect(first, count, rights)),
        2 => (place(), place()).prop_map(|((first, count), (to, _))| {
            Step::Remap(first, to, count.min(ARENA - to))
        }),
        4 => (0..ARENA).prop_map(Step::Store),
    ]
}

struct Naive {
    bus: Bus,
    memory: Arc<ModelMemory>,
    pages: BTreeMap<u64, Page>,
}

impl Naive {
    fn new() -> Self {
        let (bus, memory) = super::new(FRAMES, ARENA);
        Self {
            bus,
            memory,
            pages: BTreeMap::new(),
        }
    }

    fn mapped_in(&self, first: u64, count: u64) -> u64 {
        self.pages.range(first..first + count).count() as u64
    }

    /// Cuts the large pages that reach over the ends of the range.
    fn split(&mut self, first: u64, count: u64) {
        let range = pages(&self.memory, first, count);
        for border in [first, first + count - 1] {
            let Some(size) = self.pages.get(&border).map(|page| page.size) else {
                continue;
            };
            let whole = Range::page(pages(&self.memory, border, 1).start(), size);
            if !range.contains(whole) {
                let unit = size.bytes() / PAGE;
                let start = border - border % unit;
                for (_, page) in self.pages.range_mut(start..start + unit) {
                    page.size = PageSize::FourKiB;
                }
            }
        }
    }

    /// Performs the step on both sides.
    fn perform(&mut self, step: &Step, tag: u64) {
        let memory = Arc::clone(&self.memory);
        let free = self.bus.physical().free_frames();
        let at = |first, count| pages(&memory, first, count);
        let refused = |result: &Result<(), MemoryError>, kind| matches!(result, Err(MemoryError::System { errno, .. }) if *errno == kind);
        match *step {
            Step::Map(size, first, count, rights) => {
                let result = memory.map(at(first, count), size, rights);
                if self.mapped_in(first, count) > 0 {
                    assert!(refused(&result, ErrorKind::AlreadyExists));
                } else if result.is_ok() {
                    let page = Page {
                        size,
                        rights,
                        frame: None,
                        content: 0,
                    };
                    self.pages
                        .extend((first..first + count).map(|number| (number, page)));
                } else {
                    assert_eq!(
                        result,
                        Err(MemoryError::OutOfFrames {
                            needed: count,
                            free
                        })
                    );
                    assert!(free < count || size != PageSize::FourKiB);
                }
            }
            Step::Unmap(first, count) => {
                memory.unmap(at(first, count)).unwrap();
                self.split(first, count);
                self.pages
                    .retain(|page, _| !(first..first + count).contains(page));
            }
            Step::Discard(first, count) => match memory.discard(at(first, count)) {
                Ok(()) => {
                    self.split(first, count);
                    for (_, page) in self.pages.range_mut(first..first + count) {
                        page.frame = None;
                        page.content = 0;
                    }
                }
                Err(error) => {
                    assert!(matches!(error, MemoryError::OutOfFrames { .. }), "{error}");
                    let large = |page: &Page| page.size != PageSize::FourKiB;
                    assert!(
                        free < self.mapped_in(first, count)
                            || self
                                .pages
                                .range(first..first + count)
                                .any(|(_, page)| large(page))
                    );
                }
            },
            Step::Protect(first, count, rights) => {
                memory.protect(at(first, count), rights).unwrap();
                self.split(first, count);
                for (_, page) in self.pages.range_mut(first..first + count) {
                    page.rights = rights;
                }
            }
            Step::Remap(first, to, count) => {
                let result = memory.remap(at(first, count), at(to, count));
                if first.abs_diff(to) < count {
                    assert!(refused(&result, ErrorKind::InvalidInput));
                } else if self.mapped_in(to, count) > 0 {
                    assert!(refused(&result, ErrorKind::AlreadyExists));
                } else {
                    result.unwrap();
                    self.split(first, count);
                    for number in first..first + count {
                        let Some(mut page) = self.pages.remove(&number) else {
                            continue;
                        };
                        if first.abs_diff(to) % (page.size.bytes() / PAGE) != 0 {
                            page.size = PageSize::FourKiB;
                        }
                        self.pages.insert(number - first + to, page);
                    }
                }
            }
            Step::Store(number) => {
                if let Some(page) = self.pages.get_mut(&number)
                    && page.rights.contains(Rights::WRITE)
                {
                    store(&memory, number, tag);
                    page.content = tag;
                }
            }
        }
    }

    /// Compares everything.
    fn compare(&mut self) {
        let memory = &self.memory;
        let oracle = self.bus.oracle();
        let mut owners = BTreeMap::new();
        let view = kernels_view(memory);
        assert_eq!(view.len() as u64, memory.table.mappings(), "{view:#?}");
        assert_eq!(
            memory.budget.used(),
            OWN_MAPPINGS - 1 + memory.table.mappings()
        );
        let mut mappings = view.iter();
        let mut mapping = mappings.next().unwrap();
        for number in 0..ARENA {
            let addr = pages(memory, number, 1).start();
            while mapping.end <= addr.get() {
                mapping = mappings.next().unwrap();
            }
            let found = memory.translate(addr);
            let behind = memory.shadow().at(memory.id(), addr);
            let Some(page) = self.pages.get_mut(&number) else {
                assert_eq!(found, None, "page {number}");
                assert_eq!(behind, crate::shadow::Behind::Nothing);
                assert!(!mapping.shared && mapping.rights.is_empty());
                continue;
            };
            let found = found.unwrap_or_else(|| panic!("page {number} is not mapped: {page:?}"));
            assert_eq!(
                (found.page_size, found.rights),
                (page.size, page.rights),
                "page {number}"
            );
            assert_eq!(found.page, Range::page(addr, page.size));
            assert_eq!(found.frame.0 % (page.size.bytes() / PAGE), 0);
            let frame = found.frame.0 + (addr.get() - found.page.start().get()) / PAGE;
            assert_eq!(*page.frame.get_or_insert(frame), frame, "page {number}");
            assert_eq!(
                owners.insert(frame, number),
                None,
                "frame {frame} has two owners"
            );
            assert!(behind.agrees(Frame(frame), oracle.stamp(memory.id(), addr)));
            assert!(
                behind.allows(page.rights)
                    && (page.rights.is_all() || !behind.allows(Rights::READ_WRITE))
            );
            assert!(mapping.shared);
            assert_eq!(mapping.rights, page.rights);
            assert_eq!(mapping.offset + (addr.get() - mapping.start), frame * PAGE);
            let mut bytes = [0; 8];
            self.bus.physical().read(Frame(frame), 0, &mut bytes);
            assert_eq!(u64::from_ne_bytes(bytes), page.content, "page {number}");
            if page.rights.contains(Rights::READ) {
                assert_eq!(load(memory, number), page.content, "page {number}");
            }
        }
        let physical = self.bus.physical();
        assert_eq!(
            physical.total() - physical.free_frames(),
            owners.len() as u64
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn it_agrees_with_a_naive_model(steps in prop::collection::vec(step(), 1..40)) {
        let mut naive = Naive::new();
        for (step, tag) in steps.iter().zip(1..) {
            naive.perform(step, tag);
            naive.compare();
        }
        let bus = naive.bus.clone();
        drop(naive);
        prop_assert_eq!(bus.physical().free_frames(), bus.physical().total());
    }
}
