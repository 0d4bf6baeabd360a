//! The operations of one thread, one after the other, by chance.

use rand::Rng;
use rand::rngs::SmallRng;
use shootdown::PageSize;

use super::{Number, Operation, PLACES};

/// What a thread has made so far, as far as the generator knows: an operation that fails makes nothing.
#[derive(Default)]
pub(super) struct Draft {
    spaces: Vec<Number>,
    segments: Vec<(Number, Option<Number>)>,
    most_segments: usize,
    buffers: Vec<Buffer>,
}

#[derive(Clone, Copy)]
struct Buffer {
    number: Number,
    space: Option<Number>,
    /// Of 4 KiB, at the beginning.
    pages: u64,
    /// A page of it.
    size: PageSize,
}

/// What one thread has at the same time; what all threads have has to find room.
pub(super) const SEGMENTS: usize = 3;
const BUFFERS: usize = 4;
const SPACES: usize = 2;

/// Kinds that are drawn until one can be.
const TRIES: usize = 64;

#[derive(Clone, Copy)]
enum Kind {
    Map,
    Segment,
    Space,
    Exit,
    EndSegment,
    Unmap,
    UnmapHalf,
    Discard,
    Protect,
    Remap,
    Write,
    Count,
    Sweep,
    Settle,
    Registration,
}

/// The kinds of operations, and how often each comes up where nothing is drawn for it.
const KINDS: [(Kind, u32); 15] = [
    (Kind::Map, 3),
    (Kind::Segment, 3),
    (Kind::Space, 1),
    (Kind::Exit, 1),
    (Kind::EndSegment, 2),
    (Kind::Unmap, 2),
    (Kind::UnmapHalf, 1),
    (Kind::Discard, 4),
    (Kind::Protect, 1),
    (Kind::Remap, 1),
    (Kind::Write, 5),
    (Kind::Count, 1),
    (Kind::Sweep, 5),
    (Kind::Settle, 1),
    (Kind::Registration, 2),
];

/// Each program has kinds that it does not know, and kinds that it does all the time: what needs many of one and none of another
/// would hardly come up otherwise. Always something for the devices to do.
pub(super) fn weights(rng: &mut SmallRng) -> Vec<u32> {
    let drawn = KINDS.iter().map(|(kind, weight)| match kind {
        Kind::Map | Kind::Segment | Kind::Write => weight * [1, 1, 4][rng.random_range(0..3)],
        _ => weight * [0, 1, 1, 4, 16][rng.random_range(0..5)],
    });
    drawn.collect()
}

fn any<T: Copy>(from: &[T], rng: &mut SmallRng) -> Option<T> {
    (!from.is_empty()).then(|| from[rng.random_range(0..from.len())])
}

impl Draft {
    pub(super) fn new(most_segments: usize) -> Self {
        Self {
            most_segments,
            ..Self::default()
        }
    }

    pub(super) fn next(
        &mut self,
        number: Number,
        weights: &[u32],
        rng: &mut SmallRng,
    ) -> Operation {
        let sum = weights.iter().sum();
        for _ in 0..TRIES {
            let mut left = rng.random_range(0..sum);
            let chosen = KINDS.iter().zip(weights).find(|(_, weight)| {
                let found = left < **weight;
                left = left.saturating_sub(**weight);
                found
            });
            let operation = chosen.and_then(|((kind, _), _)| self.propose(*kind, number, rng));
            if let Some(operation) = operation {
                return operation;
            }
        }
        Operation::Registration { place: 0 }
    }

    fn any_space(&self, rng: &mut SmallRng) -> Option<Number> {
        any(&self.spaces, rng).filter(|_| rng.random_bool(0.5))
    }

    fn make_segment(&mut self, number: Number, rng: &mut SmallRng) -> Operation {
        let space = self.any_space(rng);
        self.segments.push((number, space));
        Operation::Segment { space }
    }

