//! Writes the guest's file system: a newc archive as the kernel unpacks it (its Documentation/driver-api/early-userspace).

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, at};
use crate::program::Programs;

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_755;

/// The guest program as `/init`, the command as `/shootdown`, and the modules, in the order in which they are to be inserted, as
/// `/modules/N-NAME`.
pub(crate) fn write(target: &Path, programs: &Programs, modules: &[PathBuf]) -> Result<(), Error> {
    let mut archive = Newc {
        out: Vec::new(),
        inode: 1,
    };
    for directory in ["dev", "proc", "sys", "tmp", "modules"] {
        archive.entry(directory, DIRECTORY, &[]);
    }
    for (name, program) in [("init", &programs.guest), ("shootdown", &programs.command)] {
        archive.entry(name, FILE, &at(program, std::fs::read(program))?);
    }
    for (nth, module) in modules.iter().enumerate() {
        let name = module.file_name().unwrap_or_default().to_string_lossy();
        archive.entry(
            &format!("modules/{nth}-{name}"),
            FILE,
            &at(module, std::fs::read(module))?,
        );
    }
    archive.entry("TRAILER!!!", 0, &[]);
    at(target, write_all(target, &archive.out))
}

fn write_all(target: &Path, bytes: &[u8]) -> io::Result<()> {
    std::fs::File::create(target)?.write_all(bytes)
}

struct Newc {
    out: Vec<u8>,
    inode: u32,
}

impl Newc {
    /// A header of 110 bytes in ASCII, the name, the content; name and content are padded to four bytes.
    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        let links = 1 + u32::from(mode == DIRECTORY);
        let (name_len, len) = (name.len() + 1, content.len());
        let header = format!(
            "070701{:08x}{mode:08x}{zero}{zero}{links:08x}{zero}{len:08x}{zero}{zero}{zero}{zero}{name_len:08x}{zero}{name}\0",
            self.inode,
            zero = "00000000",
        );
        self.inode += 1;
        self.out.extend_from_slice(header.as_bytes());
        self.pad();
        self.out.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.out.resize(self.out.len().next_multiple_of(4), 0);
    }
}
