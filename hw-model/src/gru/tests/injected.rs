//! Faults that are injected: each is shown to happen, and counted.

use std::time::Duration;

use shootdown::PageSize;

use super::rig::{Misses, Rig, set, until};
use crate::gru::control::InFlight;
use crate::gru::layout::{ACTIVE, CALL_OS, IDLE, MANAGEMENT, RESET, tfh};
use crate::gru::{ChipletConfig, FaultKind, FaultPlan, Scripted};

#[test]
fn a_lost_completion_stays_active_and_another_handle_still_purges() {
    let faults = FaultPlan {
        lost: 0.5,
        seed: 3,
        ..FaultPlan::default()
    };
    let (rig, base) = Rig::started(ChipletConfig {
        faults,
        ..ChipletConfig::default()
    });
    let mut lost = 0;
    for handle in 0..24 {
        rig.run(0, &set(base, 1)).unwrap();
        rig.purge(handle, 8, base, PageSize::FourKiB, 1);
        lost += u64::from(rig.purge_status(handle) == ACTIVE);
        // Done it is.
        assert!(!rig.holds(8, base));
    }
    assert!((1..24).contains(&lost), "{lost} of 24");
    assert_eq!(rig.chiplet.counts().completions_lost, lost);
}

#[test]
fn scripted_faults_strike_on_their_occasion_of_their_chiplet_and_on_no_other() {
    let scripted = |device, kind, nth| Scripted {
        device,
        kind,
        nth,
        by: Duration::ZERO,
    };
    let faults = FaultPlan {
        scripted: vec![
            scripted(0, FaultKind::Lost, 3),
            scripted(0, FaultKind::Stuck, 6),
            scripted(1, FaultKind::Lost, 1),
        ]
        .leak(),
        ..FaultPlan::default()
    };
    let (rig, base) = Rig::started(ChipletConfig {
        faults,
        ..ChipletConfig::default()
    });
    let active = (0..8).filter(|handle| {
        rig.purge(*handle, 8, base, PageSize::FourKiB, 1);
        rig.purge_status(*handle) == ACTIVE
    });
    assert_eq!(active.collect::<Vec<_>>(), [2, 5]);
    let counts = rig.chiplet.counts();
    assert_eq!((counts.completions_lost, counts.purges_stuck), (1, 1));
}

#[test]
fn a_stuck_purge_removes_nothing_until_another_handle_or_a_reset_does() {
    let faults = FaultPlan {
        stuck: 0.5,
        seed: 5,
        ..FaultPlan::default()
    };
    let (rig, base) = Rig::started(ChipletConfig {
        faults,
        ..ChipletConfig::default()
    });
    rig.run(0, &set(base, 1)).unwrap();
    let mut handle = 0;
    loop {
        rig.purge(handle, 8, base, PageSize::FourKiB, 1);
        if rig.purge_status(handle) == IDLE {
            break;
        }
        assert!(rig.holds(8, base));
        // A busy handle takes no command.
        rig.purge_all(handle);
        assert_eq!(rig.purge_status(handle), ACTIVE);
        handle += 1;
    }
    assert!(handle > 0 && !rig.holds(8, base));
    assert_eq!(rig.chiplet.counts().purges_stuck, handle);
    rig.write(MANAGEMENT + RESET, 1);
    rig.await_reset();
    assert!((0..24).all(|handle| rig.purge_status(handle) == IDLE));
}

#[test]
fn late_and_reordered_completions_come_in_the_end_and_a_repeated_purge_is_harmless() {
    let faults = FaultPlan {
        seed: 7,
        late: 0.5,
        late_by: Duration::from_millis(2),
        jitter: Duration::from_millis(1),
        duplicated: 1.0,
        duplicate_after: Duration::from_millis(1),
        ..FaultPlan::default()
    };
    let (rig, base) = Rig::started(ChipletConfig {
        faults,
        ..ChipletConfig::default()
    });
    for handle in 0..24 {
        rig.run(0, &set(base + handle % 16 * 4096, 1)).unwrap();
        rig.purge(handle, 8, base + handle % 16 * 4096, PageSize::FourKiB, 1);
    }
    (0..24).for_each(|handle| rig.await_purge(handle));
    until("the repetitions", || {
        rig.purge_status(0);
        rig.chiplet.counts().purges_repeated == 24
    });
    assert_eq!(rig.chiplet.counts().purges_duplicated, 24);
    assert!((1..24).contains(&rig.chiplet.counts().completions_late));
    rig.run(0, &set(base, 9)).unwrap();
    rig.assert_no_stale_access();
}

#[test]
fn a_reset_waits_for_the_access_in_flight_and_then_nothing_is_left() {
    let (rig, base) = Rig::started(ChipletConfig::default());
    rig.run(0, &set(base, 1)).unwrap();
    rig.issue(0, 1, &set(base + 4096, 1));
    rig.await_miss(Rig::slot(0, 1));
    rig.chiplet.core.lock().in_flight = Some(InFlight {
        context: 0,
        slot: 1,
        pages: [None; 2],
    });
    rig.chiplet.reset();
    assert_eq!(rig.read(MANAGEMENT + RESET), 1);
    rig.chiplet.core.lock().in_flight = None;
    assert_eq!(rig.read(MANAGEMENT + RESET), 0);
    assert!(rig.chiplet.tlb_entries().is_empty());
    assert_eq!((rig.state(0), rig.read(Rig::tfm(0, 0))), (0, 0));
    assert_eq!(rig.fault_state(Rig::slot(0, 1)), tfh::STATE_INACTIVE);
    // The executor goes on.
    rig.start(0, 8, Misses::UserPolling);
    rig.run(0, &set(base, 2)).unwrap();
    assert_ne!(rig.status(0, 0), CALL_OS);
}

