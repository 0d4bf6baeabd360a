//! The command, as its user sees it: what it prints, and its exit status.

use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;

fn shootdown(arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shootdown"));
    command
        .args(arguments.split_whitespace())
        .stdin(Stdio::null());
    command
}

/// Exit status, standard output, standard error.
fn ended(output: Output) -> (Option<i32>, String, String) {
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

fn run(arguments: &str) -> (Option<i32>, String, String) {
    ended(shootdown(arguments).output().expect("it starts"))
}

/// The one object on standard output.
fn object(stdout: &str) -> Value {
    assert_eq!(stdout.lines().count(), 1, "{stdout}");
    serde_json::from_str(stdout).expect("JSON")
}

/// A run in which all of these counts are more than nothing: on a machine that is busy a longer one has to be.
fn run_until(arguments: &str, happen: &[String]) -> (Option<i32>, Value, String) {
    let mut seconds = 3;
    loop {
        let (code, stdout, stderr) = run(&format!("{arguments} --seconds {seconds} --json"));
        let report = object(&stdout);
        let has_not = |path: &&String| {
            let count = report.pointer(path).and_then(Value::as_u64);
            count.is_none_or(|count| count == 0)
        };
        let missing: Vec<_> = happen.iter().filter(has_not).collect();
        if code != Some(0) || missing.is_empty() {
            return (code, report, stderr);
        }
        seconds *= 4;
        assert!(seconds < 60, "{missing:?} of {report:#}");
    }
}

/// Ctrl-C for `child`, after it has run for a while.
fn interrupt(child: Child) -> (Option<i32>, String, String) {
    std::thread::sleep(Duration::from_millis(1500));
    // SAFETY: a signal to a child that has not been waited for, so that the number is its own.
    let sent = unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGINT) };
    assert_eq!(sent, 0);
    ended(child.wait_with_output().expect("it ends"))
}

fn start(arguments: &str) -> Child {
    let mut command = shootdown(arguments);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("it starts")
}

#[test]
fn a_clean_run_passes_and_reports_everything() {
    let of_gru = [
        "misses_user",
        "misses_interrupt",
        "misses_polled",
        "contexts_stolen",
        "asid_wraps",
        "asids_retired",
        "purges_pages",
        "purges_spared",
        "messages_sent",
        "queue_flips",
        "completions",
    ];
    let of_all = [
        "/device_ops",
        "/bytes_verified",
        "/shootdowns",
        "/flush_ops",
        "/faults_resolved",
        "/releases",
        "/unregisters/plain",
        "/unregisters/map_lock_held",
        "/unregisters/inside_own_callback",
        "/unregisters/inside_other_callback",
        "/unregisters/during_release",
        "/accelerators/commands",
        "/accelerators/page_requests",
        "/accelerators/pasid_flushes",
    ];
    let mut happen: Vec<_> = of_all.map(str::to_owned).into();
    happen.extend(of_gru.map(|counter| format!("/gru/counters/{counter}")));
    for kind in ["shootdown", "unregister", "fault"] {
        let of_kind = ["p50", "p99", "p999", "max"];
        happen.extend(of_kind.map(|value| format!("/latency_ns/{kind}/{value}")));
    }
    let (code, report, stderr) = run_until("--seed 7", &happen);
    assert_eq!(code, Some(0), "{report:#}");
    assert_eq!(stderr, "");
    for (key, want) in [("seed", 7), ("threads", 4), ("devices", 4)] {
        assert_eq!(report[key], want, "{key}");
    }
    assert_eq!(report["gru"]["self_tests"], 8);
    for key in ["data_mismatches", "stale_accesses", "quarantined"] {
        assert_eq!(report[key], 0, "{key}");
    }
    for key in ["frames", "registrations", "contexts", "asids"] {
        assert_eq!(report["leaked"][key], 0, "{key}");
    }
    assert!(report["seconds"].as_f64() >= Some(3.0));
    // Exit unloads the contexts first, and then has nothing to flush.
    assert!(report["fault_retries"].is_u64() && report["full_flushes"].is_u64());
    assert_eq!(report["releases"], report["releases_expected"]);
    assert_eq!(report["findings"], Value::Array(Vec::new()));
    assert_eq!(report["verdict"], "pass");
}

