//! Makes the build that simulates, and becomes it.

use std::convert::Infallible;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use thiserror::Error;

/// Why there is no simulation.
#[derive(Debug, Error)]
pub(crate) enum LaunchError {
    #[error(
        "the simulation is a build of its own, and its sources are not at {} any more: run this where they are, by `cargo run --release -- run --sim`",
        path.display()
    )]
    NoSources { path: PathBuf },
    #[error(
        "the simulation is a build of its own, and {cargo} could not be started: {error}; put Rust's tools into the PATH, or name cargo by CARGO"
    )]
    NoCargo { cargo: String, error: io::Error },
    #[error("the simulation could not be built as {}: cargo ended with {status}", program.display())]
    Build {
        program: PathBuf,
        status: ExitStatus,
    },
    #[error("{} could not be started: {error}", path.display())]
    Start { path: PathBuf, error: io::Error },
}

/// Does not return if it succeeds: the process goes on as the other build, with the same arguments.
pub(crate) fn launch() -> Result<Infallible, LaunchError> {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR"));
    if !sources.join("Cargo.toml").is_file() {
        return Err(LaunchError::NoSources {
            path: sources.to_owned(),
        });
    }
    let own = std::env::current_exe().map_err(|error| LaunchError::Start {
        path: "/proc/self/exe".into(),
        error,
    })?;
    // target/release/shootdown: two levels up.
    let target = own.ancestors().nth(2).unwrap_or(Path::new("target"));
    let program = target.join("sim/shootdown");
    if !program.is_file() {
        eprintln!("building {}, once; this takes a while", program.display());
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(&cargo)
        .args(["build", "--profile", "sim", "--quiet", "--bin", "shootdown"])
        .current_dir(sources)
        .env("CARGO_TARGET_DIR", target)
        .env("RUSTFLAGS", "--cfg sim")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .map_err(|error| LaunchError::NoCargo {
            cargo: cargo.to_string_lossy().into_owned(),
            error,
        })?;
    if !status.success() {
        return Err(LaunchError::Build { program, status });
    }
    let error = Command::new(&program)
        .args(std::env::args_os().skip(1))
        .exec();
    Err(LaunchError::Start {
        path: program,
        error,
    })
}
