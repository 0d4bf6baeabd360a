//! The calls of handlers: seen by the watchdog, marked as inside a callback, contained.

use crate::context::InCallback;
use crate::notifier::{Op, OpCore};
use crate::primitive::contain;
use crate::registration::Inner;
use crate::space::Space;
use crate::watch::{Post, Running, Stage, Who};

/// What is being called.
pub(super) struct Calling<'a>(Option<Running<'a>>);

impl Calling<'_> {
    /// It has returned, and another method of the same handler is next.
    #[inline]
    pub(super) fn next(&self, stage: Stage) {
        if let Some(running) = &self.0 {
            running.is(stage);
        }
    }
}

/// Who calls, for one invalidation.
pub(super) struct Caller<'a> {
    space: &'a Space,
    core: &'a OpCore,
    /// None in models.
    post: Option<&'a Post>,
}

impl<'a> Caller<'a> {
    #[inline]
    pub(super) fn new(space: &'a Space, core: &'a OpCore) -> Self {
        let post = space.watch.post(core.post);
        Self { space, core, post }
    }

    /// Calls a handler with its part of the operation; `None` if it panicked, in which case its devices are in quarantine.
    #[inline]
    pub(super) fn call<R>(
        &self,
        inner: &Inner,
        stage: Stage,
        handler: impl FnOnce(&Op<'a>, &Calling<'_>) -> R,
    ) -> Option<R> {
        let op = Op::new(self.core, inner.range.clip(self.core.range));
        self.call_as(inner, (stage, inner.who), |calling| handler(&op, calling))
    }

    /// Calls what is another's, which the watchdog knows by its own name, for the sake of a registration.
    #[inline]
    pub(super) fn call_as<R>(
        &self,
        inner: &Inner,
        (stage, who): (Stage, Who),
        handler: impl FnOnce(&Calling<'_>) -> R,
    ) -> Option<R> {
        let result = {
            let calling = Calling(self.post.map(|post| post.enter(stage, who)));
            let _callback = InCallback::handler(inner.key());
            if planted!("r22") {
                Some(handler(&calling))
            } else {
                contain(|| handler(&calling))
            }
        };
        if result.is_none() {
            self.space.note_panic(inner, self.core.id);
        }
        result
    }
}
