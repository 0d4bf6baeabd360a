//! The listener: calls that the kernel hands over, and their answers.

use std::io;

/// A call that waits for its answer.
pub(super) type Notification = libc::seccomp_notif;

/// The next call; waits for one.
///
/// # Errors
/// Interrupted, or whoever made it is gone; anything else means that there is no listener any more.
pub(super) fn receive(listener: i32) -> io::Result<Notification> {
    // SAFETY: integers only; the kernel wants it zeroed.
    let mut notification: Notification = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills the structure.
    let said = unsafe {
        libc::ioctl(
            listener,
            libc::SECCOMP_IOCTL_NOTIF_RECV,
            &raw mut notification,
        )
    };
    match said {
        0 => Ok(notification),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether somebody still waits for the answer: a caller may have been killed.
pub(super) fn is_waited_for(listener: i32, id: u64) -> bool {
    // SAFETY: the kernel reads the number.
    unsafe { libc::ioctl(listener, libc::SECCOMP_IOCTL_NOTIF_ID_VALID, &raw const id) == 0 }
}

pub(super) fn answer(listener: i32, id: u64, result: Result<usize, i32>) {
    let (val, error) = match result {
        Ok(value) => (value as i64, 0),
        Err(errno) => (0, -errno),
    };
    let flags = 0;
    send(
        listener,
        libc::seccomp_notif_resp {
            id,
            val,
            error,
            flags,
        },
    );
}

/// The caller makes the call itself.
pub(super) fn let_go_on(listener: i32, id: u64) {
    send(
        listener,
        libc::seccomp_notif_resp {
            id,
            val: 0,
            error: 0,
            flags: libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
        },
    );
}

fn send(listener: i32, response: libc::seccomp_notif_resp) {
    // ENOENT: the caller was killed meanwhile, and wants no answer.
    // SAFETY: the kernel reads the structure.
    unsafe {
        libc::ioctl(
            listener,
            libc::SECCOMP_IOCTL_NOTIF_SEND,
            &raw const response,
        )
    };
}
