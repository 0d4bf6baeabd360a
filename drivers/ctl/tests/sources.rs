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

/// Operation, and what drivers can rely on with uffd and with unotify.
const MATRIX: &[(&str, &str, &str)] = &[
    ("munmap", LATE, BARRIER),
    ("mmap MAP_FIXED", LATE, BARRIER),
    ("mremap, moved", LATE, BARRIER),
    ("mremap, shrunk", LATE, BARRIER),
    ("mremap, onto it", LATE, BARRIER),
    ("mremap DONTUNMAP", LATE, BARRIER),
    ("madvise DONTNEED", BESIDE, BARRIER),
    ("madvise DONTNEED_LOCKED", BESIDE, BARRIER),
    ("madvise FREE", BESIDE, BARRIER),
    ("madvise REMOVE", BESIDE, BARRIER),
    ("madvise PAGEOUT", NOT, BARRIER),
    ("madvise COLLAPSE", NOT, BARRIER),
    ("madvise GUARD_INSTALL", NOT, BARRIER),
    ("process_madvise", BESIDE, BARRIER),
    ("mprotect", NOT, BARRIER),
    ("pkey_mprotect", NOT, BARRIER),
    ("remap_file_pages", NOT, BARRIER),
    ("brk", LATE, BARRIER),
    ("shmdt", NOT, BARRIER),
    ("shmat SHM_REMAP", NOT, BARRIER),
    ("fallocate PUNCH_HOLE", NOT, BARRIER),
    ("ftruncate", NOT, BARRIER),
    ("truncate", NOT, BARRIER),
    ("mbind MOVE", NOT, BARRIER),
    ("move_pages", NOT, BARRIER),
    ("migrate_pages", NOT, BARRIER),
    ("userfaultfd MOVE", NOT, BARRIER),
    ("userfaultfd WRITEPROTECT", NOT, BARRIER),
    ("open O_TRUNC", NOT, NOT),
    ("io_uring MADVISE", BESIDE, NOT),
    ("io_uring FALLOCATE", NOT, NOT),
    ("io_uring FTRUNCATE", NOT, NOT),
    ("another process's punch", NOT, NOT),
];
const LATE: &str = "late+end";
const BESIDE: &str = "beside";
const BARRIER: &str = "before+barrier+end";
const NOT: &str = "does not see";

#[test]
fn the_matrix_is_as_documented() {
    let table = table();
    let sources = table["sources"].as_array().unwrap();
    for (nth, name) in [(1, "uffd"), (2, "unotify")] {
        let source = &sources[nth];
        assert_eq!(source["name"], name);
        if let Some(missing) = source["missing"].as_str() {
            // SAFETY: no arguments.
            let root = unsafe { libc::geteuid() } == 0;
            assert!(!root, "as root nothing is missing: {missing}");
            eprintln!("SKIPPED: {missing}");
            continue;
        }
        for row in MATRIX {
            let expected = if nth == 1 { row.1 } else { row.2 };
            assert_eq!(counts(source, row.0), expected, "{name}: {}", row.0);
        }
        assert!(source["cost"]["munmap_watched_ns"].as_f64().unwrap() > 0.0);
    }
    // Forks are told to the privileged only.
    let fork = counts(&sources[1], "fork");
    assert!([LATE, NOT].contains(&fork), "{fork}");
    assert_eq!(counts(&sources[2], "fork"), NOT);
    assert_eq!(sources[0]["name"], "managed");
}
