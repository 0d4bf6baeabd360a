//! What may be called where: every call in every place, for real.
//!
//! [`expected`] is the table. It matches on each pair of a call and a place by name, so a call or a place that is added without
//! its cells does not compile. For each cell a fresh thread is put into the place (a real lock, a real invalidation, a space that
//! has really exited), makes the call, and reports what came of it. A place inside a callback stands for all five
//! callbacks, and another's callback also for the time between begin and end of an invalidation that somebody else drives. A thread
//! that does not report within [`PATIENCE`] is in a deadlock, and the cell is named.

mod support;

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use shootdown::{
    Addr, AddressSpace, Cause, Device, DeviceContext, Drain, Fault, FaultError, Gather,
    InsertError, InvalidateError, Issued, Kind, Map, MapError, MapWriteGuard, Notifier,
    NotifierGuard, NotifierLock, Op, Outcome, Prepared, Range, Refused, Registration, Rights,
    Segment, Share, Synchronized, UnloadFailed, UnregisterError, Unregistered, WouldBlock,
};
use support::{fake, on, space};

/// Far more than any call takes, so that only a deadlock misses it.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long a callback of another thread goes on after a call that has to wait for it may have begun.
const CALLBACK: Duration = Duration::from_millis(10);

/// An enumeration that knows all its values.
macro_rules! listed {
    ($(#[$doc:meta])* $name:ident { $($value:ident,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        enum $name { $($value,)* }
        impl $name {
            const ALL: &'static [Self] = &[$(Self::$value,)*];
        }
    };
}

listed! {
    /// The rows.
    Call {
        Prepare, Insert, Detach, DropRegistration, Unregister, PutShare, Synchronize, Begin, Retry, MapLock, Map, Unmap,
        Protect, Discard, Remap, MapSegment, UnmapSegment, DropSegment, BeginExternal,
    }
}

listed! {
    /// The columns.
    Place {
        Anywhere, MapLockHeld, NotifierLockHeld, InsideOwnCallback, InsideAnothersCallback, SpaceGone,
    }
}

listed! {
    /// Where inside of an operation the call is made.
    Site { Quiesce, Drained, Flush, CutOff, End, Open, }
}

/// What is in a cell.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Expected {
    /// It succeeds. If it has to wait for a callback, none runs on return.
    Works,
    /// The plain form is refused, the form on the guard succeeds.
    OnTheGuard,
    /// It succeeds, and `release` has run on return.
    Released,
    /// No callback runs on return; `release` runs when the lock is dropped, or has run on the thread that left last.
    Quiet,
    /// It returns at once; `release` runs when the place has been left.
    Deferred,
    /// It succeeds; `release` had run before.
    NothingToDo,
    /// It says that nothing may be installed.
    Disturbed,
    /// The typed error for a callback or an open invalidation.
    RefusedInCallback,
    /// The typed error for a `NotifierLock`.
    RefusedNotifierLock,
    /// The typed error for the map lock.
    RefusedMapLock,
    /// The typed error for a space or a registration that is over.
    Gone,
}

