//! Whether a run leaks: memory, threads, descriptors, as the kernel counts them.
//!
//! *Memory* is what is resident (VmRSS) less the frames of the model (RssShmem), in quarantine or not: a device's mapping keeps
//! resident whatever it has touched once, and the frames themselves are counted one by one. The mean of a window is compared: from
//! the end of the warm-up on, against as long before the end. Page tables of the model are resident from the first use of an
//! address on, which takes its time.
//! Threads and descriptors are counted before anything was made, when the run is warm, at its end, and after everything was
//! dropped.

use std::fmt;
use std::fs;
use std::time::Duration;

use serde::Serialize;

/// Memory may grow by so many per cent.
const MOST: f64 = 2.0;
/// And, whatever part that is, by so many bytes: in a run that is too short to be warm for page tables of the model that are used for
/// the first time; in one that keeps memory for good for the tables of that memory, which are kept with it.
const TABLES: u64 = 1 << 20;
/// Warm-up of a long run; of a shorter one it is half of it.
const WARM_UP: Duration = Duration::from_secs(60);
/// A window is this part of a run, and at most as long as this.
const WINDOW: (u32, Duration) = (10, Duration::from_secs(10));
/// Runs that are shorter say nothing of memory: they have not yet been everywhere.
const SHORTEST: Duration = Duration::from_secs(20);

/// Counts from /proc at one moment.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Count {
    pub(crate) threads: u64,
    pub(crate) descriptors: u64,
}

impl Count {
    /// Zeroes where there is no /proc.
    pub(crate) fn now() -> Self {
        let entries = |path| fs::read_dir(path).map_or(0, |folder| folder.count() as u64);
        Self {
            threads: entries("/proc/self/task"),
            descriptors: entries("/proc/self/fd"),
        }
    }
}

/// Bytes that are resident, without shared memory.
fn resident() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let bytes = |name| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib << 10)
    };
    bytes("VmRSS:")?.checked_sub(bytes("RssShmem:")?)
}

/// Has the allocator give large pieces back as soon as they are freed. By itself it keeps more of them the longer a program runs, an
/// arena for each thread, and what is resident tells of the most that was ever needed at a time instead of what is in use.
fn give_back() {
    /// What glibc begins with, in bytes.
    #[cfg(target_env = "gnu")]
    const LARGE: libc::c_int = 128 << 10;
    #[cfg(target_env = "gnu")]
    for parameter in [libc::M_MMAP_THRESHOLD, libc::M_TRIM_THRESHOLD] {
        // SAFETY: sets one number of the allocator, which any thread may do at any time. A refusal leaves it as it is.
        unsafe { libc::mallopt(parameter, LARGE) };
    }
}

/// What a run shows.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Soak {
    pub(crate) warm_up_seconds: f64,
    /// Resident bytes less the model's frames, when the run is warm and at its end; none in short runs.
    pub(crate) memory_warm: Option<u64>,
    pub(crate) memory_end: Option<u64>,
    pub(crate) at_start: Count,
    pub(crate) warm: Count,
    pub(crate) at_end: Count,
    /// When everything was dropped.
    pub(crate) after: Count,
}

impl Soak {
    /// By how many per cent memory has grown.
    pub(crate) fn growth(&self) -> Option<f64> {
        let (warm, end) = (self.memory_warm? as f64, self.memory_end? as f64);
        Some((end / warm.max(1.0) - 1.0) * 100.0)
    }

    /// What has leaked. The watchdog of the framework is one thread that stays; memory that is kept for good, its device not
    /// having come back in time, keeps the descriptor of the frames.
    pub(crate) fn leaks(&self, kept: bool) -> Vec<String> {
        let mut leaks = Vec::new();
        let more = self
            .memory_end
            .unwrap_or(0)
            .saturating_sub(self.memory_warm.unwrap_or(0));
        let warm = self.warm_up_seconds >= WARM_UP.as_secs_f64();
        let least = if warm && !kept { 0 } else { TABLES };
        let growth = self
            .growth()
            .filter(|growth| *growth > MOST && more > least);
        if let Some(growth) = growth {
            leaks.push(format!(
                "resident memory less the model's frames grew by {growth:.1} % after {:.0} s",
                self.warm_up_seconds
            ));
        }
        let stays = [
            ("threads", self.at_start.threads + 1, self.after.threads),
            (
                "descriptors",
                self.at_start.descriptors + u64::from(kept),
                self.after.descriptors,
            ),
            (
                "descriptors",
                self.warm.descriptors,
                self.at_end.descriptors,
            ),
        ];
        let more = stays
            .into_iter()
            .filter(|(_, before, after)| after > before);
        leaks.extend(more.map(|(what, before, after)| {
            format!("{what}: {after}, of {before} that may be there")
        }));
        leaks
    }
}

impl fmt::Display for Soak {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "  threads {} at the start, {} when warm, {} at the end, {} after it; descriptors {}, {}, {}, {}",
            self.at_start.threads,
            self.warm.threads,
            self.at_end.threads,
            self.after.threads,
            self.at_start.descriptors,
            self.warm.descriptors,
            self.at_end.descriptors,
            self.after.descriptors
        )?;
        if let (Some(warm), Some(end), Some(growth)) =
            (self.memory_warm, self.memory_end, self.growth())
        {
            let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
            write!(
                f,
                "\n  resident without frames: {:.1} MiB after {:.0} s, {:.1} MiB at the end ({growth:+.1} %)",
                mib(warm),
                self.warm_up_seconds,
                mib(end)
            )?;
        }
        writeln!(f)
    }
}

