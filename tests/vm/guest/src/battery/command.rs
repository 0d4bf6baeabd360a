//! The `shootdown` command, as an operator runs it.

use std::io::{self, Read};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use shootdown_vm::protocol::{Iova, Line};

use super::rig::{SIZE, race};
use crate::check::{Check, Failure, Outcome, check, demand, demand_eq};
use crate::pci::{EDU, Function, NVME};
use crate::port::say;
use crate::raw::Container;

pub(crate) const CHECKS: &[Check] = &[
    check("command:devices-lists-what-there-is", devices),
    check("command:attach-proves-the-shootdown-of-edu", attach),
    check(
        "command:attach-without-vfio-is-status-3-and-names-the-way-out",
        unbound,
    ),
    check("command:attach-bind-borrows-edu-and-puts-it-back", bind_edu),
    check(
        "command:attach-bind-borrows-nvme-from-its-driver",
        bind_nvme,
    ),
    check("command:ctrl-c-gives-a-borrowed-device-back", interrupted),
    check(
        "command:attach-with-the-wrong-driver-is-status-1",
        wrong_driver,
    ),
    check("command:attach-of-a-group-in-use-is-status-3", in_use),
];

/// How long the command may take.
const LIMIT: Duration = Duration::from_secs(15);

/// A run that is over.
struct Done {
    status: Option<i32>,
    out: String,
    error: String,
}

fn start(arguments: &[&str]) -> io::Result<Child> {
    let mut command = Command::new("/shootdown");
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
}

