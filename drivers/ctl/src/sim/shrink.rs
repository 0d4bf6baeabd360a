//! Which operations, and faults, a finding needs: delta debugging. What is left out changes who runs when, so each part is tried
//! under some schedules. The effort is bounded by a number of tries, not by a time: the same seed is shrunk in the same way.

use super::program::Number;

/// Simulations at most.
const TRIES: usize = 400;
/// Schedules that each part is tried under.
const SCHEDULES: u64 = 4;

/// What is left.
pub(super) struct Smallest<T> {
    pub(super) only: Vec<Number>,
    pub(super) schedule: u64,
    /// What was found with it; `None` if nothing could be left out.
    pub(super) found: Option<T>,
    pub(super) tries: usize,
}

/// Leaves out what can be left out of `all` with `attempt` finding something all the same.
pub(super) fn shrink<T, E>(
    all: Vec<Number>,
    schedule: u64,
    mut attempt: impl FnMut(&[Number], u64) -> Result<Option<T>, E>,
) -> Result<Smallest<T>, E> {
    let mut smallest = Smallest {
        only: all,
        schedule,
        found: None,
        tries: 0,
    };
    let mut size = smallest.only.len().div_ceil(2);
    while size > 0 {
        let mut left_out = false;
        // From the end: what comes after the finding goes first.
        let mut end = smallest.only.len();
        while end > 0 {
            let begin = end.saturating_sub(size);
            let mut part = smallest.only.clone();
            part.drain(begin..end);
            end = begin;
            if part.is_empty() {
                continue;
            }
            let last = smallest.schedule;
            for schedule in (0..SCHEDULES).map(|nth| last.wrapping_add(nth)) {
                if smallest.tries == TRIES {
                    return Ok(smallest);
                }
                smallest.tries += 1;
                if let Some(found) = attempt(&part, schedule)? {
                    let tries = smallest.tries;
                    smallest = Smallest {
                        only: part,
                        schedule,
                        found: Some(found),
                        tries,
                    };
                    left_out = true;
                    break;
                }
            }
        }
        // Once more at the smallest size, as long as that helps.
        if size > 1 || !left_out {
            size /= 2;
        }
    }
    Ok(smallest)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    #[test]
    fn what_is_needed_stays_and_nothing_else() {
        let needed = [3, 9, 14];
        let Ok(smallest) = shrink((1..=60).collect(), 7, |only, _| {
            let found = needed.iter().all(|one| only.contains(one));
            Ok::<_, Infallible>(found.then_some(only.len()))
        });
        assert_eq!(smallest.only, needed);
        assert_eq!((smallest.found, smallest.schedule), (Some(3), 7));
        assert!(smallest.tries < TRIES);
    }

    #[test]
    fn another_schedule_may_find_it() {
        let Ok(smallest) = shrink((1..=8).collect(), 7, |only, schedule| {
            Ok::<_, Infallible>((only.contains(&5) && schedule == 9).then_some(()))
        });
        assert_eq!((smallest.only, smallest.schedule), (vec![5], 9));
    }

    #[test]
    fn the_effort_is_bounded_and_what_cannot_be_left_out_stays() {
        let all: Vec<_> = (1..=500).collect();
        let Ok(smallest) = shrink(all.clone(), 7, |_, _| Ok::<_, Infallible>(None::<()>));
        assert_eq!((smallest.only, smallest.tries), (all, TRIES));
        assert!(smallest.found.is_none());
    }
}