/// Takes the samples of a run.
pub(crate) struct Sampler {
    warm_up: Duration,
    window: Duration,
    ends: Duration,
    judged: bool,
    soak: Soak,
    warm: Mean,
    end: Mean,
}

#[derive(Default)]
struct Mean {
    sum: u128,
    count: u128,
}

impl Mean {
    fn add(&mut self, value: u64) {
        self.sum += u128::from(value);
        self.count += 1;
    }

    fn get(&self) -> Option<u64> {
        self.sum.checked_div(self.count).map(|mean| mean as u64)
    }
}

impl Sampler {
    /// For a run that takes `time`, before anything of it was made.
    pub(crate) fn new(time: Duration) -> Self {
        give_back();
        let warm_up = WARM_UP.min(time / 2);
        let (part, longest) = WINDOW;
        Self {
            warm_up,
            window: (time / part).min(longest),
            ends: time,
            judged: time >= SHORTEST,
            soak: Soak {
                warm_up_seconds: warm_up.as_secs_f64(),
                at_start: Count::now(),
                ..Soak::default()
            },
            warm: Mean::default(),
            end: Mean::default(),
        }
    }

    /// What a source keeps for good was there from the start.
    pub(crate) fn keeps(&mut self, before: Count, after: Count) {
        let start = &mut self.soak.at_start;
        start.threads += after.threads.saturating_sub(before.threads);
        start.descriptors += after.descriptors.saturating_sub(before.descriptors);
    }

    /// Looks, `at` so long after the begin, unless that is in none of the windows.
    pub(crate) fn look(&mut self, at: Duration) {
        if at < self.warm_up {
            return;
        }
        if self.soak.warm.threads == 0 {
            self.soak.warm = Count::now();
        }
        let mean = if at < self.warm_up + self.window {
            &mut self.warm
        } else if at + self.window >= self.ends {
            &mut self.end
        } else {
            return;
        };
        if let Some(resident) = resident() {
            mean.add(resident);
        }
    }

    /// The run is over, and nothing of it has been dropped.
    pub(crate) fn end(&mut self) {
        self.soak.at_end = Count::now();
        if self.soak.warm.threads == 0 {
            self.soak.warm = self.soak.at_end;
        }
        if self.judged {
            (self.soak.memory_warm, self.soak.memory_end) = (self.warm.get(), self.end.get());
        }
    }

    /// Everything has been dropped, but memory that is `kept`. A thread that has ended is not gone at once.
    pub(crate) fn after(mut self, kept: bool) -> Soak {
        for _ in 0..100 {
            self.soak.after = Count::now();
            if self.soak.leaks(kept).is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        self.soak
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clean() -> Soak {
        let at = |threads, descriptors| Count {
            threads,
            descriptors,
        };
        Soak {
            warm_up_seconds: 60.0,
            memory_warm: Some(100 << 20),
            memory_end: Some(101 << 20),
            at_start: at(2, 5),
            warm: at(20, 7),
            at_end: at(20, 7),
            after: at(3, 5),
        }
    }

    #[test]
    fn what_leaks_is_found_and_what_does_not_is_not() {
        assert_eq!(clean().leaks(false), Vec::<String>::new());
        let changes: [fn(&mut Soak); 4] = [
            |soak| soak.memory_end = Some(103 << 20),
            |soak| soak.after.threads += 1,
            |soak| soak.after.descriptors += 1,
            |soak| soak.at_end.descriptors += 1,
        ];
        for change in changes {
            let mut soak = clean();
            change(&mut soak);
            assert_eq!(soak.leaks(false).len(), 1, "{soak:?}");
        }
        let mut kept = clean();
        kept.after.descriptors += 1;
        assert_eq!(kept.leaks(true), Vec::<String>::new());
        let short = Soak {
            memory_warm: None,
            memory_end: None,
            ..clean()
        };
        assert_eq!(short.growth(), None);
        assert_eq!(short.leaks(false), Vec::<String>::new());
    }

    #[test]
    fn what_tables_take_is_no_leak_in_a_run_that_is_not_warm_or_keeps_memory() {
        let mut soak = Soak {
            warm_up_seconds: 30.0,
            memory_warm: Some(10 << 20),
            memory_end: Some(11 << 20),
            ..clean()
        };
        assert_eq!(soak.leaks(false), Vec::<String>::new());
        soak.warm_up_seconds = 60.0;
        assert_eq!(soak.leaks(false).len(), 1);
        assert_eq!(soak.leaks(true), Vec::<String>::new());
        soak.warm_up_seconds = 30.0;
        soak.memory_end = Some(12 << 20);
        assert_eq!(soak.leaks(false).len(), 1);
    }

    #[test]
    fn memory_that_is_kept_is_seen() {
        let second = Duration::from_secs(1);
        let mut sampler = Sampler::new(100 * second);
        (0..99).for_each(|at| sampler.look(at * second));
        let kept = vec![1_u8; 64 << 20];
        sampler.look(99 * second);
        sampler.end();
        assert!(kept.iter().all(|byte| *byte == 1));
        assert!(sampler.soak.growth() > Some(10.0), "{:?}", sampler.soak);
    }

    #[test]
    fn threads_and_descriptors_of_this_process_are_counted() {
        let before = Count::now();
        let file = fs::File::open("/proc/self/status").unwrap();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || ended.recv());
        let during = Count::now();
        // Other tests come and go beside this one.
        assert!(
            during.threads >= 2 && during.descriptors > 3,
            "{before:?}, {during:?}"
        );
        drop((file, end));
        let _ = thread.join();
    }
}
