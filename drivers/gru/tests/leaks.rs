//! Nothing grows: the allocator of this program has handed out as much after hundreds of rounds of spaces, segments, invalidations and
//! registrations that come and go as before them, to the byte. Where chiplets fail and come back too, the only pieces that may be there
//! or not are named, and bounded.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use shootdown::{
    AddressSpace, Deadlines, Drain, Map, Notifier, Op, Range, Registration, Rights, WouldBlock,
};
use shootdown_gru::{ChipletPorts, Config, Element, Gru, Instruction};
use shootdown_hw_model::gru::{ChipletConfig, FaultPlan, Model};
use shootdown_hw_model::{Bus, ModelMemory};

/// Bytes that are handed out, and how many pieces.
static BYTES: AtomicI64 = AtomicI64::new(0);
static PIECES: AtomicI64 = AtomicI64::new(0);

struct Counts;

#[global_allocator]
static COUNTS: Counts = Counts;

// SAFETY: hands everything on to the system's allocator.
unsafe impl GlobalAlloc for Counts {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        BYTES.fetch_add(layout.size() as i64, Relaxed);
        PIECES.fetch_add(1, Relaxed);
        // SAFETY: as the caller guarantees.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        BYTES.fetch_sub(layout.size() as i64, Relaxed);
        PIECES.fetch_sub(1, Relaxed);
        // SAFETY: as the caller guarantees.
        unsafe { System.dealloc(at, layout) }
    }
}

/// Gives up a registration inside of its callback.
#[derive(Default)]
struct GivesUp(std::sync::Mutex<Option<Registration>>);

impl Notifier for GivesUp {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        if let Some(own) = self.0.lock().unwrap().take() {
            own.unregister().unwrap();
        }
        Ok(op.idle())
    }
}

struct Rig {
    bus: Bus,
    gru: Arc<Gru>,
    space: AddressSpace,
    deadlines: Deadlines,
    _model: Model,
}

const LONG: Duration = Duration::from_secs(20);

/// Purges that are lost, never begin, come late or twice, and resets that are survived.
fn faults() -> FaultPlan {
    FaultPlan {
        lost: 0.03,
        stuck: 0.03,
        late: 0.02,
        late_by: Duration::from_millis(5),
        jitter: Duration::from_micros(50),
        duplicated: 0.05,
        purge_in_miss: 0.05,
        survives_reset: 0.5,
        ..FaultPlan::default()
    }
}

/// Those of chiplets that fail are missed now and then; others have time, however loaded the machine is.
fn deadlines(faults: FaultPlan) -> Deadlines {
    if faults == FaultPlan::default() {
        return Deadlines::default();
    }
    Deadlines {
        flush: Duration::from_millis(2),
        full_flush: Duration::from_millis(2),
        reset: Duration::from_millis(4),
        ..Deadlines::default()
    }
}

impl Rig {
    fn new(faults: FaultPlan) -> Self {
        let bus = Bus::new(4096).unwrap();
        let hardware = ChipletConfig {
            tlb_entries: 8,
            faults,
            ..ChipletConfig::default()
        };
        let model = Model::new(&bus, 2, hardware);
        let ports = model.chiplets().iter().map(|chiplet| ChipletPorts {
            name: format!("gru{}", chiplet.config().device),
            blade: 0,
            registers: chiplet.clone(),
            interrupts: chiplet.clone(),
        });
        let config = Config {
            // They wrap.
            asids: 8..=40,
            fault_deadline: Duration::from_millis(20),
            ..Config::default()
        };
        let gru = Gru::attach(ports.collect(), config);
        let memory = ModelMemory::new(&bus, 64 << 20).unwrap();
        Self {
            space: AddressSpace::managed(memory, deadlines(faults)),
            deadlines: deadlines(faults),
            gru,
            bus,
            _model: model,
        }
    }

