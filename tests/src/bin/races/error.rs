//! What keeps the table from being made.

use std::io;
use std::path::PathBuf;

/// Each names what failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(
        "the catalogue has no race or plant called {name:?}: run without a name to see all of them"
    )]
    NoSuchRace { name: String },
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("`{command}` could not be started: {source}")]
    NotStarted { command: String, source: io::Error },
    #[error("`{command}` failed:\n{output}")]
    Build { command: String, output: String },
    #[error("the build made no test program {target:?}: the table names one that is not there")]
    NoProgram { target: String },
    #[error("{race}: {test} does not pass with every guard in place, so that its failure would prove nothing ({why}); its output: {}", log.display())]
    Baseline {
        race: &'static str,
        test: String,
        why: String,
        log: PathBuf,
    },
    #[error("the report could not be written: {0}")]
    Report(serde_json::Error),
}

impl Error {
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::NoSuchRace { .. } => 2,
            _ => 3,
        }
    }
}

/// Adds the path to an error of the file system.
pub(crate) fn at<T>(path: &std::path::Path, result: io::Result<T>) -> Result<T, Error> {
    result.map_err(|source| Error::File {
        path: path.to_owned(),
        source,
    })
}
