//! The driver over the model of its device: what the conformance kit does not ask, as it is this driver's own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use shootdown::{
    Addr, AddressSpace, Deadlines, DeviceError, ExcludeError, Health, Map, MemoryError, PageSize,
    ProcessMemory, Range, Registers,
};
use shootdown_hw_model::pta::{FaultPlan, PtaConfig};
use shootdown_hw_model::{Bus, ModelMemory, pta as model};
use shootdown_pta::{Command, Config, Pta, PtaError, Queue, Status};

const LONG: Duration = Duration::from_secs(10);
const PAGE: u64 = 4096;

struct Rig {
    bus: Bus,
    model: Arc<model::Pta>,
    pta: Arc<Pta>,
}

fn rig(hardware: PtaConfig, config: Config) -> Rig {
    let bus = Bus::new(16 << 10).unwrap();
    let model = model::Pta::new(&bus, hardware).unwrap();
    let pta = Pta::probe("pta0", model.clone(), model.clone(), config).unwrap();
    Rig { bus, model, pta }
}

fn healthy() -> Rig {
    rig(PtaConfig::default(), Config::default())
}

impl Rig {
    fn space(&self) -> AddressSpace {
        self.space_with(Deadlines::default())
    }

    fn space_with(&self, deadlines: Deadlines) -> AddressSpace {
        let memory = ModelMemory::new(&self.bus, 64 << 20).unwrap();
        AddressSpace::managed(memory, deadlines)
    }

    fn clean(&self) {
        let findings = self.bus.oracle().findings();
        assert!(findings.is_empty(), "{}", findings[0]);
    }
}

fn fill(queue: &Queue, at: Addr, word: u64) -> Result<u64, PtaError> {
    let range = Range::new(at, 8).unwrap();
    queue.run(0, &Command::Fill { range, word }, LONG)
}

fn load(at: Addr) -> u64 {
    // SAFETY: the test mapped the page for reading.
    unsafe { (at.get() as *const u64).read_volatile() }
}

fn at(base: Range, offset: u64) -> Addr {
    Addr::new(base.start().get() + offset)
}

#[test]
fn a_pasid_comes_back_after_a_flush_and_not_before() {
    let one = PtaConfig {
        pasids: 1,
        ..PtaConfig::default()
    };
    let rig = rig(one, Config::default());
    for round in 0..4 {
        let space = rig.space();
        let page = space.map(Map::anonymous(PAGE)).unwrap();
        let queue = rig.pta.queue(&space).unwrap();
        assert_eq!(queue.pasid(), 1);
        assert_eq!(rig.pta.stats().pasid_flushes, round);
        assert_eq!(rig.model.tlb_entries().len(), 0);
        fill(&queue, page.start(), round).unwrap();
        assert_eq!(load(page.start()), round);
        drop(queue);
        assert_eq!(rig.model.tlb_entries().len(), 1, "nobody can use it");
    }
    rig.clean();
}

#[test]
fn queues_of_a_space_share_a_pasid_and_more_spaces_than_pasids_are_refused() {
    let two = PtaConfig {
        pasids: 2,
        ..PtaConfig::default()
    };
    let rig = rig(two, Config::default());
    let spaces = [rig.space(), rig.space(), rig.space()];
    let queues = [0, 0, 1, 1].map(|nth| rig.pta.queue(&spaces[nth]).unwrap());
    assert_eq!(queues.each_ref().map(Queue::pasid), [1, 1, 2, 2]);
    let refused = rig.pta.queue(&spaces[2]);
    assert!(matches!(refused, Err(PtaError::NoPasid { limit: 2 })));
    drop(queues);
    assert!(rig.pta.queue(&spaces[2]).is_ok());
    let many: Result<Vec<_>, _> = (0..65).map(|_| rig.pta.queue(&spaces[0])).collect();
    assert!(matches!(many, Err(PtaError::NoQueue { limit: 64 })));
    assert_eq!(spaces.each_ref().map(AddressSpace::registrations), [0; 3]);
}

