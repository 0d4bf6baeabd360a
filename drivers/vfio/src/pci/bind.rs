//! Handing a function to vfio-pci, and back.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use thiserror::Error;

use super::{Pci, Use, link, read};
use crate::error::VfioError;

/// Why a function could not be handed over. It is as it was.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BindError {
    /// No such function.
    #[error(transparent)]
    Vfio(#[from] VfioError),
    /// vfio-pci is not loaded.
    #[error("the driver vfio-pci is not there: modprobe vfio-pci")]
    NoVfioPci,
    /// Somebody would miss it.
    #[error("{address} is in use: {}", uses.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    InUse {
        /// The function.
        address: String,
        /// What it is used for.
        uses: Vec<Use>,
    },
    /// A file of sysfs could not be written.
    #[error("{}: {source}: {}", path.display(), if source.kind() == io::ErrorKind::PermissionDenied { "run it as root" } else { "see dmesg" })]
    Write {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel did not bind it.
    #[error("{address} is bound to {} instead of vfio-pci: see dmesg", driver.as_deref().unwrap_or("nothing"))]
    NotBound {
        /// The function.
        address: String,
        /// Who has it.
        driver: Option<String>,
    },
}

const VFIO_PCI: &str = "vfio-pci";
/// How long the kernel may take to bind it.
const PATIENCE: Duration = Duration::from_secs(2);

/// A function that is lent to vfio-pci. Dropping it gives it back to whoever had it.
#[derive(Debug)]
#[must_use = "dropping it gives the function back"]
pub struct Bound {
    pci: Pci,
    address: String,
    before: Option<String>,
    override_before: String,
}

fn write(path: PathBuf, text: &str) -> Result<(), BindError> {
    fs::write(&path, text).map_err(|source| BindError::Write { path, source })
}

impl Pci {
    /// Hands the function at `address` to vfio-pci, through its `driver_override`. `None` if vfio-pci has it already.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn bind(&self, address: &str) -> Result<Option<Bound>, BindError> {
        let path = self.directory(address)?;
        let before = link(&path.join("driver"));
        if before.as_deref() == Some(VFIO_PCI) {
            return Ok(None);
        }
        if !self.root.join("drivers").join(VFIO_PCI).is_dir() {
            return Err(BindError::NoVfioPci);
        }
        let uses = self.uses(address)?;
        if !uses.is_empty() {
            return Err(BindError::InUse {
                address: address.to_owned(),
                uses,
            });
        }
        let override_before = read(&path.join("driver_override")).unwrap_or_default();
        let bound = Bound {
            pci: self.clone(),
            address: address.to_owned(),
            before,
            override_before,
        };
        // From here on dropping it undoes what was done.
        write(path.join("driver_override"), VFIO_PCI)?;
        bound.rebind(&path)?;
        let begun = Instant::now();
        loop {
            let driver = link(&path.join("driver"));
            if driver.as_deref() == Some(VFIO_PCI) {
                return Ok(Some(bound));
            }
            if begun.elapsed() >= PATIENCE {
                return Err(BindError::NotBound {
                    address: address.to_owned(),
                    driver,
                });
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Bound {
    /// The driver that had it, and will have it again.
    pub fn before(&self) -> Option<&str> {
        self.before.as_deref()
    }

    /// Takes it from who has it, and asks the kernel for who should.
    fn rebind(&self, path: &Path) -> Result<(), BindError> {
        if path.join("driver").exists() {
            write(path.join("driver/unbind"), &self.address)?;
        }
        write(self.pci.root.join("drivers_probe"), &self.address)
    }

    fn undo(&self) -> Result<(), BindError> {
        let path = self.pci.directory(&self.address)?;
        // The kernel takes a bare line end for none.
        let text = match self.override_before.as_str() {
            "" | "(null)" => "\n",
            before => before,
        };
        write(path.join("driver_override"), text)?;
        if link(&path.join("driver")) == self.before {
            return Ok(());
        }
        if self.before.is_none() {
            return write(path.join("driver/unbind"), &self.address);
        }
        self.rebind(&path)
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        if let Err(error) = self.undo() {
            tracing::error!(address = %self.address, %error, "not given back to its driver");
        }
    }
}
