//! The auditor against the real kernel: what it names was missed, and what was told in time it does not name.

#[path = "../../core/tests/support/child.rs"]
mod child;
#[path = "../../core/tests/support/foreign.rs"]
mod foreign;

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::process::Command;
use std::sync::Arc;

use child::in_child;
use foreign::*;
use shootdown::*;
use shootdown_kvm::{Audit, AuditError, Auditor, KvmError};

struct Rig {
    space: AddressSpace,
    arena: Range,
    auditor: Auditor,
}

/// An audited space; `None` where this machine does not tell.
fn rig() -> Option<Rig> {
    let memory = Arc::new(ProcessMemory::reserve(1 << 30).unwrap());
    let arena = memory.arena();
    let space = AddressSpace::managed(memory, Deadlines::default());
    match Auditor::start(&space, arena) {
        Ok(auditor) => Some(Rig {
            space,
            arena,
            auditor,
        }),
        Err(AuditError::Kvm(error @ (KvmError::NoKvm(_) | KvmError::NoTracepoint(_)))) => {
            eprintln!("SKIPPED: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Complete, and it has seen something.
fn finish(auditor: Auditor) -> Audit {
    let audit = auditor.finish();
    assert_eq!(audit.lost, 0);
    assert!(audit.seen > 0);
    audit
}

fn own_thread() -> u32 {
    // SAFETY: no arguments.
    (unsafe { libc::syscall(libc::SYS_gettid) }) as u32
}

fn unotify(rig: &Rig) -> Watched {
    let source = Arc::new(Unotify::new());
    rig.space.watch(source, rig.arena).unwrap()
}

/// Foreign calls of all kinds on the buffer.
fn calls(buffer: Range) {
    let (at, len) = (start(buffer), buffer.len() as usize);
    let fixed = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as usize;
    let (page, half) = (PAGE as usize, len / 2);
    let call = |nr, args| raw(nr, args).unwrap();
    assert!(map_fixed(buffer));
    touch(buffer);
    call(libc::SYS_mprotect, [at, page, 1, 0, 0, 0]);
    let advice = libc::MADV_DONTNEED as usize;
    call(libc::SYS_madvise, [at + page, page, advice, 0, 0, 0]);
    call(libc::SYS_mremap, [at, page, page, fixed, at + half, 0]);
    call(libc::SYS_mremap, [at + half, 2 * page, page, 0, 0, 0]);
    munmap(buffer).unwrap();
}

#[test]
fn the_spaces_own_operations_are_told() {
    if !in_child("the_spaces_own_operations_are_told") {
        return;
    }
    let Some(Rig { space, auditor, .. }) = rig() else {
        return;
    };
    for _ in 0..200 {
        let buffer = space.map(Map::anonymous(4 * PAGE)).unwrap();
        let target = space.map(Map::anonymous(4 * PAGE)).unwrap();
        touch(buffer);
        space.unmap(target).unwrap();
        space.discard(buffer).unwrap();
        touch(buffer);
        space.protect(buffer, Rights::READ).unwrap();
        let moved = space.remap(buffer, target.start()).unwrap();
        space.unmap(moved).unwrap();
    }
    let audit = finish(auditor);
    assert!(audit.seen >= 200 * 4, "{audit:?}");
    assert_eq!(audit.missed, 0, "{:?}", audit.first);
}

#[test]
fn a_foreign_munmap_that_nobody_tells_of_is_named() {
    if !in_child("a_foreign_munmap_that_nobody_tells_of_is_named") {
        return;
    }
    let Some(Rig { space, auditor, .. }) = rig() else {
        return;
    };
    let buffer = space.map(Map::anonymous(4 * PAGE)).unwrap();
    touch(buffer);
    munmap(page(buffer, 1)).unwrap();
    let audit = finish(auditor);
    // Splits of huge pages, at its ends, besides.
    assert!((1..=3).contains(&audit.missed), "{audit:?}");
    assert_eq!(audit.missed_of_others, 0);
    let mut missed = audit.first.iter();
    let missed = missed.find(|one| one.range == page(buffer, 1)).unwrap();
    assert_eq!(missed.thread, own_thread());
    let text = missed.to_string();
    assert!(text.contains("nobody had told the space"), "{text}");
}

#[test]
fn nothing_is_missed_where_foreign_calls_wait() {
    if !in_child("nothing_is_missed_where_foreign_calls_wait") {
        return;
    }
    let Some(rig) = rig() else { return };
    let watched = unotify(&rig);
    let buffer = rig.space.map(Map::anonymous(16 * PAGE)).unwrap();
    (0..200).for_each(|_| calls(buffer));
    drop(watched);
    let audit = finish(rig.auditor);
    assert!(audit.seen >= 200 * 6, "{audit:?}");
    assert_eq!(audit.missed, 0, "{:?}", audit.first);
}

#[test]
fn a_source_that_is_late_has_missed_it() {
    if !in_child("a_source_that_is_late_has_missed_it") {
        return;
    }
    let Some(rig) = rig() else { return };
    let source = Arc::new(Uffd::new());
    let watched = rig.space.watch(source, rig.arena).unwrap();
    let buffer = rig.space.map(Map::anonymous(4 * PAGE)).unwrap();
    touch(buffer);
    munmap(buffer).unwrap();
    drop(watched);
    let audit = finish(rig.auditor);
    assert!(
        audit.first.iter().any(|one| one.range == buffer),
        "{audit:?}"
    );
}

/// A static program without a C library, which makes the system call that it is given.
fn stranger() -> std::path::PathBuf {
    let program = std::env::temp_dir().join(format!("shootdown-stranger-{}", std::process::id()));
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/stranger.c");
    let options = [
        "-static",
        "-nostdlib",
        "-ffreestanding",
        "-O2",
        "-Wall",
        "-Werror",
    ];
    let built = Command::new("cc")
        .args(options)
        .arg("-o")
        .args([program.as_path(), source.as_ref()])
        .status();
    assert!(built.expect("there is a C compiler").success());
    program
}

#[test]
fn what_another_process_punches_is_named_where_no_source_can_see_it() {
    if !in_child("what_another_process_punches_is_named_where_no_source_can_see_it") {
        return;
    }
    let Some(rig) = rig() else { return };
    let _watched = unotify(&rig);
    let buffer = rig.space.map(Map::anonymous(4 * PAGE)).unwrap();
    // SAFETY: a name, and a number.
    let file = unsafe { libc::memfd_create(c"shared".as_ptr(), libc::MFD_CLOEXEC) };
    // SAFETY: opened just now.
    let file = unsafe { File::from_raw_fd(file) };
    file.set_len(4 * PAGE).unwrap();
    let (at, len) = (start(buffer), buffer.len() as usize);
    let flags = (libc::MAP_SHARED | libc::MAP_FIXED) as usize;
    let fd = file.as_raw_fd() as usize;
    raw(libc::SYS_mmap, [at, len, 3, flags, fd, 0]).unwrap();
    touch(buffer);
    let program = stranger();
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // Of its standard input.
    let arguments = [
        libc::SYS_fallocate,
        0,
        punch.into(),
        PAGE as i64,
        PAGE as i64,
    ];
    let mut other = Command::new(&program)
        .args(arguments.map(|argument| argument.to_string()))
        .stdin(file)
        .spawn()
        .unwrap();
    assert!(other.wait().unwrap().success());
    std::fs::remove_file(program).unwrap();
    let audit = finish(rig.auditor);
    assert_eq!((audit.missed, audit.missed_of_others), (0, 1));
    assert_eq!(audit.first[0].range, page(buffer, 1));
    assert_eq!(audit.first[0].process, other.id());
}

#[test]
fn a_space_is_audited_once() {
    if !in_child("a_space_is_audited_once") {
        return;
    }
    let Some(rig) = rig() else { return };
    let second = Auditor::start(&rig.space, rig.arena);
    assert!(matches!(second, Err(AuditError::Observed(_))));
}