/// The table.
fn expected(call: Call, place: Place) -> Expected {
    use Call as C;
    use Expected as E;
    use Place as P;
    match (call, place) {
        (C::Prepare, P::Anywhere | P::MapLockHeld | P::NotifierLockHeld | P::SpaceGone) => E::Works,
        (C::Prepare, P::InsideOwnCallback | P::InsideAnothersCallback) => E::RefusedInCallback,

        (C::Insert, P::Anywhere | P::MapLockHeld) => E::Works,
        (C::Insert, P::NotifierLockHeld) => E::RefusedNotifierLock,
        (C::Insert, P::InsideOwnCallback | P::InsideAnothersCallback) => E::Deferred,
        (C::Insert, P::SpaceGone) => E::Gone,

        (C::Detach | C::DropRegistration | C::DropSegment, P::Anywhere) => E::Released,
        (
            C::Detach | C::DropRegistration | C::DropSegment,
            P::MapLockHeld | P::NotifierLockHeld | P::InsideOwnCallback | P::InsideAnothersCallback,
        ) => E::Deferred,
        (C::Detach | C::DropRegistration | C::DropSegment, P::SpaceGone) => E::NothingToDo,

        (C::Unregister | C::PutShare, P::Anywhere) => E::Released,
        (C::Unregister | C::PutShare, P::MapLockHeld) => E::Quiet,
        (C::Unregister | C::PutShare, P::NotifierLockHeld) => E::RefusedNotifierLock,
        (C::Unregister | C::PutShare, P::InsideOwnCallback | P::InsideAnothersCallback) => {
            E::Deferred
        }
        (C::Unregister | C::PutShare, P::SpaceGone) => E::NothingToDo,

        (C::UnmapSegment, P::Anywhere) => E::Released,
        (C::UnmapSegment, P::MapLockHeld) => E::OnTheGuard,
        (C::UnmapSegment, P::NotifierLockHeld) => E::RefusedNotifierLock,
        (C::UnmapSegment, P::InsideOwnCallback | P::InsideAnothersCallback) => E::RefusedInCallback,
        (C::UnmapSegment, P::SpaceGone) => E::NothingToDo,

        (C::Synchronize, P::Anywhere | P::MapLockHeld | P::SpaceGone) => E::Works,
        (C::Synchronize, P::NotifierLockHeld) => E::RefusedNotifierLock,
        (C::Synchronize, P::InsideOwnCallback | P::InsideAnothersCallback) => E::Deferred,

        (C::Begin, P::Anywhere | P::MapLockHeld) => E::Works,
        (C::Begin, P::NotifierLockHeld) => E::RefusedNotifierLock,
        (C::Begin, P::InsideOwnCallback | P::InsideAnothersCallback) => E::RefusedInCallback,
        (C::Begin, P::SpaceGone) => E::Gone,

        (C::Retry, P::Anywhere | P::MapLockHeld | P::NotifierLockHeld) => E::Works,
        (C::Retry, P::InsideOwnCallback | P::InsideAnothersCallback | P::SpaceGone) => E::Disturbed,

        (C::MapLock, P::Anywhere | P::SpaceGone) => E::Works,
        (C::MapLock, P::MapLockHeld) => E::RefusedMapLock,
        (C::MapLock, P::NotifierLockHeld) => E::RefusedNotifierLock,
        (C::MapLock, P::InsideOwnCallback | P::InsideAnothersCallback) => E::RefusedInCallback,

        (C::Map | C::Unmap | C::Protect | C::Discard | C::Remap | C::MapSegment, P::Anywhere) => {
            E::Works
        }
        (
            C::Map | C::Unmap | C::Protect | C::Discard | C::Remap | C::MapSegment,
            P::MapLockHeld,
        ) => E::OnTheGuard,
        (
            C::Map | C::Unmap | C::Protect | C::Discard | C::Remap | C::MapSegment,
            P::NotifierLockHeld,
        ) => E::RefusedNotifierLock,
        (
            C::Map | C::Unmap | C::Protect | C::Discard | C::Remap | C::MapSegment,
            P::InsideOwnCallback | P::InsideAnothersCallback,
        ) => E::RefusedInCallback,
        (C::Map | C::Unmap | C::Protect | C::Discard | C::Remap | C::MapSegment, P::SpaceGone) => {
            E::Gone
        }

        (C::BeginExternal, P::Anywhere | P::MapLockHeld) => E::Works,
        (C::BeginExternal, P::SpaceGone) => E::Gone,
        (C::BeginExternal, P::NotifierLockHeld) => E::RefusedNotifierLock,
        (C::BeginExternal, P::InsideOwnCallback | P::InsideAnothersCallback) => {
            E::RefusedInCallback
        }
    }
}

/// A call that a handler makes once.
type Hook = Box<dyn FnOnce() + Send>;

/// A handler that makes a call at one of its sites.
#[derive(Default)]
struct Handler {
    hook: Mutex<Option<(Site, Hook)>>,
    starts: AtomicU64,
    ends: AtomicU64,
    releases: AtomicU64,
}

