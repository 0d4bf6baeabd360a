//! A `Gather` cannot be kept beyond its operation.

use std::sync::Mutex;

use shootdown::{Gather, Issued, Notifier, Op};

struct Keeps {
    gather: Mutex<Option<Gather<'static>>>,
}

impl Notifier for Keeps {
    fn flush<'o>(&self, _: &Op<'o>, gather: Gather<'o>) -> Issued<'o> {
        let earlier = self.gather.lock().unwrap().replace(gather);
        earlier.unwrap().all()
    }
}

fn main() {}
