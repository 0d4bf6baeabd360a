//! The watchdog: names the handler and the thread when a callback does not return.
//!
//! Deadlines bind hardware that is polled. A callback cannot be cut short: whoever overlaps its range waits for it, and what the
//! author needs to know is which one it is. Each space has a *post* for every invalidation that can be in progress, and some for
//! releases. A callback is noted there by a few stores; no clock is read. One thread of the process looks at all posts now and then,
//! and what it finds unchanged for longer than [`Deadlines::callback`](crate::Deadlines) it reports, once: as a `tracing` error and
//! in [`Stats::overdue`](crate::Stats). It takes no lock that a callback can hold, and holds nothing of a space but its posts.

use shootdown_primitive::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use shootdown_primitive::thread;
use shootdown_primitive::time::{Duration, Instant};

use std::sync::atomic::AtomicPtr;
use std::sync::atomic::Ordering::{Acquire, Release};

use crate::active::SLOTS;
use crate::home::home;
use crate::primitive::atomic::{AtomicU64, Ordering, fence};
use crate::primitive::kernel_thread;

/// Releases that are watched at once; more run unwatched.
const RELEASES: usize = 16;
const POSTS: usize = SLOTS + RELEASES;
/// Looks within one deadline.
const LOOKS: u32 = 8;

/// What runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Stage {
    Quiesce = 1,
    Drained,
    Flush,
    CutOff,
    Unload,
    End,
    Release,
    Reset,
}

impl Stage {
    const ALL: [(Self, &'static str); 8] = [
        (Self::Quiesce, "quiesce"),
        (Self::Drained, "drained"),
        (Self::Flush, "flush"),
        (Self::CutOff, "cut_off"),
        (Self::Unload, "unload"),
        (Self::End, "end"),
        (Self::Release, "release"),
        (Self::Reset, "reset"),
    ];
}

/// A name that the watchdog can say: its place among all that were ever given, of which there are few. Of very many, the last ones go by
/// one name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Name(u16);

/// All names, each set once; how many there are is under the lock.
static NAMES: [AtomicPtr<String>; 1 << 16] =
    [const { AtomicPtr::new(std::ptr::null_mut()) }; 1 << 16];
static NAMED: Mutex<usize> = Mutex::new(0);

impl Name {
    /// Allocates, the first time.
    pub(crate) fn new(name: &str) -> Self {
        let mut named = lock(&NAMED);
        let is_known = |at: &u16| Self(*at).as_str() == name;
        let known = (0..=u16::MAX).take(*named).find(is_known);
        let at = known
            .or_else(|| u16::try_from(*named).ok())
            .unwrap_or(u16::MAX);
        if known.is_none() && *named < NAMES.len() {
            let last = *named == NAMES.len() - 1;
            let name = Box::leak(Box::new(String::from(if last { "another" } else { name })));
            // Release, with the Acquire in `as_str`.
            NAMES[*named].store(name, Release);
            *named += 1;
        }
        Self(at)
    }

    /// The same for a name that stays as it is: mostly the one that this thread has last asked for.
    pub(crate) fn of(name: &'static str) -> Self {
        use std::cell::Cell;
        std::thread_local! {
            static LAST: Cell<Option<(&'static str, Name)>> = const { Cell::new(None) };
        }
        // The same place, not only the same letters, which takes longer to see.
        let is_it = |(last, _): &(&'static str, Name)| std::ptr::eq(*last, name);
        if let Some((_, known)) = LAST.get().filter(is_it) {
            return known;
        }
        let found = Self::new(name);
        LAST.set(Some((name, found)));
        found
    }

    /// Neither locks nor allocates.
    pub(crate) fn as_str(self) -> &'static str {
        let name = NAMES[usize::from(self.0)].load(Acquire);
        // SAFETY: null, or leaked by `new`, which changes it no more.
        unsafe { name.as_ref() }.map_or("?", |name| name)
    }
}

/// Who is called: the number of a registration, and a name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Who(u64);

impl Who {
    /// Numbers have 48 bits.
    pub(crate) fn new(number: u64, name: Name) -> Self {
        Self(number << 16 | u64::from(name.0))
    }

