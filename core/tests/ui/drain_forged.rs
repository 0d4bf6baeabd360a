//! Nothing but the operation makes a `Drain`.

use shootdown::{Drain, Notifier, Op, WouldBlock};

struct Forges;

impl Notifier for Forges {
    fn quiesce<'o>(&self, _: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        Ok(Drain {
            polled: false,
            brand: std::marker::PhantomData,
        })
    }
}

fn main() {}
