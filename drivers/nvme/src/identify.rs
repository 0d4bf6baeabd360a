//! What controller and namespace say of themselves. Source: NVMe 1.4, figures 247 and 245.

use crate::controller::{Nvme, PAGE, admin, page};
use crate::error::NvmeError;
use crate::queue::Entry;

/// What a controller says of itself.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Controller {
    /// The serial number.
    pub serial: String,
    /// The model.
    pub model: String,
    /// The firmware's revision.
    pub firmware: String,
    /// The most that one command carries, in bytes.
    pub max_transfer: u64,
}

/// What it says of a namespace.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Namespace {
    /// How many blocks it has.
    pub blocks: u64,
    /// Bytes of a block.
    pub block_bytes: u64,
}

impl Nvme {
    /// Identify, into the page for it.
    pub(crate) fn identify(&self, namespace: u32, what: u32) -> Result<(), NvmeError> {
        let entry = Entry {
            opcode: admin::IDENTIFY,
            namespace,
            data: [self.iova(page::IDENTIFY), 0],
            words: [what, 0, 0],
        };
        self.admin("identify", entry).map(drop)
    }

    pub(crate) fn identify_controller(&self) -> Result<Controller, NvmeError> {
        self.identify(0, 1)?;
        Ok(Controller::parse(&self.identified()))
    }

    pub(crate) fn identify_namespace(&self) -> Result<Namespace, NvmeError> {
        self.identify(self.config.namespace, 0)?;
        Namespace::parse(&self.identified())
    }

    /// The page for identify data, as the controller left it.
    fn identified(&self) -> Data {
        std::array::from_fn(|byte| self.pages.read8(page::IDENTIFY * PAGE as usize + byte))
    }
}

/// Identify data.
pub(crate) type Data = [u8; PAGE as usize];

impl Controller {
    pub(crate) fn parse(data: &Data) -> Self {
        let text =
            |from: usize, to: usize| String::from_utf8_lossy(&data[from..to]).trim().to_owned();
        // One list holds what follows the first page.
        let list = PAGE / 8 * PAGE;
        // log2 of the most, in pages; 0 for as much as one likes.
        let max_transfer = match data[77] {
            0 => list,
            shift => 1_u64
                .checked_shl(shift.into())
                .and_then(|pages| pages.checked_mul(PAGE))
                .map_or(list, |most| most.min(list)),
        };
        Self {
            serial: text(4, 24),
            model: text(24, 64),
            firmware: text(64, 72),
            max_transfer,
        }
    }
}

impl Namespace {
    pub(crate) fn parse(data: &Data) -> Result<Self, NvmeError> {
        let format = usize::from(data[26] & 0xf);
        let shift = data[128 + 4 * format + 2];
        let blocks = u64::from_le_bytes(std::array::from_fn(|byte| data[byte]));
        if !(9..=16).contains(&shift) || blocks == 0 {
            return Err(NvmeError::Unfit {
                what: "a namespace with blocks of 2 to the",
                found: shift.into(),
                needed: "blocks of 512 bytes to 64 KiB, at least one",
            });
        }
        Ok(Self {
            blocks,
            block_bytes: 1 << shift,
        })
    }
}
