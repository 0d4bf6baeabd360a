//! Foreign calls: raw system calls on the memory of a run, by threads that know nothing of the framework, and the source that
//! tells of them.
//!
//! Each thread of the workload has a *stranger*, to which it hands ranges of its own, and meanwhile has a device read them. When the
//! stranger's call has returned, the model is told, and from then on the oracle counts the old pages as gone. What the framework
//! knows of it is what the source has told; with none a device goes on through its old entries, and the run has to find
//! that.

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::Scope;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use rand::Rng;
use serde::Serialize;
use shootdown::{
    AddressSpace, Map, Memory, MemoryError, Observer, Operation, Operations, PageSize, Range,
    Rights, Sees, Source, SourceError, Uffd, Unotify, Watched,
};
use shootdown_gru::{Element, Instruction};
use shootdown_hw_model::ModelMemory;

use crate::report::Latency;
use crate::worker::{CHUNK, Worker};

const PAGE: u64 = PageSize::FourKiB.bytes();

/// What tells of foreign calls.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum SourceName {
    /// Nothing: stale accesses must be found.
    None,
    /// A userfaultfd. Only what waits for it is done, which is nothing.
    Uffd,
    /// Seccomp user notification.
    Unotify,
}

impl SourceName {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Uffd => "uffd",
            Self::Unotify => "unotify",
        }
    }

    fn source(self) -> Option<Arc<dyn Source>> {
        match self {
            Self::None => None,
            Self::Uffd => Some(Arc::new(Uffd::new())),
            Self::Unotify => Some(Arc::new(Unotify::new())),
        }
    }
}

/// A system call on a range of the workload.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Call {
    Munmap,
    MapFixed,
    MremapShrink,
    MremapMove,
    Mprotect,
    PkeyMprotect,
}

impl Call {
    const ALL: [Self; 6] = [
        Self::Munmap,
        Self::MapFixed,
        Self::MremapShrink,
        Self::MremapMove,
        Self::Mprotect,
        Self::PkeyMprotect,
    ];

    /// What it does to memory that devices may have cached.
    fn operations(self) -> Operations {
        match self {
            Self::Munmap => Operations::MUNMAP,
            Self::MapFixed => Operations::MAP_FIXED,
            Self::MremapShrink => Operations::MREMAP_SHRINK,
            Self::MremapMove => Operations::MREMAP_MOVE | Operations::MREMAP_OVER,
            Self::Mprotect => Operations::MPROTECT,
            Self::PkeyMprotect => Operations::PKEY_MPROTECT,
        }
    }
}

/// A call, with its arguments.
struct Request {
    call: Call,
    range: Range,
    /// Where to, of a move.
    to: Range,
    rights: Rights,
}

fn start(range: Range) -> usize {
    range.start().get() as usize
}

impl Request {
    /// Makes the call, as anybody would; the errno if it fails.
    fn make(&self) -> Result<(), i32> {
        let (at, len) = (start(self.range), self.range.len() as usize);
        let prot = usize::from(self.rights.bits());
        let fresh = (libc::PROT_READ | libc::PROT_WRITE) as usize;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED) as usize;
        let fixed = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as usize;
        let (nr, [a, b, c, d, e, f]) = match self.call {
            Call::Munmap => (libc::SYS_munmap, [at, len, 0, 0, 0, 0]),
            Call::MapFixed => (libc::SYS_mmap, [at, len, fresh, flags, usize::MAX, 0]),
            // Its second half goes.
            Call::MremapShrink => (libc::SYS_mremap, [at, len, len / 2, 0, 0, 0]),
            Call::MremapMove => (libc::SYS_mremap, [at, len, len, fixed, start(self.to), 0]),
            Call::Mprotect => (libc::SYS_mprotect, [at, len, prot, 0, 0, 0]),
            Call::PkeyMprotect => (libc::SYS_pkey_mprotect, [at, len, prot, usize::MAX, 0, 0]),
        };
        // SAFETY: the ranges are pages of the arena that one thread of the workload has to itself, and waits.
        match unsafe { libc::syscall(nr, a, b, c, d, e, f) } {
            -1 => Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)),
            _ => Ok(()),
        }
    }

    /// The call has returned: the model learns what is so now.
    fn tell(&self, memory: &ModelMemory) -> Result<(), MemoryError> {
        match self.call {
            Call::Munmap => memory.unmap(self.range),
            // What is mapped there now is nothing that the model knows; it puts fresh frames in its place.
            Call::MapFixed => memory.discard(self.range),
            Call::MremapShrink => memory.unmap(second_half(self.range)),
            Call::MremapMove => {
                memory.unmap(self.to)?;
                memory.remap(self.range, self.to)
            }
            Call::Mprotect | Call::PkeyMprotect => memory.protect(self.range, self.rights),
        }
    }
}

fn second_half(range: Range) -> Range {
    let half = range.start().get() + range.len() as u64 / 2;
    Range::inclusive(half, range.last()).expect("it ends behind its middle")
}

