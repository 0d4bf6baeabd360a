//! Physical memory: frames of 4 KiB that the process maps and devices reach by number.
//!
//! All frames are one memfd. [`ModelMemory`](crate::ModelMemory) maps pieces of it where the application sees them;
//! here it is mapped once more, whole and in order of frame numbers, which is how a device reaches it: frame and
//! offset, no page table, no rights, as DMA does. What a device does to a frame that has been given to somebody else
//! really happens to that somebody.
//!
//! # Concurrency
//! Device and CPU accesses race by design. Devices use relaxed atomic accesses, of words where the address allows and
//! of bytes at the ends, and promise no more than hardware does: aligned words are whole, their order is nobody's
//! business until a completion has been seen. The linear mapping is not inherited by child processes
//! (`MADV_DONTFORK`): the devices belong to the parent.
//!
//! The only lock is the allocator's; nothing else is taken while it is held, and nothing under it allocates or waits.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};
// Not the primitive ones: these are words of the devices' memory, and nothing is decided by them.
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use memmap2::{Advice, MmapOptions, MmapRaw};
use shootdown::{Frame, MemoryError};
use shootdown_primitive::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::buddy::{Buddy, Chain, FreeError};
use crate::error::ModelError;

/// Bytes of a frame.
pub(crate) const FRAME_BYTES: u64 = 4096;

/// The most frames that physical memory can have (256 GiB): a shadow entry names a frame in 26 bits.
pub(crate) const MAX_FRAMES: u64 = 1 << 26;

/// Bytes of a word, the unit of device accesses.
const WORD: usize = size_of::<u64>();

/// A memfd of frames, mapped in order for devices, with a buddy allocator over them.
pub struct Physical {
    file: File,
    linear: MmapRaw,
    buddy: Mutex<Buddy>,
    frames: u64,
}

impl Physical {
    /// `frames` frames of 4 KiB, all free. Memory is used only for those that are touched. May wait (system calls).
    ///
    /// # Errors
    /// [`ModelError::Frames`] for none or more than 2^26; [`ModelError::System`].
    pub fn new(frames: u64) -> Result<Arc<Self>, ModelError> {
        if frames == 0 || frames > MAX_FRAMES {
            return Err(ModelError::Frames {
                frames,
                limit: MAX_FRAMES,
            });
        }
        let bytes = frames * FRAME_BYTES;
        let failed = |call| {
            move |error: io::Error| ModelError::System {
                call,
                bytes,
                errno: error.kind(),
            }
        };
        let file = memfd().map_err(failed("memfd_create"))?;
        file.set_len(bytes).map_err(failed("ftruncate"))?;
        seal(&file, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW).map_err(failed("fcntl"))?;
        let linear = MmapOptions::new()
            .len(bytes as usize)
            .map_raw(&file)
            .map_err(failed("mmap"))?;
        linear.advise(Advice::DontFork).map_err(failed("madvise"))?;
        Ok(Arc::new(Self {
            file,
            linear,
            buddy: Mutex::new(Buddy::new(frames as u32)),
            frames,
        }))
    }

    /// How many frames there are.
    pub fn total(&self) -> u64 {
        self.frames
    }

    /// How many of them are free. Equal to [`Physical::total`] once every memory on this bus is dropped: what is missing
    /// then has leaked.
    pub fn free_frames(&self) -> u64 {
        self.buddy().free()
    }

