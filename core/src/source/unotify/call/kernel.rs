//! What this kernel changes, held against what the calls are told to: the calls are made, in a process of their own, on pages with contents
//! that are looked at before and after.

use std::io;

use super::super::filter::tests::Filter;
use super::tests::call;
use super::*;

/// Pages that calls are made on, with as many on each side that are not there to be changed.
const PAGES: usize = 12;
const ALL: usize = 3 * PAGES;

/// What is mapped there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Anonymous(i32),
    /// A file in memory.
    File(i32),
}

struct Ground {
    at: usize,
    /// How pages are mapped: shared or not, and what is no file.
    flags: i32,
    file: i32,
    /// Filters that watch pages of it, and which.
    filters: Vec<(std::ops::Range<usize>, Filter)>,
}

/// Where the words of a page are, from the first page on.
fn ends(nth: usize) -> [usize; 2] {
    [nth * PAGE, (nth + 1) * PAGE - 8]
}

impl Ground {
    fn reserve(kind: Kind) -> Self {
        let none = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping where the kernel likes; a name that ends with a nul.
        let (at, file) = unsafe {
            let at = libc::mmap(std::ptr::null_mut(), ALL * PAGE, 0, none, -1, 0);
            (at, libc::memfd_create(c"pages".as_ptr(), 0))
        };
        let flags = match kind {
            Kind::Anonymous(flags) => flags | libc::MAP_ANONYMOUS,
            Kind::File(flags) => flags,
        };
        let mut ground = Self {
            at: at as usize,
            flags,
            file,
            filters: Vec::new(),
        };
        let watched = [0..PAGES, 0..1, 2..3, 3..5, PAGES - 1..PAGES];
        ground.filters = watched
            .map(|pages| {
                let start = ground.page(pages.start) as u64;
                let range = Range::new(start, (pages.len() * PAGE) as u64);
                (pages, Filter::watching(&[range.expect("pages")]))
            })
            .into();
        ground
    }

    fn page(&self, nth: usize) -> usize {
        self.at + (PAGES + nth) * PAGE
    }

    /// Everything is as it was; every page begins and ends with its number.
    fn make(&self) {
        let map = |at: usize, pages: usize, rights: i32, flags: i32| {
            let (at, flags) = (at as *mut libc::c_void, flags | libc::MAP_FIXED);
            // SAFETY: of what was reserved, in a process that has nothing else there.
            let mapped = unsafe { libc::mmap(at, pages * PAGE, rights, flags, self.file, 0) };
            assert_eq!(mapped, at);
        };
        let none = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        map(self.at, ALL, libc::PROT_NONE, none);
        // SAFETY: the file is this one's.
        let truncated =
            [0, PAGES * PAGE].map(|len| unsafe { libc::ftruncate(self.file, len as i64) });
        assert_eq!(truncated, [0, 0]);
        map(self.page(0), PAGES, 3, self.flags);
        let is_file = self.flags & libc::MAP_ANONYMOUS == 0;
        for nth in 0..PAGES {
            for at in ends(nth) {
                let number = nth + 1;
                if is_file {
                    // Not by way of the page, which would become a copy.
                    // SAFETY: a word is read.
                    let written = unsafe {
                        libc::pwrite(self.file, (&raw const number).cast(), 8, at as i64)
                    };
                    assert_eq!(written, 8);
                    let word = (self.page(0) + at) as *const usize;
                    // SAFETY: readable since just now.
                    assert_eq!(unsafe { word.read_volatile() }, number);
                } else {
                    // SAFETY: writable since just now.
                    unsafe { ((self.page(0) + at) as *mut usize).write(number) };
                }
            }
        }
    }

    /// Whether the page is as it was made.
    fn is_unchanged(&self, nth: usize) -> bool {
        let mut word = [0];
        let mut has_number = |at| read(self.page(0) + at, &mut word) && word == [nth + 1];
        if !ends(nth).into_iter().all(&mut has_number) {
            return false;
        }
        let own = |at: *mut libc::c_void| libc::iovec {
            iov_base: at,
            iov_len: size_of::<usize>(),
        };
        let local = own(word.as_mut_ptr().cast());
        let remote = own(self.page(nth) as *mut _);
        let pid = std::process::id() as libc::pid_t;
        // SAFETY: writes what is there, if it can be written; the kernel looks.
        unsafe { libc::process_vm_writev(pid, &local, 1, &remote, 1, 0) == 8 }
    }

