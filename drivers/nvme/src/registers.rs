//! Registers of a controller, by byte offset, and what is in them. Source: NVMe 1.4, 3.1.

/// Capabilities (64 bits).
pub(crate) const CAP: u64 = 0x00;
/// Controller configuration.
pub(crate) const CC: u64 = 0x14;
/// Controller status.
pub(crate) const CSTS: u64 = 0x1c;
/// Admin queue attributes.
pub(crate) const AQA: u64 = 0x24;
/// Admin submission queue base (64 bits).
pub(crate) const ASQ: u64 = 0x28;
/// Admin completion queue base (64 bits).
pub(crate) const ACQ: u64 = 0x30;
/// The first doorbell.
const DOORBELLS: u64 = 0x1000;

/// CC: on, with pages of 4 KiB, submission entries of 2^6 bytes and completion entries of 2^4.
pub(crate) const CC_ON: u32 = 1 | 6 << 16 | 4 << 20;
pub(crate) const CC_ENABLE: u32 = 1;
pub(crate) const CSTS_READY: u32 = 1;
pub(crate) const CSTS_FATAL: u32 = 2;

/// What CAP says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Capabilities(pub(crate) u64);

impl Capabilities {
    /// Entries that a queue can have.
    pub(crate) fn entries(self) -> u32 {
        (self.0 as u16 as u32) + 1
    }

    /// How long the controller may take to become ready or stop, in milliseconds.
    pub(crate) fn timeout_ms(self) -> u64 {
        (self.0 >> 24 & 0xff) * 500
    }

    /// log2 of the smallest page in bytes.
    pub(crate) fn page_shift(self) -> u32 {
        12 + (self.0 >> 48 & 0xf) as u32
    }

    /// Where the doorbell of a queue is: the tail of the submission queue, or the head of the completion queue.
    pub(crate) fn doorbell(self, queue: u16, completion: bool) -> u64 {
        let stride = 4 << (self.0 >> 32 & 0xf);
        DOORBELLS + (2 * u64::from(queue) + u64::from(completion)) * stride
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_read_as_qemu_gives_them() {
        // 2048 entries, 7.5 s, a stride of 4 bytes, pages of 4 KiB.
        let cap = Capabilities(0x0020_0030_0f01_07ff & !(0xf << 32));
        assert_eq!(cap.entries(), 2048);
        assert_eq!(cap.timeout_ms(), 7500);
        assert_eq!(cap.page_shift(), 12);
        assert_eq!(cap.doorbell(0, false), 0x1000);
        assert_eq!(cap.doorbell(1, true), 0x100c);
    }
}
