//! That the table is whole, and that no check is believed for the wrong reason.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::entry::Check;
use crate::examine::{objection, trap};
use crate::table::TABLE;

#[test]
fn every_race_of_the_catalogue_has_an_entry_in_its_place() {
    let mut races: Vec<_> = TABLE.iter().map(|entry| entry.race).collect();
    races.dedup();
    let all: Vec<_> = (1..=36).map(|nth| format!("R{nth}")).collect();
    assert_eq!(races, all);
}

/// The names in `planted!` of the sources below `directory`.
fn planted(directory: &Path, names: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            planted(&path, names);
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let sites = text.split("planted!(\"").skip(1);
        names.extend(sites.filter_map(|site| Some(site.split_once('"')?.0.to_owned())));
    }
}

#[test]
fn every_guard_that_can_be_taken_out_is_in_the_table_and_the_other_way_round() {
    let mut sites = BTreeSet::new();
    for sources in ["../core/src", "../drivers/vfio/src"] {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join(sources);
        planted(&sources, &mut sites);
    }
    let switches = TABLE.iter().filter(|entry| {
        matches!(
            entry.check,
            Check::Model { .. } | Check::Test { .. } | Check::Trap { .. }
        )
    });
    let listed: BTreeSet<_> = switches.map(|entry| entry.plant.to_owned()).collect();
    assert_eq!(sites, listed);
}

#[test]
fn an_objection_is_the_tests_or_the_checkers() {
    let said = |place: &str, what: &str| {
        format!("\nthread 'one' (7) panicked at {place}:\n{what}\nnote: run with\n")
    };
    let of_test = said("core/tests/guards.rs:1:2", "passed over");
    assert_eq!(objection(&of_test).as_deref(), Some("passed over"));
    let of_checker = said(
        "/registry/loom-0.7.3/src/rt/execution.rs:215:13",
        "deadlock",
    );
    assert_eq!(objection(&of_checker).as_deref(), Some("deadlock"));
    let of_code = said(
        "core/src/registration/state.rs:158:9",
        "a use is given back once",
    );
    assert_eq!(objection(&of_code), None);
    let planned = said("core/tests/support/mod.rs:126:13", "planned");
    assert_eq!(objection(&planned), None);
    assert_eq!(
        objection(&(planned + &of_test)).as_deref(),
        Some("passed over")
    );
    let compared = said(
        "core/src/model.rs:1:2",
        "assertion `left == right` failed: once\n  left: 1\n right: 2",
    );
    assert_eq!(
        objection(&compared).as_deref(),
        Some("assertion `left == right` failed: once, left: 1, right: 2")
    );
    assert_eq!(objection("test result: FAILED"), None);
}

#[test]
fn an_abort_is_the_traps_only_if_the_trap_says_so() {
    assert!(trap("\nin the shootdown path: a free of 8 bytes\n").is_some());
    assert!(trap("memory allocation of 8 bytes failed\n").is_none());
}
