//! The kit judged: a good driver passes, and each bad one breaks the rule that it breaks, and no other.

mod driver;

use std::time::Duration;

use conformance::{Kit, Report, Rule};
use driver::{Bug, MyAccelerator};

#[global_allocator]
static WATCHED: conformance::Watched = conformance::Watched;

fn run(bug: Bug) -> Report {
    Kit::new()
        .seed(1)
        .run(move |hardware| MyAccelerator::with(hardware, bug))
}

#[test]
fn a_good_driver_passes() {
    let report = conformance::run(MyAccelerator::probe);
    report.assert();
    println!("{report}");
}

#[track_caller]
fn breaks(bug: Bug, rule: Rule) {
    let report = run(bug);
    println!("{report}");
    let mut rules = report.rules();
    if bug == Bug::NotBegun {
        // What is installed unasked may be so in the scenario where the lock is looked at, too.
        rules.retain(|rule| *rule != Rule::Install);
    }
    assert_eq!(rules, [rule], "{report}");
    assert!(!report.findings[0].interleaving.is_empty());
    let said = report.to_string();
    assert!(
        said.contains(rule.text()) && said.contains("SHOOTDOWN_CONFORMANCE_SEED=1"),
        "{said}"
    );
}

#[test]
fn a_handler_that_never_returns_is_named_and_ends_the_run() {
    let report = Kit::new()
        .patience(Duration::from_secs(6))
        .run(|hardware| MyAccelerator::with(hardware, Bug::NeverReturns));
    assert_eq!(report.rules(), [Rule::Blocks], "{report}");
    assert!(report.findings[0].did.contains("`quiesce`"), "{report}");
}

#[test]
fn everything_at_once_finds_by_itself_what_one_step_at_a_time_finds() {
    for bug in [
        Bug::ClaimsNothingCached,
        Bug::NarrowsTooFar,
        Bug::FlushNotAwaited,
        Bug::DrainedLies,
    ] {
        let report = Kit::new()
            .seed(1)
            .only("everything at once")
            .run(move |hardware| MyAccelerator::with(hardware, bug));
        assert_eq!(report.findings.len(), 1, "{bug:?}: {report}");
    }
}

macro_rules! bad {
    ($($name:ident: $bug:ident breaks $rule:ident,)*) => {$(
        #[test]
        fn $name() {
            breaks(Bug::$bug, Rule::$rule);
        }
    )*};
}

bad! {
    a_handler_that_claims_that_nothing_is_cached: ClaimsNothingCached breaks Flush,
    a_handler_that_narrows_too_far: NarrowsTooFar breaks Narrow,
    a_tlb_that_does_not_await_its_device: FlushNotAwaited breaks Acknowledge,
    a_drain_that_lies: DrainedLies breaks Drain,
    a_retry_that_is_not_checked: RetryNotChecked breaks Retry,
    a_begin_over_too_small_a_range: BeginTooSmall breaks WholeEntry,
    a_fault_that_is_not_begun: NotBegun breaks Begin,
    a_quiesce_that_does_not_take_the_lock: QuiesceWithoutTheLock breaks Install,
    a_range_that_stays_blocked_after_a_refusal: BlockedAfterRefusal breaks Balance,
    a_handler_that_waits_in_a_non_blocking_operation: WaitsInATry breaks Refuse,
    a_context_that_is_not_unloaded: ContextNotUnloaded breaks Unload,
    a_session_that_is_never_given_up: NeverGivenUp breaks Release,
    a_quiesce_that_allocates: AllocatesInQuiesce breaks Allocation,
    a_quiesce_that_waits_for_work_elsewhere: WaitsForAllWork breaks Blocks,
    a_handler_that_panics: Panics breaks Panics,
    a_tlb_that_counts_completions: CountsCompletions breaks Acknowledge,
    a_tlb_that_takes_the_last_completion: TakesTheLastCompletion breaks Acknowledge,
    a_reset_that_is_not_awaited: ResetNotAwaited breaks Escalate,
}
