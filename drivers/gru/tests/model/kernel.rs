//! Services of the driver's own, and ASIDs that are used up.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::{LONG, Rig, load};
use shootdown::{DeviceError, Map, ProcessMemory, Registers};
use shootdown_gru::{
    Atomic, ChipletPorts, Config, Element, Gru, GruError, Instruction, Kernel, SelfTestFailed,
    Steal,
};
use shootdown_hw_model::gru::{ChipletConfig, FaultPlan, Model};
use shootdown_hw_model::{Bus, ModelMemory};

fn rig(chiplets: u32) -> Rig {
    Rig::new(chiplets, ChipletConfig::default(), Config::default())
}

#[test]
fn the_four_self_tests_pass_on_every_blade() {
    let rig = rig(4);
    let kernel = rig.kernel();
    assert_eq!(kernel.blades().collect::<Vec<_>>(), [0, 1]);
    assert_eq!(kernel.self_test().unwrap(), 8);
    let used: u64 = rig
        .model
        .chiplets()
        .iter()
        .map(|one| one.counts().unmapped)
        .sum();
    assert!(used > 0);
    let asids = rig.gru.stats().asids_in_use;
    assert_eq!(asids, 0, "kernel contexts have none");
    drop(kernel);
    rig.clean();
}

#[test]
fn chiplets_are_found_in_the_one_window_of_a_machine() {
    let bus = Bus::new(4096).unwrap();
    let model = Model::new(&bus, 6, ChipletConfig::default());
    let machine: Arc<dyn Registers> = Arc::new(model.clone());
    assert_eq!(machine.len(), 6 * (128 << 20));
    assert!(machine.read(machine.len()).is_err());
    let ports = (0..6).map(|nth| {
        let interrupts = model.chiplets()[nth as usize].clone();
        ChipletPorts::of_machine(&machine, nth, interrupts)
    });
    let gru = Gru::attach(ports.collect(), Config::default());
    let kernel = Kernel::new(&gru, ModelMemory::new(&bus, 4 << 20).unwrap());
    assert_eq!(kernel.blades().collect::<Vec<_>>(), [0, 1, 2]);
    assert_eq!(kernel.self_test().unwrap(), 12);
    let used = |nth: usize| model.chiplets()[nth].counts().instructions > 0;
    assert_eq!(
        [0, 1, 2, 3, 4, 5].map(used),
        [true, false, true, false, true, false]
    );
}

/// A chiplet whose data segment has a bit that is always set.
struct StuckBit(Arc<dyn Registers>);

impl Registers for StuckBit {
    fn len(&self) -> u64 {
        self.0.len()
    }
    fn read(&self, offset: u64) -> Result<u64, DeviceError> {
        let data = offset < 64 << 20 && offset % (4 << 20) >= 0x2_0000;
        let stuck = if data { 1 << 45 } else { 0 };
        Ok(self.0.read(offset)? | stuck)
    }
    fn write(&self, offset: u64, value: u64) -> Result<(), DeviceError> {
        self.0.write(offset, value)
    }
}

#[test]
fn a_self_test_notices_a_bit_that_is_stuck() {
    let bus = Bus::new(4096).unwrap();
    let model = Model::new(&bus, 1, ChipletConfig::default());
    let chiplet = &model.chiplets()[0];
    let port = ChipletPorts {
        name: "gru0".to_owned(),
        blade: 0,
        registers: Arc::new(StuckBit(chiplet.clone())),
        interrupts: chiplet.clone(),
    };
    let gru = Gru::attach(vec![port], Config::default());
    let kernel = Kernel::new(&gru, ModelMemory::new(&bus, 4 << 20).unwrap());
    let failed = kernel.self_test().unwrap_err();
    assert!(
        matches!(
            failed,
            SelfTestFailed::Wrong {
                test: 0,
                blade: 0,
                ..
            }
        ),
        "{failed}"
    );
}

#[test]
fn memory_that_shows_no_frames_and_blades_that_there_are_not_are_typed_errors() {
    let rig = rig(1);
    let kernel = Kernel::new(&rig.gru, Arc::new(ProcessMemory::reserve(1 << 20).unwrap()));
    let words = kernel.words(1).unwrap();
    let error = words.physical(0).unwrap_err();
    assert!(matches!(error, GruError::NotTranslated { .. }), "{error}");
    let error = kernel.reserve(7, 1).unwrap_err();
    assert!(
        matches!(
            error,
            GruError::NoBlade {
                blade: 7,
                blades: 1
            }
        ),
        "{error}"
    );
    for lines in [0, 6, 9, 1 << 17] {
        let error = kernel.queue(lines).unwrap_err();
        assert!(matches!(error, GruError::QueueLines { .. }), "{error}");
    }
    let queue = kernel.queue(8).unwrap();
    for words in [&[][..], &[0; 16]] {
        let error = queue.send(0, words).unwrap_err();
        assert!(
            matches!(error, GruError::MessageLength { most: 15, .. }),
            "{error}"
        );
    }
}

