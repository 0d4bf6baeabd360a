//! A call that was handed over: which ranges it changes, and what came of it.
//!
//! Nothing here allocates: somebody waits who may hold the allocator's lock. What is not sure errs on the side of telling
//! too much; more ranges than there is room for are everything (R19).

use super::super::gate;
use super::super::scratch::PAGE;
use super::filter::{ADVICE, FALLOCATE};
use super::maps::{self, Mapping};
use crate::addr::Range;
use crate::notifier::{Cause, Outcome};

/// Ranges that one call changes at most, else it counts as everything.
pub(super) const CHANGES: usize = 16;

/// What a call is going to change.
#[derive(Default)]
pub(super) struct Changes {
    list: [Option<(Range, Cause)>; CHANGES],
    len: usize,
    /// There was no room, or it cannot be told.
    pub(super) everything: bool,
}

impl Changes {
    fn add(&mut self, range: Option<Range>, cause: Cause) {
        let Some(range) = range else { return };
        match self.list.get_mut(self.len) {
            Some(free) => {
                *free = Some((range, cause));
                self.len += 1;
            }
            None => self.everything = true,
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Range, Cause)> {
        self.list.iter().flatten().copied()
    }
}

/// A call, as the kernel hands it over.
pub(super) struct Call {
    nr: libc::c_long,
    args: [usize; 6],
    /// The ranges that `process_madvise` was given: looked at once, and given to the kernel from here.
    vectors: [libc::iovec; CHANGES],
}

/// Whole pages; `None` for what the kernel will refuse, or what is empty.
fn pages(at: usize, len: usize) -> Option<Range> {
    let len = len.checked_next_multiple_of(PAGE)?;
    if !at.is_multiple_of(PAGE) {
        return None;
    }
    Range::new(at as u64, len as u64).ok()
}

/// The pages at `at` that go when `len` bytes there become `kept`.
fn behind(at: usize, kept: usize, len: usize) -> Option<Range> {
    let kept = kept.checked_next_multiple_of(PAGE)?;
    let len = len.checked_next_multiple_of(PAGE)?;
    pages(at.checked_add(kept)?, len.checked_sub(kept)?)
}

impl Call {
    pub(super) fn new(data: &libc::seccomp_data) -> Self {
        Self {
            nr: data.nr.into(),
            args: data.args.map(|arg| arg as usize),
            vectors: [libc::iovec {
                iov_base: std::ptr::null_mut(),
                iov_len: 0,
            }; CHANGES],
        }
    }

    /// Whether one of its arguments is a file descriptor.
    pub(super) fn takes_descriptor(&self) -> bool {
        let anonymous = self.args[3] & libc::MAP_ANONYMOUS as usize != 0;
        matches!(
            self.nr,
            libc::SYS_fallocate | libc::SYS_ftruncate | libc::SYS_process_madvise
        ) || self.nr == libc::SYS_mmap && !anonymous
    }

    /// What it is going to change.
    pub(super) fn changes(&mut self) -> Changes {
        let mut changes = Changes::default();
        let [a, b, c, d, e, _] = self.args;
        match self.nr {
            libc::SYS_munmap => changes.add(pages(a, b), Cause::Unmap),
            libc::SYS_mmap => {
                // The kernel rounds these up to their size; 2 MiB where none is said.
                let huge = d & libc::MAP_HUGETLB as usize != 0;
                let shift = match d >> libc::MAP_HUGE_SHIFT & 0x3f {
                    0 => 21,
                    shift => shift,
                };
                let len = match huge {
                    true => b.checked_next_multiple_of(1 << shift).unwrap_or(b),
                    false => b,
                };
                changes.add(pages(a, len), Cause::Unmap);
            }
            libc::SYS_mremap => {
                let fixed = d & libc::MREMAP_FIXED as usize != 0;
                let shrinks = !fixed && c < b;
                if shrinks {
                    changes.add(behind(a, c, b), Cause::Unmap);
                } else {
                    // In place or not is the kernel's choice.
                    changes.add(pages(a, b), Cause::Remap);
                }
                if fixed {
                    changes.add(pages(e, c), Cause::Unmap);
                }
            }
            libc::SYS_madvise => changes.add(pages(a, b), advised(c)),
            libc::SYS_mprotect | libc::SYS_pkey_mprotect => {
                changes.add(pages(a, b), Cause::Protect);
            }
            libc::SYS_remap_file_pages => changes.add(pages(a, b), Cause::Remap),
            libc::SYS_brk => {
                if a != 0 {
                    changes.add(behind(0, a, current_break()), Cause::Unmap);
                }
            }
            libc::SYS_shmdt => segment(a, &mut changes),
            libc::SYS_shmat => {
                let at = if c & SHM_RND != 0 { a_down(b) } else { b };
                // Without a length the kernel will say why.
                if let Some(len) = segment_bytes(a) {
                    changes.add(pages(at, len), Cause::Unmap);
                }
            }
            libc::SYS_fallocate => {
                let shifts = b & 0x28 != 0;
                let last = match shifts {
                    true => u64::MAX,
                    false => (c as u64).saturating_add((d as u64).saturating_sub(1)),
                };
                if b & FALLOCATE as usize != 0 {
                    file(maps::inode_of_descriptor(a), c as u64, last, &mut changes);
                }
            }
            libc::SYS_ftruncate => {
                file(
                    maps::inode_of_descriptor(a),
                    b as u64,
                    u64::MAX,
                    &mut changes,
                );
            }
            libc::SYS_truncate => {
                file(maps::inode_of_path(a), b as u64, u64::MAX, &mut changes);
            }
            libc::SYS_process_madvise => self.vectors(&mut changes),
            _ => changes.everything = true,
        }
        changes
    }