#[test]
fn what_changed_while_a_space_had_no_queue_is_not_reached_by_its_next() {
    let rig = healthy();
    let space = rig.space();
    let page = space.map(Map::anonymous(PAGE)).unwrap();
    let first = rig.pta.queue(&space).unwrap();
    fill(&first, page.start(), 1).unwrap();
    // The portal goes; who holds the queue keeps what the driver has of the space.
    space.unmap(first.range()).unwrap();
    assert!(first.has_ended());
    assert_eq!(space.registrations(), 0);
    space.discard(page).unwrap();
    let second = rig.pta.queue(&space).unwrap();
    assert_eq!(first.pasid(), second.pasid());
    fill(&second, at(page, 8), 2).unwrap();
    assert_eq!((load(page.start()), load(at(page, 8))), (0, 2));
    assert!(matches!(
        fill(&first, page.start(), 3),
        Err(PtaError::QueueEnded)
    ));
    rig.clean();
}

#[test]
fn pages_are_installed_a_block_at_a_time() {
    for (fault_around, requests) in [(1, 16), (4, 4), (16, 1)] {
        let config = Config {
            fault_around,
            ..Config::default()
        };
        let rig = rig(PtaConfig::default(), config);
        let space = rig.space();
        let range = space.map(Map::anonymous(16 * PAGE)).unwrap();
        let queue = rig.pta.queue(&space).unwrap();
        let touch = Command::Touch { range, write: true };
        queue.run(3, &touch, LONG).unwrap();
        let stats = rig.pta.stats();
        assert_eq!((stats.requests, stats.pages_installed), (requests, 16));
        space.discard(range).unwrap();
        assert_eq!(rig.pta.stats().pages_removed, 16);
        rig.clean();
    }
}

#[test]
fn a_space_that_needs_more_tables_than_there_are_faults_again_and_is_right() {
    let few = PtaConfig {
        tables: 5,
        ..PtaConfig::default()
    };
    let rig = rig(few, Config::default());
    let space = rig.space();
    let range = space.map(Map::anonymous(32 << 20)).unwrap();
    let queue = rig.pta.queue(&space).unwrap();
    for round in 0..2 {
        for nth in 0..16 {
            let page = at(range, nth << 21);
            fill(&queue, page, nth + round).unwrap();
            assert_eq!(load(page), nth + round);
        }
    }
    assert!(rig.pta.stats().mirrors_recycled > 0);
    // Another space finds none at all, which it is told, or too few, which its commands are.
    let other = rig.space();
    let page = other.map(Map::anonymous(PAGE)).unwrap();
    match rig.pta.queue(&other) {
        Err(PtaError::NoTables { limit: 5 }) => {}
        Ok(queue) => assert!(matches!(
            fill(&queue, page.start(), 1),
            Err(PtaError::PageFault { done: 0, .. })
        )),
        Err(error) => panic!("{error}"),
    }
    drop(queue);
    let queue = rig.pta.queue(&other).unwrap();
    fill(&queue, page.start(), 1).unwrap();
    rig.clean();
}

#[test]
fn what_overflows_the_ring_is_resolved_all_the_same() {
    let hardware = PtaConfig {
        requests: 2,
        ..PtaConfig::default()
    };
    let config = Config {
        fault_around: 1,
        ..Config::default()
    };
    let rig = rig(hardware, config);
    let space = rig.space();
    let range = space.map(Map::anonymous(64 * PAGE)).unwrap();
    let queues = [0; 4].map(|_| rig.pta.queue(&space).unwrap());
    for (nth, queue) in (0..).zip(&queues) {
        for slot in 0..16 {
            let range = Range::new(at(range, (nth * 16 + slot) * PAGE), PAGE).unwrap();
            let fill = Command::Fill { range, word: 5 };
            queue.submit(slot as usize, &fill).unwrap();
        }
    }
    for queue in &queues {
        for slot in 0..16 {
            queue.wait(slot, LONG).unwrap();
        }
    }
    for nth in 0..64 {
        assert_eq!(load(at(range, nth * PAGE)), 5);
    }
    assert!(rig.model.counts().requests_dropped > 0);
    assert!(rig.pta.stats().ring_overflows > 0);
    rig.clean();
}

