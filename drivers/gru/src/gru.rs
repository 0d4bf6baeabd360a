//! The driver: chiplets, their service threads, and the spaces that have segments.

use std::collections::{BTreeMap, HashMap};

use hdrhistogram::Histogram;
use shootdown::{AddressSpace, Device, Range, Share, Target};
use shootdown_primitive::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use shootdown_primitive::sync::{Arc, Mutex, PoisonError, Weak};
use shootdown_primitive::thread::{self, JoinHandle};

use crate::chiplet::{Chiplet, ChipletTlb};
use crate::config::{ChipletPorts, Config, SegmentOptions};
use crate::context::{Context, User};
use crate::error::GruError;
use crate::fault;
use crate::handle::OperationStats;
use crate::notifier::{Binding, Fabric, Handler};
use crate::segment::Segment;
use crate::stats::{Counters, GruStats};
use crate::status::ChipletStatus;

/// The driver. Segments keep it; when the last reference is gone its threads end.
pub struct Gru {
    fabric: Arc<Fabric>,
    devices: Vec<Device>,
    /// What the registrations of this driver are shared under.
    key: u64,
    /// The binding of each space that has a registration, held by that registration.
    bindings: Mutex<HashMap<u64, Weak<Binding>>>,
    counters: Arc<Counters>,
    config: Config,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Gru {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gru")
            .field("devices", &self.devices)
            .finish_non_exhaustive()
    }
}

