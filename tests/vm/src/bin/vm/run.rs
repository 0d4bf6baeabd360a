//! One boot: reads what guest and IOMMU say until QEMU ends, and makes the report of it.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, PipeReader, Write};
use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use shootdown_vm::protocol::Line;
use shootdown_vm::trace::{Item, Splitter};
use shootdown_vm::witness::Witness;

use crate::error::{Error, at};
use crate::process::{TICK, check};
use crate::qemu::{Boot, GOOD_EXIT};
use crate::report::{Check, Report};

/// How long a guest may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) whole: Duration,
    pub(crate) silence: Duration,
}

/// Boots and reports. An error means that there was no boot; what goes wrong in one is in the report.
pub(crate) fn run(boot: &Boot<'_>, log: &Path, limits: Limits) -> Result<Report, Error> {
    let file = at(log, File::create(log))?;
    let begun = Instant::now();
    let (mut qemu, pipe) = boot.start()?;
    let (sender, lines) = mpsc::channel();
    let reader = std::thread::spawn(move || read(pipe, file, &sender));
    let mut reading = Reading::new(begun, log);
    let ended = reading.follow(&lines, limits)?;
    if !ended {
        drop(qemu);
        // The pipe has ended with QEMU.
        let _ = reader.join();
        reading.close();
        return Ok(reading.report);
    }
    let status = at(log, qemu.0.wait())?;
    match reader.join() {
        Ok(copied) => at(log, copied)?,
        Err(_) => reading
            .report
            .broken
            .push("the thread that reads the console panicked".into()),
    }
    if status.code() != Some(GOOD_EXIT) {
        reading.report.broken.push(format!(
            "QEMU ended with {status} instead of {GOOD_EXIT}: the guest did not come to its end{}",
            reading.last_words()
        ));
    }
    reading.close();
    Ok(reading.report)
}

/// Copies the pipe to the log, and each line with the time it came to the other thread.
fn read(pipe: PipeReader, log: File, lines: &Sender<(Instant, String)>) -> std::io::Result<()> {
    let mut pipe = BufReader::new(pipe);
    let mut log = BufWriter::new(log);
    let mut line = Vec::new();
    while pipe.read_until(b'\n', &mut line)? > 0 {
        log.write_all(&line)?;
        if line.last() == Some(&b'\n') {
            line.pop();
        }
        // Nobody listens any more when the run was given up; the log is written all the same.
        let _ = lines.send((Instant::now(), String::from_utf8_lossy(&line).into_owned()));
        line.clear();
    }
    log.flush()
}

struct Reading {
    report: Report,
    begun: Instant,
    splitter: Splitter,
    witness: Witness,
    current: Option<(usize, Instant)>,
    /// The last lines of the guest's kernel and of QEMU.
    others: Vec<String>,
}

impl Reading {
    fn new(begun: Instant, log: &Path) -> Self {
        Self {
            report: Report::new(log),
            begun,
            splitter: Splitter::default(),
            witness: Witness::default(),
            current: None,
            others: Vec::new(),
        }
    }

    /// Until QEMU closes the pipe (true) or a limit is passed (false).
    fn follow(
        &mut self,
        lines: &Receiver<(Instant, String)>,
        limits: Limits,
    ) -> Result<bool, Error> {
        let mut heard = Instant::now();
        loop {
            check()?;
            match lines.recv_timeout(TICK) {
                Ok((when, line)) => {
                    heard = when;
                    match self.splitter.line(&line) {
                        Some(Item::Guest(line)) => self.guest(line, when),
                        Some(Item::Iommu(event)) => self.witness.iommu(event),
                        Some(Item::Other(text)) => self.other(text),
                        None => {}
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(true),
                Err(RecvTimeoutError::Timeout) => {}
            }
            let late = [
                (self.begun, limits.whole, "ran for"),
                (heard, limits.silence, "said nothing for"),
            ];
            for (since, limit, what) in late {
                if since.elapsed() > limit {
                    let at = self.place();
                    let words = self.last_words();
                    let seconds = limit.as_secs();
                    let text = format!("the guest {what} {seconds} s ({at}) and was killed{words}");
                    self.report.broken.push(text);
                    return Ok(false);
                }
            }
        }
    }

    fn guest(&mut self, line: Line, when: Instant) {
        let findings = self.witness.guest(&line);
        match line {
            Line::Plan(name) => self.report.checks.push(Check::planned(name)),
            Line::Begin(name) => {
                if self.report.boot_ms == 0 {
                    self.report.boot_ms = millis(self.begun, when);
                }
                match self.report.index(&name) {
                    Some(at) => self.current = Some((at, when)),
                    None => self
                        .report
                        .broken
                        .push(format!("check {name} was not planned")),
                }
            }
            Line::End(name) => match (self.current.take(), findings) {
                (Some((at, since)), Some(findings)) if self.report.checks[at].name == name => {
                    self.report.checks[at].witnessed(&findings, millis(since, when));
                }
                _ => self
                    .report
                    .broken
                    .push(format!("the end of {name}, which had not begun")),
            },
            Line::Ok(name) => self.verdict(&name, Ok(())),
            Line::Fail(name, why) => self.verdict(&name, Err(why)),
            Line::Figure(name, text) => self.report.figures.push((name, text)),
            Line::Output(name, text) => {
                let output = self.report.outputs.entry(name).or_default();
                output.push_str(&text);
                output.push('\n');
            }
            Line::Note(text) => self.other(text),
            Line::Unmap(_)
            | Line::Unmapped(_)
            | Line::Domains(_)
            | Line::Ats(_)
            | Line::Faults(..)
            | Line::MayFault(..) => {}
        }
    }

    fn verdict(&mut self, name: &str, verdict: Result<(), String>) {
        match self.current {
            Some((at, _)) if self.report.checks[at].name == name => {
                self.report.checks[at].guest = Some(verdict);
            }
            _ => self
                .report
                .broken
                .push(format!("a verdict on {name}, which was not running")),
        }
    }

    fn other(&mut self, text: String) {
        const KEPT: usize = 12;
        if self.others.len() == KEPT {
            self.others.remove(0);
        }
        self.others.push(text);
    }

    fn place(&self) -> String {
        match self.current {
            Some((at, _)) => format!("in {}", self.report.checks[at].name),
            None => "outside of any check".into(),
        }
    }

    fn last_words(&self) -> String {
        self.others
            .iter()
            .fold(String::new(), |text, line| text + "\n    " + line)
    }

    fn close(&mut self) {
        self.report.run_ms = millis(self.begun, Instant::now());
        let stray = self.witness.stray().iter().map(ToString::to_string);
        self.report.broken.extend(stray);
        self.report.judge();
    }
}

fn millis(from: Instant, to: Instant) -> u64 {
    to.saturating_duration_since(from).as_millis() as u64
}
