//! What runs when something ends, on whatever thread comes by: the drop of a last reference, a release that fails, what a panic leaves
//! behind. None of it may meet a lock that is held, and none may take what others wait for with it.

use std::panic::{AssertUnwindSafe, catch_unwind, panic_any};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use shootdown::{
    AddressSpace, Cause, Completion, Deadlines, Device, DeviceTlb, Drain, ExitError, FlushCommand,
    Health, InsertError, InvalidateError, Issue, Limits, Map, Needs, Notifier, NotifierLock,
    Observer, Op, Outcome, PageSizes, Place, Prepared, ProcessMemory, Range, Registration, Share,
    SpacePin, Target, Ticket, Unregistered, WouldBlock,
};

const PATIENCE: Duration = Duration::from_secs(20);

fn page(nth: u64) -> Range {
    Range::new(nth << 12, 1 << 12).unwrap()
}

fn space() -> AddressSpace {
    AddressSpace::without_memory(Deadlines::default())
}

/// Fails where `f` hangs.
fn in_time(f: impl FnOnce() + Send + 'static) {
    let (done, over) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        f();
        let _ = done.send(());
    });
    if over.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
        panic!("a deadlock");
    }
    thread.join().unwrap();
}

/// Acknowledges everything at once; when it is dropped it asks something of the space.
struct Obedient(Option<SpacePin>);

impl DeviceTlb for Obedient {
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
        Ticket(0)
    }
    fn poll(&self, _: Ticket) -> Completion {
        Completion::Done
    }
}

impl Drop for Obedient {
    fn drop(&mut self) {
        if let Some(space) = self.0.as_ref().and_then(SpacePin::upgrade) {
            let open = space.begin_invalidation(page(7), Cause::External);
            open.unwrap().end(Outcome::Unchanged).unwrap();
        }
    }
}

fn obedient(pin: Option<SpacePin>) -> Device {
    Device::new("obedient", Obedient(pin))
}

fn target(device: &Device) -> Target {
    Target {
        device: device.clone(),
        tag: 0,
    }
}

struct Plain;
impl Notifier for Plain {}

#[test]
fn the_last_reference_to_a_device_is_not_dropped_under_the_lock_of_the_ghosts() {
    in_time(|| {
        let space = space();
        let (first, second) = (obedient(Some(space.pin())), obedient(None));
        for (nth, device) in [(1, &first), (2, &second)] {
            let targets = [target(device)];
            let registration = space
                .register(page(nth), Arc::new(Plain), &targets)
                .unwrap();
            device.quarantine();
            registration.unregister().unwrap();
            let met = space.begin_invalidation(page(nth), Cause::External);
            met.expect_err("it may be reached for as long as the device is in quarantine");
        }
        first.recover(PATIENCE).unwrap();
        // From here on only the ghost has it; the next that comes forgets it.
        drop(first);
        let third = obedient(None);
        let registration = space.register(page(3), Arc::new(Plain), &[target(&third)]);
        third.quarantine();
        registration.unwrap().unregister().unwrap();
    });
}

/// Panics when it is dropped.
struct Explosive(Obedient);

impl DeviceTlb for Explosive {
    fn limits(&self) -> Limits {
        self.0.limits()
    }
    fn issue(&self, command: FlushCommand) -> Issue {
        self.0.issue(command)
    }
    fn dispatch(&self) -> Ticket {
        self.0.dispatch()
    }
    fn poll(&self, ticket: Ticket) -> Completion {
        self.0.poll(ticket)
    }
}

impl Drop for Explosive {
    fn drop(&mut self) {
        panic!("planned: a device that panics when it is dropped");
    }
}

#[test]
fn a_device_that_panics_when_it_is_dropped_keeps_nobody_from_being_released() {
    in_time(|| {
        let space = space();
        let explosive = Device::new("explosive", Explosive(Obedient(None)));
        let another = obedient(None);
        for (nth, device) in [(1, explosive), (2, another.clone())] {
            let registration = space.register(page(nth), Arc::new(Plain), &[target(&device)]);
            device.quarantine();
            let unregistered = registration.unwrap().unregister();
            assert_eq!(unregistered, Ok(Unregistered::Released));
            // From here on only the ghost has the first; the second forgets it.
            if nth == 1 {
                device.recover(PATIENCE).unwrap();
            }
        }
        another.recover(PATIENCE).unwrap();
        space.exit().unwrap();
        assert_eq!(space.stats().releases, 2);
    });
}

