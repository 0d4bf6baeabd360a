//! What a simulation does: a list of numbered operations, each of one thread, and of numbered faults. All of it comes from the seed,
//! and any part of it is a program, too: what refers to an operation that is left out is left out with it.

use std::fmt;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use shootdown::PageSize;
use shootdown_hw_model::gru::{FaultKind, Latency, Scripted};

use crate::faults::Fault;

/// The number of an operation or of a fault. Operations make things, which are called by their number.
pub(super) type Number = u32;

/// The five places in which a registration is given up, as `churn::turn` counts them.
const PLACES: [&str; 5] = [
    "by a plain thread",
    "with the map lock held",
    "inside its own callback",
    "inside another's callback",
    "during release",
];

/// An operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Operation {
    /// An address space of its own.
    Space,
    Exit {
        space: Number,
    },
    /// A segment, in a space of its own or in the one that all threads share.
    Segment {
        space: Option<Number>,
    },
    EndSegment {
        segment: Number,
        locked: bool,
    },
    Map {
        space: Option<Number>,
        size: PageSize,
        pages: u64,
    },
    Unmap {
        buffer: Number,
        locked: bool,
    },
    /// Unmaps a half.
    UnmapHalf {
        buffer: Number,
        upper: bool,
    },
    Discard {
        buffer: Number,
        page: u64,
    },
    Protect {
        buffer: Number,
        page: u64,
    },
    Remap {
        buffer: Number,
    },
    /// The device sets words, and copies them; the CPU checks.
    Write {
        segment: Number,
        buffer: Number,
        page: u64,
    },
    /// Atomics on one word, at the same time.
    Count {
        segment: Number,
        buffer: Number,
        page: u64,
    },
    /// Goes over all pages, from `page` on and again; nobody waits for it.
    Sweep {
        segment: Number,
        buffer: Number,
        page: u64,
        writes: bool,
    },
    /// Waits for what is at work.
    Settle {
        segment: Number,
    },
    Registration {
        place: usize,
    },
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = |space: &Option<Number>| match space {
            Some(space) => format!("space {space}"),
            None => "the shared space".to_owned(),
        };
        let under = |locked: &bool| if *locked { " under the map lock" } else { "" };
        match self {
            Self::Space => write!(f, "make an address space"),
            Self::Exit { space } => write!(f, "exit space {space}"),
            Self::Segment { space } => write!(f, "make a segment in {}", of(space)),
            Self::EndSegment { segment, locked } => {
                write!(f, "unmap segment {segment}{}", under(locked))
            }
            Self::Map { space, size, pages } => {
                let kib = size.bytes() >> 10;
                write!(f, "map {pages} pages of {kib} KiB in {}", of(space))
            }
            Self::Unmap { buffer, locked } => write!(f, "unmap buffer {buffer}{}", under(locked)),
            Self::UnmapHalf { buffer, upper } => {
                let half = if *upper { "upper" } else { "lower" };
                write!(f, "unmap the {half} half of buffer {buffer}")
            }
            Self::Discard { buffer, page } => write!(f, "discard 4 KiB {page} of buffer {buffer}"),
            Self::Protect { buffer, page } => {
                write!(
                    f,
                    "write-protect 4 KiB {page} of buffer {buffer}, and allow writes again"
                )
            }
            Self::Remap { buffer } => write!(f, "move buffer {buffer} to where another one was"),
            Self::Write {
                segment,
                buffer,
                page,
            } => write!(
                f,
                "segment {segment} sets and copies words in 4 KiB {page} of buffer {buffer}, and the CPU checks"
            ),
            Self::Count {
                segment,
                buffer,
                page,
            } => write!(
                f,
                "segment {segment} counts in 4 KiB {page} of buffer {buffer}, and the CPU checks"
            ),
            Self::Sweep {
                segment,
                buffer,
                page,
                writes,
            } => {
                let does = if *writes { "writing" } else { "reading" };
                write!(
                    f,
                    "segment {segment} begins {does} buffer {buffer}, from 4 KiB {page} on"
                )
            }
            Self::Settle { segment } => write!(f, "wait for segment {segment}"),
            Self::Registration { place } => {
                write!(f, "register a handler, and give it up {}", PLACES[*place])
            }
        }
    }
}

/// One operation of one thread.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Step {
    pub(super) number: Number,
    pub(super) thread: usize,
    pub(super) operation: Operation,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            number,
            thread,
            operation,
        } = self;
        write!(f, "{number:>4}  thread {thread}: {operation}")
    }
}

/// A fault, at its place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Event {
    pub(super) number: Number,
    pub(super) fault: Fault,
    pub(super) scripted: Scripted,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Scripted {
            device, nth, by, ..
        } = self.scripted;
        let occasion = match self.scripted.kind {
            FaultKind::Lost | FaultKind::Duplicated => "purge that ends",
            FaultKind::Stuck | FaultKind::Late | FaultKind::Reordered => "purge that begins",
            FaultKind::PurgeInMiss => "miss",
            FaultKind::Delayed => "step",
            FaultKind::SurvivesReset => "reset",
        };
        write!(
            f,
            "{:>4}  device {device}: {}, at {occasion} {nth}",
            self.number,
            self.fault.name()
        )?;
        if !by.is_zero() {
            write!(f, ", by {by:?}")?;
        }
        Ok(())
    }
}

