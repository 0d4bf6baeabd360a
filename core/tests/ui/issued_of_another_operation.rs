//! An `Issued` of one operation is none of another.

use shootdown::{Gather, Issued};

fn swap<'one, 'other>(of_one: Gather<'one>, _of_other: Gather<'other>) -> Issued<'other> {
    of_one.all()
}

fn main() {}
