//! The VM tier: real Linux VFIO in a QEMU guest whose IOMMU is emulated. No hardware, no privilege, nothing installed.
//!
//! Two programs share this library. `guest` (package `shootdown-vm-guest`) is the guest's first process: it drives devices
//! through VFIO, runs the `shootdown` command, and says on a debug port what it is about to do, what it did, and whether its
//! own checks held ([`protocol`]). `vm` runs on the host: it provides QEMU and a kernel, builds the guest's programs, boots
//! them, and believes nothing that they say.
//!
//! # The witness
//! QEMU traces each invalidation descriptor that the guest's kernel gives to the IOMMU, and each DMA that the IOMMU refused
//! ([`trace`]). These lines and the guest's come through one pipe, in the order in which things happened; the guest's port
//! write returns when its byte is in the pipe. So [`witness`] can demand, of each range that the guest said it unmapped:
//!
//! 1. between `UNMAP` and `UNMAPPED` descriptors covered the whole range, in one domain (in as many as it was mapped in, where
//!    the guest says so), and in the device's ATS cache, where it has one;
//! 2. a wait descriptor completed after the last of them, also before `UNMAPPED`;
//! 3. the faults of a check are those that it announced: some in each announced range, none elsewhere. A race that the device
//!    may have won is announced as such: faults in its range may come or not.
//!
//! # The negative control
//! A witness that cannot fail proves nothing. In one section of each run the guest leaves out an unmap and says it did it.
//! There the guest's own check *and* the witness must fail; if either holds, the run fails.

pub mod protocol;
pub mod trace;
pub mod witness;
