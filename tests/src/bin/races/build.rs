//! The builds, each made once and when it is first needed.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Deserialize;

use crate::error::{Error, at};
use crate::run::shown;

/// One way of building tests.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Kind {
    /// Core under the model checker, with guards that can be taken out.
    Models,
    /// Core, and the windows over it, with guards that can be taken out.
    Core,
    /// The GRU driver's tests as they are.
    Drivers,
}

impl Kind {
    /// One package each: another's test may go by the same name.
    fn builds(self) -> &'static [&'static [&'static str]] {
        match self {
            Self::Models => &[&["-p", "shootdown", "--release", "--lib"]],
            Self::Core => &[
                &[
                    "-p",
                    "shootdown",
                    "--test",
                    "guards",
                    "--test",
                    "source_uffd",
                    "--test",
                    "source_unotify",
                    "--test",
                    "no_alloc",
                    "--test",
                    "source_no_alloc",
                    "--test",
                    "shootdown",
                ],
                &["-p", "shootdown-vfio", "--test", "windows"],
            ],
            Self::Drivers => &[&["-p", "shootdown-gru", "--test", "model"]],
        }
    }

    /// The flags, and the directory below that of all builds.
    fn apart(self) -> Option<(&'static str, &'static str)> {
        match self {
            Self::Models => Some(("--cfg loom --cfg planted", "planted-loom")),
            Self::Core => Some(("--cfg planted", "planted")),
            Self::Drivers => None,
        }
    }
}

/// A test program.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    pub(crate) path: PathBuf,
    /// Where cargo would run it.
    pub(crate) package: PathBuf,
}

/// What cargo says of each thing that it has made, as far as it matters here.
#[derive(Deserialize)]
struct Artifact {
    manifest_path: PathBuf,
    target: Target,
    executable: PathBuf,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

pub(crate) struct Builds {
    cargo: OsString,
    workspace: PathBuf,
    /// The directory of all builds.
    target: PathBuf,
    made: HashMap<Kind, HashMap<String, Program>>,
}

impl Builds {
    pub(crate) fn new() -> Result<Self, Error> {
        let own = at(Path::new("/proc/self/exe"), std::env::current_exe())?;
        // target/release/races: two levels up.
        let target = own.ancestors().nth(2).unwrap_or(Path::new("target"));
        let package = Path::new(env!("CARGO_MANIFEST_DIR"));
        Ok(Self {
            cargo: std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()),
            workspace: package.parent().unwrap_or(package).to_owned(),
            target: target.to_owned(),
            made: HashMap::new(),
        })
    }

    /// Where the output of the checks is kept.
    pub(crate) fn logs(&self) -> PathBuf {
        self.target.join("races")
    }

    fn cargo(&self) -> Command {
        let mut command = Command::new(&self.cargo);
        command
            .current_dir(&self.workspace)
            .env("CARGO_TARGET_DIR", &self.target)
            .env("CARGO_INCREMENTAL", "0")
            .stdin(Stdio::null());
        command
    }

    fn output(command: &mut Command) -> Result<String, Error> {
        let output = command.output().map_err(|source| Error::NotStarted {
            command: shown(command),
            source,
        })?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(Error::Build {
            command: shown(command),
            output: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// The test program `target`.
    pub(crate) fn program(&mut self, kind: Kind, target: &str) -> Result<Program, Error> {
        if !self.made.contains_key(&kind) {
            let made = self.make(kind)?;
            self.made.insert(kind, made);
        }
        self.made[&kind]
            .get(target)
            .cloned()
            .ok_or_else(|| Error::NoProgram {
                target: target.to_owned(),
            })
    }

    fn make(&self, kind: Kind) -> Result<HashMap<String, Program>, Error> {
        let mut programs = HashMap::new();
        for arguments in kind.builds() {
            let mut command = self.cargo();
            command
                .args([
                    "test",
                    "--no-run",
                    "--message-format",
                    "json-render-diagnostics",
                ])
                .args(*arguments);
            if let Some((flags, directory)) = kind.apart() {
                command
                    .env("RUSTFLAGS", flags)
                    .env_remove("CARGO_ENCODED_RUSTFLAGS")
                    .env("CARGO_TARGET_DIR", self.target.join(directory));
            }
            let messages = Self::output(&mut command)?;
            // Most lines are of another shape.
            let made = messages
                .lines()
                .filter_map(|line| serde_json::from_str::<Artifact>(line).ok());
            for made in made {
                let package = made.manifest_path.parent().unwrap_or(&self.workspace);
                let program = Program {
                    path: made.executable,
                    package: package.to_owned(),
                };
                programs.insert(made.target.name, program);
            }
        }
        Ok(programs)
    }

    /// The `shootdown` command.
    pub(crate) fn shootdown(&self) -> Result<PathBuf, Error> {
        let mut command = self.cargo();
        command.args(["build", "--release", "-p", "shootdown-cli"]);
        Self::output(&mut command)?;
        Ok(self.target.join("release/shootdown"))
    }

    /// The tier of the virtual machine.
    pub(crate) fn vm(&self) -> Result<PathBuf, Error> {
        let mut command = self.cargo();
        command.args(["build", "--release", "-p", "shootdown-vm", "--bin", "vm"]);
        Self::output(&mut command)?;
        Ok(self.target.join("release/vm"))
    }
}
