//! What a simulation does: a list of numbered operations, each of one thread, and of numbered faults. All of it comes from the seed,
//! and any part of it is a program, too: what refers to an operation that is left out is left out with it.

mod draft;

use std::fmt;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use shootdown::PageSize;
use shootdown_hw_model::gru::{FaultKind, Latency, Scripted};

use self::draft::Draft;
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
            FaultKind::Error => "access",
            FaultKind::Nack => "message",
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
        let weights = draft::weights(&mut rng);
        let most_segments = rng.random_range(1..=draft::SEGMENTS);
        let mut numbers = 1..;
        let mut steps = Vec::new();
        for thread in 0..threads {
            let mut draft = Draft::new(most_segments);
            for _ in 0..per_thread {
                let number = numbers.next().unwrap_or_default();
                let operation = draft.next(number, &weights, &mut rng);
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