/// Messages of many processors to one: none is lost, none comes twice, and those of one sender come in order.
fn exchange(rig: &Rig, lines: u32, each: u64) {
    const SENDERS: u64 = 4;
    let kernel = rig.kernel();
    let queue = kernel.queue(lines).unwrap();
    let over = AtomicBool::new(false);
    let mut seen: BTreeMap<u64, u64> = BTreeMap::new();
    thread::scope(|scope| {
        let senders: Vec<_> = (0..SENDERS)
            .map(|sender| {
                let (queue, over) = (&queue, &over);
                let blade = sender as u32 % 2;
                scope.spawn(move || {
                    for nth in 0..each {
                        let len = 2 + ((nth * 7 + sender) % 14) as usize;
                        let mut words = vec![sender << 32 | nth; len];
                        words[1] = len as u64;
                        let begun = Instant::now();
                        while let Err(error) = queue.send(blade, &words) {
                            let full = matches!(
                                error,
                                GruError::QueueFull
                                    | GruError::Congested { .. }
                                    | GruError::Exception { .. }
                            );
                            assert!(full && begun.elapsed() < LONG, "{error}");
                            assert!(!over.load(Ordering::Relaxed));
                            thread::yield_now();
                        }
                    }
                })
            })
            .collect();
        let begun = Instant::now();
        while seen.values().sum::<u64>() < SENDERS * each {
            let Some(message) = queue.receive_within(Duration::from_millis(50)) else {
                over.store(begun.elapsed() > 3 * LONG, Ordering::Relaxed);
                assert!(begun.elapsed() < 3 * LONG, "{seen:?}");
                continue;
            };
            let words = message.words();
            let (sender, nth) = (words[0] >> 32, words[0] & 0xffff_ffff);
            let next = seen.entry(sender).or_default();
            assert_eq!(nth, *next, "of sender {sender}");
            *next += 1;
            assert_eq!(words[1], words.len() as u64);
            assert!(words[2..].iter().all(|word| *word == words[0]));
        }
        for sender in senders {
            sender.join().unwrap();
        }
    });
    assert_eq!(queue.receive(), None);
    let stats = rig.gru.stats();
    assert_eq!(stats.messages_received, SENDERS * each);
    assert_eq!(stats.messages_sent, SENDERS * each);
    assert!(stats.queue_flips > 0, "{stats:?}");
}

#[test]
fn messages_between_processors_keep_their_order_through_both_halves() {
    for lines in [8, 20] {
        let rig = rig(4);
        exchange(&rig, lines, 200);
        rig.clean();
    }
}

#[test]
fn what_a_chiplet_cannot_store_in_another_page_software_does() {
    let rig = rig(4);
    exchange(&rig, 204, 200);
    assert!(rig.gru.stats().messages_stored > 0);
    rig.clean();
}

#[test]
fn messages_that_are_not_delivered_are_sent_again_or_stored_and_come_once() {
    let hardware = ChipletConfig {
        faults: FaultPlan {
            seed: 3,
            nack: 0.3,
            error: 0.02,
            ..FaultPlan::default()
        },
        ..ChipletConfig::default()
    };
    let rig = Rig::new(4, hardware, Config::default());
    exchange(&rig, 20, 100);
    let stats = rig.gru.stats();
    assert!(
        stats.messages_stored > 0 && stats.messages_congested > 0,
        "{stats:?}"
    );
    assert!(stats.retries > 0);
    rig.clean();
}

#[test]
fn kernel_contexts_are_stolen_as_others_are_and_lose_nothing() {
    let steal = Steal {
        window: Duration::ZERO,
        retry: Duration::from_micros(100),
    };
    let rig = Rig::new(
        1,
        ChipletConfig::default(),
        Config {
            steal,
            ..Config::default()
        },
    );
    let space = rig.space();
    let buffer = space.map(Map::anonymous(4096)).unwrap().start();
    let segments: Vec<_> = (0..16).map(|_| rig.gru.segment(&space).unwrap()).collect();
    let kernel = rig.kernel();
    let words = kernel.words(8).unwrap();
    let blocks = kernel.reserve(0, 8).unwrap();
    for round in 1..=20 {
        for nth in 0..8 {
            let add = Instruction::atomic(
                words.physical(nth).unwrap(),
                Atomic::Increment,
                Element::Double,
            );
            blocks.submit(nth, &add).unwrap();
        }
        for segment in &segments {
            let set = Instruction::vset(buffer, round, Element::Double, 8);
            segment.run(0, &set, LONG).unwrap();
        }
        for nth in 0..8 {
            assert_eq!(blocks.wait(nth).unwrap(), round - 1);
        }
        assert_eq!(blocks.count().unwrap(), 0);
        assert_eq!(load(buffer), round);
    }
    assert!(rig.gru.stats().contexts_stolen > 20);
    drop((blocks, words, segments));
    drop(kernel);
    rig.clean();
}