    #[inline]
    pub(crate) fn number(self) -> u64 {
        self.0 >> 16
    }

    pub(crate) fn name(self) -> Name {
        Name(self.0 as u16)
    }
}

/// Where one thread at a time says what it calls.
#[repr(align(128))]
#[derive(Debug)]
pub(crate) struct Post {
    /// 0 while nothing runs; else a number that never comes twice, and the stage.
    run: AtomicU64,
    /// A [`Who`].
    who: AtomicU64,
    thread: AtomicU64,
    /// The numbers given so far.
    given: AtomicU64,
}

/// The posts of one space.
#[derive(Debug)]
pub(crate) struct Watch {
    space: u64,
    after: Duration,
    posts: Box<[Post]>,
    overdue: AtomicU64,
}

/// A post that is one thread's for as long as this lives.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PostId(usize);

impl PostId {
    /// Of the invalidation that has claimed `slot`.
    pub(crate) fn of(slot: usize) -> Self {
        Self(slot)
    }
}

/// A callback runs for as long as this lives.
#[derive(Debug)]
pub(crate) struct Running<'w> {
    post: &'w Post,
    number: u64,
}

impl Running<'_> {
    /// Notes which callback of the same callee it is: one that it has not been yet.
    #[inline]
    pub(crate) fn is(&self, stage: Stage) {
        // Release, with the Acquire of the look: who sees the run sees who it is.
        let run = self.number << 8 | stage as u64;
        self.post.run.store(run, Ordering::Release);
    }
}

impl Drop for Running<'_> {
    #[inline]
    fn drop(&mut self) {
        // Relaxed: nothing is concluded from it.
        self.post.run.store(0, Ordering::Relaxed);
    }
}

impl Post {
    /// Notes that a callback of the thread that has it begins.
    #[inline]
    pub(crate) fn enter(&self, stage: Stage, who: Who) -> Running<'_> {
        // Only this thread writes to the post.
        let number = self.given.load(Ordering::Relaxed) + 1;
        self.given.store(number, Ordering::Relaxed);
        // As a sequence lock: `run` was taken away before, the words are written, `run` is set. The fence, with the one in `look`,
        // keeps the words behind the first.
        fence(Ordering::Release);
        self.who.store(who.0, Ordering::Relaxed);
        let running = Running { post: self, number };
        running.is(stage);
        running
    }
}

impl Watch {
    pub(crate) fn new(space: u64, after: Duration) -> Arc<Self> {
        let post = |_| Post {
            run: AtomicU64::new(0),
            who: AtomicU64::new(0),
            thread: AtomicU64::new(0),
            given: AtomicU64::new(0),
        };
        let this = Arc::new(Self {
            space,
            after,
            posts: (0..if cfg!(loom) { 0 } else { POSTS }).map(post).collect(),
            overdue: AtomicU64::new(0),
        });
        if !cfg!(loom) {
            Watchdog::watch(&this);
        }
        this
    }

    /// Under the checker there are none, as they would only add states.
    #[inline]
    pub(crate) fn post(&self, post: PostId) -> Option<&Post> {
        self.posts.get(post.0)
    }

    /// The calling thread has the post from here on.
    #[inline]
    pub(crate) fn is_at(&self, post: PostId) {
        if let Some(post) = self.post(post) {
            // As in `enter`: behind the last run, which was taken away.
            fence(Ordering::Release);
            post.thread.store(kernel_thread(), Ordering::Relaxed);
        }
    }

