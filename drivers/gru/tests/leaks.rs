//! Nothing grows: what the allocator of this program has handed out is the same, to the byte, after hundreds of rounds of spaces,
//! segments, invalidations and registrations that come and go. What a round needs for the first time it has had before the first count.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use shootdown::{
    AddressSpace, Deadlines, Drain, Map, Notifier, Op, Range, Registration, Rights, WouldBlock,
};
use shootdown_gru::{ChipletPorts, Config, Element, Gru, Instruction};
use shootdown_hw_model::gru::{ChipletConfig, Model};
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
    _model: Model,
}

const LONG: Duration = Duration::from_secs(20);

impl Rig {
    fn new() -> Self {
        let bus = Bus::new(4096).unwrap();
        let hardware = ChipletConfig {
            tlb_entries: 8,
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
            ..Config::default()
        };
        let gru = Gru::attach(ports.collect(), config);
        let memory = ModelMemory::new(&bus, 64 << 20).unwrap();
        Self {
            space: AddressSpace::managed(memory, Deadlines::default()),
            gru,
            bus,
            _model: model,
        }
    }

    /// Everything once: in the lasting space, and in one of its own.
    fn round(&self) {
        let memory = ModelMemory::new(&self.bus, 4 << 20).unwrap();
        let short_lived = AddressSpace::managed(memory, Deadlines::default());
        for space in [&self.space, &short_lived] {
            let segment = self.gru.segment(space).unwrap();
            let buffer = space.map(Map::anonymous(16 << 12)).unwrap();
            let set = Instruction::vset(buffer.start(), 7, Element::Double, 16 * 512);
            segment.run(0, &set, LONG).unwrap();
            let handler = Arc::new(GivesUp::default());
            let own = space.register(buffer, handler.clone(), &[]).unwrap();
            *handler.0.lock().unwrap() = Some(own);
            space.discard(buffer).unwrap();
            let plain = space.register(Range::ALL, handler, &[]).unwrap();
            space.protect(buffer, Rights::READ).unwrap();
            plain.unregister().unwrap();
            space.unmap(buffer).unwrap();
            segment.unmap().unwrap();
        }
        short_lived.exit().unwrap();
    }

    /// The least that is handed out at any moment of some rounds, when threads are quiet.
    fn handed_out(&self, rounds: usize) -> (i64, i64) {
        let mut least = (i64::MAX, i64::MAX);
        for _ in 0..rounds {
            self.round();
            self.space.drain().unwrap();
            least = least.min((BYTES.load(Relaxed), PIECES.load(Relaxed)));
        }
        least
    }
}

/// One test: the count is the program's.
#[test]
fn what_is_handed_out_is_the_same_after_hundreds_of_rounds() {
    let rig = Rig::new();
    rig.handed_out(100);
    let before = rig.handed_out(20);
    let begun = Instant::now();
    rig.handed_out(400);
    let after = rig.handed_out(20);
    assert!(
        after.0 <= before.0 && after.1 <= before.1,
        "{after:?} instead of {before:?} bytes and pieces, after 400 rounds in {:?}",
        begun.elapsed()
    );
    // The count can tell.
    std::mem::forget(vec![0_u8; 100]);
    let leaked = rig.handed_out(20);
    assert!(leaked.0 >= after.0 + 100, "{leaked:?} after {after:?}");
}
