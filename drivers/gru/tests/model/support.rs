//! A bus, chiplets of the model, the driver over them, and spaces.

use std::sync::Arc;
use std::time::Duration;

use shootdown::{Addr, AddressSpace, Deadlines};
use shootdown_gru::{ChipletPorts, Config, Gru, Kernel};
use shootdown_hw_model::gru::{ChipletConfig, Model};
use shootdown_hw_model::{Bus, ModelMemory};

/// Long enough for anything that ends at all.
pub(crate) const LONG: Duration = Duration::from_secs(10);

/// The driver over the model.
pub(crate) struct Rig {
    pub(crate) bus: Bus,
    pub(crate) model: Model,
    pub(crate) gru: Arc<Gru>,
}

impl Rig {
    pub(crate) fn new(chiplets: u32, hardware: ChipletConfig, config: Config) -> Self {
        Self::with_frames(16 << 10, chiplets, hardware, config)
    }

    pub(crate) fn with_frames(
        frames: u64,
        chiplets: u32,
        hardware: ChipletConfig,
        config: Config,
    ) -> Self {
        let bus = Bus::new(frames).unwrap();
        let model = Model::new(&bus, chiplets, hardware);
        let ports = model.chiplets().iter().map(|chiplet| ChipletPorts {
            name: format!("gru{}", chiplet.config().device),
            blade: chiplet.config().device / 2,
            registers: chiplet.clone(),
            interrupts: chiplet.clone(),
        });
        let gru = Gru::attach(ports.collect(), config);
        Self { bus, model, gru }
    }

    /// The driver's own services, over memory of their own.
    pub(crate) fn kernel(&self) -> Kernel {
        Kernel::new(&self.gru, ModelMemory::new(&self.bus, 4 << 20).unwrap())
    }

    pub(crate) fn space(&self) -> AddressSpace {
        self.space_with(Deadlines::default())
    }

    pub(crate) fn space_of(&self, bytes: u64) -> AddressSpace {
        let memory = ModelMemory::new(&self.bus, bytes).unwrap();
        AddressSpace::managed(memory, Deadlines::default())
    }

    pub(crate) fn space_with(&self, deadlines: Deadlines) -> AddressSpace {
        let memory = ModelMemory::new(&self.bus, 64 << 20).unwrap();
        AddressSpace::managed(memory, deadlines)
    }

    pub(crate) fn stale(&self) -> u64 {
        self.bus.oracle().stale_accesses()
    }

    /// The oracle has found nothing, and nothing was leaked.
    pub(crate) fn clean(&self) {
        let findings = self.bus.oracle().findings();
        assert_eq!(self.stale(), 0, "{}", findings[0]);
        let stats = self.gru.stats();
        assert_eq!(
            (stats.contexts_in_use, stats.asids_in_use),
            (0, 0),
            "{stats:?}"
        );
        assert_eq!(stats.contexts_leaked, 0);
    }
}

/// For hardware that misses them.
pub(crate) fn short() -> Deadlines {
    Deadlines {
        flush: Duration::from_millis(5),
        full_flush: Duration::from_millis(5),
        reset: Duration::from_millis(20),
        ..Deadlines::default()
    }
}

pub(crate) fn load(at: Addr) -> u64 {
    // SAFETY: the test mapped the page for reading.
    unsafe { (at.get() as *const u64).read_volatile() }
}

pub(crate) fn at(base: Addr, offset: u64) -> Addr {
    Addr::new(base.get() + offset)
}
