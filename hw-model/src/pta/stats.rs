//! What a device counts.

/// What a device has counted since it was built; a reset does not clear it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct Counts {
    /// Commands that ended well.
    pub commands: u64,
    /// Commands that ended with a cause.
    pub errors: u64,
    /// Bytes that accesses went over.
    pub bytes: u64,
    /// Times that the device TLB had not what was needed.
    pub misses: u64,
    /// Entries that were installed in it.
    pub fills: u64,
    /// Entries that had to make room.
    pub evictions: u64,
    /// Translations that were read again because an invalidation covered them.
    pub walks_cancelled: u64,
    /// Page requests that reached the ring.
    pub requests: u64,
    /// Page requests that found no room in the ring.
    pub requests_dropped: u64,
    /// Page requests that were not answered in time.
    pub requests_unanswered: u64,
    /// Answers that were waited for.
    pub responses: u64,
    /// Interrupts that found none pending; others are one with that which is.
    pub interrupts: u64,
    /// Answers that nobody waited for.
    pub responses_ignored: u64,
    /// Invalidations that were begun.
    pub invalidations: u64,
    /// Injected: completions lost.
    pub lost: u64,
    /// Injected: doorbells whose invalidations never begin.
    pub stuck: u64,
    /// Injected: doorbells that are late.
    pub late: u64,
    /// Injected: doorbells that may be overtaken.
    pub jittered: u64,
    /// Injected: completions that come twice.
    pub duplicated: u64,
    /// Injected: doorbells beside which completions came that nobody had asked for.
    pub unissued: u64,
    /// Injected: page requests that never reached the ring.
    pub requests_lost: u64,
    /// Injected: resets that were not heeded.
    pub resets_survived: u64,
    /// Resets.
    pub resets: u64,
}
