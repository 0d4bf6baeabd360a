//! A call that was handed over: which ranges it changes, and what came of it.
//!
//! Nothing here allocates: somebody waits who may hold the allocator's lock. What is not sure errs on the side of telling
//! too much; more ranges than there is room for are everything (R19).

use std::cell::Cell;
use std::os::fd::AsRawFd;

use arrayvec::ArrayVec;

use super::super::gate;
use super::super::scratch::PAGE;
use super::super::uffd::sys::UFFDIO_MOVE;
use super::caller::StandIn;
use super::filter::{ADVICE, FALLOCATE, GROWS};
use super::maps::{self, GIB, HUGE, Mapping, Maps};
use crate::addr::Range;
use crate::notifier::{Cause, Outcome};

/// Ranges that one call changes at most, else it counts as everything.
pub(super) const CHANGES: usize = 16;

/// What a call is going to change.
#[derive(Default)]
pub(super) struct Changes {
    list: ArrayVec<(Range, Cause), CHANGES>,
    /// There was no room, or it cannot be told.
    pub(super) everything: bool,
}

impl Changes {
    fn add(&mut self, range: Option<Range>, cause: Cause) {
        let added = range.map_or(Ok(()), |range| self.list.try_push((range, cause)));
        self.everything |= added.is_err();
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Range, Cause)> {
        self.list.iter().copied()
    }
}

/// A call, as the kernel hands it over.
pub(super) struct Call {
    pub(super) nr: libc::c_long,
    pub(super) args: [usize; 6],
    /// The ranges that `process_madvise` was given: looked at once, and given to the kernel from here.
    vectors: ArrayVec<libc::iovec, CHANGES>,
    /// It was made in parts, and one of them failed when others had been made.
    pub(super) half: Cell<bool>,
}

/// Whole pages; `None` for what the kernel will refuse, or what is empty.
pub(super) fn pages(at: usize, len: usize) -> Option<Range> {
    let len = len.checked_next_multiple_of(PAGE)?;
    if !at.is_multiple_of(PAGE) {
        return None;
    }
    Range::new(at as u64, len as u64).ok()
}

/// As [`pages`], of huge ones: the kernel rounds a length up to the size of the page, to which the address is aligned.
fn huge_pages(at: usize, len: usize) -> Option<Range> {
    let size = if at.is_multiple_of(GIB) { GIB } else { HUGE };
    match at.is_multiple_of(HUGE) {
        true => pages(at, len.checked_next_multiple_of(size)?),
        false => pages(at, len),
    }
}