    /// Makes the call on pages that are as they were, and says what was wrong with what it was said to do.
    fn try_call(&self, maps: &Maps, nr: libc::c_long, args: [usize; 6]) -> Result<(), String> {
        self.make();
        self.try_on(maps, nr, args, PAGES)
    }

    /// The same, on all pages but one that was made otherwise.
    fn try_on(
        &self,
        maps: &Maps,
        nr: libc::c_long,
        args: [usize; 6],
        but: usize,
    ) -> Result<(), String> {
        let mut call = call(nr, args.map(|arg| arg as u64));
        let mut changes = Changes::default();
        call.changes(&StandIn::AsItIs, maps, &mut changes);
        // SAFETY: on pages of the ground; what is moved elsewhere is unmapped below.
        let result = unsafe { gate::own_call(nr, args) };
        let outcome = call.outcome(result, maps);
        let told = |at: usize| {
            let holds = |(range, _): (Range, Cause)| {
                (range.start().get()..=range.last().get()).contains(&(at as u64))
            };
            changes.everything || changes.iter().any(holds)
        };
        let mut wrong = Vec::new();
        for nth in (0..PAGES).filter(|nth| *nth != but && !self.is_unchanged(*nth)) {
            if !told(self.page(nth)) {
                wrong.push(format!("page {nth} has changed, which was not told"));
            } else if outcome == Outcome::Unchanged {
                wrong.push(format!("page {nth} has changed, but unchanged was told"));
            }
            for (pages, filter) in &self.filters {
                if pages.contains(&nth) && filter.lets_through(nr, args) {
                    wrong.push(format!("page {nth} of {pages:?} was let through"));
                }
            }
        }
        self.forget_moved(nr, args, result);
        if wrong.is_empty() {
            return Ok(());
        }
        let args = args.map(|arg| format!("{arg:#x}")).join(", ");
        let at = self.page(0);
        Err(format!("{nr}({args}) = {result:x?} on {at:#x}: {wrong:?}"))
    }
}

impl Ground {
    /// Takes away what was moved elsewhere.
    fn forget_moved(&self, nr: libc::c_long, args: [usize; 6], result: Result<usize, i32>) {
        if let (libc::SYS_mremap, Ok(moved)) = (nr, result)
            && !(self.at..self.at + ALL * PAGE).contains(&moved)
        {
            // SAFETY: the kernel has put it there just now.
            unsafe { libc::munmap(moved as *mut _, args[2]) };
        }
    }

    /// Makes the call as it is, and once more as it is made where the pages are those of an arena: what it answers and what has changed
    /// is to be the same.
    fn try_in_arena(&self, maps: &Maps, nr: libc::c_long, args: [usize; 6]) -> Result<(), String> {
        let mut call = call(nr, args.map(|arg| arg as u64));
        let mut changes = Changes::default();
        call.changes(&StandIn::AsItIs, maps, &mut changes);
        let len = (ALL * PAGE) as u64;
        let arena = Range::new(self.at as u64, len).map_err(|error| error.to_string())?;
        let [bare, kept] = [None, Some(arena)].map(|arena| {
            self.make();
            let result = call.perform(&changes, arena.into_iter());
            let unchanged: [bool; PAGES] = std::array::from_fn(|nth| self.is_unchanged(nth));
            self.forget_moved(nr, args, result);
            let here = self.at..self.at + ALL * PAGE;
            // Elsewhere is where the kernel likes.
            (result.map(|at| here.contains(&at).then_some(at)), unchanged)
        });
        if bare == kept {
            return Ok(());
        }
        let args = args.map(|arg| format!("{arg:#x}")).join(", ");
        let at = self.page(0);
        Err(format!(
            "{nr}({args}) on {at:#x}: {bare:x?}, but in an arena {kept:x?}"
        ))
    }
}

fn try_in_arena(kind: Kind) -> Result<usize, String> {
    let ground = Ground::reserve(kind);
    let maps = Maps::open().map_err(|error| error.to_string())?;
    let mut made = 0;
    let mut call = |nr, args| {
        made += 1;
        ground.try_in_arena(&maps, nr, args)
    };
    for at in [ground.page(2), ground.page(2) + 8, ground.page(PAGES - 1)] {
        for len in LENS {
            call(libc::SYS_munmap, [at, len, 0, 0, 0, 0])?;
            for new in LENS {
                for flags in 0..8 {
                    for to in [7 * PAGE, 3 * PAGE, 7 * PAGE + 8] {
                        let to = ground.page(0) + to;
                        call(libc::SYS_mremap, [at, len, new, flags, to, 0])?;
                    }
                }
            }
        }
    }
    Ok(made)
}

