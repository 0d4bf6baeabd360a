//! What a check is, and how all of them are run.

use std::any::Any;
use std::error::Error;
use std::panic::{AssertUnwindSafe, catch_unwind};

use shootdown_vm::protocol::Line;

use crate::port::say;

/// Why a check did not hold.
#[derive(Debug)]
pub(crate) enum Failure {
    /// What it proves is not so.
    NotSo(String),
    /// It could not be carried out.
    Error(String),
}

impl<E: Error> From<E> for Failure {
    fn from(error: E) -> Self {
        // The causes too: they tell the errno.
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        Self::Error(text)
    }
}

/// What a check comes to.
pub(crate) type Outcome = Result<(), Failure>;

/// One check. Its name says what it proves.
#[derive(Debug)]
pub(crate) struct Check {
    pub(crate) name: &'static str,
    pub(crate) run: fn() -> Outcome,
}

/// For tables of checks.
pub(crate) const fn check(name: &'static str, run: fn() -> Outcome) -> Check {
    Check { name, run }
}

/// Fails the check, with what was found, unless the condition holds.
macro_rules! demand {
    ($condition:expr, $($why:tt)+) => {
        if !$condition {
            return Err($crate::check::Failure::NotSo(format!($($why)+)));
        }
    };
}
pub(crate) use demand;

/// Fails the check unless both are equal.
macro_rules! demand_eq {
    ($found:expr, $wanted:expr, $what:expr) => {{
        let (found, wanted) = (&$found, &$wanted);
        $crate::check::demand!(
            found == wanted,
            "{}: {found:x?} instead of {wanted:x?}",
            $what
        );
    }};
}
pub(crate) use demand_eq;

/// Runs all, each between its marks.
pub(crate) fn run(groups: &[&[Check]]) {
    let all = || groups.iter().copied().flatten();
    for check in all() {
        say(&Line::Plan(check.name.into()));
    }
    for check in all() {
        say(&Line::Begin(check.name.into()));
        let outcome = catch_unwind(AssertUnwindSafe(check.run))
            .unwrap_or_else(|panic| Err(Failure::Error(format!("panicked: {}", message(&*panic)))));
        let name = check.name.into();
        say(&match outcome {
            Ok(()) => Line::Ok(name),
            Err(Failure::NotSo(why)) => Line::Fail(name, why),
            Err(Failure::Error(why)) => Line::Fail(name, format!("error: {why}")),
        });
        say(&Line::End(check.name.into()));
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