impl Handler {
    fn at(&self, site: Site) {
        let hook = self.hook.lock().unwrap().take_if(|(at, _)| *at == site);
        if let Some((_, hook)) = hook {
            hook();
        }
    }

    fn is_quiet(&self) -> bool {
        self.starts.load(SeqCst) == self.ends.load(SeqCst)
    }
}

impl Notifier for Handler {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        self.starts.fetch_add(1, SeqCst);
        self.at(Site::Quiesce);
        Ok(op.drain())
    }

    fn drained(&self, _: &Op<'_>) -> bool {
        self.at(Site::Drained);
        true
    }

    fn flush<'o>(&self, _: &Op<'o>, gather: Gather<'o>) -> Issued<'o> {
        self.at(Site::Flush);
        gather.all()
    }

    fn cut_off(&self, _: &Op<'_>) -> Result<(), shootdown::CutOffFailed> {
        self.at(Site::CutOff);
        Ok(())
    }

    fn end(&self, _: &Op<'_>, _: Outcome) {
        self.at(Site::End);
        self.ends.fetch_add(1, SeqCst);
    }

    fn release(&self) {
        self.releases.fetch_add(1, SeqCst);
    }
}

/// Everything that a call can need, made beforehand in a place where all is legal.
struct Scene {
    space: AddressSpace,
    device: Device,
    lock: NotifierLock<()>,
    /// The handler of the registration that is meant by "own".
    handler: Arc<Handler>,
    own: Mutex<Option<Registration>>,
    /// A fault on `own` that was begun in time, for [`Call::Retry`] only: it borrows its registration, and a callback can
    /// only reach what lives for ever.
    fault: Mutex<Option<Fault<'static>>>,
    /// What the registrations are on.
    watched: Range,
    /// One buffer for the plain form of a call, one for the one that does not wait, one for the guard's.
    buffers: [Range; 3],
    prepared: Mutex<Vec<Prepared>>,
    /// What was inserted of them, and the handler that they have in common.
    inserted: Mutex<Vec<Registration>>,
    newcomer: Arc<Handler>,
    /// The one share of a registration, and the segment that has it, with the handler of both.
    share: Arc<Share>,
    segment: Mutex<Option<Segment>>,
    sharer: Arc<Handler>,
}

/// A context that is unloaded at once.
struct Unloads(Device);

impl DeviceContext for Unloads {
    fn device(&self) -> &Device {
        &self.0
    }
    fn unload(&self, _: &Op<'_>) -> Result<(), UnloadFailed> {
        Ok(())
    }
}

/// The guards of the place that the call is made from.
#[derive(Clone, Copy, Default)]
struct Guards<'a> {
    map: Option<&'a MapWriteGuard<'a>>,
    notifier: Option<&'a NotifierGuard<'a, ()>>,
}

fn refused(refused: &Refused) -> Expected {
    match refused {
        Refused::InCallback { .. } => Expected::RefusedInCallback,
        Refused::NotifierLockHeld { .. } => Expected::RefusedNotifierLock,
        Refused::MapLockHeld { .. } => Expected::RefusedMapLock,
        other => panic!("a new refusal without a cell: {other}"),
    }
}

fn mapped<T>(result: Result<T, MapError>) -> Expected {
    match result {
        Ok(_) => Expected::Works,
        Err(MapError::Refused(why)) => refused(&why),
        Err(MapError::Exiting) => Expected::Gone,
        Err(other) => panic!("{other}"),
    }
}

fn on_the_guard(plain: Expected, guarded: Expected) -> Expected {
    match (plain, guarded) {
        (Expected::RefusedMapLock, Expected::Works) => Expected::OnTheGuard,
        other => panic!("plain form, form on the guard: {other:?}"),
    }
}

/// What giving a registration up came to: by what was said, and by what its handler saw.
fn released(said: Option<Expected>, before: u64, handler: &Handler) -> Expected {
    match (said, before, handler.releases.load(SeqCst)) {
        (None | Some(Expected::Released), 0, 1) => Expected::Released,
        (None | Some(Expected::NothingToDo), 1, 1) => Expected::NothingToDo,
        (None | Some(Expected::Deferred), 0, 0) => Expected::Deferred,
        // The thread that leaves last releases it, if it holds no lock.
        (Some(Expected::Quiet), 0, 0 | 1) => Expected::Quiet,
        other => panic!("what it said, releases before, releases after: {other:?}"),
    }
}

