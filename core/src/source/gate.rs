//! The gate: one `syscall` instruction that is this crate's own.
//!
//! A filter of system calls sees the address that a call comes from, and lets those through that come from here. So the
//! supervisor can perform a call on behalf of a thread that waits for it, although the filter is on every thread of the process; and the
//! framework's own changes of memory, which have shot the range down themselves, are not stopped a second time. It is no
//! security boundary, and need not be: whoever jumps here only deceives himself.

/// Enters the kernel; on return the result, negative for an error, as the kernel gives it.
///
/// With `nr` of `usize::MAX`, which is no call, it returns the address that the kernel sees.
///
/// # Safety
/// `args` is readable, unless no call is made; and as the call itself.
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
unsafe extern "C" fn gate(nr: usize, args: *const [usize; 6]) -> isize {
    core::arch::naked_asm!(
        "cmp rdi, -1",
        "je 3f",
        "mov rax, rdi",
        "mov r11, rsi",
        "mov rdi, [r11]",
        "mov rsi, [r11 + 8]",
        "mov rdx, [r11 + 16]",
        "mov r10, [r11 + 24]",
        "mov r8, [r11 + 32]",
        "mov r9, [r11 + 40]",
        "syscall",
        "2:",
        "ret",
        "3:",
        "lea rax, [rip + 2b]",
        "ret",
    )
}

/// Where calls through the gate come from, as a filter sees it; `None` where this architecture has no gate.
pub(crate) fn address() -> Option<u64> {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: no call is made, and the arguments are not read.
    return Some(unsafe { gate(usize::MAX, std::ptr::null()) } as u64);
    #[cfg(not(target_arch = "x86_64"))]
    None
}

/// A system call that no filter of this crate stops: its result, or the errno. For implementers of
/// [`Memory`](crate::Memory), whose changes have been shot down before they are made: through here they cost under a filter what
/// they cost without.
///
/// # Errors
/// The errno.
///
/// # Safety
/// As the call itself.
pub unsafe fn own_call(nr: libc::c_long, args: [usize; 6]) -> Result<usize, i32> {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the arguments are here; the rest is the caller's promise.
    let result = unsafe { gate(nr as usize, &raw const args) };
    #[cfg(not(target_arch = "x86_64"))]
    let result = {
        let [a, b, c, d, e, f] = args;
        // SAFETY: the caller's promise.
        match unsafe { libc::syscall(nr, a, b, c, d, e, f) } {
            -1 => -(std::io::Error::last_os_error().raw_os_error().unwrap_or(0) as isize),
            result => result as isize,
        }
    };
    // The kernel's errors are -1 to -4095.
    if (-4095..0).contains(&result) {
        Err(-result as i32)
    } else {
        Ok(result as usize)
    }
}