/// Panics in `release`.
struct Unstopped;

impl Notifier for Unstopped {
    fn release(&self) {
        panic!("planned: the device could not be stopped");
    }
}

#[test]
fn a_release_that_panics_leaves_its_range_to_the_device_until_that_has_recovered() {
    let (space, device) = (space(), obedient(None));
    let registration = space.register(page(1), Arc::new(Unstopped), &[target(&device)]);
    registration.unwrap().unregister().unwrap();
    assert_eq!(device.health(), Health::Quarantined);
    let met = space.begin_invalidation(page(1), Cause::External);
    assert!(
        matches!(met, Err(InvalidateError::Quarantined { .. })),
        "nobody has stopped the device: {met:?}"
    );
    drop(met);
    assert!(space.begin_invalidation(page(2), Cause::External).is_ok());
    device.recover(PATIENCE).unwrap();
    assert!(space.begin_invalidation(page(1), Cause::External).is_ok());
}

/// Cannot stop its device, and says so.
struct Honest(Device);

impl Notifier for Honest {
    fn release(&self) {
        self.0.quarantine();
    }
}

#[test]
fn a_release_that_gives_its_device_up_leaves_it_every_range_that_ended_with_it() {
    let (space, device) = (space(), obedient(None));
    let all = (1..4).map(|nth| {
        let handler = Arc::new(Honest(device.clone()));
        let prepared = space.prepare(page(nth), handler, &[target(&device)]);
        prepared.unwrap()
    });
    let all = space.insert_all(all.collect()).unwrap();
    for end in Registration::unregister_all(&all) {
        assert_eq!(end, Ok(Unregistered::Released));
    }
    let open = |nth| space.begin_invalidation(page(nth), Cause::External);
    for nth in 1..4 {
        let met = open(nth);
        assert!(
            matches!(met, Err(InvalidateError::Quarantined { .. })),
            "page {nth}: {met:?}"
        );
    }
    assert!(open(4).is_ok());
    device.recover(PATIENCE).unwrap();
    assert!((1..4).all(|nth| open(nth).is_ok()));
}

#[test]
fn an_exit_in_which_a_release_gives_its_device_up_says_so() {
    let device = obedient(None);
    let honest: Arc<dyn Notifier> = Arc::new(Honest(device.clone()));
    for handler in [honest, Arc::new(Unstopped)] {
        let space = space();
        let _registration = space.register(page(1), handler, &[target(&device)]);
        let exited = space.exit();
        assert_eq!(exited, Err(ExitError::Reached { space: space.id() }));
        device.recover(PATIENCE).unwrap();
    }
}

/// A payload that panics where it is dropped.
struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            panic!("planned: a payload that panics");
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum At {
    Quiesce,
    End,
    Release,
}

struct Bomber {
    at: At,
    released: Arc<AtomicUsize>,
}

impl Bomber {
    fn reaches(&self, at: At) {
        if at == self.at {
            panic_any(Bomb);
        }
    }
}

impl Notifier for Bomber {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        self.reaches(At::Quiesce);
        Ok(op.idle())
    }
    fn end(&self, _: &Op<'_>, _: Outcome) {
        self.reaches(At::End);
    }
    fn release(&self) {
        self.released.fetch_add(1, SeqCst);
        self.reaches(At::Release);
    }
}

#[test]
fn a_panic_whose_payload_panics_is_contained_too() {
    for at in [At::Quiesce, At::End, At::Release] {
        in_time(move || {
            let space = space();
            let released = Arc::new(AtomicUsize::new(0));
            let bomber = Arc::new(Bomber {
                at,
                released: released.clone(),
            });
            let registration = space.register(page(1), bomber, &[]).unwrap();
            let told = catch_unwind(AssertUnwindSafe(|| {
                let open = space.begin_invalidation(page(1), Cause::External)?;
                open.end(Outcome::Changed)
            }));
            let told = told.unwrap_or_else(|_| panic!("{at:?}: the caller was unwound"));
            assert_eq!(told.is_err(), at != At::Release, "{at:?}: {told:?}");
            registration.unregister().unwrap();
            assert_eq!(released.load(SeqCst), 1, "{at:?}");
            space.exit().unwrap();
        });
    }
}

