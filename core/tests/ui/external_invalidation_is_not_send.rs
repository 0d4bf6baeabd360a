//! An `ExternalInvalidation` stays on its thread, where everything counts as inside a callback.

use shootdown::ExternalInvalidation;

fn send<T: Send>() {}

fn main() {
    send::<ExternalInvalidation<'static>>();
}