/// Lengths that are rounded, and some that are not.
const LENS: [usize; 9] = [
    0,
    1,
    6,
    40,
    PAGE - 1,
    PAGE,
    PAGE + 1,
    2 * PAGE,
    3 * PAGE - 7,
];

fn try_calls(kind: Kind) -> Result<usize, String> {
    let ground = Ground::reserve(kind);
    let maps = Maps::open().map_err(|error| error.to_string())?;
    // SAFETY: numbers only.
    let own = unsafe { libc::syscall(libc::SYS_pidfd_open, std::process::id(), 0) } as usize;
    let mut made = 0;
    let mut call = |nr, args| {
        made += 1;
        ground.try_call(&maps, nr, args)
    };
    for at in [ground.page(2), ground.page(2) + 8, ground.page(PAGES - 1)] {
        for len in LENS {
            call(libc::SYS_munmap, [at, len, 0, 0, 0, 0])?;
            // In the file, which is mapped from its start on.
            let place = at - ground.page(0);
            if let Kind::File(_) = kind {
                let file = ground.file as usize;
                call(libc::SYS_ftruncate, [file, place + len, 0, 0, 0, 0])?;
                for mode in [0, 1, 2, 3, 8, 9, 16, 17, 18, 32, 33, 64, 65, 128] {
                    call(libc::SYS_fallocate, [file, mode, place, len, 0, 0])?;
                }
            }
            let vector = [at, len];
            for advice in (0..26).chain([102, 103]) {
                let vectors = vector.as_ptr() as usize;
                call(libc::SYS_process_madvise, [own, vectors, 1, advice, 0, 0])?;
            }
            for advice in (0..26).chain([102, 103]) {
                call(libc::SYS_madvise, [at, len, advice, 0, 0, 0])?;
            }
            for rights in 0..8 {
                call(libc::SYS_mprotect, [at, len, rights, 0, 0, 0])?;
                let none = usize::MAX;
                call(libc::SYS_pkey_mprotect, [at, len, rights, none, 0, 0])?;
            }
            let fixed = libc::MAP_FIXED | libc::MAP_ANONYMOUS | libc::MAP_PRIVATE;
            for more in [0, libc::MAP_FIXED_NOREPLACE, libc::MAP_GROWSDOWN] {
                let flags = (fixed | more) as usize;
                call(libc::SYS_mmap, [at, len, 3, flags, usize::MAX, 0])?;
            }
            for page in 0..4 {
                call(libc::SYS_remap_file_pages, [at, len, 0, page, 0, 0])?;
            }
            for new in LENS {
                for flags in 0..8 {
                    // Apart, over its own end, within a page, beyond what is mapped.
                    for to in [7 * PAGE, 3 * PAGE, 7 * PAGE + 8, (PAGES - 1) * PAGE] {
                        let to = ground.page(0) + to;
                        call(libc::SYS_mremap, [at, len, new, flags, to, 0])?;
                    }
                }
            }
        }
    }
    Ok(made)
}

/// Seals a page, which stays so for good. False where the kernel cannot: before Linux 6.10.
fn seal(at: usize) -> Result<bool, String> {
    const MSEAL: libc::c_long = 462;
    // SAFETY: a page of the ground.
    let refused = unsafe {
        libc::mprotect(at as *mut _, PAGE, libc::PROT_READ) != 0
            || libc::syscall(MSEAL, at, PAGE, 0) != 0
    };
    match io::Error::last_os_error().raw_os_error() {
        _ if !refused => Ok(true),
        Some(libc::ENOSYS) => Ok(false),
        errno => Err(format!("mseal: {errno:?}")),
    }
}

/// What changes the pages in front of one that is sealed, and is refused then.
fn try_sealed(kind: Kind) -> Result<usize, String> {
    let mut made = 0;
    for (nr, third) in [
        (libc::SYS_madvise, libc::MADV_DONTNEED),
        (libc::SYS_mprotect, libc::PROT_NONE),
        (libc::SYS_munmap, 0),
    ] {
        let ground = Ground::reserve(kind);
        ground.make();
        let at = ground.page(2);
        if !seal(ground.page(4))? {
            return Ok(made);
        }
        let maps = Maps::open().map_err(|error| error.to_string())?;
        ground.try_on(&maps, nr, [at, 4 * PAGE, third as usize, 0, 0, 0], 4)?;
        made += 1;
    }
    Ok(made)
}

