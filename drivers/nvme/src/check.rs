//! The self check. It reads; it writes only where it is told that the namespace is scratch.
//!
//! The proof of the shootdown: as many reads as fit are put in flight into a page, and the page is unmapped. When that returns
//! none of them is in flight; a page that is mapped there afresh, filled, and looked at after a while holds what was put there.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shootdown::{AddressSpace, Map, MapError, Range, Rights};
use shootdown_vfio::{DeviceWork, Proof, Report, Window, WindowOptions};
use thiserror::Error;

use crate::command::Direction;
use crate::controller::{Nvme, NvmeConfig, NvmePorts, PAGE};
use crate::error::{NvmeError, Status};
use crate::memory::Pages;

/// What is checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Check {
    /// It comes up, identifies itself and its namespace.
    Identify,
    /// Its completions raise interrupts.
    Interrupt,
    /// Memory is mapped and pinned.
    Window,
    /// What is read twice is the same, and reached memory.
    Read,
    /// What is written is read back, and the blocks are put back as they were.
    Write,
    /// A command can be aborted.
    Abort,
    /// Reads that were in flight do not reach a page that was unmapped.
    ReadCutOff,
    /// The window works again, at the same IOVA.
    Touched,
}

impl Check {
    /// As it reads in a report.
    pub fn name(self) -> &'static str {
        match self {
            Self::Identify => "controller and namespace: identified",
            Self::Interrupt => "interrupt",
            Self::Window => "DMA window: registered, pinned, mapped",
            Self::Read => "DMA: blocks read twice, by PRP list too",
            Self::Write => "DMA: blocks written, read back, restored",
            Self::Abort => "abort",
            Self::ReadCutOff => "shootdown: reads in flight, memory unmapped, new page untouched",
            Self::Touched => "DMA: again, after a touch, at the same IOVA",
        }
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a check failed.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum CheckError {
    /// The driver could not do it.
    #[error(transparent)]
    Nvme(#[from] NvmeError),
    /// Memory could not be had, or not be changed.
    #[error(transparent)]
    Map(#[from] MapError),
    /// No interrupt came with a completion.
    #[error("commands completed, and no interrupt came: check the vector and bus mastering")]
    NoInterrupt,
    /// Two reads of the same blocks differ, or what was written is not what is read.
    #[error("byte {byte:#x} of the transfer is wrong")]
    Damaged {
        /// Where in the transfer.
        byte: usize,
    },
    /// A command was in flight when the shootdown had returned.
    #[error("a read that reaches the page was in flight when the shootdown had returned")]
    InFlight,
    /// A read reached the new page.
    #[error("the device wrote byte {byte:#x} of a page after the shootdown had returned")]
    Written {
        /// Where in the page.
        byte: usize,
    },
}

/// Bytes of a transfer here: more than two pages, so that PRP lists are used.
const BYTES: u64 = 4 * PAGE;
/// Two of those.
const MEMORY: u64 = 2 * BYTES;
/// How long a read that got away is waited for.
const PATIENCE: Duration = Duration::from_millis(50);

/// Makes all checks, in order, until one fails. The controller must be allowed to master the bus; whatever it did before is
/// lost. With `scratch` blocks are written, and put back as they were.
pub fn self_check(
    ports: &NvmePorts,
    config: NvmeConfig,
    scratch: bool,
) -> Report<Check, CheckError> {
    Report::of(|report| {
        let nvme = report.step(Check::Identify, |_| Ok(Nvme::probe(ports.clone(), config)?))?;
        report.step(Check::Interrupt, |_| {
            if nvme.check_interrupt()? {
                Ok(())
            } else {
                Err(CheckError::NoInterrupt)
            }
        })?;
        let rig = report.step(Check::Window, |_| Rig::new(&nvme, &ports.space))?;
        report.step(Check::Read, |_| rig.read_twice())?;
        if scratch {
            report.step(Check::Write, |_| rig.write_and_restore())?;
        }
        report.step(Check::Abort, |_| rig.abort())?;
        report.step(Check::ReadCutOff, |proof| rig.read_cut_off(proof))?;
        report.step(Check::Touched, |_| rig.read_twice())
    })
}

struct Rig {
    nvme: Arc<Nvme>,
    space: AddressSpace,
    // In this order: the window goes before its pages.
    window: Window,
    pages: Pages,
}

impl Rig {
    fn new(nvme: &Arc<Nvme>, space: &AddressSpace) -> Result<Self, CheckError> {
        let pages = Pages::new(space, MEMORY)?;
        let options = WindowOptions {
            granule: PAGE,
            ..WindowOptions::default()
        };
        let window = nvme.window(pages.range(), options);
        Ok(Self {
            window: window.map_err(NvmeError::from)?,
            nvme: nvme.clone(),
            space: space.clone(),
            pages,
        })
    }

    fn part(&self, offset: u64, bytes: u64) -> Range {
        let start = self.pages.range().start().get() + offset;
        Range::new(start, bytes).expect("part of the check's memory")
    }

    fn transfer(&self, offset: u64, direction: Direction) -> Result<(), CheckError> {
        let part = self.part(offset, BYTES);
        Ok(self.nvme.submit(&self.window, part, 0, direction)?.wait()?)
    }

    fn fill(&self, offset: u64, bytes: u64, word: impl Fn(u64) -> u32) {
        for at in (offset..offset + bytes).step_by(4) {
            self.pages.write32(at as usize, word(at));
        }
    }

    fn bytes(&self, offset: u64, bytes: u64) -> Vec<u8> {
        let places = offset..offset + bytes;
        places.map(|at| self.pages.read8(at as usize)).collect()
    }

    /// Both halves of the memory hold the same, which is not what they held.
    fn read_twice(&self) -> Result<(), CheckError> {
        self.fill(0, BYTES, |at| at as u32 ^ 0x5555_5555);
        self.fill(BYTES, BYTES, |at| at as u32 ^ 0xaaaa_aaaa);
        self.transfer(0, Direction::Read)?;
        self.transfer(BYTES, Direction::Read)?;
        same(&self.bytes(0, BYTES), &self.bytes(BYTES, BYTES))
    }

    fn write_and_restore(&self) -> Result<(), CheckError> {
        self.transfer(0, Direction::Read)?;
        let before = self.bytes(0, BYTES);
        self.fill(0, BYTES, |at| (at as u32).wrapping_mul(0x9e37_79b9));
        self.transfer(0, Direction::Write)?;
        self.fill(BYTES, BYTES, |_| 0);
        let read = self.transfer(BYTES, Direction::Read);
        let written = same(&self.bytes(0, BYTES), &self.bytes(BYTES, BYTES));
        for (at, bytes) in (0..).step_by(4).zip(before.chunks_exact(4)) {
            let word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            self.pages.write32(at, word);
        }
        self.transfer(0, Direction::Write)?;
        read?;
        written
    }

    fn abort(&self) -> Result<(), CheckError> {
        let part = self.part(0, BYTES);
        let command = self.nvme.submit(&self.window, part, 0, Direction::Read)?;
        command.abort()?;
        match command.wait() {
            Ok(())
            | Err(NvmeError::Command {
                status: Status::ABORTED,
                ..
            }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn read_cut_off(&self, proof: &mut Proof) -> Result<(), CheckError> {
        let part = self.part(0, BYTES);
        // A quick controller never has all of its places taken.
        for _ in 0..64 {
            match self.nvme.submit(&self.window, part, 0, Direction::Read) {
                Ok(command) => drop(command),
                Err(NvmeError::Busy { .. }) => break,
                Err(error) => return Err(error.into()),
            }
        }
        let begun = Instant::now();
        self.space.unmap(part)?;
        proof.shootdown = Some(begun.elapsed());
        let iova = self.window.iova_of(part).map_err(NvmeError::from)?;
        let in_flight = !self.nvme.drained(iova);
        let map = Map::anonymous(BYTES).rights(Rights::READ_WRITE);
        self.space.map(map.at(part.start()))?;
        let word = |at: u64| at as u32 ^ 0x3c3c_3c3c;
        self.fill(0, BYTES, word);
        std::thread::sleep(PATIENCE);
        if in_flight {
            return Err(CheckError::InFlight);
        }
        let expected: Vec<u8> = (0..BYTES)
            .step_by(4)
            .flat_map(|at| word(at).to_le_bytes())
            .collect();
        same(&self.bytes(0, BYTES), &expected).map_err(|error| match error {
            CheckError::Damaged { byte } => CheckError::Written { byte },
            other => other,
        })
    }
}

fn same(one: &[u8], other: &[u8]) -> Result<(), CheckError> {
    match one.iter().zip(other).position(|(one, other)| one != other) {
        None => Ok(()),
        Some(byte) => Err(CheckError::Damaged { byte }),
    }
}
