//! What the kernel writes of mappings, and calls as somebody may make them.

use std::sync::OnceLock;

use super::super::scratch::PAGE;
use super::call::{Call, Changes};
use super::caller::StandIn;
use super::maps::{Line, Mapping, Maps};

/// A line of `/proc/self/maps`, split at its spaces; `None` for what no kernel writes.
fn split(line: &[u8]) -> Option<Mapping> {
    let line = String::from_utf8_lossy(line);
    let mut fields = line.splitn(6, ' ');
    let number = |field: &str| {
        let all = !field.is_empty() && field.bytes().all(|byte| byte.is_ascii_hexdigit());
        u64::from_str_radix(field, 16).ok().filter(|_| all)
    };
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?.as_bytes();
    let legal = [b"r-", b"w-", b"x-", b"sp"];
    let are = permissions.len() == 4
        && permissions
            .iter()
            .zip(legal)
            .all(|(one, of)| of.contains(one));
    let offset = number(fields.next()?)?;
    let (major, minor) = fields.next()?.split_once(':')?;
    number(major).and(number(minor))?;
    let inode = fields.next()?;
    let decimal = !inode.is_empty() && inode.bytes().all(|byte| byte.is_ascii_digit());
    if !(are && decimal) {
        return None;
    }
    Some(Mapping {
        start: number(start)?,
        end: number(end)?,
        offset,
        inode: inode.parse().ok()?,
        shared: permissions[3] == b's',
    })
}

/// Every line gives one mapping, and a proper one the right one, whatever stands before it.
pub fn proc_maps(bytes: &[u8]) {
    let mut line = Line::default();
    let read: Vec<Mapping> = bytes.iter().filter_map(|byte| line.byte(*byte)).collect();
    let mut lines: Vec<&[u8]> = bytes.split(|byte| *byte == b'\n').collect();
    // Not ended.
    lines.pop();
    assert_eq!(read.len(), lines.len());
    for (read, line) in read.into_iter().zip(lines) {
        if let Some(split) = split(line) {
            assert_eq!(read, split, "{}", String::from_utf8_lossy(line));
        }
    }
}

/// The calls of the filter that change what their arguments say.
const CALLS: [libc::c_long; 16] = [
    libc::SYS_munmap,
    libc::SYS_mmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_mprotect,
    libc::SYS_pkey_mprotect,
    libc::SYS_remap_file_pages,
    libc::SYS_brk,
    libc::SYS_shmdt,
    libc::SYS_shmat,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_truncate,
    libc::SYS_process_madvise,
    libc::SYS_getpid,
    -1,
];

/// Bytes `from..to` that the kernel changes; none where it refuses the call.
fn affected(nr: libc::c_long, args: [u64; 6]) -> Vec<(u128, u128)> {
    let page = PAGE as u128;
    let up = |value: u64| u128::from(value).next_multiple_of(page);
    let legal =
        |(from, to): &(u128, u128)| from < to && *to <= 1 << 47 && from.is_multiple_of(page);
    let [a, b, c, d, e, _] = args;
    let span = |at: u64, len: u64| (u128::from(at), u128::from(at) + up(len));
    let spans = match nr {
        libc::SYS_munmap
        | libc::SYS_mmap
        | libc::SYS_madvise
        | libc::SYS_mprotect
        | libc::SYS_pkey_mprotect => vec![span(a, b)],
        libc::SYS_mremap => {
            let fixed = d & libc::MREMAP_FIXED as u64 != 0;
            let leaves = d & libc::MREMAP_DONTUNMAP as u64 != 0;
            let moves = d & libc::MREMAP_MAYMOVE as u64 != 0;
            if d > 7 || (fixed || leaves) && !moves || leaves && up(c) != up(b) {
                return Vec::new();
            }
            // As many pages as before stay where they are.
            if !fixed && !leaves && up(c) == up(b) {
                return Vec::new();
            }
            // More than there are addresses is refused.
            if up(c) > 1 << 47 {
                return Vec::new();
            }
            let old = if fixed || c >= b {
                span(a, b)
            } else {
                (u128::from(a) + up(c), u128::from(a) + up(b))
            };
            let new = if fixed { span(e, c) } else { old };
            // Either is refused if the other is.
            if fixed && !(legal(&old) && legal(&new)) {
                return Vec::new();
            }
            vec![old, new]
        }
        _ => return Vec::new(),
    };
    spans.into_iter().filter(legal).collect()
}

fn is_told(changes: &Changes, at: u128) -> bool {
    let holds = |range: crate::Range| {
        u128::from(range.start().get()) <= at && at <= u128::from(range.last().get())
    };
    changes.everything || changes.iter().any(|(range, _)| holds(range))
}

/// Whatever a call changes is told.
pub fn seccomp_call(bytes: &[u8]) {
    let number = |at: usize| -> u64 {
        let own = bytes.get(at..).unwrap_or_default();
        own.iter()
            .take(8)
            .rev()
            .fold(0, |value, byte| value << 8 | u64::from(*byte))
    };
    let selector = libc::c_long::from(bytes.first().copied().unwrap_or(0));
    let nr = match CALLS.iter().find(|nr| **nr == selector) {
        Some(nr) => *nr,
        None => CALLS[selector as usize % CALLS.len()],
    };
    let args: [u64; 6] = std::array::from_fn(|nth| number(4 + 8 * nth));
    let data = libc::seccomp_data {
        nr: nr as libc::c_int,
        arch: 0,
        instruction_pointer: 0,
        args,
    };
    let mut call = Call::new(&data);
    static MAPS: OnceLock<Maps> = OnceLock::new();
    let maps = MAPS.get_or_init(|| Maps::open().expect("this process has mappings"));
    let mut changes = Changes::default();
    call.changes(&StandIn::AsItIs, maps, &mut changes);
    for (from, to) in affected(nr, args) {
        let middle = from + (to - from) / 2 / PAGE as u128 * PAGE as u128;
        for at in [from, middle, to - 1] {
            assert!(is_told(&changes, at), "{nr}{args:x?}: {at:#x} is not told");
        }
    }
    let refused = call.outcome(Err(libc::ENOSYS), maps);
    assert_eq!(
        refused,
        crate::Outcome::Unchanged,
        "refused, and told as done"
    );
}
