//! The device by its registers, over memory whose frames are used again at once.

mod rig;

use shootdown::{Addr, Memory, PageSize, Rights};

use super::*;
use crate::memory::ModelMemory;
use layout::{
    ADD, BAD_COMMAND, CHECKSUM, COMPARE, COPY, DISABLED, EVERYTHING, FILL, FOR_WRITE, HUGE,
    INVALID, NO_ANSWER, ONE_PASID, OPCODE, PAGE_FAULT, PAGES, READ, RETRY, SCOPE, TABLE, TOUCH,
    WRITE,
};
use rig::{LONG, load, rig};

const ONE: u64 = 1 << 8;

#[test]
fn commands_go_through_the_page_table_to_the_frames() {
    let rig = rig(PtaConfig::default());
    let [first, second, third] = [0, 1, 2].map(|nth| rig.page(nth));
    let both = first.start().get() + 0xff8;
    // Across the border of two pages, and out of step with the words.
    assert_eq!(
        rig.run(FILL, [0, both + 3, 16, 0x0807_0605_0403_0201]),
        Ok(0)
    );
    assert_eq!(rig.run(COPY, [both + 3, third.start().get(), 16, 0]), Ok(0));
    assert_eq!(load(third), 0x0807_0605_0403_0201);
    let compare = |len| rig.run(COMPARE, [both + 3, third.start().get(), len, 0]);
    assert_eq!(compare(16), Ok(u64::MAX));
    assert_eq!(compare(24), Ok(u64::MAX), "both are zero behind");
    assert_eq!(
        rig.run(ADD, [0, third.start().get(), 8, 1]),
        Ok(0x0807_0605_0403_0201)
    );
    assert_eq!(compare(16), Ok(0));
    let sum = (0..16).map(|nth: u64| (nth % 8 + 1) * (nth + 1)).sum();
    assert_eq!(rig.run(CHECKSUM, [both + 3, 0, 16, 0]), Ok(sum));
    assert_eq!(second.start(), first.end().unwrap());
    assert_eq!(rig.stale(), 0);
    assert_eq!(rig.pta.counts().requests, 0);
}

#[test]
fn a_miss_becomes_a_request_for_one_page_and_what_is_needed_of_it() {
    let rig = rig(PtaConfig::default());
    let page = rig.mapped(0);
    rig.start(0, FILL, [0, page.start().get() + 24, 8, 7]);
    let (request, addr) = rig.request();
    assert_eq!((READ.get(request), WRITE.get(request)), (0, 1));
    assert_eq!((PASID.get(request), addr), (1, page.start().get()));
    rig.mirror(page);
    rig.answer(request, RETRY);
    assert_eq!(rig.wait(0), Ok(0));
    // A second answer to the same group, and one to nothing.
    rig.answer(request, INVALID);
    rig.answer(0, INVALID);
    assert_eq!(rig.pta.counts().responses_ignored, 2);
    // Reading needs no more than what is there; an entry that does not allow writing is read anew, and asked for.
    rig.install(
        1,
        page,
        rig.memory.translate(page.start()).unwrap().frame.0,
        Rights::READ,
    );
    rig.invalidate(SCOPE.put(ONE, ONE_PASID), 0, 1);
    rig.completion();
    assert!(rig.run(CHECKSUM, [page.start().get(), 0, 8, 0]).is_ok());
    rig.start(
        0,
        TOUCH | FOR_WRITE.put(0, 1),
        [0, page.start().get(), 8, 0],
    );
    let (request, _) = rig.request();
    rig.answer(request, INVALID);
    assert_eq!(rig.wait(0), Err(PAGE_FAULT));
    assert_eq!(
        rig.read(PORTALS + 48),
        page.start().get(),
        "where it failed"
    );
}

#[test]
fn what_was_done_before_a_fault_is_done() {
    let rig = rig(PtaConfig::default());
    let page = rig.page(0);
    rig.start(0, FILL, [0, page.start().get(), 8192, 5]);
    let (request, _) = rig.request();
    rig.answer(request, INVALID);
    assert_eq!(rig.wait(0), Err(PAGE_FAULT));
    assert_eq!(rig.read(PORTALS + 56), 4096);
    assert_eq!(load(page), 5);
}

