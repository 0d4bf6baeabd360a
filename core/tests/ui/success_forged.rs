//! Success cannot be reported without a `Gather`: nothing else makes an `Issued`.

use shootdown::{Gather, Issued, Notifier, Op};

struct Forges;

impl Notifier for Forges {
    fn flush<'o>(&self, _: &Op<'o>, _: Gather<'o>) -> Issued<'o> {
        Issued {
            flush: None,
            brand: std::marker::PhantomData,
        }
    }
}

fn main() {}
