//! Devices that lie: what they say costs them their own standing, and nobody else anything.

mod support;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use shootdown::{
    AddressSpace, Cause, Completion, CutOffFailed, Deadlines, Device, DeviceTlb, Drain, ExitError,
    FlushCommand, Gather, Health, InvalidateError, Issue, Issued, Limits, Map, MapError, Notifier,
    Op, Outcome, PageSizes, Range, ResetError, Scope, Ticket, WouldBlock,
};
use support::{Counting, fake, on, short, space};

/// What a device says, whatever is true.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Lie {
    /// There is never room.
    Busy,
    /// Tickets that nobody was given, and never the same twice.
    Tickets,
    /// That it failed, then that it is done, then that it is pending, and so on.
    Backwards,
    /// That nothing is cached, after it has accepted commands.
    NothingAfterAll,
    /// That a reset came to its end, after a time far beyond any deadline.
    LateReset,
}

struct Liar {
    lie: Lie,
    calls: Arc<AtomicU64>,
    resets: bool,
}

impl DeviceTlb for Liar {
    fn limits(&self) -> Limits {
        Limits {
            entry_sizes: PageSizes::FOUR_KIB,
            pages_per_command: 1024,
            commands_per_batch: usize::MAX,
            full_flush_cost: u64::MAX,
        }
    }

    fn issue(&self, command: FlushCommand) -> Issue {
        self.calls.fetch_add(1, SeqCst);
        match self.lie {
            Lie::Busy => Issue::Busy,
            Lie::NothingAfterAll if command.scope == Scope::Device => Issue::NothingCached,
            _ => Issue::Queued,
        }
    }

    fn dispatch(&self) -> Ticket {
        match self.lie {
            Lie::Tickets => Ticket(u64::MAX - self.calls.fetch_add(1, SeqCst)),
            _ => Ticket(0),
        }
    }

    fn poll(&self, ticket: Ticket) -> Completion {
        let nth = self.calls.fetch_add(1, SeqCst);
        match self.lie {
            Lie::Tickets if ticket.0 < u64::MAX / 2 => Completion::Done,
            Lie::Backwards if nth % 2 == 1 => Completion::Failed,
            Lie::Backwards if nth.is_multiple_of(4) => Completion::Done,
            _ => Completion::Pending,
        }
    }

    fn reset(&self, deadline: Duration) -> Result<(), ResetError> {
        if self.lie == Lie::LateReset {
            std::thread::sleep(10 * deadline);
        }
        if self.resets {
            Ok(())
        } else {
            Err(ResetError::Timeout { deadline })
        }
    }
}

fn liar(lie: Lie, resets: bool) -> Device {
    let calls = Arc::default();
    Device::new(format!("that lies: {lie:?}"), Liar { lie, calls, resets })
}

/// Acknowledges after a while, as real ones do.
struct Slow {
    takes: Duration,
    since: std::sync::Mutex<Option<Instant>>,
}

impl DeviceTlb for Slow {
    fn limits(&self) -> Limits {
        Limits {
            entry_sizes: PageSizes::FOUR_KIB,
            pages_per_command: 1024,
            commands_per_batch: 8,
            full_flush_cost: 4,
        }
    }
    fn issue(&self, _: FlushCommand) -> Issue {
        Issue::Queued
    }
    fn dispatch(&self) -> Ticket {
        *self.since.lock().unwrap() = Some(Instant::now());
        Ticket(0)
    }
    fn poll(&self, _: Ticket) -> Completion {
        let since = self.since.lock().unwrap();
        if since.is_some_and(|since| since.elapsed() >= self.takes) {
            Completion::Done
        } else {
            Completion::Pending
        }
    }
}

/// Everything that one invalidation may wait for, with room for a loaded machine.
fn most(deadlines: &Deadlines) -> Duration {
    4 * (deadlines.flush + deadlines.full_flush + deadlines.reset) + Duration::from_secs(2)
}

fn page(space: &AddressSpace) -> Range {
    space.map(Map::anonymous(1 << 12)).unwrap()
}

