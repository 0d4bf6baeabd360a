//! Chiplets that lie in their registers, or storm with their interrupts: every call ends within its deadlines, nothing is leaked,
//! no stale access is made, and whoever has nothing to do with them goes on.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use shootdown::{
    AddressSpace, Device, DeviceError, Health, Interrupts, InvalidateError, Map, MapError,
    Registers,
};
use shootdown_gru::{ChipletPorts, Config, Element, Gru, GruError, Instruction, Segment};
use shootdown_hw_model::gru::layout::{
    ACTIVE, CAUSE, CCH, CONTEXTS, EXCEPTION, IDLE, MANAGEMENT, OPCODE, RESET, SLOTS, STATUS, TFH,
    TFM, TGH, cch, tfh,
};
use shootdown_hw_model::gru::{Chiplet, ChipletConfig, Model};
use shootdown_hw_model::{Bus, ModelMemory};

use crate::support::{LONG, Rig, at, load, short};

/// What the registers say, whatever is true.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
enum Lie {
    None,
    /// Faults in every slot, also in those of nobody, and an interrupt for each look.
    FaultMap,
    /// Every fault handle has a miss, at addresses that are anywhere, of ASIDs that nobody has.
    Misses,
    /// An unresolved fault locks every context.
    Locked,
    /// Operations of contexts and faults never end.
    NeverIdle,
    /// Every purge fails.
    PurgesFail,
    /// A reset is done before it was asked for. The chiplet has not been reset.
    Reset,
    /// Every purge fails, and the reset that follows is one of that kind.
    PurgesFailAndReset,
    /// A context is given back, and is not.
    Kept,
    /// There is no chiplet.
    Gone,
    /// Handles of contexts and faults, and the fault map, hold noise.
    Noise,
}

impl Lie {
    const ALL: [Self; 11] = [
        Self::None,
        Self::FaultMap,
        Self::Misses,
        Self::Locked,
        Self::NeverIdle,
        Self::PurgesFail,
        Self::Reset,
        Self::PurgesFailAndReset,
        Self::Kept,
        Self::Gone,
        Self::Noise,
    ];
}

struct Liar {
    chiplet: Arc<Chiplet>,
    lie: AtomicU8,
    noise: AtomicU64,
    /// Operations of context handles.
    operations: AtomicU64,
    /// Waits for an interrupt.
    waits: AtomicU64,
}

impl Liar {
    fn set(&self, lie: Lie) {
        self.lie.store(lie as u8, Ordering::SeqCst);
    }

    fn lie(&self) -> Lie {
        Lie::ALL[usize::from(self.lie.load(Ordering::SeqCst))]
    }

    fn noise(&self) -> u64 {
        let nth = self
            .noise
            .fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::SeqCst);
        let mixed = (nth ^ (nth >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb)
    }
}

/// Which kind of management register is at `offset`, and which word of it.
fn kind(offset: u64) -> Option<(u64, u64)> {
    let within = offset.checked_sub(MANAGEMENT)?;
    let kinds = [RESET, CCH, TFH, 0x1_0000, TGH, TFM];
    let kind = kinds.into_iter().find(|kind| within >= *kind)?;
    Some((kind, (within - kind) % 256 / 8))
}

impl Registers for Liar {
    fn len(&self) -> u64 {
        self.chiplet.len()
    }