    /// Brings every device back, and what was in quarantine with them.
    fn recover(&self, space: &AddressSpace) {
        let begun = Instant::now();
        for device in self.gru.devices() {
            while device.recover(LONG / 100).is_err() {
                assert!(
                    begun.elapsed() < LONG,
                    "{} does not come back",
                    device.name()
                );
            }
        }
        space.drain().unwrap();
    }

    /// Until it succeeds, as it does on devices that are well.
    fn insist<T, E: std::fmt::Display>(
        &self,
        space: &AddressSpace,
        mut call: impl FnMut() -> Result<T, E>,
    ) -> T {
        let begun = Instant::now();
        loop {
            match call() {
                Ok(done) => return done,
                Err(error) => assert!(begun.elapsed() < LONG, "{error}"),
            }
            self.recover(space);
        }
    }

    /// Everything once: in the lasting space, and in one of its own.
    fn round(&self) {
        let memory = ModelMemory::new(&self.bus, 4 << 20).unwrap();
        let short_lived = AddressSpace::managed(memory, self.deadlines);
        for space in [&self.space, &short_lived] {
            let segment = self.insist(space, || self.gru.segment(space));
            let buffer = space.map(Map::anonymous(16 << 12)).unwrap();
            let set = Instruction::vset(buffer.start(), 7, Element::Double, 16 * 512);
            // A reset may take it.
            let _ = segment.run(0, &set, LONG);
            let handler = Arc::new(GivesUp::default());
            let own = space.register(buffer, handler.clone(), &[]).unwrap();
            *handler.0.lock().unwrap() = Some(own);
            self.insist(space, || space.discard(buffer));
            let plain = space.register(Range::ALL, handler, &[]).unwrap();
            self.insist(space, || space.protect(buffer, Rights::READ));
            plain.unregister().unwrap();
            // What failed is unmapped by the drain.
            let _ = space.unmap(buffer);
            let _ = segment.unmap();
            drop(segment);
            self.recover(space);
        }
        let _ = short_lived.exit();
    }

    /// The least that is handed out at any moment of some rounds, when threads are quiet.
    fn handed_out(&self, rounds: usize) -> (i64, i64) {
        let mut least = (i64::MAX, i64::MAX);
        for _ in 0..rounds {
            self.round();
            self.recover(&self.space);
            least = least.min((BYTES.load(Relaxed), PIECES.load(Relaxed)));
        }
        least
    }
}

/// The same after so many rounds, but for `room`.
fn is_flat(faults: FaultPlan, rounds: usize, room: (i64, i64)) {
    let rig = Rig::new(faults);
    rig.handed_out(rounds / 4);
    let before = rig.handed_out(20);
    let begun = Instant::now();
    rig.handed_out(rounds);
    let after = rig.handed_out(20);
    assert!(
        after.0 <= before.0 + room.0 && after.1 <= before.1 + room.1,
        "{after:?} instead of {before:?} bytes and pieces, after {rounds} rounds in {:?}",
        begun.elapsed()
    );
    // The count can tell.
    std::mem::forget(vec![0_u8; room.0 as usize + 1]);
    let leaked = rig.handed_out(20);
    assert!(leaked.0 > after.0, "{leaked:?} after {after:?}");
    let stats = rig.gru.stats();
    assert_eq!(
        stats.resets > 0,
        faults != FaultPlan::default(),
        "{stats:?}"
    );
}

/// What may be there or not, in bytes and pieces: of the model a node for the operations in progress, for each of two chiplets, from the
/// first after a reset to the next reset; of the lasting space the list of what devices in quarantine may still reach, from its first
/// use on.
const ROOM: (i64, i64) = (2 * 1024, 3);

/// Without faults no piece more. Lists keep the room that they have once needed, and how much is needed at once is a matter of who is
/// interrupted where: less than a byte a round.
const LISTS: (i64, i64) = (256, 0);

/// One test: the count is the program's.
#[test]
fn what_is_handed_out_is_the_same_after_hundreds_of_rounds_with_and_without_faults() {
    is_flat(FaultPlan::default(), 300, LISTS);
    is_flat(faults(), 100, ROOM);
}
