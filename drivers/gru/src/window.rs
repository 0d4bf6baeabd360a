//! A chiplet's window within that of a whole machine.

use shootdown_primitive::sync::Arc;

use shootdown::{DeviceError, Interrupts, Registers};

use crate::config::ChipletPorts;

/// Bytes of one chiplet's window.
const WINDOW_BYTES: u64 = 128 << 20;
/// Chiplets of a blade.
const PER_BLADE: u32 = 2;

struct Window {
    machine: Arc<dyn Registers>,
    base: u64,
}

impl Window {
    fn at(&self, offset: u64) -> Result<u64, DeviceError> {
        if offset < WINDOW_BYTES {
            return Ok(self.base + offset);
        }
        Err(DeviceError::NoRegister { offset, width: 8 })
    }
}

impl Registers for Window {
    fn len(&self) -> u64 {
        WINDOW_BYTES
    }

    fn read(&self, offset: u64) -> Result<u64, DeviceError> {
        self.machine.read(self.at(offset)?)
    }

    fn write(&self, offset: u64, value: u64) -> Result<(), DeviceError> {
        self.machine.write(self.at(offset)?, value)
    }
}

impl ChipletPorts {
    /// The chiplet that is the `nth` of `machine`, whose window has all of them: two a blade, 128 MiB each.
    pub fn of_machine(
        machine: &Arc<dyn Registers>,
        nth: u32,
        interrupts: Arc<dyn Interrupts>,
    ) -> Self {
        Self {
            name: format!("gru{nth}"),
            blade: nth / PER_BLADE,
            registers: Arc::new(Window {
                machine: Arc::clone(machine),
                base: WINDOW_BYTES * u64::from(nth),
            }),
            interrupts,
        }
    }
}