#[test]
fn control_blocks_of_a_kernel_context_are_shared_and_waited_for() {
    let rig = rig(1);
    let kernel = rig.kernel();
    let all = kernel.reserve(0, 16).unwrap();
    let error = kernel.reserve(0, 17).unwrap_err();
    assert!(
        matches!(error, GruError::NoFreeBlocks { count: 17, .. }),
        "{error}"
    );
    thread::scope(|scope| {
        let waits = scope.spawn(|| kernel.reserve(0, 1).map(drop));
        thread::sleep(Duration::from_millis(20));
        drop(all);
        waits.join().unwrap().unwrap();
    });
    let words = kernel.words(2).unwrap();
    words.store(0, 99);
    assert_eq!(kernel.read(0, words.address(0)).unwrap(), 99);
    drop(words);
    drop(kernel);
    rig.clean();
}

#[test]
fn a_kernel_context_that_a_reset_has_cost_its_state_is_made_anew() {
    let hardware = ChipletConfig {
        faults: FaultPlan {
            stuck: 1.0,
            ..FaultPlan::default()
        },
        ..ChipletConfig::default()
    };
    let rig = Rig::new(1, hardware, Config::default());
    let kernel = rig.kernel();
    let before = kernel.reserve(0, 1).unwrap();
    before.run(0, &Instruction::nop()).unwrap();
    let space = rig.space();
    reset(&rig, &space);
    let error = before.run(0, &Instruction::nop()).unwrap_err();
    assert!(matches!(error, GruError::ContextLost { .. }), "{error}");
    drop(before);
    assert_eq!(kernel.self_test().unwrap(), 4);
    drop(kernel);
    rig.clean();
}

/// Has the framework reset the chiplet, as a purge is not acknowledged.
fn reset(rig: &Rig, space: &shootdown::AddressSpace) {
    let segment = rig.gru.segment(space).unwrap();
    let buffer = space.map(Map::anonymous(4096)).unwrap();
    let set = Instruction::vset(buffer.start(), 1, Element::Double, 1);
    segment.run(0, &set, LONG).unwrap();
    space.discard(buffer).unwrap();
    assert_eq!(rig.gru.stats().resets, 1);
}

/// All 24 bits of ASIDs, from near their end on.
#[test]
fn asids_wrap_with_a_flush_and_a_new_generation() {
    let config = Config {
        first_asid: Some(0xff_ffd0),
        ..Config::default()
    };
    let rig = Rig::new(1, ChipletConfig::default(), config);
    let keeps = rig.space();
    let held = rig.gru.segment(&keeps).unwrap();
    let value = |space: &shootdown::AddressSpace, segment: &shootdown_gru::Segment, value| {
        let buffer = space.map(Map::anonymous(4096)).unwrap();
        let set = Instruction::vset(buffer.start(), value, Element::Double, 512);
        segment.run(0, &set, LONG).unwrap();
        assert_eq!(load(buffer.start()), value);
        buffer
    };
    value(&keeps, &held, 1);
    let mut asids = vec![held.asid().unwrap()];
    for nth in 0..8u64 {
        let space = rig.space();
        let segment = rig.gru.segment(&space).unwrap();
        value(&space, &segment, nth);
        asids.push(segment.asid().unwrap());
    }
    let high = [0xff_ffd0, 0xff_ffd8, 0xff_ffe0, 0xff_ffe8, 0xff_fff0];
    assert_eq!(asids, [&high[..], &[8, 16, 24, 32]].concat());
    let status = &rig.gru.status().unwrap()[0];
    assert_eq!(
        (status.generation, status.next_asid, status.wraps),
        (1, 40, 1)
    );
    assert_eq!(rig.gru.stats().asid_wraps, 1);
    let counts = rig.model.chiplets()[0].counts();
    assert_eq!(counts.purges_global, 1);
    // What was loaded at the wrap goes on with its own, and is purged by it.
    assert_eq!(held.asid(), Some(0xff_ffd0));
    let buffer = value(&keeps, &held, 7);
    keeps.unmap(buffer).unwrap();
    assert!(!rig.model.chiplets()[0].tlb_holds(0xff_ffd0, buffer));
    drop(held);
    rig.clean();
}
