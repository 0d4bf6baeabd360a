//! A guest that reads memory of this process, at privilege level 3.
//!
//! It has one processor in 64-bit mode, page tables that map a few pages of its own and the range that it shall see, and
//! one program, which reads eight bytes where it is told to, leaves them in its mailbox, and stops by an `out`. There is no code at
//! level 0, no interrupt and no exception handler: whatever else happens stops it for good.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use memmap2::{MmapMut, MmapOptions};
use shootdown::{Addr, PageSize, Range};

use crate::error::KvmError;

// Physical addresses in the guest. Its virtual ones are the same.
const PML4: usize = 0x1000;
const PDPT: usize = 0x2000;
const DIRECTORY: usize = 0x3000;
const CODE: usize = 0x4000;
const MAILBOX: usize = 0x5000;
/// Bytes of its own pages.
const OWN: usize = 0x6000;
/// Where the range begins that it sees.
const WINDOW: u64 = 256 << 20;
/// What one page directory maps.
const MAPPED: u64 = 1 << 30;

/// Present, writable, for level 3.
const TABLE: u64 = 7;
/// The same, a page of 2 MiB.
const LARGE: u64 = TABLE | 1 << 7;

/// The program: `again: mov rdi, [MAILBOX]; mov rax, [rdi]; mov [MAILBOX + 8], rax; out 0x10, al; jmp again`.
const PROGRAM: [u8; 23] = [
    0x48, 0x8b, 0x3c, 0x25, 0x00, 0x50, 0x00, 0x00, // mov rdi, [0x5000]
    0x48, 0x8b, 0x07, // mov rax, [rdi]
    0x48, 0x89, 0x04, 0x25, 0x08, 0x50, 0x00, 0x00, // mov [0x5008], rax
    0xe6, 0x10, // out 0x10, al
    0xeb, 0xe9, // jmp to the start
];

/// `out` is allowed at level 3 (IOPL), and the bit that is always set.
const RFLAGS: u64 = 3 << 12 | 1 << 1;

/// A processor at privilege level 3 that reads a range of this process's memory.
#[derive(Debug)]
pub struct Guest {
    vcpu: VcpuFd,
    _vm: VmFd,
    own: MmapMut,
    range: Range,
}

impl Guest {
    /// A guest that sees `range`, whatever is mapped there at any time.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn new(range: Range) -> Result<Self, KvmError> {
        let limit = MAPPED - WINDOW;
        if !range.is_aligned(PageSize::FourKiB) || range.len() > u128::from(limit) {
            return Err(KvmError::Range { range, limit });
        }
        let kvm = Kvm::new().map_err(|error| KvmError::NoKvm(error.into()))?;
        let vm = kvm.create_vm().map_err(KvmError::system("KVM_CREATE_VM"))?;
        // Intel's processors want three pages for it. Others do not have it.
        let _ = vm.set_tss_address(0xfffb_d000);
        let own = own_pages().map_err(|error| KvmError::System {
            call: "mmap",
            error,
        })?;
        let slots = [
            (0, own.as_ptr() as u64, OWN as u64),
            (WINDOW, range.start().get(), range.len() as u64),
        ];
        for (slot, (guest, host, size)) in (0..).zip(slots) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: guest,
                memory_size: size,
                userspace_addr: host,
            };
            // SAFETY: the guest's own pages live as long as it does, and it stores to nothing else. It reads the range as that
            // is at the time, which harms nobody.
            unsafe { vm.set_user_memory_region(region) }
                .map_err(KvmError::system("KVM_SET_USER_MEMORY_REGION"))?;
        }
        let vcpu = vm
            .create_vcpu(0)
            .map_err(KvmError::system("KVM_CREATE_VCPU"))?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::system("KVM_GET_SUPPORTED_CPUID"))?;
        vcpu.set_cpuid2(&cpuid)
            .map_err(KvmError::system("KVM_SET_CPUID2"))?;
        start(&vcpu)?;
        Ok(Self {
            vcpu,
            _vm: vm,
            own,
            range,
        })
    }

    /// The eight bytes at `addr`, as the guest's own MMU finds them; `None` if nothing is mapped there. Waits for the guest.
    ///
    /// # Errors
    /// [`KvmError::Range`] for an address that it does not see; [`KvmError::Exit`].
    pub fn read(&mut self, addr: Addr) -> Result<Option<u64>, KvmError> {
        let bytes = Range::new(addr, 8).unwrap_or(Range::ALL);
        if !self.range.contains(bytes) {
            return Err(KvmError::Range {
                range: bytes,
                limit: self.range.len() as u64,
            });
        }
        let at = WINDOW + (addr.get() - self.range.start().get());
        self.own[MAILBOX..][..8].copy_from_slice(&at.to_le_bytes());
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(0x10, _)) => break,
                Ok(VcpuExit::MemoryFault { .. }) => return self.begin_again(),
                Ok(exit) => {
                    let exit = format!("{exit:?}");
                    return Err(KvmError::Exit { exit });
                }
                Err(error) if error.errno() == libc::EFAULT => return self.begin_again(),
                // A signal.
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) => return Err(KvmError::system("KVM_RUN")(error)),
            }
        }
        let word = self.own[MAILBOX + 8..][..8].first_chunk();
        Ok(word.map(|word| u64::from_le_bytes(*word)))
    }

    /// It stands before a load that it cannot make: the next one is for another address.
    fn begin_again(&mut self) -> Result<Option<u64>, KvmError> {
        begin(&self.vcpu).map(|()| None)
    }
}

