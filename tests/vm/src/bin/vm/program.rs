//! Builds what runs in the guest, linked statically, as the guest has no libraries: its first process, and the project's command.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Error, at};
use crate::process::shown;

/// A target named explicitly keeps the flags from build scripts and procedural macros, which cannot be static.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What runs in the guest.
#[derive(Debug)]
pub(crate) struct Programs {
    /// The guest's first process.
    pub(crate) guest: PathBuf,
    /// `shootdown`, which it runs.
    pub(crate) command: PathBuf,
}

/// Builds them beside this program's own build.
pub(crate) fn build() -> Result<Programs, Error> {
    let own = at(Path::new("/proc/self/exe"), std::env::current_exe())?;
    // target/release/vm: two levels up is the directory of all builds.
    let builds = own.ancestors().nth(2).unwrap_or(Path::new("target"));
    let target = builds.join("vm-guest");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    let mut command = Command::new(cargo);
    command
        .args([
            "build",
            "--release",
            "--quiet",
            "--locked",
            "--package",
            "shootdown-vm-guest",
            "--package",
            "shootdown-cli",
            "--bin",
            "guest",
            "--bin",
            "shootdown",
            "--target",
            TARGET,
        ])
        .arg("--manifest-path")
        .arg(manifest)
        .arg("--target-dir")
        .arg(&target)
        // It is copied into the guest at each boot: no symbols.
        .env("CARGO_PROFILE_RELEASE_DEBUG", "false")
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
        // Little of it is hot, and most of a first run is spent building it.
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("CARGO_BUILD_TARGET");
    let shown = shown(&command);
    let output = command.output().map_err(|source| Error::NotStarted {
        command: shown.clone(),
        source,
        mend: "install a Rust toolchain",
    })?;
    if !output.status.success() {
        let output = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(Error::Build {
            command: shown,
            output,
        });
    }
    let release = target.join(TARGET).join("release");
    Ok(Programs {
        guest: release.join("guest"),
        command: release.join("shootdown"),
    })
}