fn given_up(
    said: Result<Unregistered, UnregisterError>,
    before: u64,
    handler: &Handler,
) -> Expected {
    let said = match said {
        Ok(Unregistered::Released) => Expected::Released,
        Ok(Unregistered::Quiet) => Expected::Quiet,
        Ok(Unregistered::Deferred) => Expected::Deferred,
        Ok(Unregistered::AlreadyGone) => Expected::NothingToDo,
        Err(UnregisterError::Refused(why)) => return refused(&why),
        Err(other) => panic!("{other}"),
    };
    released(Some(said), before, handler)
}

/// The verdict on several forms of one call that must all come to the same.
fn same<const N: usize>(forms: [Expected; N]) -> Expected {
    assert!(
        forms.iter().all(|one| *one == forms[0]),
        "the forms of a call differ: {forms:?}"
    );
    forms[0]
}

impl Scene {
    fn new(call: Call) -> Self {
        let space = space();
        let (device, _) = fake("of the cells");
        let watched = space.map(Map::anonymous(4 << 12)).unwrap();
        let buffers = [(); 3].map(|()| space.map(Map::anonymous(1 << 12)).unwrap());
        let handler = Arc::new(Handler::default());
        let own = space
            .register(watched, handler.clone(), &on(&device))
            .unwrap();
        let newcomer = Arc::new(Handler::default());
        let prepared = (0..2)
            .map(|_| {
                space
                    .prepare(watched, newcomer.clone(), &on(&device))
                    .unwrap()
            })
            .collect();
        let sharer = Arc::new(Handler::default());
        let share = space
            .share(1, || (watched, sharer.clone(), on(&device)))
            .unwrap();
        let share = Arc::new(share);
        let segment = matches!(call, Call::UnmapSegment | Call::DropSegment).then(|| {
            let context = Arc::new(Unloads(device.clone()));
            space
                .map_segment(1 << 14, None, context, share.clone())
                .unwrap()
        });
        let (own, fault) = if call == Call::Retry {
            let own: &'static Registration = Box::leak(Box::new(own));
            (None, Some(own.begin(watched, PATIENCE).unwrap()))
        } else {
            (Some(own), None)
        };
        Self {
            space,
            device,
            lock: NotifierLock::new(()),
            handler,
            own: Mutex::new(own),
            fault: Mutex::new(fault),
            watched,
            buffers,
            prepared: Mutex::new(prepared),
            inserted: Mutex::default(),
            newcomer,
            share,
            segment: Mutex::new(segment),
            sharer,
        }
    }