#[test]
fn a_run_with_every_fault_passes_and_accounts_for_each() {
    let kinds = [
        "reordered",
        "duplicated",
        "purge_in_miss",
        "delayed",
        "nack",
    ];
    let happen = kinds.map(|kind| format!("/faults/by_kind/{kind}"));
    let (code, report, stderr) = run_until("run --faults all", &happen);
    assert_eq!(code, Some(0), "{report:#}");
    assert_eq!(stderr, "");
    let faults = &report["faults"];
    assert_eq!(faults["given"].as_array().map(Vec::len), Some(10));
    assert!(faults["injected"].as_u64() > Some(0));
    assert_eq!(faults["injected"], faults["accounted"]);
    assert_eq!(
        faults["by_kind"]["survives_reset"],
        faults["by_outcome"]["quarantined"]
    );
    assert_eq!(report["stale_accesses"], 0);
    assert_eq!(report["verdict"], "pass");
}

#[test]
fn one_fault_is_injected_without_the_others() {
    let (code, stdout, _) = run("run --faults duplicated --seconds 2 --json");
    let report = object(&stdout);
    assert_eq!(code, Some(0), "{report:#}");
    let by_kind = report["faults"]["by_kind"].as_object().expect("an object");
    for (kind, count) in by_kind {
        assert_eq!(
            count.as_u64() > Some(0),
            kind == "duplicated",
            "{kind}: {count}"
        );
    }
}

#[test]
fn a_run_says_what_it_has_of_threads_descriptors_and_memory() {
    let (_, stdout, _) = run("--seconds 2 --threads 3 --devices 2 --json");
    let report = object(&stdout);
    let soak = &report["soak"];
    let threads = |when: &str| soak[when]["threads"].as_u64().expect("a number");
    // The workers; a chiplet's faults and its executor; the page-table accelerator's two; the watchdog.
    assert_eq!(threads("at_end"), threads("at_start") + 3 + 2 * 2 + 2 + 1);
    assert_eq!(threads("after"), threads("at_start") + 1);
    assert_eq!(
        soak["after"]["descriptors"],
        soak["at_start"]["descriptors"]
    );
    assert!(soak["memory_end"].is_null(), "too short to say");
}

#[test]
fn the_list_of_faults_names_each_and_what_it_is() {
    let (code, stdout, _) = run("--faults list");
    assert_eq!(code, Some(0));
    let names: Vec<_> = stdout
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert_eq!(
        names,
        [
            "lost",
            "stuck",
            "late",
            "reordered",
            "duplicated",
            "purge-in-miss",
            "delayed",
            "survives-reset",
            "error",
            "nack"
        ]
    );
}

#[test]
fn a_planted_bug_ends_the_run_and_its_race_is_named() {
    let (code, stdout, _) = run("run --plant no-flush --seconds 20 --json");
    let report = object(&stdout);
    assert_eq!(code, Some(1), "{report:#}");
    assert_eq!(report["plant"]["race"], "R14");
    let after = report["plant"]["found_after_seconds"].as_f64();
    assert!(after.is_some_and(|seconds| seconds < 20.0), "{after:?}");
    assert!(report["stale_accesses"].as_u64() > Some(0));
    assert_eq!(report["verdict"], "fail");
    let findings = report["findings"].as_array().expect("a list");
    let named = |finding: &Value| {
        let text = finding.as_str().unwrap_or_default();
        text.starts_with("R14 (no-flush): ") && text.contains("stale translation")
    };
    assert!(findings.iter().any(named), "{findings:?}");
}

#[test]
fn the_list_of_plants_names_each_with_its_race() {
    let (code, stdout, _) = run("--plant list");
    assert_eq!(code, Some(0));
    let names: Vec<_> = stdout
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert_eq!(
        names,
        [
            "no-flush",
            "flush-not-waited",
            "retry-not-checked",
            "wrong-range",
            "drop-in-not-cancelled",
            "asid-reused",
            "context-not-unloaded",
            "lost-completion"
        ]
    );
    assert!(stdout.lines().all(|line| line.contains("(R")), "{stdout}");
}

