//! The kernel's own MMU-notifier stream of this process.
//!
//! An empty virtual machine makes the kernel register a notifier for the address space of this process, and each invalidation
//! then passes a tracepoint, with its range, before the pages change. It is read from a ring for each processor. The kernel keeps
//! back what lies elsewhere; what another process does with addresses of its own that happen to be the same is kept apart by the
//! process that every record names. Each virtual machine of the process has a notifier, and each passes the tracepoint: beside a
//! [`Guest`](crate::Guest) or another stream everything is told as often.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use kvm_ioctls::{Kvm, VmFd};
use shootdown::Range;

use crate::error::KvmError;
use crate::ring::{Entry, Ring};
use crate::tracepoint::Tracepoint;

/// An invalidation that the kernel has made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unmapped {
    /// Of what, as the kernel has it: what is watched may be a part.
    pub range: Range,
    /// The process of the thread that made it: this one; or another one, or the kernel's own (0), who changed memory that they share with
    /// this one, or memory of their own at the same addresses.
    pub process: u32,
    /// The thread that made it.
    pub thread: u32,
    /// When: nanoseconds of CLOCK_MONOTONIC.
    pub at: u64,
}

/// What the stream tells.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum News {
    /// An invalidation.
    Unmapped(Unmapped),
    /// So many invalidations at least are not told of: anything may have changed.
    Lost(u64),
}

/// Reads the kernel's invalidations of some ranges. Whoever falls behind is told how much was lost.
#[derive(Debug)]
pub struct Stream {
    /// Its notifier is what makes the kernel pass the tracepoint.
    _vm: VmFd,
    rings: Vec<Ring>,
}

/// Bytes of a ring, in pages of 4 KiB: some thousand records.
pub(crate) const PAGES: usize = 128;

impl Stream {
    /// Begins to note invalidations that overlap one of `ranges`. Needs the right to trace: root, or CAP_PERFMON and a tracefs that it can
    /// read.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn open(ranges: &[Range]) -> Result<Self, KvmError> {
        Self::with_pages(ranges, PAGES)
    }

    pub(crate) fn with_pages(ranges: &[Range], pages: usize) -> Result<Self, KvmError> {
        let kvm = Kvm::new().map_err(|error| KvmError::NoKvm(error.into()))?;
        let tracepoint = Tracepoint::find()?;
        let filter: Vec<String> = ranges
            .iter()
            .map(|range| {
                let (start, last) = (range.start().get(), range.last().get());
                format!("(start <= {last} && end > {start})")
            })
            .collect();
        let filter = CString::new(filter.join(" || ")).expect("numbers and signs");
        let open = |cpu| Ring::open(tracepoint, cpu, pages, &filter);
        let rings = processors().and_then(|all| all.into_iter().map(open).collect());
        let rings = rings.map_err(|error| match error.kind() {
            io::ErrorKind::PermissionDenied => KvmError::NoTracepoint(error),
            _ => KvmError::System {
                call: "perf_event_open",
                error,
            },
        })?;
        // The machine last: what it makes the kernel tell is read.
        let vm = kvm.create_vm().map_err(KvmError::system("KVM_CREATE_VM"))?;
        Ok(Self { _vm: vm, rings })
    }

    /// Waits until there is something to read, here or from the other descriptor, or for `time`.
    pub fn wait(&self, time: Duration, other: Option<&OwnedFd>) {
        let rings = self.rings.iter().map(Ring::raw);
        let mut fds: Vec<libc::pollfd> = rings
            .chain(other.map(AsRawFd::as_raw_fd))
            .map(|fd| libc::pollfd {
                fd,
                events: libc::POLLIN,
                revents: 0,
            })
            .collect();
        let millis = time.as_millis().min(i32::MAX as u128) as i32;
        // SAFETY: as many descriptors as the vector has.
        unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, millis) };
    }

    /// Takes what is there, processor by processor. Neither waits nor allocates.
    pub fn drain(&self, mut each: impl FnMut(News)) {
        for ring in &self.rings {
            ring.drain(|entry| {
                each(match entry {
                    Entry::Lost(count) => News::Lost(count),
                    Entry::Sample(sample) => {
                        match Range::inclusive(sample.start, sample.end.wrapping_sub(1)) {
                            Ok(range) => News::Unmapped(Unmapped {
                                range,
                                process: sample.process,
                                thread: sample.thread,
                                at: sample.time,
                            }),
                            Err(_) => News::Lost(1),
                        }
                    }
                });
            });
        }
    }
}