/// An unmap that is made in two parts, as an arena ends between them, and the second is refused.
fn try_half(kind: Kind) -> Result<usize, String> {
    let ground = Ground::reserve(kind);
    ground.make();
    if !seal(ground.page(4))? {
        return Ok(0);
    }
    let maps = Maps::open().map_err(|error| error.to_string())?;
    let args = [ground.page(2) as u64, 4 * PAGE as u64, 0, 0, 0, 0];
    let mut call = call(libc::SYS_munmap, args);
    let mut changes = Changes::default();
    call.changes(&StandIn::AsItIs, &maps, &mut changes);
    let arena = pages(ground.page(2), PAGE);
    let result = call.perform(&changes, arena.into_iter());
    let outcome = call.outcome(result, &maps);
    let half = !ground.is_unchanged(2) && ground.is_unchanged(3);
    match (result, half, outcome) {
        (Err(_), true, Outcome::Changed) => Ok(1),
        wrong => Err(format!("in two parts: {wrong:?}")),
    }
}

/// A mapping that whose file it is does not want, in the place of another: a writable one of a map of BPF's that was frozen.
fn try_unwanted(kind: Kind) -> Result<usize, String> {
    const MAP_CREATE: usize = 0;
    const MAP_FREEZE: usize = 22;
    const ARRAY: u32 = 2;
    const MMAPABLE: u32 = 1 << 10;
    let bpf = |what: usize, about: &[u32]| {
        // SAFETY: the kernel reads as many bytes as it is told.
        unsafe { libc::syscall(libc::SYS_bpf, what, about.as_ptr(), size_of_val(about)) }
    };
    let map = bpf(MAP_CREATE, &[ARRAY, 4, PAGE as u32, 1, MMAPABLE]);
    if map < 0 || bpf(MAP_FREEZE, &[map as u32]) < 0 {
        // Not everybody may have one.
        return Ok(0);
    }
    let ground = Ground::reserve(kind);
    let maps = Maps::open().map_err(|error| error.to_string())?;
    let (at, fixed) = (ground.page(2), libc::MAP_FIXED | libc::MAP_SHARED);
    let args = [at, PAGE, 3, fixed as usize, map as usize, 0];
    ground.try_call(&maps, libc::SYS_mmap, args).map(|()| 1)
}

/// Runs `tries` on pages of each kind, each in a process of its own: there no other thread maps anything where room was made.
fn on_each_kind(least: usize, tries: impl Fn(Kind) -> Result<usize, String>) {
    let both = [libc::MAP_PRIVATE, libc::MAP_SHARED];
    let anonymous = both.map(Kind::Anonymous).into_iter();
    for kind in anonymous.chain(both.map(Kind::File)) {
        let mut ends = [0; 2];
        // SAFETY: room for two descriptors.
        assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
        // SAFETY: the child allocates, as C libraries allow, and takes no lock of this process's. It says by the pipe what it has found.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let said = match tries(kind) {
                Ok(made) => format!("made {made}"),
                Err(wrong) => wrong,
            };
            // SAFETY: so many bytes are there; and there is nothing to return to.
            unsafe {
                libc::write(ends[1], said.as_ptr().cast(), said.len());
                libc::_exit(0);
            }
        }
        let mut said = [0u8; 4096];
        // SAFETY: the child's and the pipe's, which are this test's own; there is room for so many bytes.
        let len = unsafe {
            libc::close(ends[1]);
            let len = libc::read(ends[0], said.as_mut_ptr().cast(), said.len());
            libc::close(ends[0]);
            libc::waitpid(child, std::ptr::null_mut(), 0);
            len
        };
        let said = String::from_utf8_lossy(&said[..usize::try_from(len).unwrap()]);
        let made = said.strip_prefix("made ");
        let made: Option<usize> = made.and_then(|made| made.parse().ok());
        assert!(made.is_some_and(|made| made > least), "{kind:?}: {said}");
    }
}

#[test]
fn whatever_this_kernel_changes_is_told() {
    on_each_kind(5_000, |kind| {
        try_sealed(kind)?;
        try_half(kind)?;
        try_unwanted(kind)?;
        try_calls(kind)
    });
}

#[test]
fn a_call_on_an_arena_answers_and_changes_what_it_does_elsewhere() {
    on_each_kind(3_000, try_in_arena);
}