    fn map(&mut self, number: Number, rng: &mut SmallRng) -> Operation {
        // Where there is a segment for it.
        let space = any(&self.segments, rng).and_then(|(_, space)| space);
        let (size, pages) = match rng.random_range(0..8) {
            0 if space.is_none() => (PageSize::TwoMiB, 1),
            0..=2 => (PageSize::SixtyFourKiB, 1),
            _ => (PageSize::FourKiB, rng.random_range(1..=6)),
        };
        self.buffers.push(Buffer {
            number,
            space,
            pages: pages * size.bytes() / PageSize::FourKiB.bytes(),
            size,
        });
        Operation::Map { space, size, pages }
    }

    /// A segment and a buffer of the same space.
    fn pair(&self, rng: &mut SmallRng) -> Option<(Number, Buffer)> {
        let buffer = any(&self.buffers, rng)?;
        let segments = self
            .segments
            .iter()
            .filter(|(_, space)| *space == buffer.space);
        let segments: Vec<_> = segments.map(|(number, _)| *number).collect();
        Some((any(&segments, rng)?, buffer))
    }

    /// `None` where there is nothing for it.
    fn propose(&mut self, kind: Kind, number: Number, rng: &mut SmallRng) -> Option<Operation> {
        let page = |buffer: Buffer, rng: &mut SmallRng| rng.random_range(0..buffer.pages);
        let small = |buffer: &Buffer| buffer.size == PageSize::FourKiB;
        Some(match kind {
            Kind::Map if self.buffers.len() < BUFFERS => self.map(number, rng),
            Kind::Segment if self.segments.len() < self.most_segments => {
                self.make_segment(number, rng)
            }
            Kind::Space if self.spaces.len() < SPACES => {
                self.spaces.push(number);
                Operation::Space
            }
            Kind::Map | Kind::Segment | Kind::Space => return None,
            Kind::Exit => {
                let space = any(&self.spaces, rng)?;
                self.spaces.retain(|one| *one != space);
                self.segments.retain(|(_, of)| *of != Some(space));
                self.buffers.retain(|one| one.space != Some(space));
                Operation::Exit { space }
            }
            Kind::EndSegment => {
                let (segment, _) = any(&self.segments, rng)?;
                self.segments.retain(|(one, _)| *one != segment);
                let locked = rng.random_bool(0.5);
                Operation::EndSegment { segment, locked }
            }
            Kind::Unmap => {
                let buffer = any(&self.buffers, rng)?.number;
                self.buffers.retain(|one| one.number != buffer);
                let locked = rng.random_bool(0.25);
                Operation::Unmap { buffer, locked }
            }
            Kind::UnmapHalf => {
                let buffer = any(&self.buffers, rng).filter(|one| small(one) && one.pages > 1)?;
                let upper = rng.random_bool(0.5);
                let lower = buffer.pages / 2;
                let left = if upper { lower } else { buffer.pages - lower };
                let mut all = self.buffers.iter_mut();
                all.find(|one| one.number == buffer.number)?.pages = left;
                let buffer = buffer.number;
                Operation::UnmapHalf { buffer, upper }
            }
            Kind::Discard => {
                let buffer = any(&self.buffers, rng)?;
                let page = page(buffer, rng);
                let buffer = buffer.number;
                Operation::Discard { buffer, page }
            }
            Kind::Protect => {
                let buffer = any(&self.buffers, rng)?;
                let page = page(buffer, rng);
                let buffer = buffer.number;
                Operation::Protect { buffer, page }
            }
            Kind::Remap => {
                let buffer = any(&self.buffers, rng).filter(small)?.number;
                Operation::Remap { buffer }
            }
            Kind::Write | Kind::Count | Kind::Sweep => {
                let (segment, buffer) = self.pair(rng)?;
                let page = page(buffer, rng);
                let buffer = buffer.number;
                match kind {
                    Kind::Write => Operation::Write {
                        segment,
                        buffer,
                        page,
                    },
                    Kind::Count => Operation::Count {
                        segment,
                        buffer,
                        page,
                    },
                    _ => {
                        let writes = rng.random_bool(0.5);
                        Operation::Sweep {
                            segment,
                            buffer,
                            page,
                            writes,
                        }
                    }
                }
            }
            Kind::Settle => {
                let (segment, _) = any(&self.segments, rng)?;
                Operation::Settle { segment }
            }
            Kind::Registration => {
                let place = rng.random_range(0..PLACES.len());
                Operation::Registration { place }
            }
        })
    }
}