/// The processors that are there, as `0-3,8` in a file of the kernel.
fn processors() -> io::Result<Vec<usize>> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/online")?;
    parse(text.trim()).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

fn parse(list: &str) -> Option<Vec<usize>> {
    let mut all = Vec::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        all.extend(first.parse::<usize>().ok()?..=last.parse().ok()?);
    }
    Some(all)
}

#[cfg(test)]
pub(crate) mod tests {
    use memmap2::{MmapMut, MmapOptions};

    use super::*;

    pub(crate) fn page() -> (MmapMut, Range) {
        let memory = MmapOptions::new().len(0x4000).map_anon().unwrap();
        let range = Range::new(memory.as_ptr() as u64, 0x4000).unwrap();
        (memory, range)
    }

    pub(crate) fn open(range: Range, pages: usize) -> Option<Stream> {
        match Stream::with_pages(&[range], pages) {
            Err(error @ (KvmError::NoKvm(_) | KvmError::NoTracepoint(_))) => {
                eprintln!("SKIPPED: {error}");
                None
            }
            stream => Some(stream.unwrap()),
        }
    }

    pub(crate) fn discard(memory: &MmapMut, page: usize) {
        // SAFETY: a page of the test's own, which nobody refers to.
        let said = unsafe {
            let at = memory.as_ptr().add(page * 0x1000).cast_mut();
            at.write_volatile(1);
            libc::madvise(at.cast(), 0x1000, libc::MADV_DONTNEED)
        };
        assert_eq!(said, 0);
    }

    #[test]
    fn a_discard_is_told_with_its_range_its_thread_and_its_time() {
        let _alone = crate::alone();
        let (memory, range) = page();
        let (other, _) = page();
        let Some(stream) = open(range, PAGES) else {
            return;
        };
        let before = crate::clock::now();
        discard(&other, 0);
        discard(&memory, 2);
        let after = crate::clock::now();
        stream.wait(Duration::from_secs(1), None);
        let mut news = Vec::new();
        stream.drain(|one| news.push(one));
        let [News::Unmapped(one)] = news[..] else {
            panic!("{news:?}");
        };
        assert_eq!(one.range.start().get(), range.start().get() + 0x2000);
        assert_eq!(one.range.len(), 0x1000);
        assert_eq!(one.process, std::process::id());
        assert!(before <= one.at && one.at <= after);
    }

    #[test]
    fn what_does_not_fit_is_said_to_be_lost() {
        let _alone = crate::alone();
        let (memory, range) = page();
        let Some(stream) = open(range, 1) else { return };
        let (mut seen, mut lost) = (0, 0);
        let mut read = || {
            stream.drain(|one| match one {
                News::Unmapped(_) => seen += 1,
                News::Lost(count) => lost += count,
            });
        };
        (0..1000).for_each(|_| discard(&memory, 1));
        read();
        discard(&memory, 1);
        read();
        assert!(seen > 10 && lost > 0, "{seen}, {lost}");
        assert_eq!(seen + lost, 1001);
    }

    #[test]
    fn processors_are_read_as_the_kernel_writes_them() {
        assert_eq!(parse("0"), Some(vec![0]));
        assert_eq!(parse("0-2,5,7-8"), Some(vec![0, 1, 2, 5, 7, 8]));
        assert_eq!(parse("a"), None);
    }
}