#[test]
fn no_lie_outlives_the_deadlines_or_reaches_another_device() {
    for lie in [
        Lie::Busy,
        Lie::Tickets,
        Lie::Backwards,
        Lie::NothingAfterAll,
        Lie::LateReset,
    ] {
        let space = space();
        let (buffer, other) = (page(&space), page(&space));
        let (bad, (good, _)) = (liar(lie, false), fake("honest"));
        let handler = Arc::new(Counting::default());
        let one = space.register(buffer, handler.clone(), &on(&bad)).unwrap();
        let two = space.register(other, handler.clone(), &on(&good)).unwrap();
        let begun = Instant::now();
        let result = space.unmap(buffer);
        assert!(begun.elapsed() < most(&short()), "{lie:?}");
        match &result {
            Err(MapError::Invalidate(InvalidateError::Quarantined { device, .. })) => {
                assert_eq!(device.name(), bad.name());
            }
            result => panic!("{lie:?}: {result:?}"),
        }
        assert_eq!(space.quarantined_bytes(), 1 << 12, "{lie:?}");
        assert_eq!(bad.health(), Health::Quarantined);
        space.unmap(other).unwrap();
        let next = page(&space);
        space.unmap(next).unwrap();
        assert_eq!(good.stats().timeouts, 0, "{lie:?}");
        one.unregister().unwrap();
        two.unregister().unwrap();
        assert_eq!(handler.starts.load(SeqCst), handler.ends.load(SeqCst));
        assert_eq!(handler.releases.load(SeqCst), 2);
        assert!(matches!(space.exit(), Err(ExitError::Reached { .. })));
    }
}

#[test]
fn a_device_that_is_busy_for_ever_takes_no_time_from_one_that_answers() {
    let deadlines = Deadlines {
        flush: Duration::from_millis(100),
        full_flush: Duration::from_millis(100),
        ..short()
    };
    let space = AddressSpace::without_memory(deadlines);
    let range = Range::new(0x1000u64, 0x1000).unwrap();
    let (bad, slow) = (
        liar(Lie::Busy, true),
        Slow {
            takes: Duration::from_millis(10),
            since: Default::default(),
        },
    );
    let good = Device::new("slow", slow);
    let handler = Arc::new(Counting::default());
    let _one = space.register(range, handler.clone(), &on(&bad)).unwrap();
    let _two = space.register(range, handler, &on(&good)).unwrap();
    let guard = space.begin_invalidation(range, shootdown::Cause::External);
    guard.unwrap().end(shootdown::Outcome::Changed).unwrap();
    assert_eq!(
        (bad.stats().timeouts, bad.stats().recovered_by_reset),
        (1, 1)
    );
    assert_eq!(good.stats().timeouts, 0, "its deadline was its own");
}

#[test]
fn a_device_that_was_flushed_as_a_whole_to_begin_with_has_recovered_from_nothing() {
    let space = space();
    let (lossy, behaviour) = fake("loses range flushes");
    behaviour.loses_ranges.store(true, SeqCst);
    let (whole, _) = fake("flushed as a whole");
    let buffer = page(&space);
    let handler = Arc::new(Counting::default());
    // More tags than a batch has commands.
    let tags = (0..9).map(|tag| shootdown::Target {
        device: whole.clone(),
        tag,
    });
    let _one = space
        .register(buffer, handler.clone(), &tags.collect::<Vec<_>>())
        .unwrap();
    let _two = space.register(buffer, handler, &on(&lossy)).unwrap();
    space.discard(buffer).unwrap();
    let stats =
        [lossy.stats(), whole.stats()].map(|stats| (stats.timeouts, stats.recovered_by_flush));
    assert_eq!(stats, [(1, 1), (0, 0)]);
}

#[test]
fn what_an_exit_cannot_give_back_is_counted() {
    let space = space();
    let buffer = space.map(Map::anonymous(3 << 12)).unwrap();
    let bad = liar(Lie::Tickets, false);
    let _one = space.register(buffer, Arc::new(Counting::default()), &on(&bad));
    assert!(matches!(space.exit(), Err(ExitError::Reached { .. })));
    assert_eq!(space.quarantined_bytes(), 3 << 12);
    assert!(matches!(
        space.map(Map::anonymous(1 << 12)),
        Err(MapError::Exiting)
    ));
}