#[test]
fn a_device_that_survives_its_reset_never_says_that_it_is_done() {
    let faults = FaultPlan {
        survives_reset: 1.0,
        ..FaultPlan::default()
    };
    let (rig, base) = Rig::started(ChipletConfig {
        faults,
        ..ChipletConfig::default()
    });
    rig.write(MANAGEMENT + RESET, 1);
    assert_eq!(rig.read(MANAGEMENT + RESET), 1);
    rig.run(0, &set(base, 1)).unwrap();
    assert_eq!(rig.read(MANAGEMENT + RESET), 1);
    let counts = rig.chiplet.counts();
    assert_eq!((counts.resets, counts.resets_survived), (0, 1));
}

#[test]
fn a_device_that_has_survived_a_reset_may_heed_the_next() {
    let faults = FaultPlan {
        seed: 1,
        survives_reset: 0.5,
        ..FaultPlan::default()
    };
    let (rig, base) = Rig::started(ChipletConfig {
        faults,
        ..ChipletConfig::default()
    });
    rig.run(0, &set(base, 1)).unwrap();
    let mut survived = 0;
    let mut heeded = 0;
    for _ in 0..32 {
        rig.write(MANAGEMENT + RESET, 1);
        let counts = rig.chiplet.counts();
        if rig.read(MANAGEMENT + RESET) == 1 {
            survived += 1;
            assert_eq!(counts.resets, heeded, "it goes on");
        } else {
            heeded += 1;
            assert!(!rig.holds(8, base) && rig.state(0) == 0);
        }
    }
    assert!(survived > 0 && heeded > 0, "{survived}, {heeded}");
    let counts = rig.chiplet.counts();
    assert_eq!((counts.resets, counts.resets_survived), (heeded, survived));
}

#[test]
fn an_injected_purge_between_miss_and_drop_in_has_the_drop_in_ignored() {
    let faults = FaultPlan {
        seed: 1,
        purge_in_miss: 0.5,
        ..FaultPlan::default()
    };
    let (rig, base) = Rig::started(ChipletConfig {
        faults,
        ..ChipletConfig::default()
    });
    for page in 0..16 {
        rig.run(0, &set(base + page * 4096, page)).unwrap();
    }
    let counts = rig.chiplet.counts();
    assert!(counts.purges_in_miss > 0);
    assert_eq!(counts.drop_ins_cancelled, counts.purges_in_miss);
    assert_eq!(
        counts.misses,
        16 + counts.purges_in_miss,
        "each misses again"
    );
    assert_eq!(counts.faults_over, counts.purges_in_miss);
}

#[test]
fn every_step_can_be_delayed_and_ends_all_the_same() {
    let faults = FaultPlan {
        delayed: 1.0,
        delay: Duration::from_micros(300),
        ..FaultPlan::default()
    };
    let (rig, base) = Rig::started(ChipletConfig {
        faults,
        ..ChipletConfig::default()
    });
    let delayed = || rig.chiplet.counts().steps_delayed;
    assert_eq!(delayed(), 2, "ALLOCATE and START");
    rig.run(0, &set(base, 1)).unwrap();
    assert_eq!(
        delayed(),
        5,
        "the interrupt of the miss, its answer, the access"
    );
    rig.write(MANAGEMENT + RESET, 1);
    rig.await_reset();
    let counts = rig.chiplet.counts();
    assert_eq!((delayed(), counts.faults_over), (6, 6));
    assert_eq!(counts.faults_cut_short, 0);
}

#[test]
fn what_a_reset_ends_is_counted_apart() {
    let faults = FaultPlan {
        late: 1.0,
        late_by: Duration::from_secs(3600),
        ..FaultPlan::default()
    };
    let (rig, base) = Rig::started(ChipletConfig {
        faults,
        ..ChipletConfig::default()
    });
    for handle in 0..3 {
        rig.purge(handle, 8, base, PageSize::FourKiB, 1);
    }
    rig.write(MANAGEMENT + RESET, 1);
    rig.await_reset();
    let counts = rig.chiplet.counts();
    assert_eq!((counts.completions_late, counts.purges_cut_short), (3, 3));
    assert_eq!((counts.faults_over, counts.faults_cut_short), (0, 3));
}

#[test]
fn a_purge_that_overtakes_an_earlier_one_is_counted() {
    let faults = FaultPlan {
        seed: 7,
        jitter: Duration::from_millis(20),
        ..FaultPlan::default()
    };
    let (rig, base) = Rig::started(ChipletConfig {
        faults,
        ..ChipletConfig::default()
    });
    for handle in 0..24 {
        rig.purge(handle, 8, base, PageSize::FourKiB, 1);
    }
    (0..24).for_each(|handle| rig.await_purge(handle));
    let counts = rig.chiplet.counts();
    assert!(
        (1..24).contains(&counts.completions_reordered),
        "{counts:?}"
    );
    assert_eq!(counts.faults_over, counts.completions_reordered);
}