    /// Notes that a release begins, if there is a post for it.
    pub(crate) fn enter_release(&self, who: Who) -> Option<Running<'_>> {
        let home = home();
        (0..RELEASES.min(self.posts.len())).find_map(|nth| {
            let at = SLOTS + (home + nth) % RELEASES;
            let post = &self.posts[at];
            // Acquire: what its last owner wrote is over. The mark is overwritten by `enter`.
            post.run
                .compare_exchange(0, u64::MAX, Ordering::Acquire, Ordering::Relaxed)
                .ok()?;
            self.is_at(PostId(at));
            Some(post.enter(Stage::Release, who))
        })
    }

    /// Callbacks that did not return in time.
    pub(crate) fn overdue(&self) -> u64 {
        self.overdue.load(Ordering::Relaxed)
    }

    /// Reports what has not changed since it was first seen too long ago.
    fn look(&self, seen: &mut [Option<Seen>; POSTS]) {
        for (post, seen) in self.posts.iter().zip(seen) {
            let run = post.run.load(Ordering::Acquire);
            let Some((_, stage)) = Stage::ALL
                .into_iter()
                .find(|(stage, _)| *stage as u64 == run & 0xff)
            else {
                *seen = None;
                continue;
            };
            let last = match seen {
                Some(last) if last.run == run => last,
                _ => {
                    *seen = Some(Seen {
                        run,
                        since: Instant::now(),
                        reported: false,
                    });
                    continue;
                }
            };
            let waited = last.since.elapsed();
            if last.reported || waited < self.after {
                continue;
            }
            let (who, thread) = (
                Who(post.who.load(Ordering::Relaxed)),
                post.thread.load(Ordering::Relaxed),
            );
            // The two belong to this run, or it is over: with the fence in `enter`.
            fence(Ordering::Acquire);
            if post.run.load(Ordering::Relaxed) != run {
                continue;
            }
            last.reported = true;
            self.overdue.fetch_add(1, Ordering::Relaxed);
            let name = std::fs::read_to_string(format!("/proc/self/task/{thread}/comm"));
            tracing::error!(
                space = self.space,
                registration = who.number(),
                handler = who.name().as_str(),
                stage,
                thread,
                thread_name = name.as_deref().unwrap_or("?").trim(),
                waited_ms = waited.as_millis() as u64,
                "a callback does not return: whatever overlaps its range waits for it"
            );
        }
    }
}

struct Seen {
    run: u64,
    since: Instant,
    reported: bool,
}

/// What the thread watches.
type Watched = Vec<(Weak<Watch>, Box<[Option<Seen>; POSTS]>)>;

static WATCHDOG: Mutex<Watchdog> = Mutex::new(Watchdog {
    new: Vec::new(),
    thread: None,
});

/// The thread, and what it has not taken up yet.
struct Watchdog {
    new: Vec<Weak<Watch>>,
    thread: Option<thread::Thread>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Changed by single pushes and assignments.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watchdog {
    fn watch(watch: &Arc<Watch>) {
        let mut this = lock(&WATCHDOG);
        this.new.push(Arc::downgrade(watch));
        match &this.thread {
            // Awake at once if this one has a shorter deadline than those that it sleeps for.
            Some(thread) => thread.unpark(),
            None => {
                let spawned = thread::Builder::new()
                    .name("shootdown-watchdog".to_owned())
                    .spawn(Self::run);
                match spawned {
                    Ok(handle) => this.thread = Some(handle.thread().clone()),
                    Err(error) => {
                        tracing::warn!(%error, "no watchdog: callbacks that do not return are not named");
                    }
                }
            }
        }
    }

    /// Sleeps for good while there is nothing to watch.
    fn run() {
        let mut watched: Watched = Vec::new();
        loop {
            let fresh = std::mem::take(&mut lock(&WATCHDOG).new);
            watched.extend(
                fresh
                    .into_iter()
                    .map(|one| (one, Box::new([const { None }; POSTS]))),
            );
            let mut nap: Option<Duration> = None;
            watched.retain_mut(|(watch, seen)| {
                let Some(watch) = watch.upgrade() else {
                    return false;
                };
                watch.look(seen);
                let next = (watch.after / LOOKS).max(Duration::from_millis(1));
                nap = Some(nap.map_or(next, |nap| nap.min(next)));
                true
            });
            match nap {
                Some(nap) => thread::park_timeout(nap),
                None => thread::park(),
            }
        }
    }
}
