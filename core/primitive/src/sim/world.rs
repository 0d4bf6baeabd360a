//! What the scheduler knows: the threads, what each waits for, the time; and how it chooses.

use std::panic::Location;

use super::time::nanoseconds;
use super::{Settings, SoFar, Waiting};

/// What a step takes, in nanoseconds: about what an atomic operation on a shared line does.
pub(super) const TICK: u64 = 20;

#[derive(Clone, Copy)]
enum State {
    Ready,
    Waits {
        what: &'static str,
        key: usize,
        until: Option<u64>,
        at: &'static Location<'static>,
    },
    Ended,
}

struct Thread {
    name: String,
    state: State,
    /// The last wait ended because somebody woke it, not because of the time.
    woken: bool,
    /// Whether it may go through its next park.
    token: bool,
    priority: u64,
}

/// How the next thread is chosen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Style {
    /// One step in so many, by chance, it is another thread's turn, anybody's.
    Random { one_in: u64 },
    /// The thread with the highest priority; one step in so many, by chance, the one that runs gets the lowest. Bugs that need
    /// few changes of thread in the right places, and one thread left behind for long, are found by this.
    Priorities { one_in: u64 },
}

/// How the scheduler cannot go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stuck {
    Deadlock,
    StepLimit,
}

/// Random numbers (splitmix64): a replay must not depend on the version of a library.
struct Random(u64);

fn mix(mut value: u64) -> u64 {
    value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }
}

pub(super) struct World {
    /// Nanoseconds.
    now: u64,
    steps: u64,
    /// Of steps, and of `now`.
    limits: (u64, u64),
    trace: u64,
    random: Random,
    style: Style,
    threads: Vec<Thread>,
    current: usize,
    /// Whose turn it is once shuttle asks.
    chosen: Option<usize>,
    /// The lowest priority that was given.
    lowest: u64,
    over: bool,
    /// Threads that can run, for `choose`.
    able: Vec<usize>,
}

impl World {
    /// One thread, the first, which runs.
    pub(super) fn new(settings: Settings) -> Self {
        let mut random = Random(settings.schedule);
        let one_in = [2, 8, 32, 128][random.below(4) as usize];
        let style = if random.one_in(2) {
            Style::Random { one_in }
        } else {
            Style::Priorities { one_in: 8 * one_in }
        };
        let mut world = Self {
            now: 0,
            steps: 0,
            limits: (settings.steps, nanoseconds(settings.time)),
            trace: 0,
            random,
            style,
            threads: Vec::new(),
            current: 0,
            chosen: None,
            lowest: 1 << 32,
            over: false,
            able: Vec::new(),
        };
        world.add("main".to_owned());
        world
    }

    pub(super) fn so_far(&self) -> SoFar {
        SoFar {
            steps: self.steps,
            nanoseconds: self.now,
            trace: self.trace,
        }
    }

    pub(super) fn now(&self) -> u64 {
        self.now
    }

    pub(super) fn current(&self) -> usize {
        self.current
    }

    pub(super) fn name(&self, thread: usize) -> &str {
        &self.threads[thread].name
    }

    /// Whether the current thread takes steps: not when all is over, nor when it is ending.
    pub(super) fn is_running(&self) -> bool {
        !self.over && !self.has_ended(self.current)
    }

    pub(super) fn stop(&mut self) {
        self.over = true;
    }

    /// A new thread, which can run.
    pub(super) fn add(&mut self, name: String) -> usize {
        // Above what `Style::Priorities` gives.
        let priority = (1 << 32) + (self.random.next() >> 32);
        self.threads.push(Thread {
            name,
            state: State::Ready,
            woken: false,
            token: false,
            priority,
        });
        self.threads.len() - 1
    }

    pub(super) fn has_ended(&self, thread: usize) -> bool {
        matches!(self.threads[thread].state, State::Ended)
    }

    /// The current thread has ended.
    pub(super) fn end(&mut self) {
        self.threads[self.current].state = State::Ended;
    }

    /// The current thread waits.
    pub(super) fn wait(
        &mut self,
        what: &'static str,
        key: usize,
        until: Option<u64>,
        at: &'static Location<'static>,
    ) {
        self.threads[self.current].state = State::Waits {
            what,
            key,
            until,
            at,
        };
    }