    /// The memfd, to map frames from, or to read and write as a file: frame `n` begins at byte `n * 4096`. Whoever writes to frames
    /// that are not theirs destroys somebody's data, as a device does.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Takes nothing yet; [`Blocks::extend`] does.
    pub(crate) fn blocks(&self) -> Blocks<'_> {
        Blocks {
            physical: self,
            chain: Chain::EMPTY,
        }
    }

    /// Gives `frames` back.
    ///
    /// # Panics
    /// When one of them is free already or does not exist: the page tables are wrong then, and going on would hand the
    /// same frame to two owners.
    pub(crate) fn give_back(&self, frames: Range<u64>) {
        let result = self.buddy().give_back(frames);
        insist(result);
    }

    /// Fills `frames` with zeros. Devices may look on, or spoil it through stale entries.
    pub(crate) fn zero(&self, frames: Range<u64>) {
        for frame in frames {
            let (words, _) = self.frame(Frame(frame)).as_chunks::<WORD>();
            for word in words {
                // Relaxed: whoever maps the frame publishes it with its page-table entry's release store.
                word_of(word).store(0, Ordering::Relaxed);
            }
        }
    }

    /// Whether there is such a frame.
    pub(crate) fn has(&self, frame: Frame) -> bool {
        frame.0 < self.frames
    }

    /// Whether somebody has the frame.
    pub(crate) fn is_used(&self, frame: Frame) -> bool {
        self.buddy().is_used(frame.0)
    }

    /// Copies the frame's bytes from `offset` on. They lie within the frame.
    pub(crate) fn read(&self, frame: Frame, offset: usize, into: &mut [u8]) {
        let from = &self.frame(frame)[offset..offset + into.len()];
        let (head, words, tail) = split(from);
        let (into_head, rest) = into.split_at_mut(head.len());
        let (into_words, into_tail) = rest.split_at_mut(words.len() * WORD);
        // Relaxed throughout: device accesses are ordered by completions and by the oracle's fence, not by themselves.
        for (to, byte) in into_head.iter_mut().zip(head) {
            *to = byte.load(Ordering::Relaxed);
        }
        for (to, word) in into_words.as_chunks_mut::<WORD>().0.iter_mut().zip(words) {
            *to = word_of(word).load(Ordering::Relaxed).to_ne_bytes();
        }
        for (to, byte) in into_tail.iter_mut().zip(tail) {
            *to = byte.load(Ordering::Relaxed);
        }
    }

    /// Overwrites the frame's bytes from `offset` on. They lie within the frame.
    pub(crate) fn write(&self, frame: Frame, offset: usize, from: &[u8]) {
        let into = &self.frame(frame)[offset..offset + from.len()];
        let (head, words, tail) = split(into);
        let (from_head, rest) = from.split_at(head.len());
        let (from_words, from_tail) = rest.split_at(words.len() * WORD);
        // Relaxed throughout: see `read`.
        for (byte, from) in head.iter().zip(from_head) {
            byte.store(*from, Ordering::Relaxed);
        }
        for (word, from) in words.iter().zip(from_words.as_chunks::<WORD>().0) {
            word_of(word).store(u64::from_ne_bytes(*from), Ordering::Relaxed);
        }
        for (byte, from) in tail.iter().zip(from_tail) {
            byte.store(*from, Ordering::Relaxed);
        }
    }

    /// Replaces the `width` bytes at `offset` by what `op` makes of them, if anything: what was there. `op` may be called
    /// several times, as a compare-and-swap loop does. `width` is 1, 2, 4 or 8, and `offset` a multiple of it.
    pub(crate) fn update(
        &self,
        frame: Frame,
        offset: usize,
        width: usize,
        op: &mut dyn FnMut(u64) -> Option<u64>,
    ) -> u64 {
        assert!(
            matches!(width, 1 | 2 | 4 | 8) && offset.is_multiple_of(width),
            "an atomic access of {width} bytes at offset {offset:#x}"
        );
        let at = self.frame(frame)[offset..offset + width]
            .as_ptr()
            .cast_mut();
        macro_rules! update {
            ($atomic:ty, $int:ty) => {{
                // SAFETY: `width` bytes of the frame begin at `at`, which is aligned to `width` (asserted; frames are page
                // aligned); they are only ever accessed atomically from Rust, and stay mapped as long as `self`.
                let cell = unsafe { <$atomic>::from_ptr(at.cast()) };
                // AcqRel and Acquire: the operation is one that programs synchronise with, in both directions, through
                // the CPU's own atomics on the same bytes.
                let result = cell.fetch_update(Ordering::AcqRel, Ordering::Acquire, |old| {
                    op(u64::from(old)).map(|new| new as $int)
                });
                u64::from(match result {
                    Ok(old) | Err(old) => old,
                })
            }};
        }
        match width {
            1 => update!(AtomicU8, u8),
            2 => update!(AtomicU16, u16),
            4 => update!(AtomicU32, u32),
            _ => update!(AtomicU64, u64),
        }
    }

    /// The frame's bytes.
    fn frame(&self, frame: Frame) -> &[AtomicU8] {
        assert!(self.has(frame), "no frame {:#x}", frame.0);
        // SAFETY: the frame lies within the linear mapping (asserted), which is readable and writable and lives as long
        // as `self`; atomics may be shared with whoever else maps the frame.
        unsafe {
            let first = self
                .linear
                .as_mut_ptr()
                .add((frame.0 * FRAME_BYTES) as usize);
            std::slice::from_raw_parts(first.cast::<AtomicU8>(), FRAME_BYTES as usize)
        }
    }

    fn buddy(&self) -> MutexGuard<'_, Buddy> {
        // Nothing panics while the lock is held, except on a frame number out of range before anything has changed.
        self.buddy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Blocks of frames that belong to nobody else; given back when dropped, unless they are kept.
pub(crate) struct Blocks<'a> {
    physical: &'a Physical,
    chain: Chain,
}

impl Blocks<'_> {
    /// Takes `frames` more, in blocks of at least 2^`least` frames, aligned to their size; `frames` is a multiple of that.
    /// Does not allocate.
    pub(crate) fn extend(&mut self, frames: u64, least: u32) -> Result<(), MemoryError> {
        let mut buddy = self.physical.buddy();
        let free = buddy.free();
        // What was appended before blocks ran out is in the chain, and goes back with it.
        if free >= frames && buddy.extend(&mut self.chain, frames, least) {
            return Ok(());
        }
        Err(MemoryError::OutOfFrames {
            needed: frames,
            free,
        })
    }

    /// The blocks, in the order in which they were taken.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Range<u64>> {
        let mut cursor = self.chain.first();
        std::iter::from_fn(move || {
            let (frames, next) = self.physical.buddy().step(cursor)?;
            cursor = next;
            Some(frames)
        })
    }

    /// Fills them with zeros.
    pub(crate) fn zero(&self) {
        self.iter().for_each(|frames| self.physical.zero(frames));
    }

    /// They belong to a page table from now on.
    pub(crate) fn keep(mut self) {
        self.chain = Chain::EMPTY;
    }
}

