//! A `MapWriteGuard` stays on its thread: what the thread holds is counted there.

use shootdown::MapWriteGuard;

fn send<T: Send>() {}

fn main() {
    send::<MapWriteGuard<'static>>();
}
