//! A `NotifierGuard` stays on its thread: what the thread holds is counted there.

use shootdown::NotifierGuard;

fn send<T: Send>() {}

fn main() {
    send::<NotifierGuard<'static, ()>>();
}
