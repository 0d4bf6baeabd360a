//! The guest's machine.

use std::io::PipeReader;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::cache::Machine;
use crate::error::{Error, at};
use crate::process::Killed;

/// Size of each NVMe device's backing file.
pub(crate) const DISK_BYTES: u64 = 4 << 20;

/// What QEMU exits with when the guest wrote 16 to the debug exit port. A panic ends it with 0.
pub(crate) const GOOD_EXIT: i32 = 16 << 1 | 1;

/// A timer check of the kernel fails now and then where the CPU is emulated. Below level 3 only a dying kernel speaks: its
/// console and the guest program's lines share one pipe.
const KERNEL_LINE: &str =
    "console=ttyS0 loglevel=3 intel_iommu=on iommu=nopt panic=-1 no_timer_check rdinit=/init";

/// The events that the witness reads.
const TRACE: [&str; 6] = [
    "vtd_inv_desc",
    "vtd_inv_desc_iotlb_pages",
    "vtd_inv_desc_iotlb_domain",
    "vtd_inv_desc_iotlb_global",
    "vtd_inv_desc_wait_sw",
    "vtd_dmar_fault",
];

/// What one boot takes.
#[derive(Debug)]
pub(crate) struct Boot<'a> {
    pub(crate) machine: &'a Machine,
    pub(crate) initramfs: &'a Path,
    /// Backing files of the two NVMe devices.
    pub(crate) disks: [&'a Path; 2],
}

impl Boot<'_> {
    /// Starts QEMU. Console, debug port and trace come through the pipe, in the order in which things happened.
    pub(crate) fn start(&self) -> Result<(Killed, PipeReader), Error> {
        let (reader, writer) = at(Path::new("a pipe"), std::io::pipe())?;
        let errors = at(Path::new("a pipe"), writer.try_clone())?;
        let mut command = self.command();
        command.stdin(Stdio::null()).stdout(writer).stderr(errors);
        // The command, which holds the writing ends, goes at the end: then the pipe ends when QEMU does.
        let child = Killed::spawn(&mut command, "remove the cache and run again")?;
        Ok((child, reader))
    }

    fn command(&self) -> Command {
        let machine = self.machine;
        let [system, user] = &machine.libraries;
        let [fast, slow] = self.disks;
        let mut command = Command::new(&machine.loader);
        command
            // Up to 7.2 the emulated CPU is a module.
            .env("QEMU_MODULE_DIR", user.join("qemu"))
            .arg("--library-path")
            .arg(format!("{}:{}", system.display(), user.display()))
            .arg(&machine.qemu);
        for firmware in &machine.firmware {
            command.arg("-L").arg(firmware);
        }
        command
            .args([
                "-machine",
                "q35,accel=tcg,kernel-irqchip=split",
                "-cpu",
                "max",
                "-m",
                "512",
            ])
            .args([
                "-nodefaults",
                "-no-user-config",
                "-no-reboot",
                "-display",
                "none",
            ])
            .arg("-kernel")
            .arg(&machine.kernel)
            .arg("-initrd")
            .arg(self.initramfs)
            .args(["-append", KERNEL_LINE])
            .args([
                "-chardev",
                "file,id=console,path=/dev/stdout",
                "-serial",
                "chardev:console",
            ])
            .args(["-chardev", "file,id=marks,path=/dev/stdout"])
            .args(["-device", "isa-debugcon,iobase=0xe9,chardev=marks"])
            .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
            .args([
                "-device",
                "intel-iommu,intremap=on,caching-mode=off,device-iotlb=on",
            ])
            .args(["-device", "edu,dma_mask=0xffffffffff,addr=4"])
            .arg("-drive")
            .arg(format!("if=none,id=disk,format=raw,file={}", fast.display()))
            .args(["-device", "nvme,serial=disk,drive=disk,addr=5"])
            .arg("-drive")
            // Four requests a second: who is behind others is in flight for long.
            .arg(format!(
                "if=none,id=slow,format=raw,throttling.iops-total=4,throttling.iops-total-max=4,file={}",
                slow.display()
            ))
            .args(["-device", "nvme,serial=slow,drive=slow,addr=6"])
            .args(["-device", "pcie-root-port,id=downstream,addr=7"])
            .args([
                "-device",
                "virtio-rng-pci,bus=downstream,ats=on,iommu_platform=on,disable-legacy=on",
            ]);
        for event in TRACE {
            command.args(["-trace", event]);
        }
        command
    }
}
