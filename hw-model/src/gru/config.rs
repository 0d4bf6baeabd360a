//! What a chiplet is told when it is built: sizes, latencies, faults that it injects, bugs that it has.

use std::time::Duration;

/// How a full TLB chooses the entry that makes room.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Eviction {
    /// The one that was installed first.
    Fifo,
    /// One at random, from the seed of the [`FaultPlan`].
    Random,
}

/// How long things take. Zero, the default, means: as fast as the model can.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Latency {
    /// A purge, from its command to the removal of the entries.
    pub purge: Duration,
    /// An operation of a context or fault handle, and a reset.
    pub handle: Duration,
    /// One access of at most a page, during which purges and interrupts of it have to wait.
    pub access: Duration,
}

/// What can go wrong: [`FaultPlan`] says what each is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum FaultKind {
    /// A lost completion; the nth end of a purge.
    Lost,
    /// A purge that never begins; the nth purge.
    Stuck,
    /// A late completion; the nth purge that begins.
    Late,
    /// A purge that others overtake; the nth that begins.
    Reordered,
    /// A purge that happens twice; the nth end of one.
    Duplicated,
    /// A purge in a miss; the nth miss.
    PurgeInMiss,
    /// A step that takes longer; the nth step.
    Delayed,
    /// A reset that is survived; the nth.
    SurvivesReset,
    /// An instruction that ends with an error; the nth step.
    Error,
    /// A message that is not delivered; the nth.
    Nack,
}

impl FaultKind {
    pub(super) const COUNT: usize = Self::Nack as usize + 1;
}

/// A fault at a given place, whatever is drawn.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Scripted {
    /// The chiplet that it is for.
    pub device: u32,
    /// What goes wrong.
    pub kind: FaultKind,
    /// Which occasion it is, counted by the chiplet from 1 on.
    pub nth: u64,
    /// By how much what is late, overtaken, delayed or repeated is so.
    pub by: Duration,
}

/// Hardware faults, drawn from a seed. A probability is in 0.0..=1.0, for each purge unless it says otherwise; the default
/// is a healthy chiplet.
///
/// For a handle that software polls, message faults take these shapes:
/// - *lost*: the entries are removed, but the handle stays ACTIVE until the chiplet is reset;
/// - *stuck*: the purge never begins, the handle stays ACTIVE until the chiplet is reset;
/// - *late*: removal and completion come `late_by` after their time;
/// - *reordered*: each purge takes up to `jitter` longer, at random, so that later ones overtake earlier ones;
/// - *duplicated*: `duplicate_after` its completion the purge happens again, unasked, and cancels misses as well.
///
/// The rest is not of purges:
/// - *purge in a miss*: a purge that nobody here asked for covers a miss before its drop-in can be written, which is ignored;
/// - *delayed*: a step takes up to `delay` longer: an operation of a handle, a reset, an access, the interrupt of a miss;
/// - *error*: an instruction ends with an exception that is worth another try, before its next access;
/// - *nack*: a message is not delivered: the receiver's buffer is full, its claim is not answered, or its lines are not taken;
/// - *surviving a reset*: the chiplet goes on, and its reset register reads 1 until a later write of 1 is heeded.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct FaultPlan {
    /// Seed of all draws, those of [`Eviction::Random`] included.
    pub seed: u64,
    /// Probability of a lost completion.
    pub lost: f64,
    /// Probability of a purge that never begins.
    pub stuck: f64,
    /// Probability of a late completion.
    pub late: f64,
    /// How late.
    pub late_by: Duration,
    /// The most by which a purge takes longer, at random.
    pub jitter: Duration,
    /// Probability of a purge that happens twice.
    pub duplicated: f64,
    /// How long after the first time.
    pub duplicate_after: Duration,
    /// Probability, for each miss, of a purge between it and its drop-in.
    pub purge_in_miss: f64,
    /// Probability, for each access of an instruction, that the instruction ends with an error instead.
    pub error: f64,
    /// Probability, for each message, that it is not delivered.
    pub nack: f64,
    /// Probability, for each step, of a delay.
    pub delayed: f64,
    /// The longest delay.
    pub delay: Duration,
    /// Probability, for each write of 1 to the reset register, that the chiplet goes on.
    pub survives_reset: f64,
    /// Faults that are not left to chance.
    pub scripted: &'static [Scripted],
}

impl FaultPlan {
    /// Whether purges overtake each other.
    pub(super) fn reorders(&self) -> bool {
        let reorders = |one: &Scripted| one.kind == FaultKind::Reordered;
        !self.jitter.is_zero() || self.scripted.iter().any(reorders)
    }
}

bitflags::bitflags! {
    /// Bugs of the model that can be switched on, to prove that a test would find them.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct Plant: u32 {
        /// A drop-in is installed although a purge covered it between the miss and the write (race R16).
        const DROP_IN_NOT_CANCELLED = 1;
    }
}

/// How a chiplet is built.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct ChipletConfig {
    /// The device number in the oracle's findings.
    pub device: u32,
    /// Entries of the TLB, at least 2: a copy needs the entries of both its pages at once.
    pub tlb_entries: usize,
    /// What a full TLB does.
    pub eviction: Eviction,
    /// How long things take.
    pub latency: Latency,
    /// What goes wrong.
    pub faults: FaultPlan,
    /// What is wrong with the model.
    pub plants: Plant,
}

impl Default for ChipletConfig {
    fn default() -> Self {
        Self {
            device: 0,
            tlb_entries: 1024,
            eviction: Eviction::Fifo,
            latency: Latency::default(),
            faults: FaultPlan::default(),
            plants: Plant::empty(),
        }
    }
}
