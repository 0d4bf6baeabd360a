//! What can keep the tier from running, and the way out.

use std::io;
use std::path::{Path, PathBuf};

/// Each names what is missing and what would mend it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(
        "no directory for the cache: none of SHOOTDOWN_VM_CACHE, XDG_CACHE_HOME and HOME is set; set SHOOTDOWN_VM_CACHE to a directory outside the source tree"
    )]
    NoCache,
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("`{command}` could not be started: {source}; {mend}")]
    NotStarted {
        command: String,
        source: io::Error,
        mend: &'static str,
    },
    #[error("`{command}` failed ({status}): {output}")]
    Failed {
        command: String,
        status: std::process::ExitStatus,
        output: String,
    },
    #[error("`{command}` was still running after {seconds} s and was killed")]
    TooLong { command: String, seconds: u64 },
    #[error(
        "apt's sources name no Debian archive; add one to /etc/apt/sources.list, or give --archive URI (the directory that holds `dists`)"
    )]
    NoArchive,
    #[error("{package} lacks {file}: remove {} and run again", cache.display())]
    Missing {
        package: String,
        file: String,
        cache: PathBuf,
    },
    #[error("apt knows no package that {package} depends on whose name begins with {wanted}")]
    NoDependency {
        package: &'static str,
        wanted: &'static str,
    },
    #[error("the guest program could not be built (`{command}`): {output}")]
    Build { command: String, output: String },
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// 1 for what the project itself did wrong, 130 for Ctrl-C, 3 for what this machine lacks.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Build { .. } => 1,
            Self::Interrupted => 130,
            _ => 3,
        }
    }
}

/// Adds the path to an error of the file system.
pub(crate) fn at<T>(path: &Path, result: io::Result<T>) -> Result<T, Error> {
    result.map_err(|source| Error::File {
        path: path.to_owned(),
        source,
    })
}
