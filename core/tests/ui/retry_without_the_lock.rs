//! `retry` is checked with a `NotifierLock` held: its guard is the proof, and no other guard is.

use std::sync::Mutex;

use shootdown::Fault;

fn without(fault: &Fault<'_>) -> bool {
    fault.retry()
}

fn with_another(fault: &Fault<'_>, lock: &Mutex<()>) -> bool {
    fault.retry(&lock.lock().unwrap())
}

fn main() {}