    /// Looks at the ranges of `process_madvise`, through the kernel: they may lie anywhere.
    fn vectors(&mut self, changes: &mut Changes) {
        let [_, at, count, advice, ..] = self.args;
        if !ADVICE.contains(&(advice as i32)) || count == 0 {
            return;
        }
        if count > CHANGES {
            changes.everything = true;
            return;
        }
        let bytes = count * size_of::<libc::iovec>();
        let local = libc::iovec {
            iov_base: self.vectors.as_mut_ptr().cast(),
            iov_len: bytes,
        };
        let remote = libc::iovec {
            iov_base: at as *mut libc::c_void,
            iov_len: bytes,
        };
        let own = std::process::id() as libc::pid_t;
        // SAFETY: `count` elements fit the array; the other side is read by the kernel, wherever it lies.
        let read = unsafe { libc::process_vm_readv(own, &local, 1, &remote, 1, 0) };
        if read != bytes as isize {
            // The kernel will say EFAULT, or read what is there by then.
            changes.everything = true;
            return;
        }
        for vector in &self.vectors[..count] {
            changes.add(
                pages(vector.iov_base as usize, vector.iov_len),
                advised(advice),
            );
        }
        self.args[1] = self.vectors.as_ptr() as usize;
    }

    /// Makes the call.
    pub(super) fn perform(&self) -> Result<usize, i32> {
        let mut args = self.args;
        if self.nr == libc::SYS_process_madvise && args[1] != 0 && args[2] <= CHANGES {
            args[1] = self.vectors.as_ptr() as usize;
        }
        // SAFETY: what a thread of this process asked for, with its arguments: as sound, or not, as its own call would be.
        unsafe { gate::own_call(self.nr, args) }
    }

    /// What the handlers are told. "Unchanged" where that is certain: some calls fail half-way.
    pub(super) fn outcome(&self, result: Result<usize, i32>) -> Outcome {
        let [at, len, _, flags, ..] = self.args;
        let errno = match result {
            Ok(now) if self.nr == libc::SYS_brk && now != at => return Outcome::Unchanged,
            Ok(_) => return Outcome::Changed,
            Err(errno) => errno,
        };
        let never_half = matches!(
            self.nr,
            libc::SYS_munmap | libc::SYS_shmdt | libc::SYS_ftruncate | libc::SYS_truncate
        ) || self.nr == libc::SYS_mremap
            && flags & libc::MREMAP_FIXED as usize == 0;
        let refused = matches!(errno, libc::EBADF | libc::ENOSYS | libc::EPERM)
            || errno == libc::EINVAL && (!at.is_multiple_of(PAGE) || len == 0);
        // One mapping is changed as a whole or not at all.
        let one_mapping = matches!(
            self.nr,
            libc::SYS_mprotect | libc::SYS_pkey_mprotect | libc::SYS_madvise
        ) && pages(at, len).is_some_and(maps::is_one_mapping);
        if never_half || refused || one_mapping {
            Outcome::Unchanged
        } else {
            Outcome::Changed
        }
    }
}

const SHM_RND: usize = 0o20000;

fn a_down(at: usize) -> usize {
    at & !(PAGE - 1)
}

fn advised(advice: usize) -> Cause {
    match advice as i32 {
        libc::MADV_PAGEOUT | libc::MADV_COLLAPSE => Cause::Migrate,
        _ => Cause::Discard,
    }
}

fn current_break() -> usize {
    // SAFETY: asks, and changes nothing.
    unsafe { gate::own_call(libc::SYS_brk, [0; 6]) }.unwrap_or(0)
}

/// The length of a shared segment, by its identifier.
fn segment_bytes(id: usize) -> Option<usize> {
    // SAFETY: integers only.
    let mut about: libc::shmid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills the structure.
    let said = unsafe { libc::shmctl(id as i32, libc::IPC_STAT, &mut about) };
    (said == 0).then_some(about.shm_segsz)
}

/// What is attached at `at`, all of it that is left: as the kernel finds it.
fn segment(at: usize, changes: &mut Changes) {
    let mut inode = None;
    let known = maps::each(|mapping: Mapping| {
        let Some(offset) = mapping.start.checked_sub(at as u64) else {
            return;
        };
        if mapping.shared
            && mapping.offset == offset
            && *inode.get_or_insert(mapping.inode) == mapping.inode
        {
            changes.add(mapping.range(), Cause::Unmap);
        }
    });
    changes.everything |= !known;
}

/// Wherever bytes `first` to `last` of a file are mapped. Files are known by their inode numbers alone, as the devices that
/// different calls tell differ on some file systems.
fn file(inode: Option<u64>, first: u64, last: u64, changes: &mut Changes) {
    // The kernel will refuse it.
    let Some(inode) = inode else { return };
    let first = first & !(PAGE as u64 - 1);
    let known = maps::each(|mapping: Mapping| {
        let len = mapping.end - mapping.start;
        if mapping.inode != inode || mapping.offset > last || mapping.offset + (len - 1) < first {
            return;
        }
        let from = mapping.start + first.saturating_sub(mapping.offset);
        let behind = (last - mapping.offset).min(len - 1);
        let to = mapping.start + (behind | (PAGE as u64 - 1));
        changes.add(Range::inclusive(from, to).ok(), Cause::Discard);
    });
    changes.everything |= !known;
}
