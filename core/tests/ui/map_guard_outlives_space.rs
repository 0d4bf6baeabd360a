//! A guard of the map lock, and an open invalidation, cannot outlive the owner they came from.

use shootdown::{AddressSpace, Cause, Deadlines, ExternalInvalidation, MapWriteGuard, Range};

fn guard() -> MapWriteGuard<'static> {
    let space = AddressSpace::without_memory(Deadlines::default());
    space.lock_write().unwrap()
}

fn open() -> ExternalInvalidation<'static> {
    let space = AddressSpace::without_memory(Deadlines::default());
    space.begin_invalidation(Range::ALL, Cause::External).unwrap()
}

fn main() {}