/// Reads words of this process, through the kernel: they may lie anywhere.
fn read(at: usize, words: &mut [usize]) -> bool {
    let bytes = size_of_val(words);
    let local = libc::iovec {
        iov_base: words.as_mut_ptr().cast(),
        iov_len: bytes,
    };
    let remote = libc::iovec {
        iov_base: at as *mut libc::c_void,
        iov_len: bytes,
    };
    let own = std::process::id() as libc::pid_t;
    // SAFETY: as many bytes as there are words are written; the other side is read by the kernel, wherever it lies.
    let read = unsafe { libc::process_vm_readv(own, &local, 1, &remote, 1, 0) };
    read == bytes as isize
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
            vectors: ArrayVec::new_const(),
            half: Cell::new(false),
        }
    }

    /// Which of its arguments is a file descriptor.
    fn place_of_descriptor(&self) -> Option<usize> {
        let anonymous = self.args[3] & libc::MAP_ANONYMOUS as usize != 0;
        match self.nr {
            libc::SYS_fallocate
            | libc::SYS_ftruncate
            | libc::SYS_process_madvise
            | libc::SYS_ioctl => Some(0),
            libc::SYS_mmap if !anonymous => Some(4),
            _ => None,
        }
    }

    /// The file descriptor that it is given.
    pub(super) fn descriptor(&self) -> Option<usize> {
        self.place_of_descriptor().map(|place| self.args[place])
    }

    /// Whether it is given a path, which starts where its caller is.
    pub(super) fn takes_path(&self) -> bool {
        self.nr == libc::SYS_truncate
    }

    /// Whether the kernel asks what its caller may do, rather than what the descriptor allows.
    pub(super) fn asks_for_rights(&self) -> bool {
        matches!(
            self.nr,
            libc::SYS_truncate
                | libc::SYS_shmat
                | libc::SYS_mbind
                | libc::SYS_move_pages
                | libc::SYS_migrate_pages
        )
    }

    /// Adds what it is going to change. From here on it is as the stand-in makes it.
    #[inline]
    pub(super) fn changes(&mut self, stand_in: &StandIn, maps: &Maps, changes: &mut Changes) {
        match self.nr {
            libc::SYS_munmap => changes.add(pages(self.args[0], self.args[1]), Cause::Unmap),
            _ => self.other_changes(stand_in, maps, changes),
        }
    }

    #[inline(never)]
    fn other_changes(&mut self, stand_in: &StandIn, maps: &Maps, changes: &mut Changes) {
        match (stand_in, self.place_of_descriptor()) {
            (StandIn::With(fd), Some(place)) => self.args[place] = fd.as_raw_fd() as usize,
            (StandIn::Not, _) => {
                // What it means is not known here.
                changes.everything = true;
                return;
            }
            _ => {}
        }
        let [a, b, c, d, e, _] = self.args;
        match self.nr {
            libc::SYS_mmap => {
                // The kernel rounds these up to their size; 2 MiB where none is said.
                let anonymous = d & libc::MAP_ANONYMOUS as usize != 0;
                let size = match d >> libc::MAP_HUGE_SHIFT & 0x3f {
                    _ if !anonymous => maps::huge_page_of_descriptor(e).unwrap_or(PAGE),
                    _ if d & libc::MAP_HUGETLB as usize == 0 => PAGE,
                    0 => HUGE,
                    shift => 1 << shift,
                };
                let len = b.checked_next_multiple_of(size).unwrap_or(b);
                changes.add(pages(a, len), Cause::Unmap);
            }
            libc::SYS_mremap => {
                let fixed = d & libc::MREMAP_FIXED as usize != 0;
                // These have a file. That others have one too does no harm.
                let huge = a.is_multiple_of(HUGE)
                    && maps.at(a as u64).is_some_and(|mapping| mapping.inode != 0);
                let pages = if huge { huge_pages } else { pages };
                let old = pages(a, b);
                let len = old.map_or(b, |old| old.len() as usize);
                let keeps = d & libc::MREMAP_DONTUNMAP as usize != 0;
                if !fixed && !keeps && c < len {
                    changes.add(behind(a, c, len), Cause::Unmap);
                } else {
                    // In place or not is the kernel's choice; not that of one that keeps its old addresses.
                    changes.add(pages(a, b), Cause::Remap);
                }
                if fixed {
                    changes.add(pages(e, c), Cause::Unmap);
                }
            }
            libc::SYS_madvise => changes.add(pages(a, b), advised(c)),
            libc::SYS_mprotect | libc::SYS_pkey_mprotect => {
                // A stack: from its lowest page.
                let below = (c & GROWS as usize != 0)
                    .then(|| maps.at(a as u64))
                    .flatten();
                changes.add(below.and_then(Mapping::range), Cause::Protect);
                changes.add(pages(a, b), Cause::Protect);
            }
            // The kernel rounds both down.
            libc::SYS_remap_file_pages => changes.add(pages(down(a), down(b)), Cause::Remap),
            libc::SYS_brk => {
                if a != 0 {
                    changes.add(behind(0, a, current_break()), Cause::Unmap);
                }
            }
            libc::SYS_shmdt => segment(a, maps, changes),
            libc::SYS_shmat => {
                let at = if c & SHM_RND != 0 { down(b) } else { b };
                // Without a length the kernel will say why. Nothing tells whether its pages are huge.
                if let Some(len) = segment_bytes(a) {
                    changes.add(huge_pages(at, len), Cause::Unmap);
                }
            }
            libc::SYS_mbind => {
                // A huge page that lies in the range in part moves as a whole.
                let (first, len) = (a - a % HUGE, b.checked_add(a % HUGE));
                let huge = len.and_then(|len| huge_pages(first, len));
                changes.add(pages(a, b).and(huge), Cause::Migrate);
            }
            libc::SYS_ioctl => {
                // Destination, source, length; or start, length.
                let mut words = [0; 3];
                changes.everything = !read(c, &mut words);
                let [first, second, third] = words;
                match b as u32 == UFFDIO_MOVE as u32 {
                    true => changes.add(pages(second, third), Cause::Remap),
                    false => changes.add(pages(first, second), Cause::Protect),
                }
            }
            libc::SYS_move_pages | libc::SYS_migrate_pages if !is_own_process(a) => {}
            libc::SYS_move_pages if b <= CHANGES => {
                let mut moved = [0; CHANGES];
                changes.everything = !read(c, &mut moved[..b]);
                for page in &moved[..b] {
                    // Of a huge one all of it. Those have a file; that others have one too does no harm.
                    let file = maps.at(*page as u64).is_some_and(|one| one.inode != 0);
                    let size = if file { GIB } else { HUGE };
                    changes.add(pages(page - page % size, size), Cause::Migrate);
                }
            }
            libc::SYS_move_pages | libc::SYS_migrate_pages => changes.everything = true,
            libc::SYS_fallocate => {
                let shifts = b & 0x28 != 0;
                let last = match shifts {
                    true => u64::MAX,
                    false => (c as u64).saturating_add((d as u64).saturating_sub(1)),
                };
                if b & FALLOCATE as usize != 0 {
                    let inode = maps::inode_of_descriptor(a);
                    file((inode, c as u64, last), maps, changes);
                }
            }
            libc::SYS_ftruncate => {
                let inode = maps::inode_of_descriptor(a);
                file((inode, b as u64, u64::MAX), maps, changes);
            }
            libc::SYS_truncate => {
                let inode = maps::inode_of_path(a);
                file((inode, b as u64, u64::MAX), maps, changes);
            }
            libc::SYS_process_madvise => self.vectors(changes),
            _ => changes.everything = true,
        }
    }

    /// Looks at the ranges of `process_madvise`.
    fn vectors(&mut self, changes: &mut Changes) {
        let [_, at, count, advice, ..] = self.args;
        if !ADVICE.contains(&(advice as i32)) || count == 0 {
            return;
        }
        if count > CHANGES {
            changes.everything = true;
            return;
        }
        let mut words = [0; 2 * CHANGES];
        let words = &mut words[..2 * count];
        if !read(at, words) {
            // The kernel will say EFAULT, or read what is there by then.
            changes.everything = true;
            return;
        }
        self.vectors = words
            .chunks_exact(2)
            .map(|word| libc::iovec {
                iov_base: word[0] as *mut libc::c_void,
                iov_len: word[1],
            })
            .collect();
        for vector in &self.vectors {
            changes.add(
                pages(vector.iov_base as usize, vector.iov_len),
                advised(advice),
            );
        }
    }

    /// Where the ranges of `process_madvise` are that were looked at.
    pub(super) fn own_vectors(&self) -> Option<usize> {
        let all = !self.vectors.is_empty() && self.vectors.len() == self.args[2];
        all.then_some(self.vectors.as_ptr() as usize)
    }

    /// What the handlers are told. "Unchanged" where that is certain: some calls fail half-way.
    #[inline]
    pub(super) fn outcome(&self, result: Result<usize, i32>, maps: &Maps) -> Outcome {
        match result {
            Ok(now) if self.nr == libc::SYS_brk && now != self.args[0] => Outcome::Unchanged,
            Ok(_) => Outcome::Changed,
            Err(errno) => self.failed(errno, maps),
        }
    }

    #[cold]
    fn failed(&self, errno: i32, maps: &Maps) -> Outcome {
        let [at, len, advice, flags, ..] = self.args;
        if self.half.get() {
            return Outcome::Changed;
        }
        let never_half = matches!(self.nr, libc::SYS_munmap | libc::SYS_shmdt)
            || self.nr == libc::SYS_mremap && flags & libc::MREMAP_FIXED as usize == 0;
        // What a file system says before it begins.
        let of_file = matches!(
            self.nr,
            libc::SYS_ftruncate | libc::SYS_truncate | libc::SYS_fallocate
        ) && matches!(
            errno,
            libc::EINVAL
                | libc::EACCES
                | libc::EFAULT
                | libc::EFBIG
                | libc::EISDIR
                | libc::ELOOP
                | libc::ENAMETOOLONG
                | libc::ENOENT
                | libc::ENOTDIR
                | libc::ETXTBSY
        );
        let by_pages = matches!(
            self.nr,
            libc::SYS_mmap
                | libc::SYS_madvise
                | libc::SYS_mprotect
                | libc::SYS_pkey_mprotect
                | libc::SYS_mbind
        );
        let no_pages = by_pages && (!at.is_multiple_of(PAGE) || len == 0);
        // One of several mappings may be sealed.
        let by_mappings = matches!(
            self.nr,
            libc::SYS_madvise
                | libc::SYS_process_madvise
                | libc::SYS_mprotect
                | libc::SYS_pkey_mprotect
                | libc::SYS_mremap
        );
        // Whose file it is may not want it: it is asked when the old mapping is gone.
        let by_file = matches!(self.nr, libc::SYS_mmap | libc::SYS_remap_file_pages);
        let refused = errno == libc::EBADF
            || errno == libc::ENOSYS && !by_file
            || errno == libc::EPERM && !by_mappings && !by_file
            || errno == libc::EINVAL && no_pages;
        // One mapping is changed as a whole or not at all by these.
        let whole = match self.nr {
            libc::SYS_mprotect | libc::SYS_pkey_mprotect => true,
            libc::SYS_madvise => matches!(
                advice as i32,
                libc::MADV_DONTNEED | libc::MADV_DONTNEED_LOCKED | libc::MADV_FREE
            ),
            _ => false,
        };
        let one_mapping = whole
            && pages(at, len).is_some_and(|range| {
                let mapping = maps.at(range.start().get());
                mapping
                    .and_then(Mapping::range)
                    .is_some_and(|all| all.contains(range))
            });
        if never_half || of_file || refused || one_mapping {
            Outcome::Unchanged
        } else {
            Outcome::Changed
        }
    }
}

