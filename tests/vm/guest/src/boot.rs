//! From an empty initramfs to a system in which VFIO works.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

/// Mounts the kernel's file systems and inserts the modules that the host put there.
pub(crate) fn boot() -> Result<(), String> {
    for (kind, target) in [
        (c"proc", c"/proc"),
        (c"sysfs", c"/sys"),
        (c"devtmpfs", c"/dev"),
        (c"tmpfs", c"/tmp"),
    ] {
        mount(kind, target).map_err(|error| format!("mounting {target:?}: {error}"))?;
    }
    let mut modules: Vec<PathBuf> = std::fs::read_dir("/modules")
        .and_then(|entries| {
            entries
                .map(|entry| entry.map(|entry| entry.path()))
                .collect()
        })
        .map_err(|error| format!("/modules: {error}"))?;
    // Their names begin with their place in the order.
    modules.sort();
    for module in modules {
        insert(&module).map_err(|error| format!("inserting {}: {error}", module.display()))?;
    }
    Ok(())
}

fn mount(kind: &CStr, target: &CStr) -> io::Result<()> {
    // SAFETY: three strings that end with a zero, no flags, no data.
    let done = unsafe {
        libc::mount(
            kind.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn insert(module: &PathBuf) -> io::Result<()> {
    let file = File::open(module)?;
    // SAFETY: finit_module takes a descriptor, a string of parameters and flags; the kernel checks the file itself.
    let done = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