/// Page tables and program.
fn own_pages() -> std::io::Result<MmapMut> {
    let mut own = MmapOptions::new().len(OWN).map_anon()?;
    let mut entry = |table: usize, nth: usize, value: u64| {
        own[table + nth * 8..][..8].copy_from_slice(&value.to_le_bytes());
    };
    entry(PML4, 0, PDPT as u64 | TABLE);
    entry(PDPT, 0, DIRECTORY as u64 | TABLE);
    for nth in 0..512 {
        entry(DIRECTORY, nth, (nth as u64) << 21 | LARGE);
    }
    own[CODE..][..PROGRAM.len()].copy_from_slice(&PROGRAM);
    Ok(own)
}

/// 64-bit mode, level 3, the program.
fn start(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let mut special = vcpu
        .get_sregs()
        .map_err(KvmError::system("KVM_GET_SREGS"))?;
    let segment = |selector, type_, long| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 3,
        db: 1 - long,
        s: 1,
        l: long,
        g: 1,
        ..kvm_segment::default()
    };
    special.cs = segment(0x33, 11, 1);
    let data = segment(0x2b, 3, 0);
    (special.ss, special.ds, special.es) = (data, data, data);
    special.cr3 = PML4 as u64;
    // PAE.
    special.cr4 = 1 << 5;
    // Paging, write protection, numeric errors, extension type, protection.
    special.cr0 = 1 << 31 | 1 << 16 | 1 << 5 | 1 << 4 | 1;
    // Long mode, enabled and active.
    special.efer = 1 << 10 | 1 << 8;
    vcpu.set_sregs(&special)
        .map_err(KvmError::system("KVM_SET_SREGS"))?;
    begin(vcpu)
}

/// Sets it to the start of the program.
fn begin(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let registers = kvm_regs {
        rip: CODE as u64,
        rflags: RFLAGS,
        ..kvm_regs::default()
    };
    vcpu.set_regs(&registers)
        .map_err(KvmError::system("KVM_SET_REGS"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_reads_what_is_mapped_now() {
        let _alone = crate::alone();
        let mut memory = MmapOptions::new().len(0x4000).map_anon().unwrap();
        let range = Range::new(memory.as_ptr() as u64, 0x4000).unwrap();
        let mut guest = match Guest::new(range) {
            Err(error @ KvmError::NoKvm(_)) => return eprintln!("SKIPPED: {error}"),
            guest => guest.unwrap(),
        };
        let at = Addr::new(range.start().get() + 0x1008);
        memory[0x1008] = 7;
        assert_eq!(guest.read(at).unwrap(), Some(7));
        memory[0x1008] = 8;
        assert_eq!(guest.read(at).unwrap(), Some(8));
        let page = Addr::new(range.start().get() + 0x1000);
        // SAFETY: a page of the test's own.
        let said = unsafe { libc::munmap(page.get() as *mut _, 0x1000) };
        assert_eq!(said, 0);
        assert_eq!(guest.read(at).unwrap(), None);
        memory[0x2000] = 9;
        let next = Addr::new(range.start().get() + 0x2000);
        assert_eq!(guest.read(next).unwrap(), Some(9));
        assert!(matches!(
            guest.read(Addr::new(0)),
            Err(KvmError::Range { .. })
        ));
    }
}