    fn read(&self, offset: u64) -> Result<u64, DeviceError> {
        let truth = self.chiplet.read(offset)?;
        let Some((kind, word)) = kind(offset) else {
            return match self.lie() {
                Lie::Gone => Err(DeviceError::Gone { reason: "a test" }),
                _ => Ok(truth),
            };
        };
        Ok(match (self.lie(), kind, word) {
            (Lie::Gone, ..) => return Err(DeviceError::Gone { reason: "a test" }),
            (Lie::FaultMap | Lie::Misses, TFM, 0 | 1) => u64::MAX,
            (Lie::Misses, TFH, 0) => tfh::STATE.put(IDLE, tfh::STATE_MISS_FMM),
            (Lie::Misses, TFH, _) => self.noise(),
            (Lie::Locked, CCH, 0) => CAUSE.put(STATUS.put(0, EXCEPTION), cch::CAUSE_LOCKED.into()),
            (Lie::NeverIdle, CCH | TFH, 0) => STATUS.put(truth, ACTIVE),
            (Lie::PurgesFail | Lie::PurgesFailAndReset, TGH, 0) => STATUS.put(truth, EXCEPTION),
            (Lie::Reset | Lie::PurgesFailAndReset, RESET, _) => 0,
            (Lie::Noise, CCH | TFH | TFM, _) => self.noise(),
            _ => truth,
        })
    }

    fn write(&self, offset: u64, value: u64) -> Result<(), DeviceError> {
        if let Some((CCH, 0)) = kind(offset) {
            self.operations.fetch_add(1, Ordering::SeqCst);
        }
        match self.lie() {
            Lie::Gone => Err(DeviceError::Gone { reason: "a test" }),
            Lie::Kept if kind(offset) == Some((CCH, 0)) && OPCODE.get(value) == cch::DEALLOCATE => {
                Ok(())
            }
            Lie::Reset | Lie::PurgesFailAndReset if offset == MANAGEMENT + RESET => Ok(()),
            _ => self.chiplet.write(offset, value),
        }
    }
}

impl Interrupts for Liar {
    fn vectors(&self) -> u32 {
        self.chiplet.vectors()
    }

    fn wait(&self, vector: u32, timeout: Duration) -> Result<u64, DeviceError> {
        self.waits.fetch_add(1, Ordering::SeqCst);
        match self.lie() {
            Lie::FaultMap | Lie::Misses | Lie::Noise => Ok(u64::MAX),
            _ => self.chiplet.wait(vector, timeout),
        }
    }
}

/// Two chiplets, the first of which can be told to lie, and a space with a segment on each.
struct Pair {
    bus: Bus,
    liar: Arc<Liar>,
    gru: Arc<Gru>,
    space: AddressSpace,
    segments: [Option<Segment>; 2],
    _model: Model,
}

impl Pair {
    fn new(hardware: ChipletConfig) -> Self {
        let bus = Bus::new(16 << 10).unwrap();
        let model = Model::new(&bus, 2, hardware);
        let liar = Arc::new(Liar {
            chiplet: model.chiplets()[0].clone(),
            lie: AtomicU8::new(0),
            noise: AtomicU64::new(1),
            operations: AtomicU64::new(0),
            waits: AtomicU64::new(0),
        });
        let ports = |name: &str, registers, interrupts| ChipletPorts {
            name: name.to_owned(),
            blade: 0,
            registers,
            interrupts,
        };
        let honest = model.chiplets()[1].clone();
        let config = Config {
            handle_deadline: Duration::from_millis(50),
            fault_deadline: Duration::from_millis(50),
            ..Config::default()
        };
        let gru = Gru::attach(
            vec![
                ports("liar", liar.clone(), liar.clone()),
                ports("honest", honest.clone(), honest),
            ],
            config,
        );
        let memory = ModelMemory::new(&bus, 64 << 20).unwrap();
        let space = AddressSpace::managed(memory, short());
        let mut pair = Self {
            bus,
            liar,
            gru,
            space,
            segments: [None, None],
            _model: model,
        };
        pair.segments();
        pair
    }

    /// A segment on each chiplet. A context that was kept is stopped for them; where a fault locks it that takes a reset, and they are
    /// told. Whoever resolves a fault may still have a segment that is gone, which counts where there are fewest.
    fn segments(&mut self) {
        let (begun, mut refused) = (Instant::now(), 0);
        while self.segments.iter().any(Option::is_none) {
            match self.gru.segment(&self.space) {
                Ok(segment) => {
                    let nth = usize::from(segment.chiplet() == "honest");
                    self.segments[nth].get_or_insert(segment);
                }
                Err(GruError::HandleException { .. }) => refused += 1,
                Err(error) => panic!("{error}"),
            }
            assert!(refused <= CONTEXTS && begun.elapsed() < MOST);
        }
    }

