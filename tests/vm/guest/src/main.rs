//! The guest's first process: mounts, inserts the modules, binds the devices to vfio-pci, runs the battery, ends the machine.
//!
//! It runs as PID 1 of the guest that `vm` boots, and refuses to run anywhere else.

mod alloc;
mod bare;
mod battery;
mod boot;
mod check;
mod edu;
mod memory;
mod pci;
mod port;
mod raw;

use std::process::ExitCode;

use shootdown_vm::protocol::Line;

fn main() -> ExitCode {
    if std::process::id() != 1 {
        eprintln!(
            "error: this is the guest's program; run `cargo run --release -p shootdown-vm`, which boots a guest with it"
        );
        return ExitCode::from(2);
    }
    let set_up = port::open()
        .map_err(|error| error.to_string())
        .and_then(|()| boot::boot());
    match set_up {
        Ok(()) => {
            check::run(battery::CHECKS);
            port::end(port::GOOD)
        }
        Err(why) => {
            port::say(&Line::Note(format!("the guest could not be set up: {why}")));
            port::end(port::BAD)
        }
    }
}
