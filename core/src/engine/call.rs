//! The calls of handlers: seen by the watchdog, marked as inside a callback, contained.

use crate::context::InCallback;
use crate::notifier::OpCore;
use crate::primitive::contain;
use crate::registration::Inner;
use crate::space::Space;
use crate::watch::{Running, Stage, Who};

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

/// Calls a handler; `None` if it panicked, in which case its devices are in quarantine.
#[inline]
pub(super) fn call<R>(
    space: &Space,
    inner: &Inner,
    core: &OpCore,
    stage: Stage,
    handler: impl FnOnce(&Calling<'_>) -> R,
) -> Option<R> {
    call_as(space, inner, core, (stage, inner.who), handler)
}

/// The same, where the watchdog knows what is called by another name.
#[inline]
pub(super) fn call_as<R>(
    space: &Space,
    inner: &Inner,
    core: &OpCore,
    (stage, who): (Stage, Who),
    handler: impl FnOnce(&Calling<'_>) -> R,
) -> Option<R> {
    let result = {
        let calling = Calling(space.watch.enter(core.post, stage, who));
        let _callback = InCallback::handler(inner.key());
        if planted!("r22") {
            Some(handler(&calling))
        } else {
            contain(|| handler(&calling))
        }
    };
    if result.is_none() {
        space.note_panic(inner, core.id);
    }
    result
}
