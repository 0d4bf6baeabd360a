//! Tests that change their process for good run in a child: this program once more, with one test.
#![allow(dead_code, reason = "each test file uses its own part of this module")]

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const CHILD: &str = "SHOOTDOWN_TEST_CHILD";

/// True in the child. In the parent it runs the child, fails where that fails, and says what it printed.
pub(crate) fn in_child(test: &str) -> bool {
    if std::env::var(CHILD).as_deref() == Ok(test) {
        return true;
    }
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .env(CHILD, test)
        // One heap for all threads: whoever holds its lock is in the way of all others.
        .env("MALLOC_ARENA_MAX", "1")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A child that hangs is what some of these tests are about.
    let deadline = Instant::now() + Duration::from_secs(120);
    while child.try_wait().unwrap().is_none() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    let hangs = child.try_wait().unwrap().is_none();
    if hangs {
        child.kill().unwrap();
    }
    let child = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&child.stdout) + String::from_utf8_lossy(&child.stderr);
    assert!(
        child.status.success() && text.contains("1 passed"),
        "in the child ({}{}): {text}",
        child.status,
        if hangs { ", as it hung" } else { "" }
    );
    // Skips, tables.
    eprintln!("{text}");
    false
}
