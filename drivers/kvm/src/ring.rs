//! One processor's ring of `perf` records.
//!
//! The kernel writes records and moves the head on; the reader moves the tail. What does not fit is counted. The record that says
//! so (`PERF_RECORD_LOST`) only comes with the next one that does fit, so the count itself is read.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};

use crate::tracepoint::Tracepoint;

// `include/uapi/linux/perf_event.h`.
const TYPE_TRACEPOINT: u32 = 2;
const SAMPLE_TID: u64 = 1 << 1;
const SAMPLE_TIME: u64 = 1 << 2;
const SAMPLE_RAW: u64 = 1 << 10;
/// Reads give the count of records, and of those that did not fit. Linux 6.0.
const FORMAT_LOST: u64 = 1 << 4;
/// `use_clockid`.
const USE_CLOCK: u64 = 1 << 25;
const CLOSE_ON_EXEC: libc::c_ulong = 1 << 3;
/// `_IOW('$', 6, char *)`.
const SET_FILTER: libc::c_ulong = 1 << 30 | 8 << 16 | 0x24 << 8 | 6;
const RECORD_THROTTLE: u32 = 5;
const RECORD_SAMPLE: u32 = 9;
// Offsets in `struct perf_event_mmap_page`.
const HEAD: usize = 1024;
const TAIL: usize = 1032;
const PAGE: usize = 4096;

/// `struct perf_event_attr`, as far as version 5 of it goes.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    period: u64,
    sample: u64,
    read: u64,
    flags: u64,
    wake_up: u32,
    breakpoint: u32,
    config1: u64,
    config2: u64,
    branches: u64,
    user_registers: u64,
    user_stack: u32,
    clock: i32,
    interrupt_registers: u64,
    watermark: u32,
    stack: u16,
    reserved: u16,
}

/// A record of the tracepoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Sample {
    pub(crate) process: u32,
    pub(crate) thread: u32,
    /// Nanoseconds of CLOCK_MONOTONIC.
    pub(crate) time: u64,
    pub(crate) start: u64,
    /// The first address behind.
    pub(crate) end: u64,
}

/// What is in a ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Entry {
    Sample(Sample),
    /// So many did not fit, or nobody knows how many.
    Lost(u64),
}

#[derive(Debug)]
pub(crate) struct Ring {
    fd: OwnedFd,
    map: MmapRaw,
    tracepoint: Tracepoint,
    /// How many lost ones have been told.
    lost: AtomicU64,
}

impl Ring {
    /// The records of one processor that pass the filter. `pages` of them, a power of two.
    pub(crate) fn open(
        tracepoint: Tracepoint,
        cpu: usize,
        pages: usize,
        filter: &std::ffi::CStr,
    ) -> io::Result<Self> {
        let attributes = Attributes {
            kind: TYPE_TRACEPOINT,
            size: size_of::<Attributes>() as u32,
            config: tracepoint.id,
            period: 1,
            sample: SAMPLE_TID | SAMPLE_TIME | SAMPLE_RAW,
            read: FORMAT_LOST,
            flags: USE_CLOCK,
            wake_up: 1,
            clock: libc::CLOCK_MONOTONIC,
            ..Attributes::default()
        };
        // SAFETY: the kernel reads the attributes, which say how long they are.
        let fd = unsafe {
            let attributes = &raw const attributes;
            libc::syscall(
                libc::SYS_perf_event_open,
                attributes,
                -1,
                cpu,
                -1,
                CLOSE_ON_EXEC,
            )
        };
        if fd == -1 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: opened just now.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        // SAFETY: a text that ends.
        if unsafe { libc::ioctl(fd.as_raw_fd(), SET_FILTER, filter.as_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let map = MmapOptions::new().len((1 + pages) * PAGE).map_raw(&fd)?;
        Ok(Self {
            fd,
            map,
            tracepoint,
            lost: AtomicU64::new(0),
        })
    }

    pub(crate) fn raw(&self) -> i32 {
        self.fd.as_raw_fd()
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        // SAFETY: the first page of the mapping is there for as long as this; the word is aligned, and the kernel changes it as
        // a whole.
        unsafe { &*self.map.as_mut_ptr().add(at).cast::<AtomicU64>() }
    }

    /// Copies bytes of the data, from position `at` on.
    fn copy(&self, at: u64, into: &mut [u8]) {
        let size = self.map.len() - PAGE;
        for (nth, byte) in into.iter_mut().enumerate() {
            let offset = PAGE + (at as usize + nth) % size;
            // SAFETY: inside the mapping; the kernel does not write between tail and head.
            *byte = unsafe { self.map.as_ptr().add(offset).read_volatile() };
        }
    }

    /// Takes what is there.
    pub(crate) fn drain(&self, mut each: impl FnMut(Entry)) {
        // Acquire, with the kernel's barrier before it moves the head: the records are there.
        let head = self.word(HEAD).load(Ordering::Acquire);
        let mut tail = self.word(TAIL).load(Ordering::Relaxed);
        while tail < head {
            let mut header = [0; 8];
            self.copy(tail, &mut header);
            let kind = u32_at(&header, 0);
            let size = u64::from(u16::from_le_bytes([header[6], header[7]]));
            let mut body = [0; 256];
            let len = (size as usize).saturating_sub(8).min(body.len());
            self.copy(tail + 8, &mut body[..len]);
            if let Some(entry) = self.entry(kind, &body[..len]) {
                each(entry);
            }
            if size == 0 {
                // Nothing that the kernel writes: the rest cannot be read.
                each(Entry::Lost(1));
                tail = head;
                break;
            }
            tail += size;
        }
        // Release, with the kernel's control dependency on the tail: what was read was read.
        self.word(TAIL).store(tail, Ordering::Release);
        let more = match self.count_lost() {
            // Relaxed: only what has come since the last look counts.
            Some(lost) => lost.saturating_sub(self.lost.swap(lost, Ordering::Relaxed)),
            // It may be anything: each look says so.
            None => 1,
        };
        if more > 0 {
            each(Entry::Lost(more));
        }
    }

    /// How many records did not fit so far.
    fn count_lost(&self) -> Option<u64> {
        let mut counts = [0u64; 2];
        let len = size_of_val(&counts);
        // SAFETY: the buffer is as long as said.
        let read = unsafe { libc::read(self.raw(), counts.as_mut_ptr().cast(), len) };
        (read == len as isize).then_some(counts[1])
    }

    fn entry(&self, kind: u32, body: &[u8]) -> Option<Entry> {
        match kind {
            RECORD_SAMPLE => {
                // Process, thread, time, length of the tracepoint's own record, that record.
                const RAW: usize = 20;
                let raw = body.get(RAW..)?;
                let Tracepoint { start, end, .. } = self.tracepoint;
                if raw.len() < end.max(start) + 8 {
                    return Some(Entry::Lost(1));
                }
                Some(Entry::Sample(Sample {
                    process: u32_at(body, 0),
                    thread: u32_at(body, 4),
                    time: u64_at(body, 8),
                    start: u64_at(raw, start),
                    end: u64_at(raw, end),
                }))
            }
            RECORD_THROTTLE => Some(Entry::Lost(1)),
            _ => None,
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..]
        .first_chunk()
        .map_or(0, |word| u32::from_le_bytes(*word))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..]
        .first_chunk()
        .map_or(0, |word| u64::from_le_bytes(*word))
}