    fn liars(&self) -> &Device {
        &self.gru.devices()[0]
    }

    /// Work on new memory, which the CPU checks.
    fn works(&self, nth: usize, value: u64) -> Result<(), GruError> {
        let buffer = self.space.map(Map::anonymous(8 << 12)).unwrap();
        let set = Instruction::vset(buffer.start(), value, Element::Double, 4096);
        let segment = self.segments[nth].as_ref().unwrap();
        segment.run(0, &set, LONG)?;
        assert_eq!(load(at(buffer.start(), 32760)), value);
        self.space.unmap(buffer)?;
        Ok(())
    }
}

/// The deadlines of all that one call may have to wait for, with room for a loaded machine.
const MOST: Duration = Duration::from_secs(4);

fn in_time<T>(what: &str, lie: Lie, call: impl FnOnce() -> T) -> T {
    let begun = Instant::now();
    let result = call();
    assert!(
        begun.elapsed() < MOST,
        "{lie:?}: {what} took {:?}",
        begun.elapsed()
    );
    result
}

#[test]
fn no_lie_of_a_chiplet_hangs_leaks_or_reaches_anything() {
    for lie in Lie::ALL {
        let mut pair = Pair::new(ChipletConfig::default());
        pair.works(0, 1).unwrap();
        pair.works(1, 1).unwrap();
        let buffer = pair.space.map(Map::anonymous(4 << 12)).unwrap();
        let set = Instruction::vset(buffer.start(), 2, Element::Double, 1 << 16).stride(0);
        pair.segments[0].as_ref().unwrap().submit(0, &set).unwrap();
        pair.liar.set(lie);
        // The other chiplet goes on, unless the first one is in quarantine, which is said.
        match in_time("work of the other", lie, || pair.works(1, 3)) {
            Ok(()) => {}
            Err(GruError::Fault(_) | GruError::Map(_)) => {
                assert_eq!(pair.liars().health(), Health::Quarantined, "{lie:?}");
            }
            Err(error) => panic!("{lie:?}: {error}"),
        }
        match in_time("an unmap", lie, || pair.space.unmap(buffer)) {
            // Nothing was flushed, and nothing reset.
            Ok(()) => assert_ne!(lie, Lie::PurgesFailAndReset),
            Err(MapError::Invalidate(InvalidateError::Quarantined { device, .. })) => {
                assert_eq!(device.name(), "liar", "{lie:?}");
            }
            Err(error) => panic!("{lie:?}: {error}"),
        }
        let segment = pair.segments[0].take().unwrap();
        let _ = in_time("the end of a segment", lie, || segment.unmap());
        drop(segment);
        let _ = in_time("a segment", lie, || pair.gru.segment(&pair.space));

        // It comes back, with all that was kept.
        pair.liar.set(Lie::None);
        let begun = Instant::now();
        while pair.liars().recover(Duration::from_millis(100)).is_err() {
            assert!(begun.elapsed() < MOST, "{lie:?}: it does not recover");
        }
        pair.space.drain().unwrap();
        assert_eq!(pair.space.quarantined_bytes(), 0, "{lie:?}");
        pair.segments[1] = None;
        pair.segments();
        pair.works(1, 4).unwrap();
        pair.works(0, 4).unwrap();
        pair.segments = [None, None];
        let stats = pair.gru.stats();
        assert_eq!(
            (stats.contexts_in_use, stats.asids_in_use),
            (0, 0),
            "{lie:?}"
        );
        assert_eq!(pair.space.registrations(), 0, "{lie:?}");
        pair.space.exit().unwrap();
        assert_eq!(pair.space.quarantined_bytes(), 0, "{lie:?}");
        let findings = pair.bus.oracle().findings();
        assert!(findings.is_empty(), "{lie:?}: {}", findings[0]);
    }
}

