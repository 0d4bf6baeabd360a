//! Purges, the TLB, and drop-ins against both.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use shootdown::{PageSize, Range, Rights};

use super::rig::{Instr, Misses, Rig, set, until};
use crate::gru::control::InFlight;
use crate::gru::layout::{ACTIVE, EXCEPTION, IDLE, page_code, page_shift, tfh, tgh};
use crate::gru::{ChipletConfig, Eviction, Latency, Plant, TlbKey};

#[test]
fn page_size_codes_are_those_of_the_data_sheet() {
    for (shift, code) in [(12, 0), (16, 2), (21, 5)] {
        assert_eq!(page_code(shift), code);
        assert_eq!(page_shift(code), shift);
    }
    for code in 0..16 {
        assert_eq!(page_code(page_shift(code)), code);
    }
}

#[test]
fn a_purge_removes_entries_of_its_page_size_asid_and_range_only() {
    let rig = Rig::new(ChipletConfig::default());
    let small = rig.map(0, 3 * 4096, PageSize::FourKiB, Rights::READ_WRITE);
    let large = rig.map(0x20_0000, 0x20_0000, PageSize::TwoMiB, Rights::READ_WRITE);
    rig.start(0, 8, Misses::FaultMap);
    rig.start(1, 16, Misses::FaultMap);
    for context in 0..2 {
        for at in [small, small + 4096, small + 8192, large + 0x1000] {
            rig.run(context, &set(at, 1)).unwrap();
        }
    }
    assert_eq!(rig.chiplet.tlb_entries().len(), 8);
    // The 4 KiB purge spans the 2 MiB entry and does not touch it.
    rig.purge(0, 8, small + 4096, PageSize::FourKiB, 1);
    rig.purge(1, 8, large, PageSize::FourKiB, 512);
    rig.await_purge(0);
    rig.await_purge(1);
    assert_eq!(
        [small, small + 4096, small + 8192, large].map(|at| rig.holds(8, at)),
        [true, false, true, true]
    );
    assert_eq!(
        [small, small + 4096, small + 8192, large].map(|at| rig.holds(16, at)),
        [true; 4]
    );
    rig.purge(0, 8, large, PageSize::TwoMiB, 1);
    rig.await_purge(0);
    assert!(!rig.holds(8, large) && rig.holds(16, large));
}

#[test]
fn a_count_of_1024_removes_everything_of_the_asid_and_global_everything() {
    let (rig, base) = Rig::started(ChipletConfig::default());
    let large = rig.map(0x20_0000, 0x20_0000, PageSize::TwoMiB, Rights::READ_WRITE);
    rig.start(1, 16, Misses::FaultMap);
    for context in 0..2 {
        rig.run(context, &set(base, 1)).unwrap();
        rig.run(context, &set(large, 1)).unwrap();
    }
    rig.purge(3, 8, 0, PageSize::FourKiB, 1024);
    rig.await_purge(3);
    assert!(!rig.chiplet.tlb_holds(8, Range::ALL) && rig.chiplet.tlb_holds(16, Range::ALL));
    rig.purge_all(23);
    rig.await_purge(23);
    assert!(rig.chiplet.tlb_entries().is_empty());
    let counts = rig.chiplet.counts();
    assert_eq!(
        (
            counts.purges_pages,
            counts.purges_asid,
            counts.purges_global
        ),
        (0, 1, 1)
    );
}

#[test]
fn a_full_tlb_makes_room_for_what_is_new() {
    for eviction in [Eviction::Fifo, Eviction::Random] {
        let config = ChipletConfig {
            tlb_entries: 3,
            eviction,
            ..ChipletConfig::default()
        };
        let (rig, base) = Rig::started(config);
        for page in 0..5 {
            rig.run(0, &set(base + page * 4096, 1)).unwrap();
            assert!(rig.holds(8, base + page * 4096));
        }
        assert_eq!(rig.chiplet.tlb_entries().len(), 3);
        assert_eq!(rig.chiplet.counts().evictions, 2);
        if eviction == Eviction::Fifo {
            assert!(!rig.holds(8, base) && !rig.holds(8, base + 4096));
        }
    }
}

/// A miss, a translation, an unmap with its purge, and the drop-in of what was translated.
fn drop_in_after_purge(plants: Plant) -> Rig {
    let (rig, base) = Rig::started(ChipletConfig {
        plants,
        ..ChipletConfig::default()
    });
    rig.issue(0, 0, &set(base, 0xbad));
    let slot = Rig::slot(0, 0);
    rig.await_miss(slot);
    assert!(rig.fill(slot));
    let page = Range::new(base, 4096).unwrap();
    shootdown::Memory::unmap(&*rig.memory, page).unwrap();
    rig.purge(0, 8, base, PageSize::FourKiB, 1);
    rig.await_purge(0);
    rig.operate(Rig::tfh(slot, 0), 0, tfh::WRITE_RESTART)
        .unwrap();
    assert_eq!(
        rig.finish(0, 0),
        if plants.is_empty() { EXCEPTION } else { IDLE }
    );
    rig
}

