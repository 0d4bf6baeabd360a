//! One contender: it has a page watched, or not, and measures what it costs to unmap that.

use std::io::{self, BufRead, Write};
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use shootdown::{
    AddressSpace, Deadlines, InsertError, Map, MapError, Memory, Needs, Notifier, ProcessMemory,
    Range, Source, SourceError, Uffd, Unotify, own_call,
};
use thiserror::Error;

use crate::Contender;
use crate::bare::{BareUffd, BareUnotify, Duties};

const PAGE: u64 = 4096;

/// Why there is nothing to measure.
#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error(transparent)]
    System(#[from] io::Error),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Map(#[from] MapError),
    #[error(transparent)]
    Insert(#[from] InsertError),
    #[error("it was asked for {0:?} calls")]
    Asked(String),
}

/// Medians of one turn, in nanoseconds.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Sample {
    pub(crate) munmap: f64,
    pub(crate) elsewhere: f64,
    pub(crate) unrelated: f64,
}

/// The handler: empty.
struct Registered;

impl Notifier for Registered {
    fn needs(&self) -> Needs {
        Needs::TOLERATES_FAULTS
    }
}

/// What prepares the page for one more call: it was mapped anew.
type Renew<'a> = &'a mut dyn FnMut() -> Result<(), Error>;

/// Serves on the first thread, or on a later one.
pub(crate) fn run(contender: Contender, later_thread: bool) -> Result<(), Error> {
    if !later_thread {
        return serve(contender);
    }
    let thread = std::thread::Builder::new().spawn(move || serve(contender))?;
    thread
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Measures as often as standard input asks for it.
fn serve(contender: Contender) -> Result<(), Error> {
    let memory = Arc::new(ProcessMemory::reserve(64 << 20)?);
    let arena = memory.arena();
    // Without a memory of its own the space watches what is somebody else's as a whole; the page lies in the same place.
    let space = match contender.keeps_addresses() {
        true => AddressSpace::managed(memory, Deadlines::default()),
        false => AddressSpace::without_memory(Deadlines::default()),
    };
    let middle = arena.start().get() + (32 << 20);
    let page = Range::new(middle, PAGE).expect("a page");
    if contender.keeps_addresses() {
        space.map(Map::anonymous(PAGE).at(page.start()))?;
    } else {
        map(Some(middle as usize))?;
    }
    let watch = |source: Arc<dyn Source>| space.watch(source, arena);
    let duties = |asks| Duties {
        asks,
        reserves: contender.keeps_addresses(),
    };
    match contender {
        Contender::Nothing => turns(page, &mut || Ok(())),
        Contender::BareUnotify | Contender::DutifulUnotify | Contender::DutifulUnotifyInArena => {
            BareUnotify::start(page, duties(contender != Contender::BareUnotify))?;
            turns(page, &mut || Ok(()))
        }
        Contender::Unotify | Contender::UnotifyInArena => {
            let _watched = watch(Arc::new(Unotify::new()))?;
            let _registration = space.register(page, Arc::new(Registered), &[])?;
            turns(page, &mut || Ok(()))
        }
        Contender::BareUffd | Contender::DutifulUffd | Contender::DutifulUffdInArena => {
            let uffd = BareUffd::start(arena, duties(contender != Contender::BareUffd))?;
            turns(page, &mut || Ok(uffd.register(page)?))
        }
        Contender::Uffd | Contender::UffdInArena => {
            let _watched = watch(Arc::new(Uffd::new()))?;
            let mut registration = None;
            turns(page, &mut || {
                // What is mapped anew is watched from the next registration there on.
                drop(registration.take());
                registration = Some(space.register(page, Arc::new(Registered), &[])?);
                Ok(())
            })
        }
    }
}

fn turns(page: Range, renew: Renew<'_>) -> Result<(), Error> {
    let elsewhere = map(None)?;
    for line in io::stdin().lock().lines() {
        let line = line?;
        let calls: u32 = line.trim().parse().map_err(|_| Error::Asked(line))?;
        let sample = measure(calls, page.start().get() as usize, elsewhere, renew)?;
        let text = serde_json::to_string(&sample).expect("numbers");
        writeln!(io::stdout(), "{text}")?;
    }
    Ok(())
}

/// A fresh page, by calls that nothing stops.
fn map(at: Option<usize>) -> io::Result<usize> {
    let fixed = if at.is_some() { libc::MAP_FIXED } else { 0 };
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | fixed) as usize;
    let args = [at.unwrap_or(0), PAGE as usize, 3, flags, usize::MAX, 0];
    // SAFETY: a new mapping, or one over a page that only this thread uses.
    let mapped = unsafe { own_call(libc::SYS_mmap, args) };
    mapped.map_err(io::Error::from_raw_os_error)
}

/// How long the munmap of the page at `at` takes, touched before.
fn unmap(at: usize) -> io::Result<f64> {
    // SAFETY: mapped by the caller.
    unsafe { (at as *mut u8).write_volatile(1) };
    let begun = Instant::now();
    // SAFETY: nobody else's page.
    let said = unsafe { libc::munmap(at as *mut _, PAGE as usize) };
    let took = begun.elapsed().as_nanos() as f64;
    match said {
        0 => Ok(took),
        _ => Err(io::Error::last_os_error()),
    }
}

fn measure(calls: u32, page: usize, elsewhere: usize, renew: Renew<'_>) -> Result<Sample, Error> {
    let (mut watched, mut not_watched, mut unrelated) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..calls {
        map(Some(page))?;
        renew()?;
        watched.push(unmap(page)?);
        map(Some(elsewhere))?;
        not_watched.push(unmap(elsewhere)?);
        const BATCH: u32 = 10;
        let begun = Instant::now();
        for _ in 0..BATCH {
            // SAFETY: no arguments, no effect.
            unsafe { libc::syscall(libc::SYS_getppid) };
        }
        unrelated.push(begun.elapsed().as_nanos() as f64 / f64::from(BATCH));
    }
    Ok(Sample {
        munmap: crate::median(watched),
        elsewhere: crate::median(not_watched),
        unrelated: crate::median(unrelated),
    })
}