/// Where a handler panics.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Site {
    Quiesce,
    Drained,
    Flush,
    CutOff,
    End,
    Release,
}

/// Panics once in one place.
struct Panics {
    at: Site,
    armed: AtomicBool,
}

impl Panics {
    fn panic_in(&self, site: Site) {
        assert!(
            self.at != site || !self.armed.swap(false, SeqCst),
            "planned"
        );
    }
}

impl Notifier for Panics {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        self.panic_in(Site::Quiesce);
        Ok(op.drain())
    }
    fn drained(&self, _: &Op<'_>) -> bool {
        self.panic_in(Site::Drained);
        true
    }
    fn flush<'o>(&self, _: &Op<'o>, gather: Gather<'o>) -> Issued<'o> {
        self.panic_in(Site::Flush);
        gather.all()
    }
    fn cut_off(&self, _: &Op<'_>) -> Result<(), CutOffFailed> {
        self.panic_in(Site::CutOff);
        Ok(())
    }
    fn end(&self, _: &Op<'_>, _: Outcome) {
        self.panic_in(Site::End);
    }
    fn release(&self) {
        self.panic_in(Site::Release);
    }
}

#[test]
fn a_panic_in_any_callback_is_told_to_the_caller_and_costs_nobody_else_anything() {
    for at in [
        Site::Quiesce,
        Site::Drained,
        Site::Flush,
        Site::CutOff,
        Site::End,
        Site::Release,
    ] {
        let space = space();
        let (buffer, next) = (page(&space), page(&space));
        let ((bad, _), (good, _)) = (fake("of the bad handler"), fake("of the good one"));
        let armed = AtomicBool::new(true);
        let handler = Arc::new(Panics { at, armed });
        let counting = Arc::new(Counting::default());
        let one = space.register(buffer, handler, &on(&bad)).unwrap();
        let two = space
            .register(Range::ALL, counting.clone(), &on(&good))
            .unwrap();
        match space.unmap(buffer) {
            Ok(()) => assert_eq!(at, Site::Release),
            Err(MapError::Invalidate(InvalidateError::HandlerPanicked { changed, .. })) => {
                assert_eq!(changed, at == Site::End, "{at:?}");
                assert_eq!(space.quarantined_bytes() == 0, changed, "{at:?}");
            }
            Err(error) => panic!("{at:?}: {error}"),
        }
        one.unregister().unwrap();
        assert_eq!(bad.health(), Health::Quarantined, "{at:?}");
        assert_eq!(space.stats().panics, 1, "{at:?}");
        assert_eq!(
            (counting.starts.load(SeqCst), counting.ends.load(SeqCst)),
            (1, 1),
            "{at:?}"
        );
        // The space goes on, and so does what was in quarantine once its device is well.
        space.unmap(next).unwrap();
        assert_eq!(good.health(), Health::Healthy);
        bad.recover(Duration::from_millis(20)).unwrap();
        space.drain().unwrap();
        assert_eq!(space.quarantined_bytes(), 0, "{at:?}");
        two.unregister().unwrap();
        assert_eq!(space.registrations(), 0, "{at:?}");
        assert_eq!(space.stats().releases, 2, "{at:?}");
    }
}

type Calls = Arc<Mutex<Vec<&'static str>>>;

/// One that nobody is hit beside: a stage in which it fails, and the calls that it and its device, if there is one, got.
struct Alone {
    at: &'static str,
    polled: bool,
    panics: bool,
    calls: Calls,
}

impl Alone {
    /// True if it is to fail.
    fn called(&self, call: &'static str) -> bool {
        self.calls.lock().unwrap().push(call);
        assert!(!(self.panics && self.at == call), "planned");
        self.at == call
    }
}

