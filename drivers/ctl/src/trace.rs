//! The flight recorder as a trace for Chrome's and Perfetto's viewers.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};

use serde_json::json;
use shootdown::{Kind, Record};

/// The phase that ends with a record.
fn phase(kind: Kind) -> Option<&'static str> {
    match kind {
        Kind::Quiesced => Some("quiesce"),
        Kind::Dispatched => Some("issue"),
        Kind::Flushed => Some("sync"),
        Kind::End => Some("cut off, change, end"),
        _ => None,
    }
}

/// Writes one event a phase, one row a shard of the recorder; everything else is an instant.
pub(crate) fn write(mut file: File, records: &[Record]) -> io::Result<()> {
    let mut before: HashMap<u64, &Record> = HashMap::new();
    let mut events = Vec::new();
    for record in records {
        let micros = |record: &Record| record.at.as_secs_f64() * 1e6;
        if let Some(name) = phase(record.kind) {
            if let Some(start) = before.insert(record.subject, record) {
                events.push(json!({
                    "name": name, "ph": "X", "pid": 1, "tid": record.shard,
                    "ts": micros(start), "dur": micros(record) - micros(start),
                    "args": { "operation": format!("{:#x}", record.subject) },
                }));
            }
            continue;
        }
        if record.kind == Kind::Start {
            before.insert(record.subject, record);
        }
        events.push(json!({
            "name": format!("{:?}", record.kind), "ph": "i", "s": "t", "pid": 1, "tid": record.shard,
            "ts": micros(record),
            "args": { "subject": format!("{:#x}", record.subject), "a": format!("{:#x}", record.a), "b": format!("{:#x}", record.b) },
        }));
    }
    file.write_all(&serde_json::to_vec(&json!({ "traceEvents": events }))?)
}
