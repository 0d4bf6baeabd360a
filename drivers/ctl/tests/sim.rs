//! `run --sim`, as its user sees it. The first of these builds what simulates, beside what is tested.

use std::process::{Command, Stdio};

use serde_json::Value;

/// Exit status, standard output, standard error.
fn run(arguments: &str) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_shootdown"))
        .args(arguments.split_whitespace())
        .stdin(Stdio::null())
        .output()
        .expect("it starts");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

fn object(stdout: &str) -> Value {
    assert_eq!(stdout.lines().count(), 1, "{stdout}");
    serde_json::from_str(stdout).expect("JSON")
}

#[test]
fn the_same_seeds_give_the_same_bytes_and_others_others() {
    for faults in ["", " --faults all"] {
        let mut traces = Vec::new();
        for seed in [1, 40, 77] {
            let arguments = format!("run --sim --seed {seed} --schedules 8{faults}");
            let (code, first, _) = run(&arguments);
            assert_eq!(code, Some(0), "{first}");
            let (_, second, _) = run(&arguments);
            assert_eq!(first, second, "{arguments}");
            let trace = object(&run(&format!("{arguments} --json")).1)["trace"].clone();
            assert!(first.contains(trace.as_str().expect("text")), "{first}");
            traces.push(trace);
        }
        traces.dedup();
        assert_eq!(traces.len(), 3, "{traces:?}");
    }
}

#[test]
fn a_clean_exploration_passes_and_says_what_it_did() {
    let (code, stdout, _) = run("run --sim --schedules 30 --faults all --json");
    let report = object(&stdout);
    assert_eq!(code, Some(0), "{report:#}");
    assert_eq!(report["schedules"], 30);
    for count in [
        "steps",
        "nanoseconds",
        "device_accesses",
        "shootdowns",
        "faults_injected",
    ] {
        assert!(report[count].as_u64() > Some(0), "{count}: {report:#}");
    }
    assert!(report["finding"].is_null());
    assert_eq!(report["verdict"], "pass");
}

/// Finds a planted bug, and replays what was found: the operations that it takes.
fn finds_and_replays(plant: &str, race: &str, most: usize) {
    let (code, stdout, stderr) = run(&format!(
        "run --sim --schedules 2000 --plant {plant} --json"
    ));
    assert_eq!(code, Some(1), "{plant}: {stdout}{stderr}");
    let report = object(&stdout);
    let found = &report["finding"];
    let first = found["findings"][0].as_str().expect("text");
    assert!(first.starts_with(&format!("{race} ({plant}): ")), "{first}");
    let operations = found["operations"].as_array().expect("a list");
    let from = found["shrunk"]["from"].as_u64().expect("a number");
    assert!(operations.len() <= most, "{found:#}");
    assert!((operations.len() as u64) < from, "{found:#}");
    let replay = found["replay"].as_str().expect("text");
    let replay = replay.strip_prefix("shootdown ").expect("a command");
    let (code, stdout, _) = run(&format!("{replay} --json"));
    assert_eq!(code, Some(1), "{replay}");
    let again = object(&stdout);
    for same in [
        "class",
        "findings",
        "records",
        "operations",
        "steps",
        "nanoseconds",
        "trace",
        "replay",
    ] {
        assert_eq!(again["finding"][same], found[same], "{replay}: {same}");
    }
    // For a reader it is the same text, but for how it was found.
    let (_, text, _) = run(replay);
    for part in operations {
        assert!(text.contains(part.as_str().expect("text")), "{text}");
    }
    assert!(text.contains(first) && text.contains(replay), "{text}");
}

#[test]
fn no_flush_is_found_and_replayed() {
    finds_and_replays("no-flush", "R14", 8);
}

#[test]
fn a_flush_that_is_not_waited_for_is_found_and_replayed() {
    // Which schedule finds it first changes with the code, and what is left of some is a minimum only near that schedule.
    finds_and_replays("flush-not-waited", "R21", 16);
}

#[test]
fn a_retry_that_is_not_checked_is_found_and_replayed() {
    finds_and_replays("retry-not-checked", "R9", 8);
}

#[test]
fn a_sequence_of_the_wrong_range_is_found_and_replayed() {
    finds_and_replays("wrong-range", "R34", 8);
}

#[test]
fn a_drop_in_that_is_not_cancelled_is_found_and_replayed() {
    finds_and_replays("drop-in-not-cancelled", "R16", 8);
}

/// The rarest: ASIDs have to wrap.
#[test]
fn an_asid_that_is_reused_is_found_and_replayed() {
    finds_and_replays("asid-reused", "R15", 12);
}

#[test]
fn a_context_that_is_not_unloaded_is_found_and_replayed() {
    finds_and_replays("context-not-unloaded", "R14", 8);
}

#[test]
fn lost_completions_are_lived_with() {
    let (code, stdout, _) = run("run --sim --schedules 20 --plant lost-completion --json");
    assert_eq!(code, Some(0), "{stdout}");
    assert_eq!(object(&stdout)["plant"]["must_be_found"], false);
}

#[test]
fn one_schedule_of_one_program_can_be_asked_for() {
    let report = |arguments: &str| {
        let (code, stdout, _) = run(&format!("run --sim --json --seed 5 {arguments}"));
        assert_eq!(code, Some(0), "{stdout}");
        let report = object(&stdout);
        assert_eq!(report["schedules"], 1);
        report
    };
    let (one, other) = (report("--schedule 0x5"), report("--schedule 6"));
    assert_eq!(one["trace"], report("--schedules 1")["trace"]);
    assert_ne!(one["trace"], other["trace"]);
    assert_ne!(report("--only 1,2,3 --schedule 5")["trace"], one["trace"]);
}

#[test]
fn wrong_usage_is_status_2_and_names_what_is_wrong() {
    for (arguments, said) in [
        ("run --sim --seconds 5", "--seconds"),
        ("run --sim --threads 2", "--threads"),
        ("run --sim --trace /tmp/t", "--trace"),
        ("run --sim --audit", "--audit"),
        ("run --only 1", "--sim"),
        ("run --schedules 5", "--sim"),
        ("run --sim --schedules 5 --schedule 1", "--schedule"),
        ("run --sim --schedules 0", "'0'"),
        ("run --sim --schedule many", "hexadecimal"),
        ("run --sim --only one", "'one'"),
        ("run --sim --only 99999", "99999"),
        ("run --sim --plant unheard-of", "\"unheard-of\""),
    ] {
        let (code, stdout, stderr) = run(arguments);
        assert_eq!(code, Some(2), "{arguments}: {stderr}");
        assert_eq!(stdout, "", "{arguments}");
        assert!(stderr.contains(said), "{arguments}: {stderr}");
    }
}

#[test]
fn without_cargo_it_says_so_and_the_way_out() {
    let output = Command::new(env!("CARGO_BIN_EXE_shootdown"))
        .args(["run", "--sim"])
        .env("CARGO", "/no/such/cargo")
        .output()
        .expect("it starts");
    assert_eq!(output.status.code(), Some(3));
    let said = String::from_utf8_lossy(&output.stderr);
    for part in ["/no/such/cargo", "a build of its own", "PATH"] {
        assert!(said.contains(part), "{said}");
    }
}