    /// Makes the call where the thread stands, in each of its forms.
    fn attempt(&self, call: Call, guards: Guards<'_>) -> Expected {
        match call {
            Call::Prepare => {
                let handler = Arc::new(Handler::default());
                match self.space.prepare(self.watched, handler, &on(&self.device)) {
                    Ok(_) => Expected::Works,
                    Err(why) => refused(&why),
                }
            }
            Call::Insert => self.insert(guards),
            Call::Detach | Call::DropRegistration | Call::Unregister => self.give_up(call),
            Call::PutShare => {
                let before = self.sharer.releases.load(SeqCst);
                given_up(self.share.put(), before, &self.sharer)
            }
            Call::MapSegment => self.map_segment(guards),
            Call::UnmapSegment => self.unmap_segment(guards),
            Call::DropSegment => {
                let before = self.sharer.releases.load(SeqCst);
                drop(self.segment.lock().unwrap().take());
                released(None, before, &self.sharer)
            }
            Call::Synchronize => {
                let own = self.own.lock().unwrap();
                match own.as_ref().unwrap().synchronize() {
                    Ok(Synchronized::Quiet) => Expected::Works,
                    Ok(Synchronized::Deferred) => Expected::Deferred,
                    Err(why) => refused(&why),
                }
            }
            Call::Begin => {
                let own = self.own.lock().unwrap();
                match own.as_ref().unwrap().begin(self.watched, PATIENCE) {
                    Ok(_) => Expected::Works,
                    Err(FaultError::Refused(why)) => refused(&why),
                    Err(FaultError::Gone { .. }) => Expected::Gone,
                    Err(other) => panic!("{other}"),
                }
            }
            Call::Retry => {
                let fault = self.fault.lock().unwrap();
                let fault = fault.as_ref().unwrap();
                let disturbed = match guards.notifier {
                    Some(held) => fault.retry(held),
                    None => fault.retry(&self.lock.lock()),
                };
                if disturbed {
                    Expected::Disturbed
                } else {
                    Expected::Works
                }
            }
            Call::MapLock => self.map_lock(),
            Call::Map | Call::Unmap | Call::Protect | Call::Discard | Call::Remap => {
                self.memory(call, guards)
            }
            Call::BeginExternal => {
                let (range, cause) = (self.watched, Cause::External);
                let forms = [
                    AddressSpace::begin_invalidation,
                    AddressSpace::try_begin_invalidation,
                ];
                same(forms.map(|begin| match begin(&self.space, range, cause) {
                    Ok(open) => {
                        open.end(Outcome::Changed).unwrap();
                        Expected::Works
                    }
                    Err(InvalidateError::Refused(why)) => refused(&why),
                    Err(InvalidateError::Exiting { .. }) => Expected::Gone,
                    Err(other) => panic!("{other}"),
                }))
            }
        }
    }

    /// Insertions that have taken effect.
    fn visible(&self) -> usize {
        let records = self.space.records();
        let inserts = records.iter().filter(|record| record.kind == Kind::Insert);
        inserts.count()
    }

    fn insert(&self, guards: Guards<'_>) -> Expected {
        let insert = |insert: &dyn Fn(Prepared) -> Result<Registration, InsertError>| {
            let before = self.visible();
            match insert(self.prepared.lock().unwrap().pop().unwrap()) {
                Ok(registration) => {
                    self.inserted.lock().unwrap().push(registration);
                    if self.visible() > before {
                        Expected::Works
                    } else {
                        Expected::Deferred
                    }
                }
                Err(InsertError::Exiting { .. }) => Expected::Gone,
                Err(InsertError::Refused(why)) => refused(&why),
                Err(other) => panic!("{other}"),
            }
        };
        let plain = insert(&Prepared::insert);
        match guards.map {
            Some(guard) => same([plain, insert(&|prepared| guard.insert(prepared))]),
            None => plain,
        }
    }

    fn give_up(&self, call: Call) -> Expected {
        let before = self.handler.releases.load(SeqCst);
        let own = self.own.lock().unwrap().take().unwrap();
        match call {
            Call::Unregister => {
                let said = own.unregister();
                let refused = said.is_err();
                let came = given_up(said, before, &self.handler);
                if refused {
                    *self.own.lock().unwrap() = Some(own);
                }
                came
            }
            Call::Detach => {
                own.detach();
                released(None, before, &self.handler)
            }
            _ => {
                drop(own);
                released(None, before, &self.handler)
            }
        }
    }

    fn map_segment(&self, guards: Guards<'_>) -> Expected {
        let context = || Arc::new(Unloads(self.device.clone()));
        let len = 1 << 14;
        let plain = (self.space).map_segment(len, None, context(), self.share.clone());
        let plain = mapped(plain);
        match guards.map {
            Some(guard) => {
                let guarded = guard.map_segment(len, None, context(), self.share.clone());
                on_the_guard(plain, mapped(guarded))
            }
            None => plain,
        }
    }

    fn unmap_segment(&self, guards: Guards<'_>) -> Expected {
        let segment = self.segment.lock().unwrap();
        let segment = segment.as_ref().unwrap();
        let before = self.sharer.releases.load(SeqCst);
        let verdict = |result: Result<Unregistered, MapError>| match result {
            Ok(said) => given_up(Ok(said), before, &self.sharer),
            other => mapped(other),
        };
        let plain = verdict(segment.unmap());
        match guards.map {
            Some(guard) => {
                let guarded = verdict(guard.unmap_segment(segment));
                assert_eq!(guarded, Expected::Quiet);
                on_the_guard(plain, Expected::Works)
            }
            None => plain,
        }
    }

