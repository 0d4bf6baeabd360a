//! Message queues: order, limits, and what becomes of messages that are not delivered.

use super::rig::{Instr, Rig};
use crate::gru::layout::cb;
use crate::gru::{ChipletConfig, FaultPlan};

fn send(base: u64, lines: u64) -> Instr {
    Instr {
        opcode: 8,
        element: 6,
        base0: base,
        count: lines,
        tri0: 64,
        ..Instr::default()
    }
}

fn substatus(rig: &Rig) -> u64 {
    cb::SUBSTATUS.get(rig.read(Rig::cb(0, 0, 0)))
}

#[test]
fn a_full_message_queue_refuses_and_a_queue_keeps_the_order() {
    let (rig, base) = Rig::started(ChipletConfig::default());
    // Head and limit in lines: room for four messages of one line, from line 2 on.
    rig.poke(base, &(2_u64 | 6 << 32).to_le_bytes());
    let send = send(base, 1);
    let substatus = || substatus(&rig);
    for message in 0..4 {
        rig.write(Rig::dsr(0, 64), 100 + message);
        assert_eq!(rig.run(0, &send), Ok((2 + message) | 6 << 32));
        assert_eq!(substatus(), 0);
    }
    rig.run(0, &send).unwrap();
    assert_eq!(substatus(), cb::QUEUE_LIMIT);
    for message in 0..4 {
        let line = rig.peek(base + (2 + message) * 64, 8);
        assert_eq!(line, (100 + message).to_le_bytes());
    }
    // A slot in the next page is claimed, and left to software.
    rig.poke(base, &(63_u64 | 70 << 32).to_le_bytes());
    rig.run(0, &send).unwrap();
    assert_eq!(rig.run(0, &send), Ok(64 | 70 << 32));
    assert_eq!(substatus(), cb::PAGE_OVERFLOW);
}

#[test]
fn a_message_that_does_not_fit_below_the_limit_leaves_the_queue_as_it_was() {
    let (rig, base) = Rig::started(ChipletConfig::default());
    let queue = 2_u64 | 5 << 32;
    rig.poke(base, &queue.to_le_bytes());
    rig.run(0, &send(base, 2)).unwrap();
    assert_eq!(substatus(&rig), 0);
    let memory = rig.peek(base, 4096);
    rig.run(0, &send(base, 2)).unwrap();
    assert_eq!(substatus(&rig), cb::QUEUE_LIMIT);
    assert!(
        rig.peek(base, 4096) == memory,
        "one line was left, two were sent"
    );
    rig.run(0, &send(base, 1)).unwrap();
    assert_eq!(substatus(&rig), 0);
    rig.run(0, &send(base, 1)).unwrap();
    assert_eq!(substatus(&rig), cb::QUEUE_LIMIT);
}

#[test]
fn a_message_that_is_not_delivered_has_claimed_its_lines_or_not_as_its_result_says() {
    let config = ChipletConfig {
        faults: FaultPlan {
            nack: 0.7,
            ..FaultPlan::default()
        },
        ..ChipletConfig::default()
    };
    let (rig, base) = Rig::started(config);
    let mut results = [0; 6];
    for round in 0..200 {
        rig.poke(base, &(2_u64 | 40 << 32).to_le_bytes());
        rig.poke(base + 128, &[0; 64]);
        rig.write(Rig::dsr(0, 64), 1000 + round);
        rig.run(0, &send(base, 1)).unwrap();
        let head = rig.peek(base, 4);
        let line = rig.peek(base + 128, 8);
        let result = substatus(&rig);
        results[result as usize] += 1;
        let claimed = matches!(result, 0 | cb::PUT_NACKED);
        assert_eq!(head, if claimed { 3_u32 } else { 2 }.to_le_bytes());
        let stored = if result == 0 { 1000 + round } else { 0 };
        assert_eq!(line, stored.to_le_bytes());
    }
    let counts = rig.chiplet.counts();
    assert_eq!(
        (counts.messages, counts.nacks),
        (results[0], 200 - results[0])
    );
    for nack in [cb::LB_OVERFLOW, cb::AMO_NACKED, cb::PUT_NACKED] {
        assert!(results[nack as usize] > 0, "{results:?}");
    }
}
