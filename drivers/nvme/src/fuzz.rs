//! What holds for whatever bytes a controller writes: a function for each fuzz target of `tests/fuzz`.

use std::sync::{Arc, Mutex};

use arbitrary::{Result, Unstructured};
use shootdown::{AddressSpace, Deadlines, DeviceError, ProcessMemory, Range, Registers};

use crate::controller::PAGE;
use crate::error::Status;
use crate::identify::{Controller, Data, Namespace};
use crate::memory::Pages;
use crate::queue::{ENTRIES, Ended, Entry, Queue, SLOTS};
use crate::registers::Capabilities;

/// Identify data.
pub fn identify(bytes: &[u8]) {
    let mut data: Data = [0; PAGE as usize];
    let len = bytes.len().min(data.len());
    data[..len].copy_from_slice(&bytes[..len]);
    let controller = Controller::parse(&data);
    let most = controller.max_transfer;
    assert!(
        most.is_multiple_of(PAGE) && (PAGE..=512 * PAGE).contains(&most),
        "{most:#x}"
    );
    let shift = u32::from(data[77]);
    let allowed = shift == 0 || shift > 50 || most <= PAGE << shift;
    assert!(allowed, "more than 2^{shift} pages");
    if let Ok(namespace) = Namespace::parse(&data) {
        let bytes = namespace.block_bytes;
        assert!(bytes.is_power_of_two() && (512..=1 << 16).contains(&bytes));
        assert!(namespace.blocks > 0 && namespace.blocks.to_le_bytes() == data[..8]);
        assert!(bytes <= most || most < 1 << 16, "not even a block");
    }
}

/// A doorbell page.
#[derive(Default)]
struct Doorbells(Mutex<Vec<u32>>);

impl Registers for Doorbells {
    fn len(&self) -> u64 {
        0x2000
    }
    fn read(&self, offset: u64) -> core::result::Result<u64, DeviceError> {
        Err(DeviceError::NoRegister { offset, width: 8 })
    }
    fn write(&self, offset: u64, _: u64) -> core::result::Result<(), DeviceError> {
        Err(DeviceError::NoRegister { offset, width: 8 })
    }
    fn write32(&self, _: u64, value: u32) -> core::result::Result<(), DeviceError> {
        self.0.lock().expect("nobody panics with it").push(value);
        Ok(())
    }
}

/// A place, as whoever reads the specification would keep it.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Place {
    Free,
    Flying { reaches: Option<Range>, left: bool },
    Ended(Ended),
}

struct Naive {
    places: [Place; SLOTS],
    /// The completion queue, and what is read of it next.
    entries: [[u32; 4]; ENTRIES as usize],
    head: usize,
    phase: u32,
}

impl Naive {
    fn reap(&mut self) {
        for _ in 0..ENTRIES {
            let [result, _, _, last] = self.entries[self.head];
            if last >> 16 & 1 != self.phase {
                break;
            }
            if let Some(place) = self.places.get_mut((last & 0xffff) as usize)
                && let Place::Flying { left, .. } = *place
            {
                let status = Status((last >> 17 & 0x7ff) as u16);
                *place = match left {
                    true => Place::Free,
                    false => Place::Ended(Ended::Done { status, result }),
                };
            }
            self.head = (self.head + 1) % self.entries.len();
            self.phase ^= u32::from(self.head == 0);
        }
    }

    fn lose(&mut self) {
        for place in &mut self.places {
            match place {
                Place::Flying { left: true, .. } => *place = Place::Free,
                Place::Flying { .. } => *place = Place::Ended(Ended::Lost),
                _ => {}
            }
        }
    }
}

const COMPLETIONS: usize = 4096;