    fn map_lock(&self) -> Expected {
        fn verdict<T>(result: Result<T, Refused>) -> Expected {
            result.map_or_else(|why| refused(&why), |_| Expected::Works)
        }
        same([
            verdict(self.space.lock_write().map(drop)),
            verdict(self.space.lock_read().map(drop)),
            verdict(self.space.try_lock_write().map(|got| drop(got.unwrap()))),
            verdict(self.space.try_lock_read().map(|got| drop(got.unwrap()))),
        ])
    }

    fn memory(&self, call: Call, guards: Guards<'_>) -> Expected {
        let space = &self.space;
        let [plain, tried, guarded] = self.buffers;
        let page = Map::anonymous(1 << 12);
        // A free place, one for each form.
        let beside = |one: Range| Addr::new(one.start().get() + (64 << 12));
        let forms = match call {
            Call::Map => [space.map(page), space.map(page)].map(mapped),
            Call::Unmap => [space.unmap(plain), space.try_unmap(tried)].map(mapped),
            Call::Discard => [space.discard(plain), space.try_discard(tried)].map(mapped),
            Call::Protect => [
                space.protect(plain, Rights::READ),
                space.try_protect(tried, Rights::READ),
            ]
            .map(mapped),
            Call::Remap => [
                space.remap(plain, beside(plain)),
                space.try_remap(tried, beside(tried)),
            ]
            .map(mapped),
            other => unreachable!("{other:?} changes no memory"),
        };
        let plain = same(forms);
        let Some(guard) = guards.map else {
            return plain;
        };
        let guarded = match call {
            Call::Map => mapped(guard.map(page)),
            Call::Unmap => mapped(guard.unmap(guarded)),
            Call::Discard => mapped(guard.discard(guarded)),
            Call::Protect => mapped(guard.protect(guarded, Rights::READ)),
            _ => mapped(guard.remap(guarded, beside(guarded))),
        };
        on_the_guard(plain, guarded)
    }

    /// Lets another thread be inside an invalidation that hits `own`, until shortly after `call` may have begun.
    fn while_busy(self: &Arc<Self>, call: impl FnOnce() -> Expected) -> Expected {
        let (entered, is_entered) = mpsc::channel();
        let (called, is_called) = mpsc::channel();
        let scene = self.clone();
        let busy = thread::spawn(move || {
            let open = scene
                .space
                .begin_invalidation(scene.watched, Cause::External)
                .unwrap();
            entered.send(()).unwrap();
            is_called.recv().unwrap();
            thread::sleep(CALLBACK);
            open.end(Outcome::Changed).unwrap();
        });
        is_entered.recv().unwrap();
        called.send(()).unwrap();
        let observed = call();
        if matches!(
            observed,
            Expected::Works | Expected::Released | Expected::Quiet
        ) {
            assert!(self.handler.is_quiet(), "it did not wait for the callback");
        }
        busy.join().unwrap();
        observed
    }

    /// Makes the call at `site` of an operation that `handler` is in, and `own` too.
    fn inside(self: &Arc<Self>, handler: &Handler, site: Site, call: Call) -> Expected {
        let begin = || {
            self.space
                .begin_invalidation(self.watched, Cause::External)
                .unwrap()
        };
        if site == Site::Open {
            let open = begin();
            let observed = self.attempt(call, Guards::default());
            open.end(Outcome::Changed).unwrap();
            return observed;
        }
        let (report, reported) = mpsc::channel();
        let scene = self.clone();
        let hook = Box::new(move || {
            report.send(scene.attempt(call, Guards::default())).unwrap();
        });
        *handler.hook.lock().unwrap() = Some((site, hook));
        begin().end(Outcome::Changed).unwrap();
        reported.try_recv().expect("the callback made the call")
    }
}

