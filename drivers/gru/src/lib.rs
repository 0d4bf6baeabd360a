//! A driver for the GRU: a user-mapped accelerator that dereferences user virtual addresses through its own TLB.
//!
//! It is written over the traits of [`shootdown`] alone, and runs over whatever implements them: real chiplets or a model.
//! A space's segments, on whatever chiplets, share one registration of the whole space, so that an unmap flushes every
//! chiplet where the space has an ASID, all of them in flight at once, and costs nothing where it has none.
//!
//! ```text
//!   Gru ── chiplet ── contexts ◄── Segment ── submit, poll, wait
//!    │        │                       │
//!    │        ├─ fault thread ── begin, translate, retry, write the entry
//!    │        └─ TLB: purges ◄── engine ── registration ◄── share
//! ```

mod asid;
mod blocks;
mod chiplet;
mod config;
mod context;
mod error;
mod fault;
mod fill;
mod gru;
mod handle;
mod instruction;
mod kernel;
mod layout;
mod load;
mod notifier;
mod purge;
mod queue;
mod segment;
mod self_test;
mod shared;
mod stats;
mod status;
mod stop;
mod window;

pub use config::{ChipletPorts, Config, LateDropIns, MissMode, Plant, SegmentOptions, Steal};
pub use error::{Causes, Ended, GruError};
pub use gru::Gru;
pub use handle::OperationStats;
pub use instruction::{AddressKind, Atomic, Element, Instruction};
pub use kernel::{Kernel, Pending, Words};
pub use queue::{Message, Queue};
pub use segment::{Delivery, Segment, Status};
pub use self_test::SelfTestFailed;
pub use stats::{GruStats, SegmentStats};
pub use status::{ChipletStatus, Condition, ContextStatus};
