//! What a scenario has seen so far.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use shootdown::{AddressSpace, Kind, Stats};

use crate::alloc::outside;
use crate::report::{Finding, Moment, Skipped};
use crate::rule::Rule;

/// Steps that are kept.
const STEPS: usize = 64;
/// Moments of a finding.
const MOMENTS: usize = 24;

pub(crate) struct Log {
    pub(crate) scenario: &'static str,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    space: Option<AddressSpace>,
    /// When the space was made, as its flight recorder counts.
    epoch: Option<Instant>,
    steps: VecDeque<Moment>,
    finding: Option<Finding>,
    skipped: Vec<Skipped>,
    accesses: u64,
    invalidations: u64,
}

/// What a scenario leaves.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) finding: Option<Finding>,
    pub(crate) skipped: Vec<Skipped>,
    pub(crate) accesses: u64,
    pub(crate) invalidations: u64,
}

impl Log {
    pub(crate) fn new(scenario: &'static str) -> Self {
        Self {
            scenario,
            state: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Changed by pushes and assignments.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whose flight recorder is looked at from here on, in which something has been recorded just now; `None` lets go of the last one.
    pub(crate) fn watch(&self, space: Option<AddressSpace>) {
        let recorded = space.as_ref().map(AddressSpace::records);
        let newest = recorded.and_then(|records| records.last().map(|record| record.at));
        let mut state = self.lock();
        if let Some(at) = newest {
            state.epoch = Instant::now().checked_sub(at);
        }
        let before = std::mem::replace(&mut state.space, space);
        drop(state);
        // With no lock held: it may be the last owner.
        drop(before);
    }

    /// The kit did something.
    pub(crate) fn step(&self, what: impl FnOnce() -> String) {
        outside(|| {
            let what = format!("kit: {}", what());
            let mut state = self.lock();
            let at = state.epoch.map_or(Duration::ZERO, |epoch| epoch.elapsed());
            let moment = Moment { at, what };
            if state.steps.len() == STEPS {
                state.steps.pop_front();
            }
            state.steps.push_back(moment);
        });
    }

    /// A rule was broken. The first one in a scenario is kept with what led there: others may be its consequences.
    pub(crate) fn find(&self, rule: Rule, did: impl FnOnce() -> String) {
        outside(|| {
            let known = |state: &mut State| {
                let Some(first) = &mut state.finding else {
                    return false;
                };
                first.times += u64::from(first.rule == rule);
                true
            };
            if known(&mut self.lock()) {
                return;
            }
            // With no lock held: it may ask this log.
            let did = did();
            let mut state = self.lock();
            if known(&mut state) {
                return;
            }
            let mut interleaving: Vec<Moment> = state.steps.iter().cloned().collect();
            if let Some(space) = &state.space {
                interleaving.extend(space.records().iter().map(Moment::of));
            }
            interleaving.sort_by_key(|moment| moment.at);
            let old = interleaving.len().saturating_sub(MOMENTS);
            state.finding = Some(Finding {
                rule,
                scenario: self.scenario,
                did,
                interleaving: interleaving.split_off(old),
                times: 1,
            });
        });
    }

    /// A stale access: what the device did because of what was found before, or else the breaking of `rule`.
    pub(crate) fn stale(&self, rule: Rule, times: u64, did: &str) {
        {
            let mut state = self.lock();
            if let Some(first) = &mut state.finding {
                if !first.did.contains("says the oracle") {
                    first.did.push_str("\n  and so, says the oracle, ");
                    first.did.push_str(did);
                }
                return;
            }
        }
        self.find(rule, || {
            format!("{times} stale accesses, says the oracle; the first: {did}")
        });
    }

    pub(crate) fn stats(&self) -> Option<Stats> {
        self.lock().space.as_ref().map(AddressSpace::stats)
    }

    pub(crate) fn has_found(&self) -> bool {
        self.lock().finding.is_some()
    }

    /// Something is not asked.
    pub(crate) fn skip(&self, why: impl Into<String>) {
        self.lock().skipped.push(Skipped {
            scenario: self.scenario,
            why: why.into(),
        });
    }

    pub(crate) fn count(&self, accesses: u64, invalidations: u64) {
        let mut state = self.lock();
        state.accesses += accesses;
        state.invalidations += invalidations;
    }

    /// Where the newest operation is, for one that does not return.
    pub(crate) fn newest(&self) -> String {
        let state = self.lock();
        let records = state.space.as_ref().map(AddressSpace::records);
        let Some(last) = records.as_ref().and_then(|records| records.last()) else {
            return "nothing is recorded".to_owned();
        };
        let stage = match last.kind {
            Kind::Start => "in `quiesce` or `drained`, or in any call of one that has no device",
            Kind::Quiesced => "in `flush`, or issuing flushes",
            Kind::Dispatched => "in `poll` or `reset`",
            Kind::Flushed => "in `cut_off`, `unload` or `end`",
            Kind::Unregister => "in a callback before the release, or in `release`",
            _ => "outside of an operation",
        };
        format!(
            "the newest record is \"{}\", so it is {stage}",
            Moment::of(last).what
        )
    }

    pub(crate) fn take(&self) -> Seen {
        let state = std::mem::take(&mut *self.lock());
        let State {
            finding,
            skipped,
            accesses,
            invalidations,
            space,
            ..
        } = state;
        // One that hangs is never let go of: who waits in it has it.
        std::mem::forget(space);
        Seen {
            finding,
            skipped,
            accesses,
            invalidations,
        }
    }
}
