//! The two ports to the host: the debug console, which takes a byte a write and is done when the write returns, and the port
//! that ends the machine.

use std::arch::asm;
use std::io;
use std::sync::{Mutex, PoisonError};

use shootdown_vm::protocol::Line;

/// QEMU's isa-debugcon.
const CONSOLE: u16 = 0xe9;
/// QEMU's isa-debug-exit: it ends with status 2 n + 1.
const EXIT: u16 = 0xf4;
/// All checks were run, whatever came of them.
pub(crate) const GOOD: u32 = 16;
/// None was.
pub(crate) const BAD: u32 = 17;

/// One line at a time.
static SPEAKING: Mutex<()> = Mutex::new(());

/// Lets this process, and those that it forks, use the ports.
pub(crate) fn open() -> io::Result<()> {
    for (port, len) in [(CONSOLE, 1), (EXIT, 4)] {
        // SAFETY: the call only changes which ports this process may use; nothing else in it uses ports.
        if unsafe { libc::ioperm(port.into(), len, 1) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Says one line to the host. When this returns the line stands before any trace of what comes after.
pub(crate) fn say(line: &Line) {
    // A panic while speaking leaves nothing half done that matters: the host drops a line it cannot read.
    let _one = SPEAKING.lock().unwrap_or_else(PoisonError::into_inner);
    for byte in format!("{line}\r\n").bytes() {
        // SAFETY: the port belongs to QEMU's debug console, which takes any byte and touches no memory of ours.
        unsafe {
            asm!("out dx, al", in("dx") CONSOLE, in("al") byte, options(nomem, nostack, preserves_flags))
        };
    }
}

/// Ends the machine; the host demands [`GOOD`].
pub(crate) fn end(status: u32) -> ! {
    loop {
        // SAFETY: the port belongs to QEMU's debug exit device; the machine is gone after it.
        unsafe {
            asm!("out dx, eax", in("dx") EXIT, in("eax") status, options(nomem, nostack, preserves_flags))
        };
        std::thread::yield_now();
    }
}