/// For hardware that misses them.
fn short() -> Deadlines {
    Deadlines {
        flush: Duration::from_millis(5),
        full_flush: Duration::from_millis(5),
        reset: Duration::from_millis(50),
        ..Deadlines::default()
    }
}

#[test]
fn a_device_that_does_not_flush_is_reset_and_its_queues_are_lost() {
    let stuck = PtaConfig {
        faults: FaultPlan {
            stuck: 1.0,
            ..FaultPlan::default()
        },
        ..PtaConfig::default()
    };
    let rig = rig(stuck, Config::default());
    let space = rig.space_with(short());
    let page = space.map(Map::anonymous(PAGE)).unwrap();
    let queue = rig.pta.queue(&space).unwrap();
    fill(&queue, page.start(), 1).unwrap();
    space.discard(page).unwrap();
    let stats = rig.pta.device().stats();
    assert_eq!((stats.timeouts, stats.recovered_by_reset), (1, 1));
    assert!(matches!(queue.poll(0), Err(PtaError::QueueLost)));
    let again = rig.pta.queue(&space).unwrap();
    fill(&again, at(page, 8), 2).unwrap();
    assert_eq!((load(page.start()), load(at(page, 8))), (0, 2));
    rig.clean();
}

/// A device that is unplugged.
struct Unplugged {
    model: Arc<model::Pta>,
    gone: AtomicBool,
    /// It answers with all ones, as a bus does on which nobody answers, not with an error.
    ones: bool,
}

impl Registers for Unplugged {
    fn len(&self) -> u64 {
        self.model.len()
    }
    fn read(&self, offset: u64) -> Result<u64, DeviceError> {
        match (self.gone.load(SeqCst), self.ones) {
            (false, _) => self.model.read(offset),
            (true, true) => Ok(u64::MAX),
            (true, false) => Err(DeviceError::Gone {
                reason: "it was unplugged",
            }),
        }
    }
    fn write(&self, offset: u64, value: u64) -> Result<(), DeviceError> {
        match (self.gone.load(SeqCst), self.ones) {
            (false, _) => self.model.write(offset, value),
            (true, true) => Ok(()),
            (true, false) => Err(DeviceError::Gone {
                reason: "it was unplugged",
            }),
        }
    }
}

#[test]
fn a_device_that_is_gone_ends_in_quarantine_and_hangs_nobody() {
    for ones in [false, true] {
        let bus = Bus::new(1024).unwrap();
        let model = model::Pta::new(&bus, PtaConfig::default()).unwrap();
        let registers = Arc::new(Unplugged {
            model: model.clone(),
            gone: AtomicBool::new(false),
            ones,
        });
        let config = Config {
            deadline: Duration::from_millis(20),
            ..Config::default()
        };
        let pta = Pta::probe("pta0", registers.clone(), model, config).unwrap();
        let memory = ModelMemory::new(&bus, 4 << 20).unwrap();
        let space = AddressSpace::managed(memory, short());
        let range = space.map(Map::anonymous(4 * PAGE)).unwrap();
        let queue = pta.queue(&space).unwrap();
        fill(&queue, range.start(), 1).unwrap();
        registers.gone.store(true, SeqCst);
        assert!(space.unmap(range).is_err());
        assert_eq!(pta.device().health(), Health::Quarantined);
        assert_eq!(space.quarantined_bytes(), 4 * PAGE);
        let end = queue.wait(0, Duration::from_millis(20));
        assert!(end.is_err(), "{end:?}");
        drop(queue);
        assert!(space.exit().is_err());
        assert_eq!(bus.oracle().stale_accesses(), 0);
    }
}