#[test]
fn a_request_that_nobody_answers_ends_its_command() {
    for lost in [0.0, 1.0] {
        let rig = rig(PtaConfig {
            request_timeout: Duration::from_millis(5),
            faults: FaultPlan {
                request_lost: lost,
                ..FaultPlan::default()
            },
            ..PtaConfig::default()
        });
        assert_eq!(rig.fill(rig.nth(0), 1), Err(NO_ANSWER));
        assert_eq!(rig.pta.counts().requests_lost, lost as u64);
        assert_eq!(rig.pta.counts().requests_unanswered, 1);
    }
}

#[test]
fn a_ring_without_room_says_so_and_what_was_dropped_comes_again() {
    let rig = rig(PtaConfig {
        requests: 2,
        ..PtaConfig::default()
    });
    let pages = [0, 1, 2].map(|nth| rig.mapped(nth));
    for (slot, page) in (0..).zip(pages) {
        rig.start(slot, FILL, [0, page.start().get(), 8, slot + 1]);
    }
    let begun = Instant::now();
    while rig.pta.counts().requests_dropped < 2 {
        assert!(begun.elapsed() < LONG);
        std::thread::sleep(Duration::from_micros(50));
    }
    assert_eq!(rig.read(REQUEST_STATUS), 1);
    rig.write(REQUEST_STATUS, 1);
    for _ in pages {
        while rig.read(REQUEST_HEAD) == rig.read(REQUEST_TAIL) {
            std::thread::sleep(Duration::from_micros(50));
        }
        let head = rig.read(REQUEST_HEAD);
        let at = REQUEST_RING + head * 16;
        let (request, addr) = (rig.read(at), rig.read(at + 8));
        rig.write(REQUEST_HEAD, (head + 1) % 2);
        rig.mirror(Range::page(Addr::new(addr), PageSize::FourKiB));
        rig.answer(request, RETRY);
    }
    for (slot, page) in (0..).zip(pages) {
        assert_eq!(rig.wait(slot), Ok(0));
        assert_eq!(load(page), slot + 1);
    }
}

#[test]
fn an_entry_stays_until_it_is_invalidated_whatever_the_page_table_says() {
    let rig = rig(PtaConfig::default());
    let page = rig.page(0);
    rig.fill(page, 1).unwrap();
    rig.install(1, page, 0, Rights::empty());
    rig.fill(page, 2).unwrap();
    assert_eq!(load(page), 2);
    rig.memory.unmap(page).unwrap();
    rig.fill(page, 3).unwrap();
    assert_eq!(rig.stale(), 1, "it hit a frame that is free");
    rig.invalidate(SCOPE.put(ONE, PAGES), page.start().get(), 77);
    assert_eq!(rig.completion(), 77);
    rig.start(0, FILL, [0, page.start().get(), 8, 4]);
    let (request, _) = rig.request();
    rig.answer(request, INVALID);
    assert_eq!(rig.wait(0), Err(PAGE_FAULT));
    assert_eq!(rig.stale(), 1);
}

#[test]
fn an_entry_that_was_left_in_the_page_table_is_found_though_the_frame_comes_back() {
    let rig = rig(PtaConfig::default());
    let page = rig.page(0);
    let before = rig.memory.translate(page.start());
    rig.memory.unmap(page).unwrap();
    rig.mapped(0);
    assert_eq!(rig.memory.translate(page.start()), before);
    rig.fill(page, 1).unwrap();
    assert_eq!(rig.stale(), 1);
}

#[test]
fn a_completion_waits_for_the_access_that_has_read_the_entry_and_for_no_other() {
    for plants in [Plant::empty(), Plant::NO_DRAIN] {
        let rig = rig(PtaConfig {
            plants,
            ..PtaConfig::default()
        });
        let [page, other] = [0, 1].map(|nth| rig.page(nth));
        rig.pta.hold(true);
        rig.start(0, FILL, [0, page.start().get(), 8, 1]);
        let begun = Instant::now();
        while rig.pta.works_at(rig.memory.id(), page).is_none() {
            assert!(begun.elapsed() < LONG);
        }
        rig.invalidate(SCOPE.put(ONE, PAGES), other.start().get(), 1);
        assert_eq!(rig.completion(), 1);
        rig.invalidate(SCOPE.put(ONE, PAGES), page.start().get(), 2);
        std::thread::sleep(Duration::from_millis(5));
        let early = rig.read(INVALIDATE_COMPLETION);
        assert_eq!(early, if plants.is_empty() { 0 } else { 2 });
        if early == 0 {
            rig.pta.hold(false);
            assert_eq!(rig.completion(), 2);
        }
        rig.memory.unmap(page).unwrap();
        rig.pta.hold(false);
        rig.wait(0).unwrap();
        assert_eq!(rig.stale() == 0, plants.is_empty());
    }
}