/// All that a seed fixes but the interleaving.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Program {
    pub(super) threads: usize,
    pub(super) devices: u32,
    pub(super) latency: Latency,
    /// Few, so that they wrap.
    pub(super) asids: u32,
    pub(super) steps: Vec<Step>,
    pub(super) events: Vec<Event>,
}

impl Program {
    /// From `seed`, with the given faults.
    pub(super) fn new(seed: u64, faults: &[Fault]) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let threads = rng.random_range(1..=3);
        let devices = [1, 1, 2][rng.random_range(0..3)];
        let nanos =
            |rng: &mut SmallRng, most: u64| Duration::from_nanos(rng.random_range(0..=most));
        let latency = Latency {
            purge: nanos(&mut rng, 20_000),
            handle: nanos(&mut rng, 5_000),
            access: nanos(&mut rng, 2_000),
        };
        let asids = [1, 1, 2, 4][rng.random_range(0..4)];
        let per_thread = rng.random_range(12..=36);
        let weights = weights(&mut rng);
        let most_segments = rng.random_range(1..=SEGMENTS);
        let mut numbers = 1..;
        let mut steps = Vec::new();
        for thread in 0..threads {
            let mut hand = Hand {
                most_segments,
                ..Hand::default()
            };
            for _ in 0..per_thread {
                let number = numbers.next().unwrap_or_default();
                let operation = hand.next(number, &weights, &mut rng);
                steps.push(Step {
                    number,
                    thread,
                    operation,
                });
            }
        }
        let mut events = Vec::new();
        for fault in faults {
            for _ in 0..rng.random_range(0..=2) {
                let number = numbers.next().unwrap_or_default();
                let scripted = fault.scripted(rng.random_range(0..devices), &mut rng);
                events.push(Event {
                    number,
                    fault: *fault,
                    scripted,
                });
            }
        }
        Self {
            threads,
            devices,
            latency,
            asids,
            steps,
            events,
        }
    }

    /// The numbers of all that it does.
    pub(super) fn numbers(&self) -> Vec<Number> {
        let steps = self.steps.iter().map(|step| step.number);
        steps
            .chain(self.events.iter().map(|event| event.number))
            .collect()
    }

    /// Of it, what has these numbers.
    pub(super) fn only(&self, numbers: &[Number]) -> Self {
        let mut part = self.clone();
        part.steps.retain(|step| numbers.contains(&step.number));
        part.events.retain(|event| numbers.contains(&event.number));
        part
    }

    pub(super) fn scripted(&self) -> Vec<Scripted> {
        self.events.iter().map(|event| event.scripted).collect()
    }
}

/// What a thread has made so far, as far as the generator knows: an operation that fails makes nothing.
#[derive(Default)]
struct Hand {
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
const SEGMENTS: usize = 3;
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
fn weights(rng: &mut SmallRng) -> Vec<u32> {
    let drawn = KINDS.iter().map(|(kind, weight)| match kind {
        Kind::Map | Kind::Segment | Kind::Write => weight * [1, 1, 4][rng.random_range(0..3)],
        _ => weight * [0, 1, 1, 4, 16][rng.random_range(0..5)],
    });
    drawn.collect()
}

fn any<T: Copy>(from: &[T], rng: &mut SmallRng) -> Option<T> {
    (!from.is_empty()).then(|| from[rng.random_range(0..from.len())])
}

impl Hand {
    fn next(&mut self, number: Number, weights: &[u32], rng: &mut SmallRng) -> Operation {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_one_program_and_another_seed_another() {
        for seed in 0..50 {
            let program = Program::new(seed, &Fault::ALL);
            assert_eq!(program, Program::new(seed, &Fault::ALL));
            assert_ne!(program.steps, Program::new(seed + 1, &Fault::ALL).steps);
        }
    }

    #[test]
    fn numbers_are_unique_and_a_part_has_those_asked_for() {
        let program = Program::new(7, &Fault::ALL);
        let numbers = program.numbers();
        assert!(numbers.windows(2).all(|pair| pair[0] < pair[1]));
        let some = [numbers[0], numbers[3], numbers[numbers.len() - 1]];
        assert_eq!(program.only(&some).numbers(), some);
        assert_eq!(program.only(&numbers), program);
    }

    #[test]
    fn faults_do_not_change_the_operations() {
        for seed in 0..20 {
            let without = Program::new(seed, &[]);
            assert_eq!(without.steps, Program::new(seed, &Fault::ALL).steps);
            assert!(without.events.is_empty());
        }
    }

    #[test]
    fn every_operation_and_every_fault_comes_up() {
        let (mut operations, mut faults) = (std::collections::HashSet::new(), Vec::new());
        for seed in 0..100 {
            let program = Program::new(seed, &Fault::ALL);
            operations.extend(
                program
                    .steps
                    .iter()
                    .map(|step| std::mem::discriminant(&step.operation)),
            );
            faults.extend(program.events.iter().map(|event| event.fault));
        }
        assert_eq!(operations.len(), 15);
        assert!(Fault::ALL.iter().all(|fault| faults.contains(fault)));
    }
}
