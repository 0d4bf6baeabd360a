//! Kinds of memory, each mapped for a device and reached by it, or refused with a reason.

use std::fs::File;
use std::io::Read;
use std::os::fd::FromRawFd;

use shootdown::{DeviceError, DmaWindow, Range, Rights};

use super::rig::{BEFORE, DMA, Rig, SIZE, page, unmapping};
use crate::check::{Check, Failure, Outcome, check, demand, demand_eq};
use crate::edu::CHUNK;
use crate::memory::{Memory, PAGE};
use crate::pci::{Function, NVME};
use crate::raw;

pub(crate) const CHECKS: &[Check] = &[
    check("memory:anonymous-pages", anonymous),
    check("memory:a-transparent-huge-page-is-one-granule", huge),
    check("memory:a-part-of-a-hugetlb-page", hugetlb),
    check("memory:a-memfd", memfd),
    check("memory:a-shared-file-changes", shared_file),
    check("memory:a-private-file-does-not-change", private_file),
    check("memory:without-rights-is-refused", without_rights),
    check("memory:another-devices-bar-is-reached-by-dma", bar),
];

const IOVA: u64 = 0x5000_0000;
const HUGE: usize = 2 << 20;

fn range(start: u64, len: u64) -> Range {
    Range::new(start, len).expect("a range of a check")
}

/// The device writes to the first page, and to nothing else.
fn reached(rig: &Rig, memory: Range) -> Outcome {
    let view = rig.view(memory);
    view.fill(BEFORE);
    rig.load(DMA)?;
    let iova = range(IOVA, memory.len() as u64);
    rig.container.map(iova, memory, Rights::READ_WRITE)?;
    let written = rig.edu.write(IOVA, CHUNK);
    unmapping(&[iova], || rig.container.unmap(iova))?;
    written?;
    demand_eq!(view.differs(0, CHUNK, DMA), None, "what the device wrote");
    let rest = memory.len() as usize - CHUNK;
    demand_eq!(view.differs(CHUNK, rest, BEFORE), None, "memory behind it");
    Ok(())
}

fn anonymous() -> Outcome {
    reached(&Rig::new()?, Memory::anonymous(4 * PAGE)?.range())
}

/// A part that begins at a huge page.
fn aligned(memory: &Memory, len: usize) -> Range {
    range(memory.address().next_multiple_of(HUGE as u64), len as u64)
}

fn huge() -> Outcome {
    // With less than 512 MiB the kernel switches it off at boot.
    std::fs::write("/sys/kernel/mm/transparent_hugepage/enabled", "madvise")?;
    let memory = Memory::anonymous(2 * HUGE)?;
    memory.advise(libc::MADV_HUGEPAGE)?;
    memory.fill(BEFORE);
    let whole = aligned(&memory, HUGE);
    let rollup = std::fs::read_to_string("/proc/self/smaps_rollup")?;
    let huge = rollup
        .lines()
        .find(|line| line.starts_with("AnonHugePages:"))
        .unwrap_or_default();
    demand!(!huge.contains(" 0 kB"), "the memory is not huge: {huge}");
    let rig = Rig::new()?;
    reached(&rig, whole)?;
    let iova = range(IOVA, HUGE as u64);
    rig.container.map(iova, whole, Rights::READ_WRITE)?;
    let cut = rig.container.unmap(page(iova, 3));
    demand!(
        matches!(cut, Err(DeviceError::Cut { .. })),
        "an unmap of a page of it: {cut:?}"
    );
    unmapping(&[iova], || rig.container.unmap(iova))?;
    Ok(())
}

fn hugetlb() -> Outcome {
    std::fs::write("/proc/sys/vm/nr_hugepages", "2")?;
    let memory = Memory::hugetlb(2 * HUGE)?;
    let rig = Rig::new()?;
    reached(&rig, memory.range())?;
    let part = range(memory.address() + HUGE as u64 - 2 * SIZE, 4 * SIZE);
    reached(&rig, part)?;
    drop(memory);
    std::fs::write("/proc/sys/vm/nr_hugepages", "0")?;
    Ok(())
}

fn memfd() -> Outcome {
    // SAFETY: a name that ends with a zero, and flags.
    let fd = unsafe { libc::memfd_create(c"check".as_ptr(), libc::MFD_CLOEXEC) };
    demand!(fd >= 0, "memfd_create: {}", std::io::Error::last_os_error());
    // SAFETY: made just now, and nobody else knows it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(4 * SIZE)?;
    reached(
        &Rig::new()?,
        Memory::file(&file, 0, 4 * PAGE, libc::MAP_SHARED)?.range(),
    )
}

/// A file of zeroes, mapped so, which a device then writes to; gives its first byte.
fn first_byte_of_file(flags: libc::c_int) -> Result<u8, Failure> {
    const PATH: &str = "/tmp/file";
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(PATH)?;
    file.set_len(4 * SIZE)?;
    reached(
        &Rig::new()?,
        Memory::file(&file, 0, 4 * PAGE, flags)?.range(),
    )?;
    let mut byte = [0];
    file.read_exact(&mut byte)?;
    std::fs::remove_file(PATH)?;
    Ok(byte[0])
}

fn shared_file() -> Outcome {
    demand_eq!(first_byte_of_file(libc::MAP_SHARED)?, DMA, "the file");
    Ok(())
}

fn private_file() -> Outcome {
    demand_eq!(first_byte_of_file(libc::MAP_PRIVATE)?, 0, "the file");
    Ok(())
}

fn without_rights() -> Outcome {
    let rig = Rig::new()?;
    let memory = Memory::anonymous(PAGE)?;
    memory.fill(BEFORE);
    let map = |rights| rig.container.map(range(IOVA, SIZE), memory.range(), rights);
    memory.protect(libc::PROT_NONE)?;
    let none = map(Rights::READ);
    demand!(
        matches!(none, Err(DeviceError::Unbacked { .. })),
        "a map of memory without rights: {none:?}"
    );
    memory.protect(libc::PROT_READ)?;
    demand_eq!(
        map(Rights::READ),
        Ok(()),
        "a map for reading of memory to read"
    );
    unmapping(&[range(IOVA, SIZE)], || {
        rig.container.unmap(range(IOVA, SIZE))
    })?;
    Ok(())
}

/// edu fetches a register of the NVMe controller.
fn bar() -> Outcome {
    const CAPABILITIES: u64 = 8;
    let function = Function::find(NVME)?;
    let container = raw::Container::of(&function)?;
    let device = container.device(&function)?;
    device.enable()?;
    let bar = device.bar(0)?;
    let rig = Rig::new()?;
    rig.load(BEFORE)?;
    let registers = page(bar.range(), 0);
    let iova = range(IOVA, SIZE);
    rig.container.map(iova, registers, Rights::READ_WRITE)?;
    let fetched = rig.edu.read(IOVA, CAPABILITIES as usize);
    unmapping(&[iova], || rig.container.unmap(iova))?;
    fetched?;
    let memory = rig.pages(1)?;
    let window = rig.window(memory, SIZE)?;
    rig.arm(&window, memory)?;
    rig.edu.finish()?;
    // SAFETY: mapped by the rig, aligned, and no reference to it exists.
    let copy = unsafe {
        std::ptr::with_exposed_provenance::<u64>(memory.start().get() as usize).read_volatile()
    };
    demand_eq!(
        copy,
        shootdown::Registers::read(&bar, 0)?,
        "the controller's CAP, by DMA"
    );
    demand!(copy != 0 && copy != u64::MAX, "CAP reads {copy:#x}");
    Ok(())
}
