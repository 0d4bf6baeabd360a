//! What calls change, for arguments of every kind; and what came of those that fail.

use proptest::prelude::*;

use super::*;

/// A call, as the kernel hands it over.
pub(super) fn call(nr: libc::c_long, args: [u64; 6]) -> Call {
    Call::new(&libc::seccomp_data {
        nr: nr as i32,
        arch: 0,
        instruction_pointer: 0,
        args,
    })
}

fn argument() -> impl Strategy<Value = u64> {
    let edges = [0, 1 << 12, 1 << 21, 1 << 30, 1 << 47, 1 << 63, u64::MAX];
    prop_oneof![
        (proptest::sample::select(edges.to_vec()), -0x2000i64..0x2000)
            .prop_map(|(edge, off)| edge.wrapping_add_signed(off)),
        0u64..0x1_0000,
    ]
}

const CALLS: &[libc::c_long] = &[
    libc::SYS_munmap,
    libc::SYS_mmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_mprotect,
    libc::SYS_remap_file_pages,
    libc::SYS_brk,
    libc::SYS_shmdt,
    libc::SYS_shmat,
    libc::SYS_mbind,
    libc::SYS_ioctl,
    libc::SYS_move_pages,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_truncate,
    libc::SYS_process_madvise,
];

proptest! {
    /// A supervisor that panics would leave its caller waiting for ever.
    #[test]
    fn no_argument_makes_a_supervisor_panic(args in proptest::array::uniform6(argument())) {
        let maps = Maps::open().unwrap();
        for nr in CALLS {
            let mut call = call(*nr, args);
            call.changes(&StandIn::AsItIs, &maps, &mut Changes::default());
            let _ = call.outcome(Err(libc::EINVAL), &maps);
        }
    }
}

fn changes(nr: libc::c_long, args: [u64; 6]) -> Vec<(u64, u64)> {
    let maps = Maps::open().unwrap();
    let mut changes = Changes::default();
    call(nr, args).changes(&StandIn::AsItIs, &maps, &mut changes);
    assert!(!changes.everything);
    let both = |(range, _): (Range, Cause)| (range.start().get(), range.last().get() + 1);
    changes.iter().map(both).collect()
}

#[test]
fn what_is_rounded_is_rounded_as_the_kernel_does() {
    let (page, huge) = (PAGE as u64, HUGE as u64);
    let at = 0x7000_0000_0000;
    let anonymous = (libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    let hugetlb = anonymous | libc::MAP_HUGETLB as u64;
    let map = |flags| changes(libc::SYS_mmap, [at, 1, 3, flags, u64::MAX, 0]);
    assert_eq!(map(anonymous), [(at, at + page)]);
    assert_eq!(map(hugetlb), [(at, at + huge)]);
    assert_eq!(
        map(hugetlb | 30 << libc::MAP_HUGE_SHIFT),
        [(at, at + (1 << 30))]
    );
    let shrunk = changes(libc::SYS_mremap, [at, 4 * page, page + 1, 0, 0, 0]);
    assert_eq!(shrunk, [(at + 2 * page, at + 4 * page)]);
    let down = changes(libc::SYS_remap_file_pages, [at + 8, page + 8, 0, 0, 0, 0]);
    assert_eq!(down, [(at, at + page)]);
}

#[test]
fn a_failure_that_may_have_come_half_way_is_not_called_unchanged() {
    // SAFETY: a new mapping where the kernel likes.
    let at = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        libc::mmap(std::ptr::null_mut(), 4 * PAGE, 3, flags, -1, 0)
    } as u64;
    let maps = Maps::open().unwrap();
    let outcome = |nr, args, errno| call(nr, args).outcome(Err(errno), &maps);
    let len = PAGE as u64;
    let advise =
        |advice: i32, errno| outcome(libc::SYS_madvise, [at, len, advice as u64, 0, 0, 0], errno);
    assert_eq!(
        advise(libc::MADV_DONTNEED, libc::EINVAL),
        Outcome::Unchanged
    );
    // One huge page of several was made; a file system has dropped its pages, and then failed.
    assert_eq!(advise(libc::MADV_COLLAPSE, libc::EAGAIN), Outcome::Changed);
    assert_eq!(advise(libc::MADV_REMOVE, libc::EIO), Outcome::Changed);
    let truncated = |errno| outcome(libc::SYS_ftruncate, [3, 0, 0, 0, 0, 0], errno);
    assert_eq!(truncated(libc::EIO), Outcome::Changed);
    assert_eq!(truncated(libc::EINVAL), Outcome::Unchanged);
    let protected = outcome(libc::SYS_mprotect, [at, 8 * len, 0, 0, 0, 0], libc::ENOMEM);
    assert_eq!(protected, Outcome::Changed, "of two mappings the first");
    let fixed = (libc::MAP_FIXED | libc::MAP_SHARED) as u64;
    let mapped = |errno| outcome(libc::SYS_mmap, [at, len, 3, fixed, 3, 0], errno);
    // A driver's word, when the old mapping is gone.
    assert_eq!(mapped(libc::EPERM), Outcome::Changed);
    assert_eq!(mapped(libc::ENOSYS), Outcome::Changed);
    assert_eq!(mapped(libc::EBADF), Outcome::Unchanged);
}
