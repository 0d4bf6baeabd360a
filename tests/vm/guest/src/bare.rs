//! edu in a container of its own, all by bare system calls.

use crate::check::{Failure, Outcome, demand_eq};
use crate::edu::{CHUNK, Edu};
use crate::memory::{Memory, PAGE};
use crate::pci::{EDU, Function};
use crate::raw::{Container, Device, Rights};

/// Where its own scratch page is mapped.
const SCRATCH: u64 = 0x7000_0000;

/// The device and what it needs.
pub(crate) struct Bare {
    pub(crate) edu: Edu,
    pub(crate) device: Device,
    pub(crate) container: Container,
    pub(crate) function: Function,
}

impl Bare {
    pub(crate) fn open() -> Result<Self, Failure> {
        let function = Function::find(EDU)?;
        let container = Container::of(&function)?;
        let device = container.device(&function)?;
        device.enable()?;
        let edu = Edu::new(device.bar(0)?)?;
        Ok(Self {
            edu,
            device,
            container,
            function,
        })
    }

    /// Fills the device's buffer with one byte.
    pub(crate) fn load(&self, byte: u8) -> Outcome {
        let memory = self.scratch(byte)?;
        self.edu.read(SCRATCH, CHUNK)?;
        self.unmap()?;
        drop(memory);
        Ok(())
    }

    /// The first byte of the device's buffer that is not `byte`.
    pub(crate) fn differs(&self, byte: u8) -> Result<Option<(usize, u8)>, Failure> {
        let memory = self.scratch(!byte)?;
        self.edu.write(SCRATCH, CHUNK)?;
        self.unmap()?;
        Ok(memory.differs(0, CHUNK, byte))
    }

    fn scratch(&self, byte: u8) -> Result<Memory, Failure> {
        let memory = Memory::anonymous(PAGE)?;
        memory.fill(byte);
        demand_eq!(
            self.container.map(SCRATCH, &memory, Rights::ReadWrite),
            Ok(()),
            "map of the scratch page"
        );
        Ok(memory)
    }

    fn unmap(&self) -> Outcome {
        let unmapped = self.container.unmap(SCRATCH, PAGE as u64);
        demand_eq!(unmapped, Ok(PAGE as u64), "unmap of the scratch page");
        Ok(())
    }
}