#[test]
fn a_drop_in_is_ignored_when_a_purge_came_between_miss_and_write() {
    let rig = drop_in_after_purge(Plant::empty());
    assert_eq!(rig.chiplet.counts().drop_ins_cancelled, 1);
    assert_eq!(rig.chiplet.counts().drop_ins, 0);
    rig.assert_no_stale_access();
}

#[test]
fn the_oracle_finds_the_planted_drop_in_that_is_not_ignored() {
    let rig = drop_in_after_purge(Plant::DROP_IN_NOT_CANCELLED);
    assert_eq!(rig.bus.oracle().stale_accesses(), 1);
}

#[test]
fn a_purge_cancels_drop_ins_from_its_command_on() {
    let latency = Latency {
        purge: Duration::from_secs(3600),
        ..Latency::default()
    };
    let (rig, base) = Rig::started(ChipletConfig {
        latency,
        ..ChipletConfig::default()
    });
    rig.issue(0, 0, &set(base, 1));
    let slot = Rig::slot(0, 0);
    rig.await_miss(slot);
    rig.purge(0, 8, base, PageSize::FourKiB, 1);
    assert!(rig.fill(slot));
    rig.operate(Rig::tfh(slot, 0), 0, tfh::WRITE_RESTART)
        .unwrap();
    assert_eq!(rig.chiplet.counts().drop_ins_cancelled, 1);
    assert_eq!(rig.purge_status(0), ACTIVE);
    // The block misses again, after the command: this drop-in holds, until the purge takes effect.
    assert_eq!(rig.finish(0, 0), IDLE);
    assert!(rig.holds(8, base));
}

#[test]
fn a_purge_of_other_pages_or_another_asid_does_not_cancel() {
    let (rig, base) = Rig::started(ChipletConfig::default());
    let large = rig.map(0x20_0000, 0x20_0000, PageSize::TwoMiB, Rights::READ_WRITE);
    let slot = Rig::slot(0, 0);
    for at in [base, large] {
        rig.issue(0, 0, &set(at, 1));
        rig.await_miss(slot);
        rig.purge(0, 8, at + 0x1000, PageSize::FourKiB, 2);
        rig.purge(1, 16, at, PageSize::FourKiB, 1);
        rig.await_purge(0);
        rig.await_purge(1);
        assert_eq!(rig.finish(0, 0), IDLE);
    }
    assert_eq!(rig.chiplet.counts().drop_ins_cancelled, 0);
    // A purge of the miss's own address does, also by pages that are smaller than the entry.
    rig.purge_all(0);
    rig.await_purge(0);
    rig.issue(0, 0, &set(large + 0x5008, 1));
    rig.await_miss(slot);
    rig.purge(0, 8, large + 0x5000, PageSize::FourKiB, 1);
    rig.await_purge(0);
    assert_eq!(rig.finish(0, 0), IDLE);
    assert_eq!(rig.chiplet.counts().drop_ins_cancelled, 1);
}

#[test]
fn a_fault_that_forgets_purges_ignores_every_drop_in() {
    let (rig, base) = Rig::started(ChipletConfig::default());
    rig.issue(0, 0, &set(base, 1));
    rig.await_miss(Rig::slot(0, 0));
    for page in 1..=17 {
        rig.purge(0, 8, base + page * 4096, PageSize::FourKiB, 1);
        rig.await_purge(0);
    }
    assert_eq!(rig.finish(0, 0), IDLE);
    assert_eq!(rig.chiplet.counts().drop_ins_cancelled, 1);
}

#[test]
fn a_drop_in_without_a_miss_or_for_another_asid_is_ignored() {
    let (rig, base) = Rig::started(ChipletConfig::default());
    rig.operate(Rig::tfh(0, 0), 0, tfh::WRITE_ONLY).unwrap();
    rig.issue(0, 0, &set(base, 1));
    rig.await_miss(0);
    assert!(rig.fill(0));
    let fill = rig.read(Rig::tfh(0, tfh::FILL));
    rig.write(Rig::tfh(0, tfh::FILL), tfh::ASID.put(fill, 16));
    rig.operate(Rig::tfh(0, 0), 0, tfh::WRITE_ONLY).unwrap();
    assert!(rig.chiplet.tlb_entries().is_empty());
    assert_eq!(rig.chiplet.counts().drop_ins_cancelled, 2);
    assert_eq!(rig.operate(Rig::tfh(0, 0), 0, 5), Err(1));
    assert_eq!(rig.finish(0, 0), IDLE);
}

#[test]
fn a_purge_waits_for_the_access_through_its_entry() {
    let (rig, base) = Rig::started(ChipletConfig::default());
    let access = |page| InFlight {
        context: 0,
        slot: 1,
        pages: [None, Some(TlbKey::of(8, 0, page))],
    };
    rig.chiplet.core.lock().in_flight = Some(access(base));
    rig.purge(0, 8, base, PageSize::FourKiB, 1);
    rig.purge(1, 8, base + 4096, PageSize::FourKiB, 1);
    assert_eq!((rig.purge_status(0), rig.purge_status(1)), (ACTIVE, IDLE));
    assert_eq!(
        tgh::STATE.get(rig.read(Rig::tgh(0, 0))),
        tgh::STATE_WAIT_DONE
    );
    rig.chiplet.core.lock().in_flight = None;
    assert_eq!(rig.purge_status(0), IDLE);
}

