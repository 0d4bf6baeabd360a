//! The matrix of this machine: operations by sources, as `shootdown sources` finds it.

use std::process::Command;

use serde_json::Value;

fn table() -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_shootdown"))
        .args(["sources", "--json"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// What counts of an operation.
fn counts<'t>(source: &'t Value, operation: &str) -> &'t str {
    let rows = source["operations"].as_array().unwrap();
    let row = rows.iter().find(|row| row["operation"] == operation);
    row.unwrap_or_else(|| panic!("no {operation}"))["counts"]
        .as_str()
        .unwrap()
}

/// Operation, and what drivers can rely on with uffd, with unotify, and with kvm-mmu.
const MATRIX: &[(&str, [&str; 3])] = &[
    ("munmap", [LATE, BARRIER, BESIDE]),
    ("mmap MAP_FIXED", [LATE, BARRIER, BESIDE]),
    ("mremap, moved", [LATE, BARRIER, BESIDE]),
    ("mremap, shrunk", [LATE, BARRIER, BESIDE]),
    ("mremap, onto it", [LATE, BARRIER, BESIDE]),
    ("mremap DONTUNMAP", [LATE, BARRIER, BESIDE]),
    ("madvise DONTNEED", [BESIDE, BARRIER, BESIDE]),
    ("madvise DONTNEED_LOCKED", [BESIDE, BARRIER, BESIDE]),
    ("madvise FREE", [BESIDE, BARRIER, BESIDE]),
    ("madvise REMOVE", [BESIDE, BARRIER, BESIDE]),
    ("madvise PAGEOUT", [NOT, BARRIER, SWAP]),
    ("madvise COLLAPSE", [NOT, BARRIER, BESIDE]),
    ("madvise GUARD_INSTALL", [NOT, BARRIER, BESIDE]),
    ("process_madvise", [BESIDE, BARRIER, BESIDE]),
    ("mprotect", [NOT, BARRIER, BESIDE]),
    ("pkey_mprotect", [NOT, BARRIER, BESIDE]),
    ("remap_file_pages", [NOT, BARRIER, BESIDE]),
    ("brk", [LATE, BARRIER, BESIDE]),
    ("shmdt", [NOT, BARRIER, BESIDE]),
    ("shmat SHM_REMAP", [NOT, BARRIER, BESIDE]),
    ("fallocate PUNCH_HOLE", [NOT, BARRIER, BESIDE]),
    ("ftruncate", [NOT, BARRIER, BESIDE]),
    ("truncate", [NOT, BARRIER, BESIDE]),
    ("mbind MOVE", [NOT, BARRIER, BESIDE]),
    ("move_pages", [NOT, BARRIER, BESIDE]),
    ("migrate_pages", [NOT, BARRIER, BESIDE]),
    ("userfaultfd MOVE", [NOT, BARRIER, BESIDE]),
    ("userfaultfd WRITEPROTECT", [NOT, BARRIER, BESIDE]),
    ("open O_TRUNC", [NOT, NOT, BESIDE]),
    ("io_uring MADVISE", [BESIDE, NOT, BESIDE]),
    ("io_uring FALLOCATE", [NOT, NOT, BESIDE]),
    ("io_uring FTRUNCATE", [NOT, NOT, BESIDE]),
    ("another process's punch", [NOT, NOT, BESIDE]),
];
const LATE: &str = "late+end";
const BESIDE: &str = "beside";
const BARRIER: &str = "before+barrier+end";
const NOT: &str = "does not see";
/// Nothing happens to the page where there is no swap.
const SWAP: &str = "beside, or does not see";

#[test]
fn the_matrix_is_as_documented() {
    let table = table();
    let sources = table["sources"].as_array().unwrap();
    assert!(MATRIX.len() >= 25);
    for (nth, name) in ["uffd", "unotify", "kvm-mmu"].into_iter().enumerate() {
        let source = &sources[1 + nth];
        assert_eq!(source["name"], name);
        if let Some(missing) = source["missing"].as_str() {
            // SAFETY: no arguments.
            let root = unsafe { libc::geteuid() } == 0;
            assert!(
                !root || name == "kvm-mmu",
                "as root nothing is missing: {missing}"
            );
            let reason = missing
                .split_once("not available: ")
                .map_or(missing, |(_, reason)| reason);
            eprintln!("SKIPPED: {reason}");
            continue;
        }
        for (operation, expected) in MATRIX {
            let counts = counts(source, operation);
            let expected = expected[nth];
            let fits = counts == expected || expected == SWAP && [BESIDE, NOT].contains(&counts);
            assert!(fits, "{name}: {operation}: {counts}, not {expected}");
        }
        assert!(source["cost"]["munmap_watched_ns"].as_f64().unwrap() > 0.0);
    }
    // Forks are told to the privileged only.
    let fork = counts(&sources[1], "fork");
    assert!([LATE, NOT].contains(&fork), "{fork}");
    assert_eq!(counts(&sources[2], "fork"), NOT);
    assert_eq!(sources[0]["name"], "managed");
}
