//! Models: that a receiver which is stuck is relieved, however the calls before came to an end, and by one thread.

mod model {
    use std::sync::Arc;

    use loom::cell::UnsafeCell;
    use loom::sync::Notify;
    use loom::sync::atomic::{AtomicUsize, Ordering};
    use loom::thread;

    use crate::source::relay::Relay;

    /// What receives, and what only one thread at a time may touch: whoever receives does.
    struct Rig {
        relay: Relay,
        receiving: UnsafeCell<()>,
        relieved: Notify,
        receivers: AtomicUsize,
    }

    // SAFETY: the checker tells of accesses that are not ordered.
    unsafe impl Sync for Rig {}

    impl Rig {
        fn new() -> Arc<Self> {
            Arc::new(Self {
                relay: Relay::default(),
                receiving: UnsafeCell::new(()),
                relieved: Notify::new(),
                receivers: AtomicUsize::new(0),
            })
        }

        fn receive(&self) {
            self.receiving.with_mut(|_| ());
        }

        /// Waits until it receives, and lets the one go that is stuck.
        fn stand_by(&self) {
            if self.relay.stand_by() {
                self.receive();
                self.receivers.fetch_add(1, Ordering::Relaxed);
                self.relieved.notify();
                self.relay.close();
            }
        }
    }

    fn check(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(preemptions);
        builder.check(model);
    }

    /// The one that watches may be about to stop when the second thing is received, which lasts until somebody else receives.
    #[test]
    fn a_receiver_that_is_stuck_is_relieved() {
        check(3, || {
            let rig = Rig::new();
            let other = {
                let rig = rig.clone();
                thread::spawn(move || rig.stand_by())
            };
            rig.receive();
            let quick = rig.relay.busy();
            // It may be relieved of that already.
            if rig.relay.done(quick) {
                rig.receive();
                let stuck = rig.relay.busy();
                while rig.receivers.load(Ordering::Relaxed) == 0 {
                    rig.relieved.wait();
                }
                assert!(!rig.relay.done(stuck), "another receives");
            }
            other.join().unwrap();
            assert_eq!(rig.receivers.load(Ordering::Relaxed), 1);
        });
    }

    /// It comes to its end when somebody is about to relieve it: one of them receives.
    #[test]
    fn one_receives_at_a_time() {
        check(2, || {
            let rig = Rig::new();
            let others = [(); 2].map(|()| {
                let rig = rig.clone();
                thread::spawn(move || rig.stand_by())
            });
            rig.receive();
            let turn = rig.relay.busy();
            if rig.relay.done(turn) {
                rig.receive();
                rig.relay.close();
            }
            for other in others {
                other.join().unwrap();
            }
            assert!(rig.receivers.load(Ordering::Relaxed) <= 1);
        });
    }
}