impl Drop for Blocks<'_> {
    fn drop(&mut self) {
        let chain = std::mem::replace(&mut self.chain, Chain::EMPTY);
        let result = self.physical.buddy().give_back_chain(chain);
        insist(result);
    }
}

/// See [`Physical::give_back`].
fn insist(freed: Result<(), FreeError>) {
    if let Err(error) = freed {
        panic!("frames of physical memory: {error}");
    }
}

/// A word of a frame. Only for chunks that [`split`] made or that begin a frame: those are aligned.
fn word_of(bytes: &[AtomicU8; WORD]) -> &AtomicU64 {
    let first = bytes.as_ptr().cast_mut().cast::<u64>();
    debug_assert!(first.is_aligned());
    // SAFETY: 8 bytes begin here, aligned as the caller says, atomics both ways and for as long as `bytes`. Accesses of
    // two sizes to the same bytes can meet; each side asks for whole aligned units only, which the processors that this
    // crate runs on perform whole.
    unsafe { AtomicU64::from_ptr(first) }
}

/// Bytes up to the first word border, whole words, and the rest.
fn split(bytes: &[AtomicU8]) -> (&[AtomicU8], &[[AtomicU8; WORD]], &[AtomicU8]) {
    let head = bytes.as_ptr().align_offset(WORD).min(bytes.len());
    let (head, rest) = bytes.split_at(head);
    let (words, tail) = rest.as_chunks::<WORD>();
    (head, words, tail)
}

/// Forbids something for this memfd for ever. That it cannot shrink is what keeps accesses to its mappings from faulting.
pub(crate) fn seal(file: &impl AsFd, seals: libc::c_int) -> io::Result<()> {
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: the descriptor is open; the call touches no memory.
    match unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// An empty memfd that can be sealed.
fn memfd() -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a C string; the call has no other precondition.
    let fd = unsafe { libc::memfd_create(c"shootdown-frames".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and belongs to nobody else.
    Ok(unsafe { File::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_sizes_are_typed_errors() {
        for frames in [0, MAX_FRAMES + 1, u64::MAX] {
            assert_eq!(
                Physical::new(frames).err(),
                Some(ModelError::Frames {
                    frames,
                    limit: MAX_FRAMES
                })
            );
        }
    }

    #[test]
    fn bytes_come_back_at_any_offset_and_length() {
        let physical = Physical::new(2).unwrap();
        let data: Vec<u8> = (0..64).collect();
        for offset in 0..24 {
            for len in 0..40 {
                physical.zero(0..2);
                physical.write(Frame(1), offset, &data[..len]);
                let mut all = [0xff; 4096];
                physical.read(Frame(1), 0, &mut all);
                assert_eq!(&all[offset..offset + len], &data[..len]);
                assert!(
                    all[..offset]
                        .iter()
                        .chain(&all[offset + len..])
                        .all(|byte| *byte == 0)
                );
                let mut part = vec![0xff; len];
                physical.read(Frame(1), offset, &mut part);
                assert_eq!(part, &data[..len]);
            }
        }
    }

    #[test]
    fn an_update_touches_only_its_own_bytes() {
        let physical = Physical::new(1).unwrap();
        for width in [1, 2, 4, 8] {
            physical.write(Frame(0), 0, &[0xff; 32]);
            let all_ones = u64::MAX >> (64 - 8 * width);
            assert_eq!(
                physical.update(Frame(0), 16, width, &mut |_| None),
                all_ones
            );
            assert_eq!(
                physical.update(Frame(0), 16, width, &mut |old| Some(old.wrapping_add(2))),
                all_ones
            );
            let mut bytes = [0; 32];
            physical.read(Frame(0), 0, &mut bytes);
            let mut expected = [0xff; 32];
            expected[16..16 + width].fill(0);
            expected[16] = 1;
            assert_eq!(bytes, expected);
        }
    }

    #[test]
    fn blocks_that_are_not_kept_go_back_and_too_many_are_an_error() {
        let physical = Physical::new(1024).unwrap();
        let mut blocks = physical.blocks();
        blocks.extend(700, 0).unwrap();
        assert_eq!(physical.free_frames(), 324);
        assert_eq!(
            blocks.extend(325, 0),
            Err(MemoryError::OutOfFrames {
                needed: 325,
                free: 324
            })
        );
        drop(blocks);
        assert_eq!(physical.free_frames(), physical.total());
    }

    #[test]
    #[should_panic(expected = "freed twice")]
    fn a_double_free_is_noticed() {
        Physical::new(8).unwrap().give_back(3..4);
    }
}