/// Puts this thread into the place and makes the call; what came of it.
fn observe(call: Call, place: Place, site: Site) -> Expected {
    let scene = Arc::new(Scene::new(call));
    let waits = matches!(
        call,
        Call::Unregister | Call::PutShare | Call::UnmapSegment | Call::Synchronize | Call::Begin
    );
    let busily = |guards: Guards<'_>| {
        let attempt = || scene.attempt(call, guards);
        if waits {
            scene.while_busy(attempt)
        } else {
            attempt()
        }
    };
    let observed = match place {
        Place::Anywhere => busily(Guards::default()),
        Place::MapLockHeld => {
            let guard = scene.space.lock_write().unwrap();
            busily(Guards {
                map: Some(&guard),
                ..Guards::default()
            })
        }
        Place::NotifierLockHeld => {
            let held = scene.lock.lock();
            busily(Guards {
                notifier: Some(&held),
                ..Guards::default()
            })
        }
        Place::InsideOwnCallback => scene.inside(&scene.handler.clone(), site, call),
        Place::InsideAnothersCallback => {
            let other = Arc::new(Handler::default());
            let _other = scene
                .space
                .register(scene.watched, other.clone(), &on(&scene.device))
                .unwrap();
            scene.inside(&other, site, call)
        }
        Place::SpaceGone => {
            scene.space.exit().unwrap();
            scene.attempt(call, Guards::default())
        }
    };
    let left = scene.own.lock().unwrap().take();
    if let Some(own) = left
        && place != Place::SpaceGone
    {
        assert_eq!(
            own.unregister().unwrap(),
            Unregistered::Released,
            "a refused call has changed nothing"
        );
    }
    let inserted = scene.inserted.lock().unwrap().len() as u64;
    if inserted > 0 {
        let before = scene.newcomer.starts.load(SeqCst);
        let open = scene
            .space
            .begin_invalidation(scene.watched, Cause::External);
        open.unwrap().end(Outcome::Changed).unwrap();
        let called = scene.newcomer.starts.load(SeqCst) - before;
        assert_eq!(called, inserted, "an insertion has taken effect by now");
    }
    scene.space.exit().unwrap();
    assert_eq!(scene.handler.releases.load(SeqCst), 1, "released once");
    assert_eq!(scene.sharer.releases.load(SeqCst), 1, "released once");
    let released = scene.newcomer.releases.load(SeqCst);
    assert_eq!(released, inserted, "each released once");
    assert!(scene.handler.is_quiet(), "whoever got start got end");
    assert!(scene.sharer.is_quiet() && scene.newcomer.is_quiet());
    observed
}

/// The sites that a place stands for; where no operation is involved, one that is not looked at.
fn sites(place: Place) -> &'static [Site] {
    match place {
        Place::InsideOwnCallback => &Site::ALL[..5],
        Place::InsideAnothersCallback => Site::ALL,
        Place::Anywhere | Place::MapLockHeld | Place::NotifierLockHeld | Place::SpaceGone => {
            &Site::ALL[..1]
        }
    }
}

/// All cells of a call; what is wrong with each.
fn wrong(call: Call) -> Vec<String> {
    let mut wrong = Vec::new();
    for place in Place::ALL.iter().copied() {
        for site in sites(place).iter().copied() {
            let (report, reported) = mpsc::channel();
            thread::spawn(move || report.send(observe(call, place, site)));
            let cell = format!("{call:?} / {place:?} ({site:?})");
            let want = expected(call, place);
            match reported.recv_timeout(PATIENCE) {
                Ok(observed) if observed == want => {}
                Ok(observed) => wrong.push(format!("{cell}: {observed:?}, not {want:?}")),
                Err(RecvTimeoutError::Timeout) => wrong.push(format!("{cell}: a deadlock")),
                Err(RecvTimeoutError::Disconnected) => wrong.push(format!("{cell}: a panic")),
            }
        }
    }
    wrong
}

#[test]
fn every_call_does_in_every_place_what_the_table_says() {
    let wrong: Vec<_> = Call::ALL.iter().flat_map(|call| wrong(*call)).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
