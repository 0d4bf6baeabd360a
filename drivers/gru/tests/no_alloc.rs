//! Unloading a context neither allocates nor frees (R18), whatever state its control blocks are in: the allocator of this program
//! counts what the thread does between the start and the end of the shootdown. The model's registers are the hardware, and
//! left out.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use shootdown::{
    AddressSpace, Deadlines, DeviceError, Drain, Map, Notifier, Op, Outcome, Range, Registers,
    WouldBlock,
};
use shootdown_gru::{ChipletPorts, Config, Element, Gru, Instruction};
use shootdown_hw_model::gru::{ChipletConfig, Model};
use shootdown_hw_model::{Bus, ModelMemory};

thread_local! {
    static ARMED: Cell<bool> = const { Cell::new(false) };
}

static FOUND: AtomicU64 = AtomicU64::new(0);

struct Trap;

#[global_allocator]
static TRAP: Trap = Trap;

fn note() {
    if ARMED.get() {
        FOUND.fetch_add(1, SeqCst);
    }
}

// SAFETY: hands everything on to the system's allocator.
unsafe impl GlobalAlloc for Trap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: as the caller guarantees.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        note();
        // SAFETY: as the caller guarantees.
        unsafe { System.dealloc(at, layout) }
    }
}

/// Arms from its `quiesce` to its `end`.
#[derive(Default)]
struct Arms {
    armed: AtomicU64,
    allocates: bool,
}

impl Notifier for Arms {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        self.armed.fetch_add(1, SeqCst);
        ARMED.set(true);
        if self.allocates {
            drop(std::hint::black_box(Box::new(op.id())));
        }
        Ok(op.idle())
    }
    fn end(&self, _: &Op<'_>, _: Outcome) {
        ARMED.set(false);
    }
}

/// Hardware does not use the heap.
struct Hardware(Arc<dyn Registers>);

impl Hardware {
    fn apart<R>(call: impl FnOnce() -> R) -> R {
        let armed = ARMED.replace(false);
        let result = call();
        ARMED.set(armed);
        result
    }
}

impl Registers for Hardware {
    fn len(&self) -> u64 {
        self.0.len()
    }
    fn read(&self, offset: u64) -> Result<u64, DeviceError> {
        Self::apart(|| self.0.read(offset))
    }
    fn write(&self, offset: u64, value: u64) -> Result<(), DeviceError> {
        Self::apart(|| self.0.write(offset, value))
    }
}

#[test]
fn unloading_a_context_at_work_does_not_allocate() {
    let bus = Bus::new(4096).unwrap();
    let model = Model::new(&bus, 1, ChipletConfig::default());
    let ports = model.chiplets().iter().map(|chiplet| ChipletPorts {
        name: "gru".to_owned(),
        blade: 0,
        registers: Arc::new(Hardware(chiplet.clone())),
        interrupts: chiplet.clone(),
    });
    let gru = Gru::attach(ports.collect(), Config::default());
    let memory = ModelMemory::new(&bus, 16 << 20).unwrap();
    let space = AddressSpace::managed(memory, Deadlines::default());
    let arms = Arc::new(Arms::default());
    let registration = space.register(Range::ALL, arms.clone(), &[]).unwrap();
    let buffer = space.map(Map::anonymous(64 << 12)).unwrap();
    for nth in 0..20 {
        let segment = gru.segment(&space).unwrap();
        if nth % 2 == 1 {
            for cb in 0..segment.control_blocks() {
                let set = Instruction::vset(buffer.start(), 5, Element::Double, 4096);
                segment.submit(cb, &set).unwrap();
            }
        }
        segment.unmap().unwrap();
    }
    assert_eq!(arms.armed.load(SeqCst), 20);
    assert_eq!(FOUND.load(SeqCst), 0, "allocations and frees in the path");
    registration.unregister().unwrap();

    // That the trap works.
    let allocates = Arc::new(Arms {
        allocates: true,
        ..Arms::default()
    });
    let _registration = space.register(Range::ALL, allocates, &[]).unwrap();
    gru.segment(&space).unwrap().unmap().unwrap();
    assert_eq!(FOUND.load(SeqCst), 2);
}
