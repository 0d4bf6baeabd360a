//! What the threads of a run share, and what they do with its devices.

use shootdown::{AddressSpace, Device, FaultError, Health, InvalidateError, MapError, Range};
use shootdown_gru::{Gru, GruError, Instruction, Kernel, Segment};
use shootdown_hw_model::Bus;
use shootdown_primitive::sync::Arc;
use shootdown_primitive::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use shootdown_primitive::thread;
use shootdown_primitive::time::{Duration, Instant};

use crate::accelerator::Accelerators;
use crate::churn::Releases;
use crate::foreign::Foreign;

/// Any instruction ends sooner, or its device is dead.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// What all threads share.
pub(crate) struct Shared {
    /// The driver's own services, until the end of the run.
    pub(crate) kernel: Option<Kernel>,
    pub(crate) bus: Bus,
    pub(crate) gru: Arc<Gru>,
    pub(crate) accelerators: Accelerators,
    pub(crate) space: AddressSpace,
    pub(crate) arena: Range,
    /// Devices fail on purpose.
    pub(crate) faulty: bool,
    pub(crate) stop: AtomicBool,
    pub(crate) shootdowns: AtomicU64,
    pub(crate) bytes_verified: AtomicU64,
    pub(crate) data_mismatches: AtomicU64,
    pub(crate) segments_torn_down: AtomicU64,
    pub(crate) spaces_exited: AtomicU64,
    pub(crate) short_lived: Spaces,
    /// Bytes that the exits of short-lived spaces had to keep.
    pub(crate) kept: AtomicU64,
    pub(crate) releases: Releases,
    /// Others change the memory too.
    pub(crate) foreign: Option<Foreign>,
}

impl Shared {
    /// Of a run on `space`, with nobody else at its memory.
    pub(crate) fn new(
        bus: &Bus,
        gru: &Arc<Gru>,
        space: AddressSpace,
        arena: Range,
        faulty: bool,
    ) -> Self {
        Self {
            kernel: None,
            bus: bus.clone(),
            gru: gru.clone(),
            accelerators: Accelerators::default(),
            space,
            arena,
            faulty,
            stop: AtomicBool::new(false),
            shootdowns: AtomicU64::new(0),
            bytes_verified: AtomicU64::new(0),
            data_mismatches: AtomicU64::new(0),
            segments_torn_down: AtomicU64::new(0),
            spaces_exited: AtomicU64::new(0),
            short_lived: Spaces::default(),
            kept: AtomicU64::new(0),
            releases: Arc::default(),
            foreign: None,
        }
    }

    /// Bytes of memory in quarantine.
    pub(crate) fn quarantined(&self) -> u64 {
        self.space.quarantined_bytes() + self.kept.load(Ordering::Relaxed)
    }

    /// Waits until no device is in quarantine: what a space keeps when it exits meanwhile it keeps for good.
    pub(crate) fn await_health(&self) {
        let sick = |device: &Device| device.health() == Health::Quarantined;
        let begun = Instant::now();
        while self.gru.devices().iter().any(sick)
            && begun.elapsed() < PATIENCE
            && !self.stop.load(Ordering::Relaxed)
        {
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Whether an error comes of a device that was lost, which is no finding.
    pub(crate) fn is_lost(&self, error: &GruError) -> bool {
        match error {
            GruError::ContextLost { .. } | GruError::Timeout { .. } | GruError::Fault(_) => true,
            GruError::HandleTimeout { .. }
            | GruError::NoContext { .. }
            | GruError::NoneStealable { .. }
            | GruError::NoFreeBlocks { .. }
            | GruError::Congested { .. } => self.faulty,
            GruError::Exception { causes, .. } => self.faulty && causes.is_retryable(),
            GruError::Map(error) => self.faulty && is_quarantine(error),
            _ => false,
        }
    }

    /// Waits for an instruction, and where a device is in quarantine for that to be over, as then nobody's misses are resolved.
    pub(crate) fn wait(&self, segment: &Segment, cb: usize) -> Result<u64, GruError> {
        let begun = Instant::now();
        loop {
            match segment.wait(cb, PATIENCE) {
                Err(GruError::Fault(FaultError::DeviceQuarantined { .. }))
                    if begun.elapsed() < PATIENCE && !self.stop.load(Ordering::Relaxed) =>
                {
                    thread::sleep(Duration::from_millis(1));
                }
                result => return result,
            }
        }
    }

    /// Runs instructions at the same time, one a control block. None is at work afterwards, unless the device was lost.
    pub(crate) fn run_together(
        &self,
        segment: &Segment,
        instructions: &[Instruction],
    ) -> Result<(), GruError> {
        let mut result = Ok(());
        let mut submitted = 0;
        for instruction in instructions {
            result = segment.submit(submitted, instruction);
            if result.is_err() {
                break;
            }
            submitted += 1;
        }
        for cb in 0..submitted {
            result = self.wait(segment, cb).map(|_| ()).and(result);
        }
        result
    }

    /// Waits for work that may end with the data or with an exception, as its memory changed meanwhile.
    pub(crate) fn settle(&self, segment: &Segment, blocks: usize) -> Result<(), GruError> {
        let mut result = Ok(());
        for cb in 0..blocks {
            match self.wait(segment, cb) {
                Ok(_) | Err(GruError::Exception { .. }) => {}
                Err(error) => result = Err(error),
            }
        }
        result
    }
}

/// Whether pages were not changed because a device may still reach them.
pub(crate) fn is_quarantine(error: &MapError) -> bool {
    matches!(
        error,
        MapError::InQuarantine { .. } | MapError::Invalidate(InvalidateError::Quarantined { .. })
    )
}

/// Sums over the spaces that have come and gone.
#[derive(Default)]
pub(crate) struct Spaces {
    pub(crate) inserts: AtomicU64,
    pub(crate) releases: AtomicU64,
    pub(crate) registrations: AtomicU64,
}
