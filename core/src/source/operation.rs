//! What can be done to memory, and how much of it a source is told.

/// Names each operation once: the enum, the set of them, and the text.
macro_rules! operations {
    ($($(#[doc = $doc:literal])* $name:ident $flag:ident $text:literal;)*) => {
        /// Something that changes the pages behind a range.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[non_exhaustive]
        #[repr(u8)]
        pub enum Operation {
            $($(#[doc = $doc])* $name,)*
        }

        impl Operation {
            /// All of them, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// As one writes it.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }

        bitflags::bitflags! {
            /// A set of operations.
            #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
            pub struct Operations: u64 {
                $($(#[doc = $doc])* const $flag = 1 << Operation::$name as u32;)*
            }
        }
    };
}

operations! {
    /// `munmap`.
    Munmap MUNMAP "munmap";
    /// `mmap` with `MAP_FIXED` over it.
    MapFixed MAP_FIXED "mmap MAP_FIXED";
    /// `mremap` that moves it away.
    MremapMove MREMAP_MOVE "mremap, moved";
    /// `mremap` that makes it shorter.
    MremapShrink MREMAP_SHRINK "mremap, shrunk";
    /// `mremap` that moves something else onto it.
    MremapOver MREMAP_OVER "mremap, onto it";
    /// `mremap` that moves the pages and leaves the addresses.
    MremapDontunmap MREMAP_DONTUNMAP "mremap DONTUNMAP";
    /// `madvise(MADV_DONTNEED)`.
    Dontneed DONTNEED "madvise DONTNEED";
    /// `madvise(MADV_DONTNEED_LOCKED)`.
    DontneedLocked DONTNEED_LOCKED "madvise DONTNEED_LOCKED";
    /// `madvise(MADV_FREE)`.
    Free FREE "madvise FREE";
    /// `madvise(MADV_REMOVE)`: a hole in the file behind it.
    Remove REMOVE "madvise REMOVE";
    /// `madvise(MADV_PAGEOUT)`.
    Pageout PAGEOUT "madvise PAGEOUT";
    /// `madvise(MADV_COLLAPSE)`: other frames, huge ones.
    Collapse COLLAPSE "madvise COLLAPSE";
    /// `madvise(MADV_GUARD_INSTALL)`.
    GuardInstall GUARD_INSTALL "madvise GUARD_INSTALL";
    /// `process_madvise` of this process.
    ProcessMadvise PROCESS_MADVISE "process_madvise";
    /// `mprotect`.
    Mprotect MPROTECT "mprotect";
    /// `pkey_mprotect`.
    PkeyMprotect PKEY_MPROTECT "pkey_mprotect";
    /// `remap_file_pages`.
    RemapFilePages REMAP_FILE_PAGES "remap_file_pages";
    /// `brk` that takes heap away.
    Brk BRK "brk";
    /// `shmdt`.
    Shmdt SHMDT "shmdt";
    /// `shmat` with `SHM_REMAP` over it.
    ShmatRemap SHMAT_REMAP "shmat SHM_REMAP";
    /// `fallocate` that punches, zeroes or collapses the file behind it.
    Fallocate FALLOCATE "fallocate PUNCH_HOLE";
    /// `ftruncate` of the file behind it.
    Ftruncate FTRUNCATE "ftruncate";
    /// `truncate` of the file behind it, by its path.
    Truncate TRUNCATE "truncate";
    /// `mbind` that moves pages to other nodes: other frames.
    Mbind MBIND "mbind MOVE";
    /// `move_pages`.
    MovePages MOVE_PAGES "move_pages";
    /// `migrate_pages`.
    MigratePages MIGRATE_PAGES "migrate_pages";
    /// `UFFDIO_MOVE` of a userfaultfd: the pages go to another address.
    UffdMove UFFD_MOVE "userfaultfd MOVE";
    /// `UFFDIO_WRITEPROTECT` of a userfaultfd.
    UffdWriteProtect UFFD_WRITE_PROTECT "userfaultfd WRITEPROTECT";
    /// `open` with `O_TRUNC` of the file behind it.
    OpenTruncate OPEN_TRUNCATE "open O_TRUNC";
    /// `fork`: private pages become copy-on-write.
    Fork FORK "fork";
    /// A `madvise(MADV_DONTNEED)` that an io_uring does.
    IoUringMadvise IO_URING_MADVISE "io_uring MADVISE";
    /// A punching `fallocate` that an io_uring does.
    IoUringFallocate IO_URING_FALLOCATE "io_uring FALLOCATE";
    /// An `ftruncate` that an io_uring does.
    IoUringFtruncate IO_URING_FTRUNCATE "io_uring FTRUNCATE";
    /// Another process punches or truncates the file behind it.
    OtherProcess OTHER_PROCESS "another process's punch";
}

impl Operation {
    /// The set of this one.
    pub const fn flag(self) -> Operations {
        Operations::from_bits_truncate(1 << self as u32)
    }
}

impl std::fmt::Display for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl Operations {
    /// What threads of the process do by system calls of their own. Left out is what no source of this crate can hold up: fork,
    /// `open` with `O_TRUNC`, io_uring, other processes.
    pub const CALLS: Self = Self::all()
        .difference(Self::FORK)
        .difference(Self::OPEN_TRUNCATE)
        .difference(Self::IO_URING_MADVISE)
        .difference(Self::IO_URING_FALLOCATE)
        .difference(Self::IO_URING_FTRUNCATE)
        .difference(Self::OTHER_PROCESS);

    /// One by one.
    pub fn each(self) -> impl Iterator<Item = Operation> {
        Operation::ALL
            .iter()
            .copied()
            .filter(move |one| self.contains(one.flag()))
    }
}

bitflags::bitflags! {
    /// How much of an operation a source is told. Empty: it does not see it.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
    pub struct Sees: u8 {
        /// It is told, perhaps when the pages are gone.
        const TOLD = 1;
        /// It is told while the old pages are still there.
        const BEFORE = 2;
        /// The operation waits until every handler has run and every device has acknowledged.
        const BARRIER = 4;
        /// It is told when the pages have changed.
        const END = 8;
        /// Now and then it is not told.
        const LOSSY = 16;
    }
}

impl std::fmt::Display for Sees {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if !self.contains(Self::TOLD) {
            return f.write_str("does not see");
        }
        let mut parts = vec![if self.contains(Self::BEFORE) {
            "before"
        } else if self.contains(Self::END) {
            "late"
        } else {
            "beside"
        }];
        for (flag, text) in [
            (Self::BARRIER, "barrier"),
            (Self::END, "end"),
            (Self::LOSSY, "lossy"),
        ] {
            if self.contains(flag) {
                parts.push(text);
            }
        }
        f.write_str(&parts.join("+"))
    }
}

bitflags::bitflags! {
    /// What a driver needs to be told of changes that somebody else makes.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
    pub struct Needs: u8 {
        /// While the old pages are still there.
        const BEFORE = 2;
        /// So that the change waits for its devices.
        const BARRIER = 4;
        /// When the pages have changed.
        const END = 8;
        /// Also where nothing watches the space: without a source there a registration is refused.
        const FOREIGN = 32;
        /// Its device takes a page fault rather than go wrong: it is registered whatever is not seen.
        const TOLERATES_FAULTS = 64;
    }
}

impl Needs {
    /// What [`Notifier::needs`](crate::Notifier::needs) says unless it is told otherwise.
    pub const BEFORE_AND_BARRIER: Self = Self::BEFORE.union(Self::BARRIER);

    /// What of the needs `sees` does not meet.
    pub(crate) fn lacks(self, sees: Sees) -> bool {
        let wanted = Sees::TOLD | Sees::from_bits_truncate(self.bits());
        !sees.contains(wanted) || sees.contains(Sees::LOSSY)
    }
}

impl std::fmt::Display for Needs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let timing = Sees::TOLD | Sees::from_bits_truncate(self.bits());
        if timing == Sees::TOLD {
            return f.write_str("to be told");
        }
        write!(f, "{timing}")
    }
}