/// Waits for its end. What it prints fits into a pipe.
fn finish(mut child: Child) -> Result<Done, Failure> {
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if begun.elapsed() > LIMIT {
            child.kill()?;
            child.wait()?;
            return Err(Failure::NotSo(format!("the command went on for {LIMIT:?}")));
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let (mut out, mut error) = (String::new(), String::new());
    if let (Some(mut stdout), Some(mut stderr)) = (child.stdout.take(), child.stderr.take()) {
        stdout.read_to_string(&mut out)?;
        stderr.read_to_string(&mut error)?;
    }
    Ok(Done {
        status: status.code(),
        out,
        error,
    })
}

fn run(arguments: &[&str]) -> Result<Done, Failure> {
    finish(start(arguments)?)
}

impl Done {
    fn ended(&self, status: i32) -> Outcome {
        let (out, error) = (&self.out, &self.error);
        demand!(
            self.status == Some(status),
            "status {:?} instead of {status}: {out} {error}",
            self.status
        );
        Ok(())
    }

    fn says(&self, text: &str) -> Outcome {
        let (out, error) = (&self.out, &self.error);
        demand!(
            out.contains(text) || error.contains(text),
            "`{text}` is not in: {out} {error}"
        );
        Ok(())
    }

    /// Lets the host keep it, as a person would see it.
    fn save(&self, name: &str, arguments: &[&str]) {
        let line = |text: &str| say(&Line::Output(name.into(), text.into()));
        line(&format!("$ shootdown {}", arguments.join(" ")));
        self.out.lines().chain(self.error.lines()).for_each(line);
    }
}

/// A device that is with the kernel, not with vfio-pci, until this is dropped.
struct Returned(Function);

impl Returned {
    fn new(function: Function) -> Result<Self, Failure> {
        let this = Self(function);
        this.0.give_back()?;
        Ok(this)
    }
}

impl Drop for Returned {
    fn drop(&mut self) {
        if let Err(error) = self.0.bind_to_vfio() {
            say(&Line::Note(format!(
                "{} could not be handed to vfio-pci again: {error}",
                self.0.address
            )));
        }
    }
}

fn devices() -> Outcome {
    let edu = Function::find(EDU)?;
    let plain = run(&["devices"])?;
    plain.ended(0)?;
    plain.says(&edu.address)?;
    plain.says("vfio-pci")?;
    plain.save("devices.txt", &["devices"]);
    let json = run(&["devices", "--json"])?;
    json.ended(0)?;
    json.says(&format!("\"address\":\"{}\"", edu.address))?;
    json.says("\"attachable_by\":\"edu\"")
}

/// Attaches edu, whose self check arms DMA to its one window and unmaps it. `None`: the machine was too slow for the proof.
fn attach_edu(arguments: &[&str]) -> Result<Option<Done>, Failure> {
    /// Where the command's first window lies.
    const WINDOW: Iova = Iova {
        start: SIZE,
        len: SIZE,
    };
    let edu = Function::find(EDU)?;
    let done = run(&[&["attach", &edu.address], arguments].concat())?;
    let late = done.status == Some(1) && done.out.contains("nothing is proven");
    let announce = if late { Line::MayFault } else { Line::Faults };
    say(&announce(edu.requester(), WINDOW));
    Ok((!late).then_some(done))
}

fn attach() -> Outcome {
    let edu = Function::find(EDU)?;
    let plain = race(|| attach_edu(&[]))?;
    plain.ended(0)?;
    plain.says("PASS")?;
    plain.save("attach-edu.txt", &["attach", &edu.address]);
    let json = race(|| attach_edu(&["--json"]))?;
    json.ended(0)?;
    json.says("\"passed\":true")
}

fn unbound() -> Outcome {
    let edu = Returned::new(Function::find(EDU)?)?;
    demand_eq!(edu.0.driver()?, None, "edu's driver");
    let done = run(&["attach", &edu.0.address])?;
    done.ended(3)?;
    done.says("--bind")?;
    done.save("attach-unbound.txt", &["attach", &edu.0.address]);
    Ok(())
}

fn bind_edu() -> Outcome {
    let edu = Returned::new(Function::find(EDU)?)?;
    let done = race(|| attach_edu(&["--bind"]))?;
    done.ended(0)?;
    done.save("attach-edu-bind.txt", &["attach", &edu.0.address, "--bind"]);
    demand_eq!(
        (edu.0.driver()?, edu.0.promised_to()?),
        (None, None),
        "edu's driver, and whom it is promised to"
    );
    Ok(())
}

/// It is with its own driver, and promised to nobody.
fn is_back(nvme: &Function) -> Outcome {
    demand_eq!(
        (nvme.driver()?, nvme.promised_to()?),
        (Some("nvme".to_owned()), None),
        "the controller's driver, and whom it is promised to"
    );
    Ok(())
}

fn bind_nvme() -> Outcome {
    let nvme = Returned::new(Function::find(NVME)?)?;
    is_back(&nvme.0)?;
    let arguments = ["attach", &nvme.0.address, "--bind", "--scratch"];
    let done = run(&arguments)?;
    done.ended(0)?;
    done.says("lent by nvme")?;
    done.save("attach-nvme-bind.txt", &arguments);
    is_back(&nvme.0)
}

fn interrupted() -> Outcome {
    // The slow one: its check takes seconds.
    let nvme = Returned::new(Function::nth(NVME, 1)?)?;
    is_back(&nvme.0)?;
    let child = start(&["attach", &nvme.0.address, "--bind"])?;
    let begun = Instant::now();
    while nvme.0.driver()?.as_deref() != Some("vfio-pci") {
        demand!(
            begun.elapsed() < LIMIT,
            "the command did not borrow the device"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(300));
    // SAFETY: a child that has not been waited for: the number is its own.
    let sent = unsafe { libc::kill(child.id().cast_signed(), libc::SIGINT) };
    demand_eq!(sent, 0, "kill");
    let done = finish(child)?;
    done.says("interrupted")?;
    is_back(&nvme.0)
}

fn wrong_driver() -> Outcome {
    let nvme = Function::find(NVME)?;
    let done = run(&["attach", &nvme.address, "--driver", "edu"])?;
    done.ended(1)?;
    done.says("FAIL")
}

fn in_use() -> Outcome {
    let edu = Function::find(EDU)?;
    let _holder = Container::of(&edu)?;
    let done = run(&["attach", &edu.address])?;
    done.ended(3)?;
    done.says("error:")
}
