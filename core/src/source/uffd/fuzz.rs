//! Events, as a kernel may send them.

use super::sys::{Event, Message};

/// A message tells of every address that it names, or of everything.
pub fn uffd_event(bytes: &[u8]) {
    let mut message = Message::default();
    let len = bytes.len().min(message.len());
    message[..len].copy_from_slice(&bytes[..len]);
    let argument = |nth: usize| {
        let at = 8 + 8 * nth;
        u64::from_ne_bytes(message[at..at + 8].try_into().expect("eight bytes"))
    };
    let (a, b, c) = (argument(0), argument(1), argument(2));
    let (event, child) = Event::parse(&message);
    assert_eq!(child, (event == Event::Fork).then_some(a as i32));
    let exactly = |range: crate::Range, start: u64, end: u128| {
        assert_eq!(u128::from(range.start().get()), u128::from(start));
        assert_eq!(u128::from(range.last().get()) + 1, end);
    };
    match event {
        Event::Fork => assert_eq!(message[0], 0x13),
        Event::Remap(from, to) => {
            assert_eq!(message[0], 0x14);
            exactly(from, a, u128::from(a) + u128::from(c));
            if let Some(to) = to {
                exactly(to, b, u128::from(b) + u128::from(c));
            }
        }
        Event::Remove(range) | Event::Unmap(range) => {
            assert_eq!(
                message[0],
                if event == Event::Unmap(range) {
                    0x16
                } else {
                    0x15
                }
            );
            exactly(range, a, b.into());
        }
        Event::Unknown => match message[0] {
            0x13 => panic!("a fork is known"),
            0x14 => assert!(c == 0 || a.checked_add(c - 1).is_none()),
            0x15 | 0x16 => assert!(b <= a),
            _ => {}
        },
    }
}
