//! The self check: registers, interrupt, DMA both ways, and the proof of the shootdown.
//!
//! The proof has two halves, because a page that was unmapped cannot be looked at any more:
//! * *The device writes.* A transfer into a page is armed, then the page's rights are changed: its frame stays, and can be read.
//!   When the transfer is over the page holds what it held: the write did not reach it.
//! * *The device reads.* A transfer out of a page that holds a secret is armed, then the page is unmapped. When the transfer is over
//!   the device's buffer is fetched, and holds nothing of the secret.
//!
//! Both count only if the transfer was still to come when the shootdown had returned; else the check says that it came too late.
//! That the IOMMU *faulted*, neither the device nor type1 tells: whoever watches the IOMMU knows ([`Iommu::watch`]).

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shootdown::{AddressSpace, Interrupts, Map, MapError, Range, Registers, Rights};
use shootdown_vfio::{Iommu, Proof, Report, Window, WindowOptions};
use thiserror::Error;

use crate::bytes::Words;
use crate::edu::{Direction, Edu, EduConfig};
use crate::error::EduError;

/// What is checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Check {
    /// It is an edu, and inverts what is written to its liveness register.
    Registers,
    /// It computes.
    Factorial,
    /// Its interrupt arrives.
    Interrupt,
    /// A page of memory is mapped and pinned.
    Window,
    /// What goes to the device by DMA comes back.
    RoundTrip,
    /// A write that was armed does not reach a page whose rights were changed.
    WriteCutOff,
    /// A read that was armed does not reach a page that was unmapped.
    ReadCutOff,
    /// The window works again, at the same IOVA, with the page that is there now.
    Touched,
}