/// The foreign calls of a run.
pub(crate) struct Foreign {
    source: SourceName,
    memory: Arc<ModelMemory>,
    calls: Vec<Call>,
    left_out: Vec<LeftOut>,
    made: [AtomicU64; Call::ALL.len()],
    refused: AtomicU64,
    /// Knows which changes are the model's.
    observer: Option<Arc<dyn Observer>>,
}

/// A call that is not made, as the source is late for it, or does not see it.
#[derive(Clone, Debug, Serialize)]
struct LeftOut {
    call: &'static str,
    sees: String,
}

impl Foreign {
    /// Has the source, if any, watch the space.
    pub(crate) fn start(
        source: SourceName,
        space: &AddressSpace,
        memory: Arc<ModelMemory>,
        observer: Option<Arc<dyn Observer>>,
    ) -> Result<(Self, Option<Watched>), SourceError> {
        let watch = |source| space.watch(source, memory.arena());
        let watched = source.source().map(watch).transpose()?;
        let sees = |operation| match &watched {
            None => Sees::all(),
            Some(watched) => {
                let mut tried = watched.self_test().iter();
                let tried = tried.find(|one| one.operation == operation);
                tried.map_or(Sees::empty(), |one| one.counts())
            }
        };
        let (mut calls, mut left_out) = (Vec::new(), Vec::new());
        for call in Call::ALL {
            let late = |operation: &Operation| {
                !sees(*operation).contains(Sees::TOLD | Sees::BEFORE | Sees::BARRIER)
            };
            match call.operations().each().find(late) {
                None => calls.push(call),
                Some(operation) => left_out.push(LeftOut {
                    call: operation.name(),
                    sees: sees(operation).to_string(),
                }),
            }
        }
        let this = Self {
            source,
            memory,
            calls,
            left_out,
            made: Default::default(),
            refused: AtomicU64::new(0),
            observer,
        };
        Ok((this, watched))
    }

    /// What drivers have to be told of: everything, unless the source cannot, and then what is done.
    pub(crate) fn operations(&self) -> Operations {
        if self.left_out.is_empty() {
            return Operations::CALLS;
        }
        let made = self.calls.iter().map(|call| call.operations());
        made.fold(Operations::empty(), Operations::union)
    }

    /// A thread that makes the calls of one worker, until that is gone.
    pub(crate) fn stranger<'s>(&'s self, scope: &'s Scope<'s, '_>) -> Stranger {
        let (ask, asked) = channel::<Request>();
        let (answer, answers) = channel();
        let thread = std::thread::Builder::new().name("stranger".to_owned());
        let run = move || {
            for request in asked {
                let begun = Instant::now();
                let made = request.make();
                let took = begun.elapsed();
                let told = made.map(|()| {
                    // Relaxed: statistics.
                    self.made[request.call as usize].fetch_add(1, Ordering::Relaxed);
                    self.tell(&request)
                });
                let result = match told {
                    Ok(Ok(())) => Ok(true),
                    Ok(Err(error)) => Err(error),
                    Err(_) => {
                        self.refused.fetch_add(1, Ordering::Relaxed);
                        Ok(false)
                    }
                };
                if answer.send((took, result)).is_err() {
                    return;
                }
            }
        };
        // Without it the worker finds nobody, and says so.
        let _ = thread.spawn_scoped(scope, run);
        Stranger { ask, answers }
    }

    /// The model's own changes, to be as the kernel is, are nobody's to tell of.
    fn tell(&self, request: &Request) -> Result<(), MemoryError> {
        let changed = [request.range, request.to];
        if let Some(observer) = &self.observer {
            changed.iter().for_each(|range| observer.may_change(*range));
        }
        let told = request.tell(&self.memory);
        if let Some(observer) = &self.observer {
            changed.iter().for_each(|range| observer.changed(*range));
        }
        told
    }

    pub(crate) fn report(&self, latency_ns: Latency) -> Report {
        let made = self.calls.iter().map(|call| Made {
            call: call.operations().each().next().map_or("", Operation::name),
            times: self.made[*call as usize].load(Ordering::Relaxed),
        });
        Report {
            source: self.source.name(),
            made: made.collect(),
            refused: self.refused.load(Ordering::Relaxed),
            left_out: self.left_out.clone(),
            latency_ns,
        }
    }
}

/// The thread that makes the foreign calls of one worker.
pub(crate) struct Stranger {
    ask: Sender<Request>,
    answers: Receiver<(Duration, Result<bool, MemoryError>)>,
}

#[derive(Clone, Debug, Serialize)]
struct Made {
    call: &'static str,
    times: u64,
}

