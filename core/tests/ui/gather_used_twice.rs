//! A `Gather` makes one `Issued`.

use shootdown::{Gather, Issued, Notifier, Op};

struct Twice;

impl Notifier for Twice {
    fn flush<'o>(&self, _: &Op<'o>, gather: Gather<'o>) -> Issued<'o> {
        let _ = gather.nothing_cached();
        gather.all()
    }
}

fn main() {}
