//! Insertion, in two halves: what is prepared allocates, what is inserted becomes visible.

use std::sync::Arc as StdArc;

use super::{Inner, InsertError, Registration, Target, Targets};
use crate::addr::Range;
use crate::context;
use crate::list::Link;
use crate::notifier::Notifier;
use crate::primitive::{Arc, Contained, Direct};
use crate::registration::state::StateWord;
use crate::registry::Free;
use crate::source::{Needs, Operations};
use crate::space::Space;
use crate::watch::{Name, Who};

/// A registration that is complete but not visible yet: inserting it allocates nothing that it needs later.
#[derive(Debug)]
#[must_use = "a prepared registration does nothing until it is inserted"]
pub struct Prepared {
    inner: Arc<Inner>,
    needs: Needs,
    operations: Operations,
}

impl Prepared {
    pub(crate) fn new(
        space: &Arc<Space>,
        range: Range,
        notifier: StdArc<dyn Notifier>,
        targets: &[Target],
        word: StateWord,
    ) -> Self {
        // What may panic comes first: from the reservation on the drop of the registration takes it back.
        let (needs, operations) = (notifier.needs(), notifier.operations());
        let name = Name::of(notifier.name());
        space.reserve(targets);
        Self {
            needs,
            operations,
            inner: Arc::new(Inner {
                who: Who::new(space.next_registration(), name),
                range,
                word,
                notifier: Contained::new(Direct::new(notifier)),
                targets: Targets::new(targets),
                space: space.clone(),
                next: Link::new(),
                next_put_off: Link::new(),
            }),
        }
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }

    /// Makes it visible. From here on callbacks may run, also before this returns. An invalidation of an overlapping range
    /// that is in progress does not call this handler; [`Registration::begin`] waits for its end. Takes no
    /// lock that a callback can hold; with the map lock held it is legal.
    ///
    /// Inside a callback, or an open invalidation, it returns at once, and takes effect when the thread has left the outermost of
    /// them: until then the handler is not called, and `begin` on another thread waits.
    ///
    /// # Errors
    /// [`InsertError::Exiting`]; [`InsertError::Uncovered`]; [`Refused`](crate::Refused) with a `NotifierLock` held (outside a callback).
    pub fn insert(self) -> Result<Registration, InsertError> {
        drop(Self::admit(std::slice::from_ref(&self))?);
        context::leave();
        Ok(self.inserted())
    }

    pub(crate) fn inserted(self) -> Registration {
        Registration {
            inner: self.inner,
            owned: true,
        }
    }

    /// All of one space. The caller runs [`context::leave`] afterwards: exit may have come between, and left releases to this thread.
    pub(crate) fn admit(these: &[Self]) -> Result<Free<Inner>, InsertError> {
        let Some(Self { inner: first, .. }) = these.first() else {
            return Ok(Free::default());
        };
        let space = &first.space;
        let later = context::inside_callback();
        if !later {
            context::wait_refusal("insert")?;
        }
        for one in these {
            let range = one.inner.range;
            if !later {
                // What is yet to be told of an earlier mapping is not told to this one (R29).
                space.sources.settle(range);
            }
            // The space translates what lies in its arena: a driver that registers everything needs no more than that to be watched.
            let all = |arena: &Range| range.contains(*arena);
            let watched = space.table.arena.filter(all).unwrap_or(range);
            space.sources.check(watched, one.needs, one.operations)?;
        }
        let inners = || these.iter().map(|one| &one.inner);
        if !space.admit(inners()) {
            return Err(InsertError::Exiting { range: first.range });
        }
        if later {
            inners().for_each(|inner| context::insert_later(inner.clone()));
            return Ok(Free::default());
        }
        Ok(Inner::publish(space, inners()))
    }
}
