//! Quarantined devices come back: the run goes on without them for a while, then recovers them, and their memory with them.

use shootdown::{AddressSpace, Device, Health};
use shootdown_primitive::time::{Duration, Instant};

use crate::run::deadlines;

/// How long the run goes on with a device in quarantine.
const WITHOUT: Duration = Duration::from_millis(100);
/// How long it is tried at the end. A chiplet that may survive a reset does so every second time.
const PATIENCE: Duration = Duration::from_secs(10);

/// The devices of a run, and since when each is in quarantine.
pub(crate) struct Recovery<'a> {
    devices: Vec<(&'a Device, Option<Instant>)>,
    space: &'a AddressSpace,
    pub(crate) recoveries: u64,
    pub(crate) findings: Vec<String>,
}

impl<'a> Recovery<'a> {
    pub(crate) fn new(devices: &'a [Device], space: &'a AddressSpace) -> Self {
        Self {
            devices: devices.iter().map(|device| (device, None)).collect(),
            space,
            recoveries: 0,
            findings: Vec::new(),
        }
    }

    /// Tries to bring back what has been in quarantine for long enough. Waits for hardware.
    pub(crate) fn tick(&mut self) {
        self.recover(WITHOUT);
    }

    /// Brings everything back, and the memory: whether that came to its end in time.
    pub(crate) fn finish(&mut self) -> bool {
        let begun = Instant::now();
        loop {
            self.recover(Duration::ZERO);
            if self.devices.iter().all(|(device, _)| is_healthy(device)) {
                self.drain();
                return true;
            }
            if begun.elapsed() >= PATIENCE {
                return false;
            }
        }
    }

    fn recover(&mut self, after: Duration) {
        let mut recovered = false;
        for (device, since) in &mut self.devices {
            if is_healthy(device) {
                *since = None;
                continue;
            }
            let since = since.get_or_insert_with(Instant::now);
            // A failure says that it survived; the next turn tries again.
            if since.elapsed() >= after && device.recover(deadlines().reset).is_ok() {
                self.recoveries += 1;
                recovered = true;
            }
        }
        if recovered {
            self.drain();
        }
    }

    /// Gives back the memory of devices that have recovered.
    fn drain(&mut self) {
        if let Err(refused) = self.space.drain() {
            self.findings.push(format!("drain: {refused}"));
        }
    }
}

fn is_healthy(device: &Device) -> bool {
    device.health() == Health::Healthy
}
