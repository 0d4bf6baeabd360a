//! What this kernel changes, held against what the calls are told to: the calls are made, in a process of their own, on pages with contents
//! that are looked at before and after.

use super::*;

/// Pages that calls are made on, with as many on each side that are not there to be changed.
const PAGES: usize = 12;
const ALL: usize = 3 * PAGES;

struct Ground {
    at: usize,
    shared: i32,
}

impl Ground {
    fn reserve(shared: i32) -> Self {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping where the kernel likes.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), ALL * PAGE, 0, flags, -1, 0) };
        let at = at as usize;
        Self { at, shared }
    }

    fn page(&self, nth: usize) -> usize {
        self.at + (PAGES + nth) * PAGE
    }

    /// Everything is as it was; every page begins with its number.
    fn make(&self) {
        let fixed = libc::MAP_FIXED | libc::MAP_ANONYMOUS;
        let map = |at: usize, pages: usize, rights: i32, flags: i32| {
            let at = at as *mut libc::c_void;
            // SAFETY: of what was reserved, in a process that has nothing else there.
            let mapped = unsafe { libc::mmap(at, pages * PAGE, rights, fixed | flags, -1, 0) };
            assert_eq!(mapped, at);
        };
        map(self.at, ALL, libc::PROT_NONE, libc::MAP_PRIVATE);
        map(self.page(0), PAGES, 3, self.shared);
        for nth in 0..PAGES {
            // SAFETY: writable since just now.
            unsafe { (self.page(nth) as *mut usize).write(nth + 1) };
        }
    }

    /// Whether the page is as it was made.
    fn is_unchanged(&self, nth: usize) -> bool {
        let mut word = [0];
        if !read(self.page(nth), &mut word) || word != [nth + 1] {
            return false;
        }
        let own = |at: *mut libc::c_void| libc::iovec {
            iov_base: at,
            iov_len: size_of::<usize>(),
        };
        let (local, remote) = (own(word.as_mut_ptr().cast()), own(self.page(nth) as *mut _));
        let pid = std::process::id() as libc::pid_t;
        // SAFETY: writes what is there, if it can be written; the kernel looks.
        unsafe { libc::process_vm_writev(pid, &local, 1, &remote, 1, 0) == word.len() as isize * 8 }
    }

    /// Makes the call, and says what was wrong with what it was said to do.
    fn try_call(&self, maps: &Maps, nr: libc::c_long, args: [usize; 6]) -> Result<(), String> {
        self.make();
        let mut call = Call::new(&libc::seccomp_data {
            nr: nr as i32,
            arch: 0,
            instruction_pointer: 0,
            args: args.map(|arg| arg as u64),
        });
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
        for nth in (0..PAGES).filter(|nth| !self.is_unchanged(*nth)) {
            if !told(self.page(nth)) {
                wrong.push(format!("page {nth} has changed, which was not told"));
            } else if outcome == Outcome::Unchanged {
                wrong.push(format!("page {nth} has changed, but unchanged was told"));
            }
        }
        if let (libc::SYS_mremap, Ok(moved)) = (nr, result)
            && !(self.at..self.at + ALL * PAGE).contains(&moved)
        {
            // SAFETY: the kernel has put it there just now.
            unsafe { libc::munmap(moved as *mut _, args[2]) };
        }
        if wrong.is_empty() {
            return Ok(());
        }
        let args = args.map(|arg| format!("{arg:#x}")).join(", ");
        let at = self.page(0);
        Err(format!("{nr}({args}) = {result:x?} on {at:#x}: {wrong:?}"))
    }
}

fn try_calls(shared: i32) -> Result<usize, String> {
    let ground = Ground::reserve(shared);
    let maps = Maps::open().map_err(|error| error.to_string())?;
    let mut made = 0;
    let mut call = |nr, args| {
        made += 1;
        ground.try_call(&maps, nr, args)
    };
    let lens = [
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
    for at in [ground.page(2), ground.page(2) + 8, ground.page(PAGES - 1)] {
        for len in lens {
            call(libc::SYS_munmap, [at, len, 0, 0, 0, 0])?;
            for advice in 0..26 {
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
            for new in lens {
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

#[test]
fn whatever_this_kernel_changes_is_told() {
    for shared in [libc::MAP_PRIVATE, libc::MAP_SHARED] {
        let mut ends = [0; 2];
        // SAFETY: room for two descriptors.
        assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
        // In a process of its own: no other thread maps anything where this has made room. It says by the pipe what it has found.
        // SAFETY: the child allocates, as C libraries allow, and takes no lock of this process's.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let said = match try_calls(shared) {
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
        let made = said
            .strip_prefix("made ")
            .and_then(|made| made.parse().ok());
        assert!(made.is_some_and(|made: usize| made > 5_000), "{said}");
    }
}