impl Notifier for Alone {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        if self.called("quiesce") {
            return Err(WouldBlock);
        }
        Ok(if self.polled { op.drain() } else { op.idle() })
    }
    fn drained(&self, _: &Op<'_>) -> bool {
        !self.called("drained")
    }
    fn flush<'o>(&self, _: &Op<'o>, gather: Gather<'o>) -> Issued<'o> {
        self.called("flush");
        gather.all()
    }
    fn cut_off(&self, op: &Op<'_>) -> Result<(), CutOffFailed> {
        if self.called("cut_off") {
            return Err(CutOffFailed { range: op.range() });
        }
        Ok(())
    }
    fn end(&self, _: &Op<'_>, outcome: Outcome) {
        self.called(match outcome {
            Outcome::Changed => "end",
            Outcome::Unchanged => "end, unchanged",
            _ => "end, quarantined",
        });
    }
}

/// Acknowledges at once, and tells of its flushes and resets.
struct Telling(Calls);

impl DeviceTlb for Telling {
    fn limits(&self) -> Limits {
        Limits {
            entry_sizes: PageSizes::FOUR_KIB,
            pages_per_command: 1024,
            commands_per_batch: 8,
            full_flush_cost: 4,
        }
    }
    fn issue(&self, _: FlushCommand) -> Issue {
        self.0.lock().unwrap().push("issue");
        Issue::Queued
    }
    fn dispatch(&self) -> Ticket {
        Ticket(0)
    }
    fn poll(&self, _: Ticket) -> Completion {
        self.0.lock().unwrap().push("poll");
        Completion::Done
    }
    fn reset(&self, _: Duration) -> Result<(), ResetError> {
        self.0.lock().unwrap().push("reset");
        Ok(())
    }
}

/// Alone or beside another, with a device or without, whatever goes wrong in one phase, the others are run and the caller is told.
#[test]
fn who_is_hit_alone_is_called_as_beside_others() {
    let all = ["", "quiesce", "drained", "flush", "cut_off", "end"];
    let cases = all.iter().flat_map(|at| {
        let cases = (0..8).map(|nth| [1, 2, 4].map(|bit| nth & bit != 0));
        cases.map(move |[panics, polled, flushes]| (*at, panics, polled, flushes))
    });
    for (at, panics, polled, flushes) in cases {
        let case = (at, panics, polled, flushes);
        let run = |beside: bool, may_block: bool| {
            let deadlines = Deadlines {
                drain: Duration::from_millis(1),
                ..Deadlines::default()
            };
            let space = AddressSpace::without_memory(deadlines);
            let range = Range::new(1u64 << 30, 1 << 12).unwrap();
            let alone = Arc::new(Alone {
                at,
                polled,
                panics,
                calls: Calls::default(),
            });
            let device = Device::new("that tells", Telling(alone.calls.clone()));
            let targets = if flushes { on(&device) } else { vec![] };
            let _one = space.register(range, alone.clone(), &targets).unwrap();
            let counting = Arc::new(Counting::default());
            let _other = beside.then(|| space.register(range, counting, &[]).unwrap());
            let begun = if may_block {
                space.begin_invalidation(range, Cause::External)
            } else {
                space.try_begin_invalidation(range, Cause::External)
            };
            let told = begun.and_then(|open| open.end(Outcome::Changed));
            let mut calls = alone.calls.lock().unwrap().clone();
            calls.dedup(); // It is polled as often as there is time.
            (calls, told.map_err(|error| error.to_string()))
        };
        for may_block in [true, false] {
            let (calls, told) = run(false, may_block);
            assert_eq!(run(true, may_block), (calls.clone(), told.clone()));
            let fails = match at {
                "quiesce" | "cut_off" => true,
                "drained" => polled,
                "" => false,
                _ => panics,
            };
            // What does not drain ends with the device.
            let fails = fails && !(at == "drained" && flushes && !panics);
            assert_eq!(told.is_err(), fails, "{case:?}: {told:?}");
            let refused = at == "quiesce" && !panics && !may_block;
            let polled = polled && at != "quiesce";
            let mut phases = vec!["quiesce"];
            if !refused {
                phases.extend(polled.then_some("drained"));
                let resets = polled && at == "drained" && flushes && !panics;
                phases.extend(resets.then_some("reset"));
                phases.push("flush");
                // One that has panicked is not asked: it is in quarantine.
                let is_asked = flushes
                    && !(panics && ["quiesce", "flush"].contains(&at))
                    && !(panics && polled && at == "drained");
                phases.extend(["issue", "poll"].into_iter().filter(|_| is_asked));
                phases.push("cut_off");
            }
            phases.push(match told {
                Err(_) if refused => "end, unchanged",
                Err(_) if at != "end" => "end, quarantined",
                _ => "end",
            });
            assert_eq!(calls, phases, "{case:?} {may_block}");
        }
    }
}