#[test]
fn a_translation_that_was_read_before_an_invalidation_is_read_again() {
    for plants in [Plant::empty(), Plant::STALE_FILL] {
        let rig = rig(PtaConfig {
            latency: Latency {
                walk: Duration::from_millis(50),
                ..Latency::default()
            },
            plants,
            ..PtaConfig::default()
        });
        let page = rig.page(0);
        rig.start(0, FILL, [0, page.start().get(), 8, 1]);
        let begun = Instant::now();
        while rig.pta.counts().misses == 0 {
            assert!(begun.elapsed() < LONG);
        }
        // What a driver does for an unmap.
        rig.install(1, page, 0, Rights::empty());
        rig.invalidate(SCOPE.put(ONE, PAGES), page.start().get(), 1);
        assert_eq!(rig.completion(), 1);
        rig.memory.unmap(page).unwrap();
        if plants.is_empty() {
            let (request, _) = rig.request();
            rig.answer(request, INVALID);
            assert_eq!(rig.wait(0), Err(PAGE_FAULT));
            assert_eq!((rig.pta.counts().walks_cancelled, rig.stale()), (1, 0));
        } else {
            assert_eq!(rig.wait(0), Ok(0));
            assert_eq!(rig.stale(), 1);
        }
    }
}

#[test]
fn a_page_of_2_mib_is_one_entry_which_an_invalidation_of_small_ones_leaves() {
    let rig = rig(PtaConfig::default());
    let huge = Range::new(rig.memory.arena().start(), 2 << 20).unwrap();
    let rights = Rights::READ_WRITE;
    rig.memory.map(huge, PageSize::TwoMiB, rights).unwrap();
    rig.mirror(huge);
    rig.run(FILL, [0, huge.start().get(), 2 << 20, 9]).unwrap();
    let entries = rig.pta.tlb_entries();
    assert_eq!(entries.len(), 1);
    assert_eq!(entries[0].key.range(), huge);
    let small = SCOPE.put(ONE, PAGES);
    rig.invalidate(small, huge.start().get() + 4096, 1);
    rig.completion();
    assert_eq!(rig.pta.tlb_entries().len(), 1);
    rig.invalidate(HUGE.put(small, 1), huge.start().get() + 4096, 2);
    rig.completion();
    assert_eq!(rig.pta.tlb_entries().len(), 0);
    assert_eq!(rig.stale(), 0);
}

#[test]
fn a_pasid_that_is_given_to_another_keeps_the_entries_of_the_last_until_they_are_flushed() {
    let rig = rig(PtaConfig::default());
    let page = rig.page(0);
    rig.fill(page, 1).unwrap();
    let other = ModelMemory::new(&rig.bus, 2 << 20).unwrap();
    rig.write(QUEUE_CONTROL, 0);
    rig.write(PASID_TABLE + 16, 0);
    rig.load(0, 1, other.id());
    assert_eq!(rig.pta.tlb_entries().len(), 1);
    rig.fill(page, 2).unwrap();
    assert_eq!(rig.stale(), 1, "an entry of the other space");
    rig.invalidate(SCOPE.put(0, EVERYTHING), 0, 1);
    rig.completion();
    assert_eq!(rig.pta.tlb_entries().len(), 0);
}

#[test]
fn a_queue_that_is_disabled_ends_its_commands_and_is_busy_with_an_access() {
    let rig = rig(PtaConfig::default());
    rig.start(0, FILL, [0, rig.nth(0).start().get(), 8, 1]);
    rig.request();
    rig.write(QUEUE_CONTROL, 0);
    assert_eq!(rig.wait(0), Err(DISABLED));
    assert_eq!(BUSY.get(rig.read(QUEUE_CONTROL)), 0);
    assert_eq!(rig.fill(rig.nth(0), 1), Err(DISABLED));
    // Not before the access is over.
    let page = rig.page(1);
    rig.write(QUEUE_CONTROL, PASID.put(1, 1));
    rig.pta.hold(true);
    rig.start(0, FILL, [0, page.start().get(), 8192, 7]);
    while rig.pta.works_at(rig.memory.id(), page).is_none() {
        std::thread::yield_now();
    }
    rig.write(QUEUE_CONTROL, 0);
    assert_eq!(BUSY.get(rig.read(QUEUE_CONTROL)), 1);
    rig.pta.hold(false);
    assert_eq!(rig.wait(0), Err(DISABLED));
    assert_eq!(BUSY.get(rig.read(QUEUE_CONTROL)), 0);
    assert_eq!(load(page), 7);
    // So does a PASID.
    rig.write(QUEUE_CONTROL, PASID.put(1, 1));
    rig.write(PASID_TABLE + 16, 0);
    assert_eq!(rig.fill(rig.nth(0), 1), Err(DISABLED));
}

