//! The listener: calls that the kernel hands over, and their answers.

use super::super::gate;

/// A call that waits for its answer.
pub(super) type Notification = libc::seccomp_notif;

/// A request to the listener.
///
/// # Safety
/// The kernel reads or fills what the request says at `what`.
unsafe fn request(listener: i32, request: libc::Ioctl, what: usize) -> Result<usize, i32> {
    let args = [listener as usize, request as usize, what, 0, 0, 0];
    // SAFETY: the caller's promise.
    unsafe { gate::own_call(libc::SYS_ioctl, args) }
}

/// The next call; waits for one.
///
/// # Errors
/// The errno. Interrupted, or whoever made it is gone; anything else means that there is no listener any more.
pub(super) fn receive(listener: i32, into: &mut Notification) -> Result<(), i32> {
    // SAFETY: integers only; the kernel wants it zeroed.
    *into = unsafe { std::mem::zeroed() };
    let at = &raw mut *into as usize;
    // SAFETY: the kernel fills the structure.
    unsafe { request(listener, libc::SECCOMP_IOCTL_NOTIF_RECV, at) }.map(|_| ())
}

/// Whether somebody still waits for the answer: a caller may have been killed.
pub(super) fn is_waited_for(listener: i32, id: u64) -> bool {
    let at = &raw const id as usize;
    // SAFETY: the kernel reads the number.
    unsafe { request(listener, libc::SECCOMP_IOCTL_NOTIF_ID_VALID, at) }.is_ok()
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
    let at = &raw const response as usize;
    // ENOENT: the caller was killed meanwhile, and wants no answer.
    // SAFETY: the kernel reads the structure.
    let _ = unsafe { request(listener, libc::SECCOMP_IOCTL_NOTIF_SEND, at) };
}