#[test]
fn wrong_usage_is_status_2_and_names_what_is_wrong() {
    for (arguments, said) in [
        ("--no-such-flag", "--no-such-flag"),
        ("--seconds 0", "'0'"),
        ("--threads many", "'many'"),
        ("--segments 0", "'0'"),
        ("gru", "status"),
        ("gru status --pid many", "'many'"),
        ("gru status --no-such-flag", "--no-such-flag"),
        ("--plant unheard-of", "\"unheard-of\""),
        ("--faults lost,unheard-of", "\"unheard-of\""),
        ("--faults all --plant no-flush", "--plant"),
        ("plants --seeds 0", "'0'"),
        (
            "--trace /no/such/folder/trace.json",
            "/no/such/folder/trace.json",
        ),
    ] {
        let (code, stdout, stderr) = run(arguments);
        assert_eq!(code, Some(2), "{arguments}: {stderr}");
        assert_eq!(stdout, "", "{arguments}");
        assert!(stderr.contains(said), "{arguments}: {stderr}");
    }
}

#[test]
fn a_trace_that_cannot_be_written_is_status_3_after_the_report() {
    let (code, stdout, stderr) = run("--seconds 1 --json --trace /dev/full");
    assert_eq!(code, Some(3), "{stderr}");
    assert_eq!(object(&stdout)["verdict"], "pass");
    assert!(stderr.contains("/dev/full"), "{stderr}");
}

#[test]
fn help_is_status_0_and_names_every_option() {
    let (code, stdout, _) = run("run --help");
    assert_eq!(code, Some(0));
    for option in [
        "--seconds",
        "--threads",
        "--devices",
        "--segments",
        "--seed",
        "--plant",
        "--faults",
        "--json",
        "--trace",
        "--verbose",
        "--sim",
        "--schedules",
        "--schedule",
        "--only",
    ] {
        assert!(stdout.contains(option), "{option}: {stdout}");
    }
    let (_, stdout, _) = run("--help");
    assert!(stdout.contains("plants"), "{stdout}");
}

#[test]
fn ctrl_c_ends_a_run_which_still_reports() {
    let (code, stdout, _) = interrupt(start("--seconds 600 --json"));
    let report = object(&stdout);
    assert_eq!(code, Some(0), "{report:#}");
    assert_eq!(report["interrupted"], true);
    assert!(report["shootdowns"].as_u64() > Some(0));
    let seconds = report["seconds"].as_f64();
    assert!(seconds.is_some_and(|seconds| seconds < 60.0), "{seconds:?}");
}

#[test]
fn ctrl_c_ends_plants_which_report_what_was_done() {
    let (code, stdout, _) = interrupt(start("plants --seeds 9999 --json"));
    let campaign = object(&stdout);
    assert_eq!(code, Some(0), "{campaign:#}");
    assert_eq!(campaign["interrupted"], true);
    let first = &campaign["plants"][0];
    assert_eq!(first["name"], "no-flush");
    assert!(first["runs"].as_u64() > Some(0));
    assert_eq!(first["good"], first["runs"]);
}

#[test]
fn runs_that_plants_kills_leave_no_socket() {
    let folder = std::env::temp_dir().join(format!("shootdown-plants-{}", std::process::id()));
    std::fs::create_dir(&folder).expect("a folder");
    let is_empty = || std::fs::read_dir(&folder).expect("it is there").count() == 0;
    // Each time the run may end by itself before it is killed.
    for _ in 0..8 {
        let mut plants = shootdown("plants --seeds 9999 --json");
        plants.env("XDG_RUNTIME_DIR", &folder);
        let plants = plants.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let plants = plants.expect("it starts");
        let begun = std::time::Instant::now();
        while is_empty() && begun.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(1));
        }
        // SAFETY: a signal to a child that has not been waited for, so that the number is its own.
        let sent = unsafe { libc::kill(plants.id() as libc::pid_t, libc::SIGINT) };
        assert_eq!(sent, 0);
        plants.wait_with_output().expect("it ends");
        assert!(is_empty(), "a socket is left");
    }
    std::fs::remove_dir(&folder).expect("it is empty");
}

#[test]
fn a_trace_has_the_phases() {
    let path = std::env::temp_dir().join(format!("shootdown-{}.json", std::process::id()));
    let (code, _, stderr) = run(&format!("--seconds 1 --trace {}", path.display()));
    assert_eq!(code, Some(0), "{stderr}");
    let text = std::fs::read(&path).expect("the trace");
    std::fs::remove_file(&path).expect("it is there");
    let trace: Value = serde_json::from_slice(&text).expect("JSON");
    let events = trace["traceEvents"].as_array().expect("a list");
    for phase in ["quiesce", "issue", "sync"] {
        assert!(events.iter().any(|event| event["name"] == phase), "{phase}");
    }
}

