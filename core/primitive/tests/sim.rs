//! The simulation's primitives, each test in a process of its own, which is what a simulation is.
//! `RUSTFLAGS="--cfg sim" cargo test --profile sim -p shootdown-primitive`.
#![cfg(sim)]

use std::process::Command;

use shootdown_primitive::sim::{self, Settings, SoFar};
use shootdown_primitive::sync::atomic::{AtomicU64, Ordering::SeqCst};
use shootdown_primitive::sync::{Arc, Condvar, Mutex, RwLock};
use shootdown_primitive::thread;
use shootdown_primitive::time::{Duration, Instant};

/// What a child is to do: in the environment, so that only it does.
const SCHEDULE: &str = "SHOOTDOWN_SIM_SCHEDULE";

/// What the test `name` said when it simulated `body` under `schedule`. In the child it does not return.
fn simulated(name: &str, schedule: u64, body: fn() -> String) -> String {
    if let Ok(schedule) = std::env::var(SCHEDULE) {
        let settings = Settings {
            schedule: schedule.parse().unwrap(),
            steps: 100_000,
            time: Duration::from_secs(100_000),
        };
        static SAID: std::sync::Mutex<String> = std::sync::Mutex::new(String::new());
        sim::run(
            settings,
            move || *SAID.lock().unwrap() = body(),
            |end| {
                let SoFar {
                    steps,
                    nanoseconds,
                    trace,
                } = sim::so_far();
                let said = SAID.lock().unwrap();
                println!("\n<{said}|{end:?}|{steps} {nanoseconds} {trace:x}>");
                0
            },
        );
    }
    let child = Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture"])
        .env(SCHEDULE, schedule.to_string())
        .output()
        .unwrap();
    let out = String::from_utf8(child.stdout).unwrap();
    let line = out.lines().find(|line| line.starts_with('<'));
    line.unwrap_or_else(|| panic!("{out}\n{}", String::from_utf8_lossy(&child.stderr)))
        .to_owned()
}

/// What the body returned, how it ended, and the rest.
fn parts(line: &str) -> [&str; 3] {
    let mut parts = line.trim_matches(['<', '>']).split('|');
    std::array::from_fn(|_| parts.next().unwrap())
}

/// Two threads that each load, and then store one more.
fn lost_update() -> String {
    let count = Arc::new(AtomicU64::new(0));
    let threads = [(); 2].map(|()| {
        let count = count.clone();
        thread::spawn(move || count.store(count.load(SeqCst) + 1, SeqCst))
    });
    threads
        .into_iter()
        .for_each(|thread| thread.join().unwrap());
    count.load(SeqCst).to_string()
}

#[test]
fn schedules_differ_in_what_they_find_and_each_repeats_itself() {
    let name = "schedules_differ_in_what_they_find_and_each_repeats_itself";
    let all: Vec<_> = (0..40)
        .map(|nth| simulated(name, nth, lost_update))
        .collect();
    for count in ["1", "2"] {
        let found = all.iter().filter(|line| parts(line)[0] == count).count();
        assert!(found > 0, "{count}: {all:?}");
    }
    for (nth, line) in all.iter().enumerate().step_by(7) {
        assert_eq!(*line, simulated(name, nth as u64, lost_update));
    }
    let mut traces: Vec<_> = all.iter().map(|line| parts(line)[2]).collect();
    traces.sort_unstable();
    traces.dedup();
    assert!(traces.len() > 10, "{traces:?}");
}

#[test]
fn no_update_is_lost_under_a_lock() {
    fn body() -> String {
        let (count, read) = (Arc::new(Mutex::new(0)), Arc::new(RwLock::new(0)));
        let threads = [(); 4].map(|()| {
            let (count, read) = (count.clone(), read.clone());
            thread::spawn(move || {
                let mut count = count.lock().unwrap();
                thread::yield_now();
                *count += 1;
                let now = *read.read().unwrap();
                *read.write().unwrap() = now + *count;
            })
        });
        threads
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
        format!("{:?} {:?}", count.lock().unwrap(), read.read().unwrap())
    }
    for schedule in 0..20 {
        let line = simulated("no_update_is_lost_under_a_lock", schedule, body);
        assert_eq!(parts(&line)[..2], ["4 10", "Done"], "{line}");
    }
}