/// A queue pair beside a list of places: what the controller writes into the completion queue, and where, is anything.
pub fn completions(bytes: &[u8]) {
    let memory = ProcessMemory::reserve(1 << 16).expect("64 KiB of addresses");
    let space = AddressSpace::managed(Arc::new(memory), Deadlines::default());
    let pages = Pages::new(&space, 2 * PAGE).expect("two pages");
    let mut queue = Queue::new(1, 0, COMPLETIONS);
    let mut naive = Naive {
        places: [Place::Free; SLOTS],
        entries: [[0; 4]; ENTRIES as usize],
        head: 0,
        phase: 1,
    };
    let mut bytes = Unstructured::new(bytes);
    while !bytes.is_empty() && step(&mut bytes, &pages, &mut queue, &mut naive).is_ok() {
        let free = naive.places.iter().position(|place| *place == Place::Free);
        assert_eq!(queue.free(), free);
        let everywhere = Range::new(0_u64, 1 << 40).expect("not empty");
        for (slot, place) in naive.places.iter().enumerate() {
            let flying = matches!(
                place,
                Place::Flying {
                    reaches: Some(_),
                    ..
                }
            );
            assert_eq!(queue.reaches(slot, everywhere), flying, "place {slot}");
        }
    }
}

fn step(
    bytes: &mut Unstructured<'_>,
    pages: &Pages,
    queue: &mut Queue,
    naive: &mut Naive,
) -> Result<()> {
    const CAPABILITIES: Capabilities = Capabilities(15);
    let doorbells = Doorbells::default();
    let kind = bytes.int_in_range(0..=15_u8)?;
    let slot = usize::from(bytes.arbitrary::<u8>()?) % SLOTS;
    match kind {
        0..=4 => {
            let Some(free) = queue.free() else {
                return Ok(());
            };
            let reaches = (slot > 3).then(|| Range::new(slot as u64 * PAGE, PAGE).expect("a page"));
            let entry = Entry::default();
            queue
                .submit(free, entry, reaches, pages, &doorbells, CAPABILITIES)
                .expect("the doorbell takes it");
            naive.places[free] = Place::Flying {
                reaches,
                left: false,
            };
        }
        // A proper completion, where one is looked for next.
        5..=8 => {
            let last = naive.phase << 16 | u32::from(bytes.arbitrary::<u8>()? & 3) << 17;
            complete(pages, naive, naive.head, [7, 0, 0, last | slot as u32]);
        }
        // Anything, anywhere.
        9 | 10 => {
            let at = usize::from(bytes.arbitrary::<u8>()?) % ENTRIES as usize;
            complete(pages, naive, at, bytes.arbitrary()?);
        }
        11..=13 => {
            queue
                .reap(pages, &doorbells, CAPABILITIES)
                .expect("the doorbell takes it");
            naive.reap();
            let rung = doorbells.0.into_inner().expect("nobody panics with it");
            assert!(rung.len() <= 1 && rung.iter().all(|head| *head == naive.head as u32));
        }
        14 => {
            let expected = match naive.places[slot] {
                Place::Ended(ended) => Some(ended),
                _ => None,
            };
            assert_eq!(queue.take(slot), expected, "place {slot}");
            if expected.is_some() {
                naive.places[slot] = Place::Free;
            }
        }
        _ if slot == 0 => {
            queue.restart(pages);
            naive.lose();
            (naive.head, naive.phase) = (0, 1);
            naive.entries = [[0; 4]; ENTRIES as usize];
        }
        _ => {
            queue.leave(slot);
            match &mut naive.places[slot] {
                Place::Flying { left, .. } => *left = true,
                place => *place = Place::Free,
            }
        }
    }
    Ok(())
}

fn complete(pages: &Pages, naive: &mut Naive, at: usize, words: [u32; 4]) {
    naive.entries[at] = words;
    for (nth, word) in words.into_iter().enumerate() {
        pages.write32(COMPLETIONS + 16 * at + 4 * nth, word);
    }
}

#[cfg(test)]
#[path = "../../../tests/fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    use super::replay::replay;

    #[test]
    fn the_corpus_of_what_controllers_write_holds() {
        replay("nvme_identify", 256, super::identify);
        replay("nvme_completions", 64, super::completions);
    }
}
