//! What the author sees at 2 a.m.: the flight recorder in the log, after something went wrong and only then.

mod support;

use std::io::Write;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};

use shootdown::Map;
use support::{Counting, fake, on, space};

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

#[test]
fn a_missed_deadline_dumps_the_flight_recorder_and_a_quiet_run_does_not() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_writer(move || writer.clone())
        .with_ansi(false)
        .finish();
    tracing::subscriber::with_default(subscriber, || {
        let space = space();
        let (device, behaviour) = fake("loses range flushes");
        let buffer = space.map(Map::anonymous(2 << 12)).unwrap();
        let _registration = space
            .register(buffer, Arc::new(Counting::default()), &on(&device))
            .unwrap();
        space.discard(buffer).unwrap();
        assert_eq!(log.text(), "");
        behaviour.loses_ranges.store(true, SeqCst);
        space.unmap(buffer).unwrap();
        let text = log.text();
        assert!(text.contains("WARN") && text.contains("Deadline"), "{text}");
        assert!(
            text.contains(&format!("{:#x}", buffer.start().get())),
            "the range is in it: {text}"
        );
        behaviour.loses_ranges.store(false, SeqCst);
        let another = space.map(Map::anonymous(1 << 12)).unwrap();
        let _other = space
            .register(another, Arc::new(Counting::default()), &on(&device))
            .unwrap();
        space.discard(another).unwrap();
        assert_eq!(log.text(), text, "it is dumped once");
    });
}