/// Cannot be inserted where nobody tells of foreign calls; owns a share of something else.
struct Demanding(#[allow(dead_code, reason = "it is dropped")] Mutex<Option<Share>>);

impl Notifier for Demanding {
    fn needs(&self) -> Needs {
        Needs::BEFORE_AND_BARRIER | Needs::FOREIGN
    }
}

#[test]
fn a_handler_that_no_share_can_have_is_not_dropped_under_the_lock_of_the_shares() {
    in_time(|| {
        let space = space();
        let plain = space.share(1, || (page(1), Arc::new(Plain), Vec::new()));
        let demanding = Arc::new(Demanding(Mutex::new(Some(plain.unwrap()))));
        let refused = space.share(2, move || (page(2), demanding, Vec::new()));
        assert!(matches!(refused, Err(InsertError::Uncovered(_))));
        assert!(
            space
                .share(1, || (page(1), Arc::new(Plain), Vec::new()))
                .is_ok()
        );
    });
}

/// Panics when it is told that the first change is over.
#[derive(Default)]
struct Confused(AtomicUsize);

impl Observer for Confused {
    fn may_change(&self, _: Range) {}
    fn changed(&self, _: Range) {
        if self.0.fetch_add(1, SeqCst) == 0 {
            panic!("planned: an observer that cannot go on");
        }
    }
}

#[test]
fn an_observer_that_panics_at_the_end_leaves_nobody_in_use() {
    in_time(|| {
        let space = space();
        let observer = Arc::new(Confused::default());
        space.observe(observer.clone()).unwrap();
        let device = obedient(None);
        let registration = space.register(page(1), Arc::new(Plain), &[target(&device)]);
        let open = space.begin_invalidation(page(1), Cause::External).unwrap();
        let ended = catch_unwind(AssertUnwindSafe(|| open.end(Outcome::Changed)));
        assert!(ended.is_err(), "the panic is the caller's to see");
        assert_eq!(observer.0.load(SeqCst), 1, "it was told once");
        let unregistered = registration.unwrap().unregister();
        assert_eq!(unregistered, Ok(Unregistered::Released));
        space.exit().unwrap();
    });
}

#[test]
fn an_invalidation_that_hits_nothing_does_not_go_by_the_name_of_an_earlier_one() {
    let space = space();
    let _registration = space.register(page(1), Arc::new(Plain), &[]).unwrap();
    let name = format!("{:?}", page(1));
    let open = space.begin_invalidation(page(1), Cause::External).unwrap();
    assert!(format!("{open:?}").contains(&name));
    open.end(Outcome::Changed).unwrap();
    let open = space.begin_invalidation(page(5), Cause::External).unwrap();
    assert!(!format!("{open:?}").contains(&name), "{open:?}");
}

/// Owns the space that it is registered in, until it is released.
struct Landlord(Mutex<Option<AddressSpace>>);

impl Notifier for Landlord {
    fn release(&self) {
        drop(self.0.lock().unwrap().take());
    }
}

/// The exit that is put off in a release waits for that registration too: it comes when this one has left the index.
#[test]
fn a_release_may_drop_the_last_owner_of_its_space() {
    in_time(|| {
        let space = space();
        let pin = space.pin();
        let landlord = Arc::new(Landlord(Mutex::new(None)));
        let registration = space.register(page(0), landlord.clone(), &[]).unwrap();
        let other = space.register(page(1), landlord.clone(), &[]).unwrap();
        *landlord.0.lock().unwrap() = Some(space);
        assert_eq!(registration.unregister(), Ok(Unregistered::Released));
        assert!(pin.is_exiting());
        assert_eq!(other.unregister(), Ok(Unregistered::AlreadyGone));
    });
}

/// The same where another thread has completed it: released is it by who waits for that.
#[test]
fn so_may_one_that_another_thread_has_completed() {
    in_time(|| {
        let space = space();
        let landlord = Arc::new(Landlord(Mutex::new(None)));
        let registration = space.register(page(0), landlord.clone(), &[]).unwrap();
        let (begun, has_begun) = mpsc::channel();
        let (go, may_go) = mpsc::channel::<()>();
        let (leaves, left) = mpsc::channel();
        let (guest, lock) = (space.clone(), NotifierLock::new(()));
        let invalidating = std::thread::spawn(move || {
            let open = guest.begin_invalidation(page(0), Cause::External).unwrap();
            begun.send(()).unwrap();
            may_go.recv().unwrap();
            // With this held it completes, and does not release.
            let held = lock.lock();
            open.end(Outcome::Changed).unwrap();
            drop(guest);
            leaves.send(()).unwrap();
            let _ = may_go.recv();
            drop(held);
        });
        has_begun.recv().unwrap();
        let unregistering = std::thread::spawn(move || registration.unregister());
        while space.stats().unregisters[Place::Plain as usize] == 0 {
            std::thread::yield_now();
        }
        let mut empty = landlord.0.lock().unwrap();
        go.send(()).unwrap();
        left.recv().unwrap();
        *empty = Some(space);
        drop(empty);
        assert_eq!(unregistering.join().unwrap(), Ok(Unregistered::Released));
        drop(go);
        invalidating.join().unwrap();
    });
}

/// Of those that are released together the first to be called inserts another, and the next is called when that is visible.
struct Successor {
    prepared: Mutex<Option<Prepared>>,
    inserted: Mutex<Option<Registration>>,
    invalidate: Box<dyn Fn() + Send + Sync>,
}

impl Notifier for Successor {
    fn release(&self) {
        match self.prepared.lock().unwrap().take() {
            Some(prepared) => *self.inserted.lock().unwrap() = Some(prepared.insert().unwrap()),
            None => (self.invalidate)(),
        }
    }
}

#[test]
fn what_a_release_inserts_does_not_wait_for_the_releases_of_others() {
    let space = space();
    let counted = Arc::new(Counted::default());
    let invalidating = space.pin();
    let successor = Arc::new(Successor {
        prepared: Mutex::new(Some(space.prepare(page(7), counted.clone(), &[]).unwrap())),
        inserted: Mutex::new(None),
        invalidate: Box::new(move || {
            let space = invalidating.upgrade().unwrap();
            let invalidate = || {
                let open = space.begin_invalidation(page(7), Cause::External);
                open.unwrap().end(Outcome::Changed).unwrap();
            };
            std::thread::scope(|scope| scope.spawn(invalidate).join().unwrap());
        }),
    });
    let prepare = |nth| space.prepare(page(nth), successor.clone(), &[]).unwrap();
    let both = space.insert_all(vec![prepare(0), prepare(1)]).unwrap();
    Registration::unregister_all(&both)
        .into_iter()
        .for_each(|one| {
            assert_eq!(one, Ok(Unregistered::Released));
        });
    assert_eq!(counted.0.load(SeqCst), 1);
}

/// Counts the invalidations that it is told of.
#[derive(Default)]
struct Counted(AtomicUsize);

impl Notifier for Counted {
    fn end(&self, _: &Op<'_>, _: Outcome) {
        self.0.fetch_add(1, SeqCst);
    }
}

/// What may change just now, and what has.
#[derive(Default)]
struct Sees(Mutex<(Vec<Range>, Vec<Range>)>);

impl Observer for Sees {
    fn may_change(&self, range: Range) {
        self.0.lock().unwrap().0.push(range);
    }
    fn changed(&self, range: Range) {
        self.0.lock().unwrap().1.push(range);
    }
}

#[test]
fn an_observer_is_told_of_what_hits_nobody_too() {
    let space = space();
    let sees = Arc::new(Sees::default());
    space.observe(sees.clone()).unwrap();
    let _registration = space.register(page(1), Arc::new(Plain), &[]).unwrap();
    for nth in [1, 5] {
        let open = space
            .begin_invalidation(page(nth), Cause::External)
            .unwrap();
        let told = || sees.0.lock().unwrap().clone();
        assert_eq!(told(), (vec![page(nth)], vec![]));
        open.end(Outcome::Changed).unwrap();
        assert_eq!(told(), (vec![page(nth)], vec![page(nth)]));
        *sees.0.lock().unwrap() = Default::default();
    }
}

#[test]
fn an_observer_is_told_of_what_the_space_maps_though_nothing_watches_it() {
    let memory = Arc::new(ProcessMemory::reserve(1 << 20).unwrap());
    let space = AddressSpace::managed(memory, Deadlines::default());
    let sees = Arc::new(Sees::default());
    space.observe(sees.clone()).unwrap();
    let range = space.map(Map::anonymous(1 << 12)).unwrap();
    let told = sees.0.lock().unwrap().clone();
    assert_eq!(told, (vec![range], vec![range]));
}
