//! An `Issued` cannot be kept beyond its operation.

use std::sync::Mutex;

use shootdown::{Gather, Issued, Notifier, Op};

struct Keeps {
    issued: Mutex<Option<Issued<'static>>>,
}

impl Notifier for Keeps {
    fn flush<'o>(&self, _: &Op<'o>, gather: Gather<'o>) -> Issued<'o> {
        let earlier = self.issued.lock().unwrap().replace(gather.all());
        earlier.unwrap()
    }
}

fn main() {}