impl Check {
    /// As it reads in a report.
    pub fn name(self) -> &'static str {
        match self {
            Self::Registers => "registers: identity and liveness",
            Self::Factorial => "registers: a factorial",
            Self::Interrupt => "interrupt",
            Self::Window => "DMA window: registered, pinned, mapped",
            Self::RoundTrip => "DMA: to the device and back",
            Self::WriteCutOff => "shootdown: armed DMA write, rights changed, page untouched",
            Self::ReadCutOff => "shootdown: armed DMA read, page unmapped, nothing leaked",
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
    Edu(#[from] EduError),
    /// Memory could not be had, or not be changed.
    #[error(transparent)]
    Map(#[from] MapError),
    /// A wrong result.
    #[error("the factorial of {n} came out as {found}, not {expected}")]
    Factorial {
        /// What was asked for.
        n: u32,
        /// What came.
        found: u32,
        /// What is right.
        expected: u32,
    },
    /// A transfer changed the data.
    #[error("word {word} came back from the device wrong")]
    Damaged {
        /// Its number in the transfer.
        word: u64,
    },
    /// The device wrote to a page that it was cut off from.
    #[error("the device wrote word {word} of a page after the shootdown had returned")]
    Written {
        /// Its number in the page.
        word: u64,
    },
    /// The device read a page that it was cut off from.
    #[error("the device read a page after the shootdown had returned: word {word} has its secret")]
    Leaked {
        /// Its number in the device's buffer.
        word: u64,
    },
    /// The shootdown took longer than the device waits: nothing is proven.
    #[error("the transfer was over when the shootdown returned, after {took:?}: nothing is proven")]
    TooLate {
        /// How long the shootdown took.
        took: Duration,
    },
}

/// What the check needs of the device's surroundings.
pub struct CheckPorts<'p> {
    /// BAR 0.
    pub registers: Arc<dyn Registers>,
    /// The device's one interrupt.
    pub interrupts: Arc<dyn Interrupts>,
    /// The IOMMU that the device is behind.
    pub iommu: &'p Arc<Iommu>,
    /// Where memory for the check is mapped.
    pub space: &'p AddressSpace,
    /// The last address that the device's DMA engine forms: QEMU's `dma_mask`.
    pub last: u64,
    /// Deadlines of the driver.
    pub config: EduConfig,
}

const PAGE: u64 = 4096;
/// What one transfer carries here, in bytes.
const CHUNK: u64 = 2048;

/// How long a fault may take to be told of; nothing depends on it.
const PATIENCE: Duration = Duration::from_millis(20);

/// A word that no page holds by chance.
fn pattern(seed: u64) -> impl Fn(u64) -> u64 + Copy {
    move |nth| (seed << 32 | nth).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// Makes all checks, in order, until one fails. The device must be allowed to master the bus. Takes about a second, most of it
/// the device's own. What it maps it unmaps.
pub fn self_check(ports: &CheckPorts<'_>) -> Report<Check, CheckError> {
    Report::of(|report| {
        let edu = report.step(Check::Registers, |_| {
            let (registers, interrupts) = (ports.registers.clone(), ports.interrupts.clone());
            let edu = Edu::probe(registers, interrupts, ports.config)?;
            edu.check_liveness(0x0123_4567)?;
            edu.check_liveness(!0)?;
            Ok(edu)
        })?;
        report.step(Check::Factorial, |_| {
            let (n, expected) = (10, 3_628_800);
            let found = edu.factorial(n)?;
            if found == expected {
                Ok(())
            } else {
                Err(CheckError::Factorial { n, found, expected })
            }
        })?;
        report.step(Check::Interrupt, |_| Ok(edu.check_interrupt()?))?;
        let rig = report.step(Check::Window, |_| Rig::new(ports, &edu))?;
        report.step(Check::RoundTrip, |_| rig.round_trip(1))?;
        report.step(Check::WriteCutOff, |proof| rig.write_cut_off(proof))?;
        report.step(Check::ReadCutOff, |proof| rig.read_cut_off(proof))?;
        report.step(Check::Touched, |_| rig.round_trip(6))
    })
}

/// A page with a window.
struct Rig<'p> {
    edu: Arc<Edu>,
    space: &'p AddressSpace,
    iommu: &'p Arc<Iommu>,
    page: Range,
    /// Always there, but while the value is dropped.
    window: Option<Window>,
}

impl<'p> Rig<'p> {
    fn new(ports: &CheckPorts<'p>, edu: &Arc<Edu>) -> Result<Self, CheckError> {
        let space = ports.space;
        let mut this = Self {
            page: space.map(Map::anonymous(PAGE))?,
            edu: edu.clone(),
            space,
            iommu: ports.iommu,
            window: None,
        };
        let options = WindowOptions {
            granule: PAGE,
            last: ports.last.into(),
            deadline: ports.config.deadline,
            ..WindowOptions::default()
        };
        let window = Window::open(ports.iommu, space, this.page, edu.clone(), options);
        this.window = Some(window.map_err(EduError::from)?);
        Ok(this)
    }

    fn part(&self, offset: u64) -> Range {
        Range::new(self.page.start().get() + offset, CHUNK).expect("half of a page")
    }

    fn words(&self, offset: u64) -> Words {
        // SAFETY: the page was mapped by this value, for reading and writing, and where it is unmapped in between nothing reads or
        // writes it. It is told to nobody but the device.
        unsafe { Words::new(self.part(offset)) }
    }

    fn arm(&self, offset: u64, direction: Direction) -> Result<crate::Transfer<'_>, CheckError> {
        let window = self.window.as_ref().expect("it is taken by drop only");
        Ok(self.edu.arm(window, self.part(offset), 0, direction)?)
    }

    /// Runs `shootdown` while a transfer is armed; it has to be over before the transfer begins.
    fn against(
        &self,
        direction: Direction,
        proof: &mut Proof,
        shootdown: impl FnOnce() -> Result<(), MapError>,
    ) -> Result<(), CheckError> {
        let transfer = self.arm(0, direction)?;
        let begun = Instant::now();
        shootdown()?;
        let elapsed = begun.elapsed();
        proof.shootdown = Some(elapsed);
        let in_time = transfer.is_running()?;
        transfer.wait()?;
        // Who tells of faults does so when it gets round to it.
        let begun = Instant::now();
        while proof.fault.is_none() && begun.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(1));
            proof.fault = self.iommu.faults().into_iter().find_map(|(_, found)| found);
        }
        if in_time {
            Ok(())
        } else {
            Err(CheckError::TooLate { took: elapsed })
        }
    }

    /// The first half of the page goes to the device, and comes back into the second.
    fn round_trip(&self, seed: u64) -> Result<(), CheckError> {
        let sent = pattern(seed);
        self.words(0).fill(sent);
        self.words(CHUNK).fill(|_| 0);
        self.arm(0, Direction::ToDevice)?.wait()?;
        self.arm(CHUNK, Direction::ToMemory)?.wait()?;
        match self.words(CHUNK).find(|nth, word| word != sent(nth)) {
            None => Ok(()),
            Some(word) => Err(CheckError::Damaged { word }),
        }
    }

    fn write_cut_off(&self, proof: &mut Proof) -> Result<(), CheckError> {
        let (kept, armed) = (pattern(2), pattern(3));
        self.words(0).fill(armed);
        self.arm(0, Direction::ToDevice)?.wait()?;
        self.words(0).fill(kept);
        let page = self.page;
        self.against(Direction::ToMemory, proof, || {
            self.space.protect(page, Rights::READ)
        })?;
        let wrong = self.words(0).find(|nth, word| word != kept(nth));
        self.space.protect(page, Rights::READ_WRITE)?;
        match wrong {
            None => Ok(()),
            Some(word) => Err(CheckError::Written { word }),
        }
    }

    fn read_cut_off(&self, proof: &mut Proof) -> Result<(), CheckError> {
        let (harmless, secret) = (pattern(4), pattern(5));
        self.words(0).fill(harmless);
        self.arm(0, Direction::ToDevice)?.wait()?;
        self.words(0).fill(secret);
        let page = self.page;
        let cut_off = self.against(Direction::ToDevice, proof, || self.space.unmap(page));
        // Also after a failure: the page is there again for whoever comes next.
        match self.space.map(Map::anonymous(PAGE).at(page.start())) {
            // The shootdown failed, so that the page is still there.
            Err(MapError::Occupied { .. } | MapError::InQuarantine { .. }) => {}
            other => drop(other?),
        }
        cut_off?;
        self.arm(0, Direction::ToMemory)?.wait()?;
        match self.words(0).find(|nth, word| word == secret(nth)) {
            None => Ok(()),
            Some(word) => Err(CheckError::Leaked { word }),
        }
    }
}

impl Drop for Rig<'_> {
    fn drop(&mut self) {
        self.window.take();
        // A page in quarantine stays: its space knows.
        let _ = self.space.unmap(self.page);
    }
}
