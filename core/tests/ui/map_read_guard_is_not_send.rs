//! A `MapReadGuard` stays on its thread: what the thread holds is counted there.

use shootdown::MapReadGuard;

fn send<T: Send>() {}

fn main() {
    send::<MapReadGuard<'static>>();
}
