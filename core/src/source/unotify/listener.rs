//! The listener: calls that the kernel hands over, and their answers.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// A call that waits for its answer.
pub(super) type Notification = libc::seccomp_notif;

/// Waits for calls, so that one supervisor wakes for each. Without an epoll descriptor, of which there may be no more, all wake, and
/// one receives it.
pub(super) struct Wait(Option<OwnedFd>);

impl Wait {
    pub(super) fn new(listener: i32) -> Self {
        // SAFETY: numbers only.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if fd < 0 {
            return Self(None);
        }
        // SAFETY: opened just now.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut event = libc::epoll_event {
            events: (libc::EPOLLIN | libc::EPOLLEXCLUSIVE) as u32,
            u64: 0,
        };
        let add = libc::EPOLL_CTL_ADD;
        // SAFETY: both descriptors are open.
        let added = unsafe { libc::epoll_ctl(fd.as_raw_fd(), add, listener, &mut event) };
        Self((added == 0).then_some(fd))
    }

    pub(super) fn wait(&self) {
        let Some(fd) = &self.0 else { return };
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        // SAFETY: there is room for one event.
        unsafe { libc::epoll_wait(fd.as_raw_fd(), &mut event, 1, -1) };
    }
}

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