#[test]
fn a_deadlock_names_the_threads_and_where_they_wait() {
    fn body() -> String {
        let locks = Arc::new([Mutex::new(()), Mutex::new(())]);
        let threads = [0, 1].map(|nth| {
            let locks = locks.clone();
            let name = thread::Builder::new().name(format!("philosopher {nth}"));
            name.spawn(move || {
                let _first = locks[nth].lock().unwrap();
                let _second = locks[1 - nth].lock().unwrap();
            })
        });
        threads
            .into_iter()
            .for_each(|thread| thread.unwrap().join().unwrap());
        String::new()
    }
    let name = "a_deadlock_names_the_threads_and_where_they_wait";
    let all: Vec<_> = (0..40).map(|nth| simulated(name, nth, body)).collect();
    assert!(all.iter().any(|line| parts(line)[1] == "Done"), "{all:?}");
    let deadlock = all
        .iter()
        .find(|line| parts(line)[1].starts_with("Deadlock"))
        .unwrap();
    for said in [
        "philosopher 0",
        "philosopher 1",
        "a mutex",
        "tests/sim.rs:",
        "main",
    ] {
        assert!(deadlock.contains(said), "{deadlock}");
    }
}

#[test]
fn a_thread_that_looks_at_its_watch_does_not_hide_a_deadlock() {
    fn body() -> String {
        thread::spawn(|| {
            loop {
                thread::park_timeout(Duration::from_secs(10));
            }
        });
        let never = Mutex::new(());
        drop(Condvar::new().wait(never.lock().unwrap()));
        String::new()
    }
    let name = "a_thread_that_looks_at_its_watch_does_not_hide_a_deadlock";
    let line = simulated(name, 3, body);
    assert!(parts(&line)[1].starts_with("Deadlock"), "{line}");
    assert!(line.contains("a condition"), "{line}");
}

#[test]
fn time_passes_without_taking_any() {
    fn body() -> String {
        let begun = Instant::now();
        thread::sleep(Duration::from_secs(3600));
        let slept = begun.elapsed();
        let (lock, condition) = (Mutex::new(()), Condvar::new());
        let (_guard, result) = (condition)
            .wait_timeout(lock.lock().unwrap(), Duration::from_secs(60))
            .unwrap();
        let waited = begun.elapsed() - slept;
        while begun.elapsed() < slept + waited + Duration::from_micros(10) {
            std::hint::black_box(());
        }
        format!(
            "{} {} {}",
            slept.as_secs(),
            result.timed_out(),
            waited.as_secs()
        )
    }
    let real = std::time::Instant::now();
    let line = simulated("time_passes_without_taking_any", 1, body);
    assert_eq!(parts(&line)[..2], ["3600 true 60", "Done"], "{line}");
    assert!(real.elapsed() < Duration::from_secs(60));
}

#[test]
fn whoever_is_notified_or_unparked_in_time_has_not_timed_out() {
    fn body() -> String {
        let shared = Arc::new((Mutex::new(false), Condvar::new()));
        let (to, main) = (shared.clone(), thread::current());
        let thread = thread::spawn(move || {
            main.unpark();
            *to.0.lock().unwrap() = true;
            to.1.notify_one();
        });
        let (guard, result) = (shared.1)
            .wait_timeout_while(shared.0.lock().unwrap(), Duration::from_secs(5), |done| {
                !*done
            })
            .unwrap();
        let said = format!("{} {}", *guard, result.timed_out());
        drop(guard);
        thread.join().unwrap();
        // The token was kept.
        let begun = Instant::now();
        thread::park_timeout(Duration::from_secs(5));
        format!("{said} {}", begun.elapsed() < Duration::from_secs(1))
    }
    let name = "whoever_is_notified_or_unparked_in_time_has_not_timed_out";
    for schedule in 0..20 {
        let line = simulated(name, schedule, body);
        assert_eq!(parts(&line)[..2], ["true false true", "Done"], "{line}");
    }
}

#[test]
fn a_panic_is_the_end_and_says_who_and_where() {
    fn body() -> String {
        let name = thread::Builder::new().name("the third".to_owned());
        let thread = name.spawn(|| panic!("three is too many"));
        thread.unwrap().join().unwrap();
        String::new()
    }
    let line = simulated("a_panic_is_the_end_and_says_who_and_where", 1, body);
    for said in [
        "Panicked",
        "the third",
        "three is too many",
        "tests/sim.rs:",
    ] {
        assert!(line.contains(said), "{line}");
    }
}

#[test]
fn what_does_not_end_is_ended() {
    fn body() -> String {
        let word = AtomicU64::new(0);
        while word.load(SeqCst) == 0 {}
        String::new()
    }
    let line = simulated("what_does_not_end_is_ended", 1, body);
    assert!(parts(&line)[1].starts_with("StepLimit"), "{line}");
}