impl Gru {
    /// Attaches to chiplets, which have to be in the state after a reset. Where the thread that serves a chiplet's faults cannot
    /// be made, its users have to resolve them, which [`Segment::wait`] does.
    pub fn attach(ports: Vec<ChipletPorts>, config: Config) -> Arc<Self> {
        // Keys of drivers in this process. Relaxed: only that they differ matters.
        static KEY: AtomicU64 = AtomicU64::new(0x6772_7500_0000_0000);
        let counters = Arc::new(Counters::default());
        let stop = Arc::new(AtomicBool::new(false));
        let (mut chiplets, mut devices, mut threads) = (Vec::new(), Vec::new(), Vec::new());
        for port in ports {
            let tags = crate::notifier::TAGS;
            let counters = Arc::clone(&counters);
            let registers = port.registers;
            let at = (port.name, port.blade);
            let chiplet = Chiplet::new(at, registers, &config, tags, counters);
            let chiplet = Arc::new(chiplet);
            // Before the thread begins, which may take it back.
            chiplet.served.store(true, Ordering::Release);
            let (served, stop) = (Arc::clone(&chiplet), Arc::clone(&stop));
            let thread = thread::Builder::new()
                .name(format!("{}-faults", chiplet.name))
                .spawn(move || fault::serve(&served, &*port.interrupts, &stop));
            match thread {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    chiplet.served.store(false, Ordering::Release);
                    tracing::warn!(chiplet = %chiplet.name, %error, "faults are left to users");
                }
            }
            let tlb = ChipletTlb(Arc::clone(&chiplet));
            devices.push(Device::new(chiplet.name.clone(), tlb));
            chiplets.push(chiplet);
        }
        Arc::new(Self {
            fabric: Arc::new(Fabric::new(chiplets, config.late_drop_ins, config.foreign)),
            devices,
            key: KEY.fetch_add(1, Ordering::Relaxed),
            bindings: Mutex::new(HashMap::new()),
            counters,
            config,
            stop,
            threads,
        })
    }

    /// The chiplets, as the framework knows them.
    pub fn devices(&self) -> &[Device] {
        &self.devices
    }

    /// Makes a segment for `space`, as the driver's configuration has them. As [`Gru::segment_with`].
    ///
    /// # Errors
    /// As there.
    pub fn segment(self: &Arc<Self>, space: &AddressSpace) -> Result<Segment, GruError> {
        self.segment_with(space, self.config.segment)
    }

    /// Makes a segment for `space` on the chiplet with the fewest, mapped anywhere in the space. It is loaded at once where a context
    /// is free, else when it is first used. Waits for hardware, then for the map lock.
    ///
    /// # Errors
    /// [`GruError::NoContext`], [`GruError::NoTag`], [`GruError::NoAsid`], [`GruError::TooLarge`]; the space exits or has no room;
    /// the hardware does not answer.
    pub fn segment_with(
        self: &Arc<Self>,
        space: &AddressSpace,
        options: SegmentOptions,
    ) -> Result<Segment, GruError> {
        let SegmentOptions {
            control_blocks,
            data_bytes,
            ..
        } = options;
        if !(1..=128).contains(&control_blocks) || data_bytes > 32 << 10 {
            return Err(GruError::TooLarge {
                control_blocks,
                data_bytes,
            });
        }
        let (binding, share) = self.join(space)?;
        let share = Arc::new(share);
        let mut order: Vec<_> = self.fabric.chiplets.iter().zip(&self.devices).collect();
        order.sort_by_key(|(chiplet, _)| chiplet.segments());
        let context = |(chiplet, device): &(&Arc<Chiplet>, &Device)| {
            let user = User {
                binding: Arc::clone(&binding),
                share: Arc::clone(&share),
            };
            Context::new(chiplet, device, Some(user), options)
        };
        for at in &order {
            let context = context(at);
            if context.try_load(false)? {
                return Segment::map(space, context, share, Arc::clone(self));
            }
        }
        match order.iter().find(|(chiplet, _)| chiplet.is_well()) {
            Some(at) => Segment::map(space, context(at), share, Arc::clone(self)),
            None => Err(GruError::NoContext {
                chiplets: self.fabric.chiplets.len(),
            }),
        }
    }

    /// A share of the space's registration, and what belongs to it.
    fn join(&self, space: &AddressSpace) -> Result<(Arc<Binding>, Share), GruError> {
        let mut bindings = self.bindings.lock().unwrap_or_else(PoisonError::into_inner);
        bindings.retain(|_, binding| binding.strong_count() > 0);
        // Made beforehand, since `make` cannot fail; given back if there is one already.
        let new = Arc::new(Binding::new(&self.fabric, space.id(), space.pin())?);
        let mut used = false;
        let share = space.share(self.key, || {
            used = true;
            let targets = self.devices.iter().map(|device| Target {
                device: device.clone(),
                tag: new.tag,
            });
            let handler = Arc::new(Handler(Arc::clone(&new)));
            (Range::ALL, handler, targets.collect())
        })?;
        if !used && let Some(old) = bindings.get(&space.id()).and_then(Weak::upgrade) {
            return Ok((old, share));
        }
        bindings.insert(space.id(), Arc::downgrade(&new));
        Ok((new, share))
    }

    /// How long TLB misses took, in nanoseconds, one histogram a chiplet: from when one was taken up until its answer, an entry or
    /// an exception, was written. Waiting for the thread that serves them, and for the map lock, comes before that.
    pub fn fault_latencies(&self) -> Vec<Histogram<u64>> {
        let chiplets = self.fabric.chiplets.iter();
        chiplets
            .map(|chiplet| chiplet.fault_latency.read())
            .collect()
    }

    /// The blades by number, and of each the chiplet with the fewest segments.
    pub(crate) fn blades(&self) -> impl Iterator<Item = (u32, (&Arc<Chiplet>, &Device))> {
        let mut blades = BTreeMap::new();
        for at in self.fabric.chiplets.iter().zip(&self.devices) {
            let best = blades.entry(at.0.blade).or_insert(at);
            if at.0.segments() < best.0.segments() {
                *best = at;
            }
        }
        blades.into_iter()
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.counters
    }

    /// The chiplets, as they are now. Takes each one's lock for a moment, and reads its fault handles.
    ///
    /// # Errors
    /// One of them is gone.
    pub fn status(&self) -> Result<Vec<ChipletStatus>, GruError> {
        let chiplets = self.fabric.chiplets.iter();
        chiplets
            .map(|chiplet| ChipletStatus::new(chiplet))
            .collect()
    }

    /// What each operation of the driver's handles has cost.
    pub fn operations(&self) -> Vec<OperationStats> {
        let chiplets = self.fabric.chiplets.iter();
        let purges = chiplets.map(|chiplet| chiplet.purge_timing());
        self.counters.operations.read(purges)
    }

    /// What has been counted.
    pub fn stats(&self) -> GruStats {
        let mut stats = self.counters.read();
        for chiplet in &self.fabric.chiplets {
            stats.contexts_in_use += chiplet.taken() as u64;
            stats.asids_in_use += chiplet.words.in_use();
            let unended = chiplet.unended();
            stats.purges_covered += unended.covered;
            stats.purges_reset += unended.reset;
            stats.purges_open += unended.open;
        }
        stats
    }
}

impl Drop for Gru {
    fn drop(&mut self) {
        // Release, with the acquire of the threads.
        self.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            // A panic of the thread has been printed by it; there is nobody here to hand it to.
            drop(thread.join());
        }
        for chiplet in &self.fabric.chiplets {
            // Only leaked ones are left: segments hold the driver.
            let left = std::mem::replace(&mut chiplet.lock().slots, std::array::from_fn(|_| None));
            drop(left);
        }
    }
}