/// No device answers for it: as long as it could say that it is over, and once it cannot any more, the pages stay.
#[test]
fn pages_that_one_without_devices_may_still_reach_stay_when_it_is_gone() {
    for at in ["quiesce", "drained", "flush", "cut_off"] {
        for (panics, beside) in [(false, false), (true, false), (false, true), (true, true)] {
            if !panics && at == "flush" {
                continue; // It cannot fail otherwise.
            }
            let space = space();
            let page = space.map(Map::anonymous(1 << 12)).unwrap();
            let alone = Arc::new(Alone {
                at,
                polled: at == "drained",
                panics,
                calls: Calls::default(),
            });
            let one = space.register(page, alone, &[]).unwrap();
            let counting = Arc::new(Counting::default());
            let _other = beside.then(|| space.register(page, counting, &[]).unwrap());
            space.unmap(page).unwrap_err();
            drop(one);
            space.drain().unwrap();
            let stay = space.quarantined_bytes();
            assert_eq!(stay, 1 << 12, "{at} {panics} {beside}");
        }
    }
}

/// A failed invalidation holds who may still reach the pages, and no longer than somebody can ask for it.
#[test]
fn a_handler_that_failed_is_dropped_with_its_registration() {
    for panics in [false, true] {
        let space = space();
        let page = page(&space);
        let alone = Arc::new(Alone {
            at: "cut_off",
            polled: false,
            panics,
            calls: Calls::default(),
        });
        let handler = Arc::downgrade(&alone);
        let one = space.register(page, alone, &[]).unwrap();
        assert!(space.begin_invalidation(page, Cause::External).is_err());
        drop(one);
        space.drain().unwrap();
        assert_eq!(handler.strong_count(), 0, "{panics}");
    }
}

/// A TLB whose driver panics, once, in the method with this number.
struct PanickingTlb {
    at: u32,
    armed: AtomicBool,
}

impl PanickingTlb {
    fn panic_in(&self, at: u32) {
        assert!(self.at != at || !self.armed.swap(false, SeqCst), "planned");
    }
}

impl DeviceTlb for PanickingTlb {
    fn limits(&self) -> Limits {
        Limits {
            entry_sizes: PageSizes::FOUR_KIB,
            pages_per_command: 1024,
            commands_per_batch: 8,
            full_flush_cost: 4,
        }
    }
    fn issue(&self, _: FlushCommand) -> Issue {
        self.panic_in(0);
        Issue::Queued
    }
    fn dispatch(&self) -> Ticket {
        self.panic_in(1);
        Ticket(0)
    }
    fn poll(&self, _: Ticket) -> Completion {
        self.panic_in(2);
        if self.at == 3 && self.armed.load(SeqCst) {
            return Completion::Failed;
        }
        Completion::Done
    }
    fn reset(&self, _: Duration) -> Result<(), ResetError> {
        self.panic_in(3);
        Ok(())
    }
}

/// As with a handler: the device goes into quarantine, others go on, and the range is not claimed for ever.
#[test]
fn a_tlb_that_panics_is_quarantined_and_the_caller_told() {
    for at in 0..4 {
        let space = space();
        let buffer = page(&space);
        let armed = AtomicBool::new(true);
        let bad = Device::new("bad", PanickingTlb { at, armed });
        let (good, behaviour) = fake("good");
        let counting = Arc::new(Counting::default());
        let one = space.register(buffer, counting.clone(), &on(&bad)).unwrap();
        let two = space
            .register(buffer, counting.clone(), &on(&good))
            .unwrap();
        let result = space.unmap(buffer);
        assert!(
            matches!(
                result,
                Err(MapError::Invalidate(InvalidateError::Quarantined { .. }))
            ),
            "{at}: {result:?}"
        );
        assert_eq!(bad.health(), Health::Quarantined, "{at}");
        assert_eq!(good.health(), Health::Healthy, "{at}");
        assert_eq!(behaviour.dispatched.load(SeqCst), 1, "{at}");
        assert_eq!(counting.starts.load(SeqCst), 2, "{at}");
        assert_eq!(counting.ends.load(SeqCst), 2, "{at}");
        bad.recover(Duration::from_millis(20)).unwrap();
        space.drain().unwrap();
        assert_eq!(space.quarantined_bytes(), 0, "{at}");
        one.unregister().unwrap();
        two.unregister().unwrap();
    }
}

