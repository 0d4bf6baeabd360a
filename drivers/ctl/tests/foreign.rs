//! The main job while strangers make raw system calls on its memory: what tells of them in time is clean, and nothing is found out.

use std::process::Command;

use serde_json::Value;

/// Exit status, report, standard error.
fn run(arguments: &str) -> (Option<i32>, Value, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_shootdown"))
        .args(arguments.split_whitespace())
        .output()
        .expect("it starts");
    let report = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code(), report, stderr)
}

/// A machine without the source says so, with exit status 3. As root nothing is missing.
fn is_missing(code: Option<i32>, stderr: &str) -> bool {
    // SAFETY: no arguments.
    let root = unsafe { libc::geteuid() } == 0;
    let missing = code == Some(3) && !root;
    if missing {
        eprintln!("SKIPPED: {}", stderr.trim());
    }
    missing
}

/// A machine on which the kernel does not tell has no audit.
fn is_not_audited(code: Option<i32>, stderr: &str) -> bool {
    let reason = stderr.trim().strip_prefix("error: no audit: ");
    if let Some(reason) = reason.filter(|_| code == Some(3)) {
        eprintln!("SKIPPED: {reason}");
        return true;
    }
    false
}

/// How often each call was made.
fn made(report: &Value) -> Vec<(&str, u64)> {
    let calls = report["foreign"]["made"].as_array().expect("a list");
    let count = |one: &Value| one["times"].as_u64().expect("a count");
    let name = |call| Value::as_str(call).expect("a name");
    calls
        .iter()
        .map(|one| (name(&one["call"]), count(one)))
        .collect()
}

const CALLS: [&str; 6] = [
    "munmap",
    "mmap MAP_FIXED",
    "mremap, shrunk",
    "mremap, moved",
    "mprotect",
    "pkey_mprotect",
];

#[test]
fn a_run_with_foreign_calls_is_clean_where_they_wait_for_the_devices() {
    let (code, report, stderr) = run("--source unotify --seconds 4 --json");
    if is_missing(code, &stderr) {
        return;
    }
    assert_eq!(code, Some(0), "{report:#} {stderr}");
    assert_eq!(report["stale_accesses"], 0);
    assert_eq!(report["data_mismatches"], 0);
    let made = made(&report);
    assert_eq!(made.len(), CALLS.len());
    for ((call, times), expected) in made.into_iter().zip(CALLS) {
        assert_eq!(call, expected);
        assert!(times > 0, "{call}");
    }
}

#[test]
fn the_same_run_without_a_source_finds_stale_accesses() {
    let (code, report, stderr) = run("--source none --seconds 4 --json");
    assert_eq!(code, Some(1), "{report:#} {stderr}");
    assert!(report["stale_accesses"].as_u64() > Some(0));
    assert!(made(&report).iter().all(|(_, times)| *times > 0));
}

#[test]
fn what_a_late_source_cannot_stop_is_left_out_and_named() {
    let (code, report, stderr) = run("--source uffd --seconds 2 --json");
    if is_missing(code, &stderr) {
        return;
    }
    assert_eq!(code, Some(0), "{report:#} {stderr}");
    assert_eq!(made(&report), []);
    let left_out = report["foreign"]["left_out"].as_array().expect("a list");
    let names: Vec<_> = left_out.iter().map(|one| &one["call"]).collect();
    assert_eq!(names, CALLS);
    assert_eq!(left_out[0]["sees"], "late+end");
    assert_eq!(left_out[4]["sees"], "does not see");
}

#[test]
fn an_audit_finds_nothing_that_was_not_told_where_foreign_calls_wait() {
    let (code, report, stderr) = run("--source unotify --audit --seconds 3 --json");
    if is_not_audited(code, &stderr) {
        return;
    }
    assert_eq!(code, Some(0), "{report:#} {stderr}");
    let audit = &report["audit"];
    // Each call is one or more, and the run's own operations are others.
    let calls: u64 = made(&report).iter().map(|one| one.1).sum();
    assert!(calls > 0 && audit["seen"].as_u64() > Some(calls), "{audit}");
    assert_eq!(audit["missed"], 0);
    assert_eq!(audit["lost"], 0);
}

#[test]
fn an_audit_names_what_nobody_told_of() {
    let (code, report, stderr) = run("--source none --audit --seconds 2 --json");
    if is_not_audited(code, &stderr) {
        return;
    }
    assert_eq!(code, Some(1), "{report:#} {stderr}");
    let audit = &report["audit"];
    assert!(audit["missed"].as_u64() > Some(0), "{audit}");
    let first = audit["first"][0].as_str().expect("a sentence");
    assert!(first.contains("(stranger)"), "{first}");
}

#[test]
fn a_dead_device_refuses_foreign_calls_and_the_run_passes() {
    let (code, report, stderr) = run("--source unotify --faults all --seconds 4 --json");
    if is_missing(code, &stderr) {
        return;
    }
    assert_eq!(code, Some(0), "{report:#} {stderr}");
    assert!(made(&report).iter().any(|(_, times)| *times > 0));
}

#[test]
fn what_would_say_nothing_is_refused() {
    for with in ["--plant no-flush", "--faults all"] {
        let (code, _, stderr) = run(&format!("--source none {with}"));
        assert_eq!(code, Some(2), "{stderr}");
        let option = with.split(' ').next().expect("an option");
        assert!(
            stderr.contains(option) && stderr.contains("name a source"),
            "{stderr}"
        );
    }
    let (code, _, stderr) = run("--source ptrace");
    assert_eq!(code, Some(2));
    assert!(stderr.contains("none, uffd, unotify"), "{stderr}");
}
