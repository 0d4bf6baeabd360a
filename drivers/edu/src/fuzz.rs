//! What holds for a device whose registers say anything: a function for the fuzz target of `tests/fuzz`.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use shootdown::{DeviceError, Interrupts, Registers};

use crate::{Edu, EduConfig, EduError};

/// What was read last, and the bytes that are left. The last answer stays: a device that repeats itself for ever.
struct Liar(Mutex<(Vec<u8>, u64)>);

impl Liar {
    fn answer(&self) -> u64 {
        let mut state = self.0.lock().expect("nobody panics with it");
        if !state.0.is_empty() {
            let len = state.0.len().min(4);
            let bytes: Vec<u8> = state.0.drain(..len).collect();
            state.1 = bytes
                .iter()
                .rev()
                .fold(0, |value, byte| value << 8 | u64::from(*byte));
        }
        state.1
    }
}

impl Registers for Liar {
    fn len(&self) -> u64 {
        1 << 20
    }
    fn read(&self, _: u64) -> Result<u64, DeviceError> {
        Ok(self.answer())
    }
    fn write(&self, _: u64, _: u64) -> Result<(), DeviceError> {
        Ok(())
    }
    fn read32(&self, _: u64) -> Result<u32, DeviceError> {
        match self.answer() {
            0xdead_dead => Err(DeviceError::Gone { reason: "planned" }),
            value => Ok(value as u32),
        }
    }
    fn write32(&self, _: u64, _: u32) -> Result<(), DeviceError> {
        Ok(())
    }
}

impl Interrupts for Liar {
    fn vectors(&self) -> u32 {
        1
    }
    fn wait(&self, _: u32, _: Duration) -> Result<u64, DeviceError> {
        Ok(self.answer())
    }
}

/// Every call ends by its deadline, and what the device says is passed on as it is or refused.
pub fn registers(bytes: &[u8]) {
    let liar = Arc::new(Liar(Mutex::new((bytes.to_vec(), 0))));
    let config = EduConfig {
        deadline: Duration::from_millis(1),
    };
    let begun = Instant::now();
    let identity = bytes
        .get(..4)
        .map(|id| u32::from_le_bytes([id[0], id[1], id[2], id[3]]));
    let edu = match Edu::probe(liar.clone(), liar.clone(), config) {
        Ok(edu) => edu,
        Err(error) => {
            assert!(identity != Some(0x0100_00ed), "{error}");
            return;
        }
    };
    let answers = || liar.0.lock().expect("nobody panics with it").1 as u32;
    match edu.check_liveness(0x1234_5678) {
        Ok(()) => assert_eq!(answers(), !0x1234_5678),
        Err(EduError::NotAlive { found, .. }) => assert_eq!(answers(), found),
        Err(_) => {}
    }
    if let Ok(factorial) = edu.factorial(5) {
        assert_eq!(factorial, answers());
    }
    let _ = edu.check_interrupt();
    assert!(begun.elapsed() < Duration::from_secs(5), "it does not end");
}

#[cfg(test)]
#[path = "../../../tests/fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    #[test]
    fn the_corpus_of_registers_holds() {
        super::replay::replay("edu_registers", 64, super::registers);
    }
}