#[test]
fn what_is_no_such_device_and_no_slot_is_refused_by_name() {
    let bus = Bus::new(64).unwrap();
    let model = model::Pta::new(&bus, PtaConfig::default()).unwrap();
    let unplugged = Arc::new(Unplugged {
        model: model.clone(),
        gone: AtomicBool::new(true),
        ones: true,
    });
    let refused = Pta::probe("pta0", unplugged, model, Config::default());
    assert!(matches!(
        refused,
        Err(PtaError::NotPta {
            found: u64::MAX,
            ..
        })
    ));
    let rig = healthy();
    let space = rig.space();
    let queue = rig.pta.queue(&space).unwrap();
    let far = Range::new(1 << 48, 8).unwrap();
    let fill = Command::Fill {
        range: far,
        word: 0,
    };
    assert!(matches!(
        queue.run(0, &fill, LONG),
        Err(PtaError::Refused { slot: 0, .. })
    ));
    assert!(matches!(queue.poll(0), Ok(Status::Failed)));
    assert!(matches!(
        queue.submit(16, &fill),
        Err(PtaError::NoSlot {
            slot: 16,
            count: 16
        })
    ));
    let page = space.map(Map::anonymous(PAGE)).unwrap();
    rig.model.hold(true);
    let long = Command::Checksum { range: page };
    queue.submit(1, &long).unwrap();
    assert!(matches!(
        queue.submit(1, &long),
        Err(PtaError::Busy { slot: 1 })
    ));
    let late = queue.wait(1, Duration::from_millis(5));
    assert!(matches!(late, Err(PtaError::Timeout { slot: 1, .. })));
    rig.model.hold(false);
    assert_eq!(queue.wait(1, LONG).unwrap(), 0);
    rig.clean();
}

#[test]
fn pages_of_every_size_are_used_as_the_device_has_them() {
    let rig = healthy();
    let space = rig.space();
    let queue = rig.pta.queue(&space).unwrap();
    let huge = Map::anonymous(2 << 20).page_size(PageSize::TwoMiB);
    let place = space.map(huge).unwrap();
    space.unmap(place).unwrap();
    for (size, requests, entries) in [
        (PageSize::FourKiB, 32, 512),
        (PageSize::SixtyFourKiB, 32, 512),
        (PageSize::TwoMiB, 1, 1),
    ] {
        let before = rig.pta.stats();
        let map = Map::anonymous(2 << 20).page_size(size);
        let range = space.map(map.at(place.start())).unwrap();
        let fill = Command::Fill { range, word: 3 };
        queue.run(0, &fill, LONG).unwrap();
        let stats = rig.pta.stats();
        assert_eq!(stats.requests - before.requests, requests, "{size}");
        let installed = stats.pages_installed - before.pages_installed;
        assert_eq!(installed, entries, "{size}");
        space.unmap(range).unwrap();
    }
    rig.clean();
}

#[test]
fn exclusive_access_to_memory_whose_touches_nobody_sees_is_refused_by_name() {
    let rig = healthy();
    let memory = Arc::new(ProcessMemory::reserve(1 << 20).unwrap());
    let space = AddressSpace::managed(memory, Deadlines::default());
    let queue = rig.pta.queue(&space).unwrap();
    let page = space.map(Map::anonymous(PAGE)).unwrap();
    let refused = queue.exclusive(0, page, LONG).unwrap_err();
    assert!(matches!(
        refused,
        PtaError::Exclude(ExcludeError::Memory(MemoryError::TouchNotSeen { .. }))
    ));
}

#[test]
fn an_unmap_of_a_queue_waits_for_its_access() {
    let rig = healthy();
    let space = rig.space();
    let page = space.map(Map::anonymous(PAGE)).unwrap();
    let queue = rig.pta.queue(&space).unwrap();
    let range = page;
    rig.model.hold(true);
    let fill = Command::Fill { range, word: 4 };
    queue.submit(0, &fill).unwrap();
    while rig.model.works_at(space.id(), page).is_none() {
        std::thread::yield_now();
    }
    std::thread::scope(|scope| {
        let unmap = scope.spawn(|| queue.unmap());
        std::thread::sleep(Duration::from_millis(20));
        assert!(!unmap.is_finished());
        rig.model.hold(false);
        unmap.join().unwrap().unwrap();
    });
    assert!(rig.model.works_at(space.id(), page).is_none());
    assert_eq!(load(page.start()), 4);
    rig.clean();
}
