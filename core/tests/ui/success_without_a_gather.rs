//! Success cannot be reported without an `Issued`.

use shootdown::{Gather, Issued, Notifier, Op};

struct Forgets;

impl Notifier for Forgets {
    fn flush<'o>(&self, _: &Op<'o>, _: Gather<'o>) -> Issued<'o> {}
}

fn main() {}