#[test]
fn a_miss_that_comes_while_a_purge_is_at_work_has_its_drop_in_ignored() {
    let (rig, base) = Rig::started(ChipletConfig::default());
    let pages = [Some(TlbKey::of(8, 0, base)), None];
    rig.chiplet.core.lock().in_flight = Some(InFlight {
        context: 0,
        slot: 1,
        pages,
    });
    rig.purge(0, 8, base, PageSize::FourKiB, 1);
    rig.issue(0, 0, &set(base, 1));
    rig.await_miss(0);
    assert!(rig.fill(0));
    assert_eq!(rig.purge_status(0), ACTIVE);
    rig.chiplet.core.lock().in_flight = None;
    rig.await_purge(0);
    rig.operate(Rig::tfh(0, 0), 0, tfh::WRITE_RESTART).unwrap();
    assert_eq!(rig.chiplet.counts().drop_ins_cancelled, 1);
    assert_eq!(rig.finish(0, 0), IDLE);
}

#[test]
fn an_entry_that_is_dropped_in_while_a_purge_is_at_work_is_gone_when_it_is_done() {
    let (rig, base) = Rig::started(ChipletConfig::default());
    let pages = [Some(TlbKey::of(8, 0, base)), None];
    rig.chiplet.core.lock().in_flight = Some(InFlight {
        context: 0,
        slot: 1,
        pages,
    });
    rig.purge(0, 8, base, PageSize::FourKiB, 1);
    rig.issue(0, 0, &set(base, 1));
    rig.await_miss(0);
    assert!(rig.fill(0));
    rig.operate(Rig::tfh(0, 0), 0, tfh::WRITE_ONLY).unwrap();
    assert!(rig.holds(8, base));
    rig.chiplet.core.lock().in_flight = None;
    rig.await_purge(0);
    assert!(!rig.holds(8, base));
}

#[test]
fn a_purge_concerns_the_misses_and_accesses_of_the_contexts_in_its_bitmap_only() {
    let (rig, base) = Rig::started(ChipletConfig::default());
    rig.start(1, 8, Misses::FaultMap);
    let slots = [0, 1].map(|context| Rig::slot(context, 0));
    for context in 0..2 {
        rig.issue(context, 0, &set(base, 1));
        rig.await_miss(slots[context as usize]);
    }
    let pages = [Some(TlbKey::of(8, 0, base)), None];
    rig.chiplet.core.lock().in_flight = Some(InFlight {
        context: 0,
        slot: 1,
        pages,
    });
    rig.write(Rig::tgh(0, tgh::VADDR), base);
    rig.write(Rig::tgh(0, tgh::WHAT), 8);
    rig.write(Rig::tgh(0, tgh::WHERE), tgh::CONTEXTS.put(0, 0b10));
    rig.operate(Rig::tgh(0, 0), 0, tgh::TLBINV).unwrap();
    rig.chiplet.core.lock().in_flight = None;
    for slot in slots {
        assert!(rig.fill(slot));
        rig.operate(Rig::tfh(slot, 0), 0, tfh::WRITE_ONLY).unwrap();
    }
    let counts = rig.chiplet.counts();
    assert_eq!((counts.drop_ins, counts.drop_ins_cancelled), (1, 1));
    assert!(rig.holds(8, base));
}

/// Ends the other thread also when this one panics.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn purges_race_with_a_running_context_and_no_access_is_stale() {
    let latency = Latency {
        access: Duration::from_micros(20),
        ..Latency::default()
    };
    let (rig, base) = Rig::started(ChipletConfig {
        latency,
        ..ChipletConfig::default()
    });
    // The driver's rule: no drop-in during an invalidation, and pages change when the purge is acknowledged.
    let invalidation = Mutex::new(());
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                if rig.status(0, 0) != ACTIVE {
                    rig.issue(
                        0,
                        0,
                        &Instr {
                            count: 1024,
                            ..set(base, 1)
                        },
                    );
                }
                let _no_invalidation = invalidation.lock().unwrap();
                rig.resolve(0);
            }
        });
        let _end = SetOnDrop(&done);
        for round in 0..300 {
            let page = Range::new(base + round % 2 * 4096, 4096).unwrap();
            let invalidating = invalidation.lock().unwrap();
            rig.purge(0, 8, page.start().get(), PageSize::FourKiB, 1);
            rig.await_purge(0);
            shootdown::Memory::discard(&*rig.memory, page).unwrap();
            drop(invalidating);
            let bytes = rig.chiplet.counts().bytes;
            until("another access", || rig.chiplet.counts().bytes != bytes);
        }
    });
    rig.assert_no_stale_access();
}