    /// Whether the last wait of the current thread ended by [`World::wake`].
    pub(super) fn was_woken(&self) -> bool {
        self.threads[self.current].woken
    }

    /// All that wait for `key` can run.
    pub(super) fn wake(&mut self, key: usize) {
        for thread in &mut self.threads {
            if matches!(thread.state, State::Waits { key: one, .. } if one == key) {
                (thread.state, thread.woken) = (State::Ready, true);
            }
        }
    }

    /// One that waits for `key`, any, can run.
    pub(super) fn wake_one(&mut self, key: usize) {
        let waits = |one: &Thread| matches!(one.state, State::Waits { key: one, .. } if one == key);
        let count = self.threads.iter().filter(|one| waits(one)).count() as u64;
        if count > 0 {
            let nth = self.random.below(count) as usize;
            if let Some(thread) = self.threads.iter_mut().filter(|one| waits(one)).nth(nth) {
                (thread.state, thread.woken) = (State::Ready, true);
            }
        }
    }

    /// Gives `thread` its token.
    pub(super) fn give_token(&mut self, thread: usize) {
        self.threads[thread].token = true;
    }

    /// Takes the token of the current thread: whether it had it.
    pub(super) fn take_token(&mut self) -> bool {
        std::mem::take(&mut self.threads[self.current].token)
    }

    /// Notes a value that was seen or left.
    pub(super) fn note(&mut self, value: u64) {
        self.trace = mix(self.trace ^ value).wrapping_add(value);
    }

    /// Those who wait, and not for a time.
    pub(super) fn waiting(&self) -> Vec<Waiting> {
        let waiting = self.threads.iter().filter_map(|thread| match thread.state {
            State::Waits {
                what,
                at,
                until: None,
                ..
            } => Some(Waiting {
                thread: thread.name.clone(),
                what,
                at: format!("{}:{}", at.file(), at.line()),
            }),
            _ => None,
        });
        waiting.collect()
    }

    /// Takes a step, and chooses who goes on: whether that is another thread.
    pub(super) fn choose(&mut self) -> Result<bool, Stuck> {
        self.steps += 1;
        self.now += TICK;
        if self.steps > self.limits.0 {
            return Err(Stuck::StepLimit);
        }
        if self.now > self.limits.1 {
            return Err(Stuck::Deadlock);
        }
        let stays = matches!(self.threads[self.current].state, State::Ready);
        let next = match self.style {
            Style::Random { one_in } if stays && !self.random.one_in(one_in) => self.current,
            Style::Random { .. } => {
                self.find_able()?;
                self.able[self.random.below(self.able.len() as u64) as usize]
            }
            Style::Priorities { one_in } => {
                if self.random.one_in(one_in) {
                    self.lowest -= 1;
                    self.threads[self.current].priority = self.lowest;
                }
                self.find_able()?;
                let priority = |thread: &&usize| self.threads[**thread].priority;
                *self
                    .able
                    .iter()
                    .max_by_key(priority)
                    .ok_or(Stuck::Deadlock)?
            }
        };
        let thread = &mut self.threads[next];
        if matches!(thread.state, State::Waits { .. }) {
            (thread.state, thread.woken) = (State::Ready, false);
        }
        self.note(self.now << 8 | next as u64);
        if next != self.current {
            self.chosen = Some(next);
        }
        Ok(next != self.current)
    }

    /// Fills `able` with the threads that can run, after the clock has gone to where there are some.
    fn find_able(&mut self) -> Result<(), Stuck> {
        loop {
            let (mut first, now) = (None::<u64>, self.now);
            self.able.clear();
            for (nth, thread) in self.threads.iter().enumerate() {
                match thread.state {
                    State::Ready => self.able.push(nth),
                    State::Waits {
                        until: Some(until), ..
                    } => {
                        if until <= now {
                            self.able.push(nth);
                        }
                        first = Some(first.map_or(until, |first| first.min(until)));
                    }
                    State::Waits { .. } | State::Ended => {}
                }
            }
            if !self.able.is_empty() {
                return Ok(());
            }
            self.now = first.ok_or(Stuck::Deadlock)?;
        }
    }

    /// Whose turn it is; `current` goes on where nothing was chosen.
    pub(super) fn take_chosen(&mut self, current: usize) -> usize {
        self.current = self.chosen.take().unwrap_or(current);
        self.current
    }
}
