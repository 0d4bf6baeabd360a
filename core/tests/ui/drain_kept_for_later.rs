//! A `Drain` cannot be kept beyond its operation.

use std::sync::Mutex;

use shootdown::{Drain, Notifier, Op, WouldBlock};

struct Keeps {
    drain: Mutex<Option<Drain<'static>>>,
}

impl Notifier for Keeps {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        *self.drain.lock().unwrap() = Some(op.idle());
        Ok(op.idle())
    }
}

fn main() {}