fn is_own_process(pid: usize) -> bool {
    pid == 0 || pid == std::process::id() as usize
}

const SHM_RND: usize = 0o20000;

fn down(at: usize) -> usize {
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

/// What may be attached at `at`, all of it that is left: pieces of a segment have its file, and lie as far behind its start as in it.
/// Other files may happen to lie so, and are told of too.
fn segment(at: usize, maps: &Maps, changes: &mut Changes) {
    let known = maps.each(|mapping| {
        let offset = mapping.start.checked_sub(at as u64);
        if mapping.shared && offset == Some(mapping.offset) {
            changes.add(mapping.range(), Cause::Unmap);
        }
    });
    changes.everything |= !known;
}

/// Wherever bytes `first` to `last` of a file are mapped. Files are known by their inode numbers alone, as the devices that
/// different calls tell differ on some file systems.
fn file((inode, first, last): (Option<u64>, u64, u64), maps: &Maps, changes: &mut Changes) {
    // The kernel will refuse it.
    let Some(inode) = inode else { return };
    let first = first & !(PAGE as u64 - 1);
    let known = maps.each(|mapping| {
        let len = mapping.end - mapping.start;
        let behind = mapping.offset.saturating_add(len - 1);
        if mapping.inode != inode || mapping.offset > last || behind < first {
            return;
        }
        let from = mapping.start + first.saturating_sub(mapping.offset);
        let behind = (last - mapping.offset).min(len - 1);
        let to = mapping.start + (behind | (PAGE as u64 - 1));
        changes.add(Range::inclusive(from, to).ok(), Cause::Discard);
    });
    changes.everything |= !known;
}

#[cfg(test)]
mod kernel;
#[cfg(test)]
mod tests;