/// Runs the command with a folder of its own for sockets.
fn status(folder: &std::path::Path, arguments: &str) -> (Option<i32>, String, String) {
    let mut command = shootdown(arguments);
    command.env("XDG_RUNTIME_DIR", folder);
    ended(command.output().expect("it starts"))
}

#[test]
fn a_folder_for_sockets_that_is_no_place_does_not_count() {
    let temporary = std::env::temp_dir().join(format!("shootdown-nobody-{}", std::process::id()));
    std::fs::create_dir(&temporary).expect("a folder");
    for nowhere in ["", "here"] {
        let mut command = shootdown("gru status");
        command.env("XDG_RUNTIME_DIR", nowhere);
        let (code, _, stderr) = ended(
            command
                .env("TMPDIR", &temporary)
                .output()
                .expect("it starts"),
        );
        assert_eq!(code, Some(3));
        assert!(stderr.contains(&*temporary.to_string_lossy()), "{stderr}");
    }
    std::fs::remove_dir(&temporary).expect("nobody has been there");
}

#[test]
fn the_status_of_the_grus_is_that_of_the_run_that_is_at_work() {
    let folder = std::env::temp_dir().join(format!("shootdown-status-{}", std::process::id()));
    std::fs::create_dir(&folder).expect("a folder");
    let (code, stdout, stderr) = status(&folder, "gru status");
    assert_eq!((code, stdout.as_str()), (Some(3), ""), "{stderr}");
    assert!(
        stderr.contains("no run is at work") && stderr.contains("shootdown run"),
        "{stderr}"
    );
    // Somebody who has crashed.
    let stale = folder.join("shootdown-1.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).expect("a socket"));
    let start = || {
        Command::new(env!("CARGO_BIN_EXE_shootdown"))
            .args(["run", "--seconds", "600", "--devices", "2", "--json"])
            .env("XDG_RUNTIME_DIR", &folder)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it starts")
    };
    let first = start();
    let begun = std::time::Instant::now();
    let look = || loop {
        let (code, stdout, stderr) = status(&folder, "gru status --json");
        if code == Some(0) {
            return object(&stdout);
        }
        assert!(begun.elapsed().as_secs() < 60, "{stderr}");
        std::thread::sleep(std::time::Duration::from_millis(50));
    };
    let instructions = |status: &Value| -> u64 {
        let chiplets = status["chiplets"].as_array().expect("a list");
        chiplets
            .iter()
            .filter_map(|one| one["instructions"].as_u64())
            .sum()
    };
    let before = look();
    assert_eq!(before["pid"], first.id());
    assert_eq!(before["chiplets"].as_array().map(Vec::len), Some(2));
    while instructions(&look()) == instructions(&before) {
        assert!(begun.elapsed().as_secs() < 60, "it does not live");
    }
    assert!(!stale.exists(), "it was left by nobody");
    let (code, table, _) = status(&folder, "gru status");
    assert_eq!(code, Some(0));
    for word in [
        "blade",
        "gru1",
        "TLB",
        "faults",
        "ASID",
        "drop-ins",
        "START of a context",
    ] {
        assert!(table.contains(word), "{word}: {table}");
    }
    let (code, _, stderr) = status(&folder, "gru status --pid 1");
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains(&first.id().to_string()), "{stderr}");
    let second = start();
    let both = format!("gru status --pid {}", second.id());
    while status(&folder, &both).0 != Some(0) {
        assert!(begun.elapsed().as_secs() < 60, "the second run");
    }
    let (code, _, stderr) = status(&folder, "gru status");
    assert_eq!(code, Some(2), "{stderr}");
    for pid in [first.id(), second.id()] {
        assert!(stderr.contains(&pid.to_string()), "{stderr}");
    }
    for run in [first, second] {
        let (code, stdout, stderr) = interrupt(run);
        assert_eq!(code, Some(0), "{stdout} {stderr}");
    }
    assert_eq!(status(&folder, "gru status").0, Some(3));
    std::fs::remove_dir(&folder).expect("nothing is left in it");
}