/// The foreign calls, in a report.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    source: &'static str,
    made: Vec<Made>,
    /// Calls that failed, and changed nothing.
    refused: u64,
    left_out: Vec<LeftOut>,
    latency_ns: Latency,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n  foreign calls, told by {}", self.source)?;
        for Made { call, times } in &self.made {
            writeln!(f, "  {call:<22} {times:>12}")?;
        }
        for LeftOut { call, sees } in &self.left_out {
            let why = format!("{} gives \"{sees}\", and no barrier", self.source);
            writeln!(f, "  {call:<22}     left out: {why}")?;
        }
        let micros = |nanos: u64| nanos as f64 / 1e3;
        let Latency { p50, p99, max, .. } = self.latency_ns;
        writeln!(
            f,
            "  {} refused; latency (us): p50 {:.1}, p99 {:.1}, max {:.1}",
            self.refused,
            micros(p50),
            micros(p99),
            micros(max)
        )
    }
}

impl Worker<'_> {
    /// Has a stranger change a part of the buffer, which a device reads meanwhile.
    pub(crate) fn foreign(&mut self, buffer: Range) {
        let Some(foreign) = &self.shared.foreign else {
            return;
        };
        if foreign.calls.is_empty() {
            return;
        }
        let call = foreign.calls[self.rng.random_range(0..foreign.calls.len())];
        match call {
            Call::Munmap | Call::MremapShrink => {
                let part = self.pages_of(buffer, 2..=2);
                self.ask(call, part, part, Rights::READ_WRITE);
                self.read_by_device(part);
            }
            Call::MapFixed => {
                let part = self.pages_of(buffer, 1..=16);
                if self.ask(call, part, part, Rights::READ_WRITE) {
                    let words = (part.len() / 8) as u32;
                    self.matches(part.start(), words, 0, "a foreign mmap");
                    self.work(part);
                }
            }
            Call::MremapMove => self.move_away(buffer),
            Call::Mprotect | Call::PkeyMprotect => {
                let part = self.pages_of(buffer, 1..=16);
                let less = match self.rng.random_bool(0.5) {
                    true => Rights::READ,
                    false => Rights::empty(),
                };
                if self.ask(call, part, part, less)
                    && self.ask(call, part, part, Rights::READ_WRITE)
                {
                    self.work(part);
                }
            }
        }
    }

    /// Has a page moved over one of another buffer.
    fn move_away(&mut self, buffer: Range) {
        let Ok(other) = self.shared.space.map(Map::anonymous(PAGE)) else {
            return;
        };
        self.work(other);
        let page = self.pages_of(buffer, 1..=1);
        let old: u64 = self.rng.random();
        // SAFETY: the buffer is this thread's own and mapped for writing.
        unsafe { (start(page) as *mut u64).write_volatile(old) };
        if self.ask(Call::MremapMove, page, other, Rights::READ_WRITE) {
            self.matches(other.start(), 1, old, "a foreign move");
            self.work(other);
        }
        self.unmap(other);
    }

    /// So many pages of the buffer, which has at least two.
    fn pages_of(&mut self, buffer: Range, count: RangeInclusive<u64>) -> Range {
        let pages = buffer.pages(PageSize::FourKiB);
        let count = self.rng.random_range(count).min(pages);
        let first = self.rng.random_range(0..=pages - count);
        Range::new(buffer.start().get() + first * PAGE, count * PAGE).expect("pages of the buffer")
    }

    /// Whether the call was made, and the model told.
    fn ask(&mut self, call: Call, range: Range, to: Range, rights: Rights) -> bool {
        let Some(stranger) = &self.stranger else {
            return false;
        };
        let request = Request {
            call,
            range,
            to,
            rights,
        };
        if stranger.ask.send(request).is_err() {
            return false;
        }
        loop {
            let answer = self.stranger.as_ref().map(|stranger| {
                let answers = &stranger.answers;
                answers.recv_timeout(Duration::ZERO)
            });
            match answer {
                Some(Ok((took, result))) => {
                    let nanos = took.as_nanos() as u64;
                    self.measured.foreign.saturating_record(nanos);
                    return result.unwrap_or_else(|error| {
                        self.find(format!("the model, of a foreign {call:?}: {error}"));
                        false
                    });
                }
                Some(Err(RecvTimeoutError::Timeout)) => self.read_by_device(range),
                _ => {
                    self.find("a thread of foreign calls panicked".to_owned());
                    return false;
                }
            }
        }
    }

    /// A device reads what it can of the range: it ends with the data or with an exception.
    fn read_by_device(&mut self, range: Range) {
        let Some(nth) = self.any_segment() else {
            std::thread::yield_now();
            return;
        };
        let stride = (range.len() / 8) as i64 / i64::from(CHUNK);
        let load =
            Instruction::vload(range.start(), 0, Element::Double, CHUNK).stride(stride.max(1));
        let result = self.segments[nth]
            .submit(0, &load)
            .and_then(|()| self.shared.settle(&self.segments[nth], 1));
        if let Err(error) = result {
            self.lose(nth, error, "a load beside a foreign call");
        }
    }
}