/// A reset that the framework has not asked for.
#[test]
fn a_chiplet_that_does_not_come_back_from_its_drivers_reset_is_in_quarantine_until_it_recovers() {
    let mut pair = Pair::new(ChipletConfig::default());
    pair.segments = [None, None];
    assert_eq!(pair.liars().health(), Health::Healthy);
    pair.liar.set(Lie::Gone);
    let segments = [(); 2].map(|()| pair.gru.segment(&pair.space));
    assert!(segments.iter().any(Result::is_err));
    assert_eq!(pair.liars().health(), Health::Quarantined);
    drop(segments);
    pair.liar.set(Lie::None);
    pair.liars().recover(MOST).unwrap();
    pair.space.drain().unwrap();
    // One on each.
    pair.segments();
    pair.works(0, 1).unwrap();
}

#[test]
fn an_interrupt_storm_does_not_eat_a_processor_and_faults_are_still_served() {
    let pair = Pair::new(ChipletConfig::default());
    pair.liar.set(Lie::FaultMap);
    let before = pair.liar.waits.load(Ordering::SeqCst);
    std::thread::sleep(Duration::from_secs(1));
    let looks = pair.liar.waits.load(Ordering::SeqCst) - before;
    assert!((1..200).contains(&looks), "{looks} in a second");
    pair.works(0, 1).unwrap();
    pair.works(1, 1).unwrap();
}

#[test]
fn a_context_that_stays_locked_is_asked_now_and_then_until_the_deadline() {
    let pair = Pair::new(ChipletConfig::default());
    pair.liar.set(Lie::Locked);
    let before = pair.liar.operations.load(Ordering::SeqCst);
    let begun = Instant::now();
    pair.segments[0].as_ref().unwrap().unmap().unwrap();
    let asked = pair.liar.operations.load(Ordering::SeqCst) - before;
    assert!(begun.elapsed() >= Duration::from_millis(50) && begun.elapsed() < MOST);
    assert_eq!(pair.liars().stats().resets, 1);
    // Some dozens at once, then one each 50 us at most.
    assert!((2..1100).contains(&asked), "{asked}");
}

/// DMA to every address: nobody but the oracle judges that, and it finds each.
#[test]
fn a_chiplet_that_installs_its_own_translations_is_found_by_the_oracle() {
    let rig = Rig::new(1, ChipletConfig::default(), Config::default());
    let (space, other) = (rig.space(), rig.space());
    let secret = other.map(Map::anonymous(4096)).unwrap();
    let segment = rig.gru.segment(&space).unwrap();
    let chiplet = &rig.model.chiplets()[0];
    let frame = other.translate(secret.start()).unwrap().frame.0;
    let slot = (0..SLOTS as u64).find(|slot| {
        let set = Instruction::vset(secret.start(), 1, Element::Double, 1);
        let _ = segment.submit(0, &set);
        let base = MANAGEMENT + TFH + slot * 256;
        tfh::STATE.get(chiplet.read(base).unwrap()) != tfh::STATE_INACTIVE
    });
    let base = MANAGEMENT + TFH + slot.unwrap() * 256;
    let begun = Instant::now();
    // An address that its space does not have, and a frame that is another's.
    while rig.stale() == 0 {
        let set = Instruction::vset(secret.start(), 1, Element::Double, 1);
        let _ = segment.submit(0, &set);
        for (word, value) in [
            (tfh::FILL_VADDR, secret.start().get()),
            (
                tfh::FILL,
                tfh::DIRTY.put(u64::from(segment.asid().unwrap()), 1),
            ),
            (tfh::PFN, frame),
            (0, 1 | (tfh::WRITE_RESTART << 8) | (ACTIVE << 16)),
        ] {
            chiplet.write(base + word as u64 * 8, value).unwrap();
        }
        assert!(begun.elapsed() < LONG, "it was not found");
    }
    drop(segment);
    space.exit().unwrap();
    other.unmap(secret).unwrap();
}