/// Where a handler calls back, and which of its calls were not refused.
struct Reenters {
    space: AddressSpace,
    own: std::sync::OnceLock<Range>,
    asked: AtomicU64,
    granted: std::sync::Mutex<Vec<(Site, &'static str)>>,
}

impl Reenters {
    /// Everything that a callback may not do.
    fn call(&self, site: Site) {
        let Some(own) = self.own.get().copied() else {
            return;
        };
        let space = &self.space;
        self.asked.fetch_add(1, SeqCst);
        let calls: [(&'static str, bool); 10] = [
            ("map", space.map(Map::anonymous(1 << 12)).is_ok()),
            ("unmap", space.unmap(own).is_ok()),
            ("discard", space.discard(own).is_ok()),
            (
                "protect",
                space.protect(own, shootdown::Rights::READ).is_ok(),
            ),
            ("remap", space.remap(own, own.start()).is_ok()),
            ("lock for writing", space.lock_write().is_ok()),
            ("lock for reading", space.lock_read().is_ok()),
            (
                "try to lock",
                space.try_lock_read().is_ok_and(|held| held.is_some()),
            ),
            (
                "invalidate",
                space
                    .begin_invalidation(own, shootdown::Cause::External)
                    .is_ok(),
            ),
            ("exit", space.exit().is_ok()),
        ];
        let granted = calls.into_iter().filter(|(_, granted)| *granted);
        let mut all = self.granted.lock().unwrap();
        all.extend(granted.map(|(what, _)| (site, what)));
    }
}

impl Notifier for Reenters {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        self.call(Site::Quiesce);
        Ok(op.drain())
    }
    fn drained(&self, _: &Op<'_>) -> bool {
        self.call(Site::Drained);
        true
    }
    fn flush<'o>(&self, _: &Op<'o>, gather: Gather<'o>) -> Issued<'o> {
        self.call(Site::Flush);
        gather.all()
    }
    fn cut_off(&self, _: &Op<'_>) -> Result<(), CutOffFailed> {
        self.call(Site::CutOff);
        Ok(())
    }
    fn end(&self, _: &Op<'_>, _: Outcome) {
        self.call(Site::End);
    }
    fn release(&self) {
        self.call(Site::Release);
    }
}

/// Nothing is granted in any callback, nobody waits for himself, and the space is as before.
#[test]
fn a_handler_that_calls_everything_from_everywhere_is_refused_and_costs_nobody_anything() {
    let space = space();
    let (buffer, other) = (page(&space), page(&space));
    let (device, _) = fake("of the handler");
    let handler = Arc::new(Reenters {
        space: space.clone(),
        own: buffer.into(),
        asked: AtomicU64::new(0),
        granted: Default::default(),
    });
    let one = space
        .register(buffer, handler.clone(), &on(&device))
        .unwrap();
    let begun = Instant::now();
    space.discard(buffer).unwrap();
    one.unregister().unwrap();
    assert!(begun.elapsed() < most(&short()), "it has waited for itself");
    assert_eq!(*handler.granted.lock().unwrap(), []);
    assert_eq!(handler.asked.load(SeqCst), 6, "in each callback");
    assert_eq!(
        (device.health(), space.stats().panics),
        (Health::Healthy, 0)
    );
    assert_eq!(space.registrations(), 0);
    for range in [buffer, other] {
        space.unmap(range).unwrap();
    }
    space.exit().unwrap();
}