#[test]
fn a_reset_ends_everything_and_may_not_be_heeded() {
    let rig = rig(PtaConfig {
        faults: FaultPlan {
            survives_reset: 1.0,
            ..FaultPlan::default()
        },
        ..PtaConfig::default()
    });
    let page = rig.page(0);
    rig.fill(page, 1).unwrap();
    rig.pta.hold(true);
    rig.start(0, FILL, [0, page.start().get(), 8, 2]);
    rig.write(RESET, 1);
    assert_eq!(rig.read(RESET), 0);
    assert_eq!((rig.pta.tlb_entries().len(), load(page)), (0, 1));
    assert_eq!(rig.read(LOCAL), 0);
    assert_eq!(rig.read(QUEUE_CONTROL), 0);
    rig.write(RESET, 1);
    assert_eq!(rig.read(RESET), 1, "the first is heeded, this is not");
    assert_eq!(rig.pta.counts().resets_survived, 1);
}

#[test]
fn what_is_no_command_and_no_register_is_refused_and_hurts_nobody() {
    let rig = rig(PtaConfig::default());
    let page = rig.page(0).start().get();
    for (command, words) in [
        (0, [page, page, 8, 0]),
        (99, [page, page, 8, 0]),
        (FILL, [0, page, 0, 0]),
        (FILL, [0, u64::MAX, 8, 0]),
        (COPY, [1 << 48, page, 8, 0]),
        (CHECKSUM, [page, 0, u64::MAX, 0]),
        (ADD, [0, page + 4, 8, 1]),
        (ADD, [0, page, 16, 1]),
    ] {
        assert_eq!(rig.run(command, words), Err(BAD_COMMAND), "{command}");
    }
    // A table that is its own child, and one that does not exist.
    let root = NUMBER.get(rig.read(PASID_TABLE + 16));
    let far = 0x7000_0000_0000_u64;
    let at = LOCAL + root * TABLE_BYTES + (far >> layout::span(3)) * 8;
    for table in [root, 1 << 30] {
        rig.write(at, NUMBER.put(TABLE.put(0, 1), table));
        rig.start(0, FILL, [0, far, 8, 1]);
        let (request, _) = rig.request();
        rig.answer(request, INVALID);
        assert_eq!(rig.wait(0), Err(PAGE_FAULT));
    }
    for offset in [4, 0x20, layout::PORTALS + 2048, rig.pta.len()] {
        assert!(rig.pta.read(offset).is_err(), "{offset:#x}");
    }
    assert_eq!(OPCODE.get(rig.read(PORTALS)), FILL);
    assert!(rig.pta.wait(1, Duration::ZERO).is_err());
    assert_eq!(rig.stale(), 0);
}

#[test]
fn completions_get_lost_come_twice_late_and_unasked() {
    let with = |faults: FaultPlan| {
        rig(PtaConfig {
            faults: FaultPlan {
                late_by: Duration::from_millis(2),
                duplicate_after: Duration::from_millis(1),
                ..faults
            },
            ..PtaConfig::default()
        })
    };
    let none = FaultPlan::default();
    let all = SCOPE.put(0, EVERYTHING);
    for (faults, expected) in [
        (FaultPlan { lost: 1.0, ..none }, vec![]),
        (FaultPlan { stuck: 1.0, ..none }, vec![]),
        (FaultPlan { late: 1.0, ..none }, vec![5]),
        (
            FaultPlan {
                duplicated: 1.0,
                ..none
            },
            vec![5, 5],
        ),
        (
            FaultPlan {
                unissued: 1.0,
                ..none
            },
            vec![5 + (1 << 20), u64::MAX, 5],
        ),
    ] {
        let rig = with(faults);
        rig.fill(rig.page(0), 1).unwrap();
        rig.invalidate(all, 0, 5);
        std::thread::sleep(Duration::from_millis(20));
        let mut found = Vec::new();
        while let number @ 1.. = rig.read(INVALIDATE_COMPLETION) {
            found.push(number);
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(found, expected, "{faults:?}");
        let left = rig.pta.tlb_entries().len();
        assert_eq!(left, usize::from(faults.stuck > 0.0), "{faults:?}");
    }
}
