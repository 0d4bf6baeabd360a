//! The cache outside the source tree: QEMU with its libraries and firmware, and a kernel with its VFIO modules.

use std::path::{Path, PathBuf};

use crate::apt::Apt;
use crate::error::{Error, at};

/// Release of the packages, and number of the layout; another name when what it holds changes, so that an old cache is never taken
/// for a new one.
const CONTENT: &str = "bookworm-1";

const LOADER: &str = "qemu/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2";
const QEMU: &str = "qemu/usr/bin/qemu-system-x86_64";
const KERNEL: &str = "kernel/vmlinuz";

/// In the order in which they are inserted; each needs only those before it.
const MODULES: [&str; 6] = [
    "virt/lib/irqbypass.ko",
    "drivers/vfio/vfio.ko",
    "drivers/vfio/vfio_virqfd.ko",
    "drivers/vfio/vfio_iommu_type1.ko",
    "drivers/vfio/pci/vfio-pci-core.ko",
    "drivers/vfio/pci/vfio-pci.ko",
];

/// What a boot needs, all of it there.
#[derive(Debug)]
pub(crate) struct Machine {
    /// The cache directory.
    pub(crate) root: PathBuf,
    /// The dynamic loader that goes with QEMU's libraries.
    pub(crate) loader: PathBuf,
    /// QEMU.
    pub(crate) qemu: PathBuf,
    /// Where its shared libraries are.
    pub(crate) libraries: [PathBuf; 2],
    /// Where its firmware is.
    pub(crate) firmware: [PathBuf; 2],
    /// The guest's kernel.
    pub(crate) kernel: PathBuf,
    /// Kernel modules, in the order in which they are inserted.
    pub(crate) modules: Vec<PathBuf>,
}

/// Finds the cache, or fills it: into a directory of its own that gets its name when it is complete.
pub(crate) fn provide(archive: Option<&str>) -> Result<Machine, Error> {
    let root = directory()?;
    at(&root, std::fs::create_dir_all(&root))?;
    let root = at(&root, root.canonicalize())?;
    let content = root.join(CONTENT);
    if !content.exists() {
        let scratch = Scratch::new(&root)?;
        eprintln!(
            "fetching QEMU and a kernel (about 64 MB) into {}",
            root.display()
        );
        let filled = fill(scratch.path(), archive)?;
        match std::fs::rename(&filled, &content) {
            // Somebody else was faster: what they made is as good.
            Err(_) if content.exists() => {}
            renamed => at(&content, renamed)?,
        }
    }
    machine(root, &content)
}

fn directory() -> Result<PathBuf, Error> {
    let set = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    set("SHOOTDOWN_VM_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|cache| cache.join("shootdown-vm")))
        .or_else(|| set("HOME").map(|home| home.join(".cache/shootdown-vm")))
        .ok_or(Error::NoCache)
}

fn fill(scratch: &Path, archive: Option<&str>) -> Result<PathBuf, Error> {
    let apt = Apt::new(scratch.join("apt"), archive)?;
    let content = scratch.join("content");
    let qemu = content.join("qemu");
    at(&qemu, std::fs::create_dir_all(&qemu))?;
    apt.unpack(&apt.closure("qemu-system-x86")?, &qemu)?;

    let (package, file) = apt.dependency("linux-image-cloud-amd64", "linux-image-")?;
    let whole = scratch.join("kernel");
    at(&whole, std::fs::create_dir_all(&whole))?;
    apt.unpack(&[file], &whole)?;
    // Of the kernel's 100 MB a few files are wanted.
    let version = package.trim_start_matches("linux-image-");
    let target = content.join("kernel");
    at(&target, std::fs::create_dir_all(&target))?;
    let keep = |file: PathBuf, to: PathBuf| at(&file, std::fs::rename(&file, to));
    keep(
        whole.join(format!("boot/vmlinuz-{version}")),
        content.join(KERNEL),
    )?;
    for module in MODULES {
        let file = whole.join(format!("lib/modules/{version}/kernel/{module}"));
        keep(file, target.join(base(module)))?;
    }
    Ok(content)
}

fn base(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

fn machine(root: PathBuf, content: &Path) -> Result<Machine, Error> {
    let file = |name: &str| {
        let file = content.join(name);
        if file.exists() {
            Ok(file)
        } else {
            Err(Error::Missing {
                package: CONTENT.into(),
                file: name.into(),
                cache: content.to_owned(),
            })
        }
    };
    let modules = MODULES
        .iter()
        .map(|module| file(&format!("kernel/{}", base(module))));
    Ok(Machine {
        loader: file(LOADER)?,
        qemu: file(QEMU)?,
        libraries: [
            file("qemu/lib/x86_64-linux-gnu")?,
            file("qemu/usr/lib/x86_64-linux-gnu")?,
        ],
        firmware: [
            file("qemu/usr/share/qemu")?,
            file("qemu/usr/share/seabios")?,
        ],
        kernel: file(KERNEL)?,
        modules: modules.collect::<Result<_, _>>()?,
        root,
    })
}

/// A directory in the cache that goes when this is dropped.
#[derive(Debug)]
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    /// Makes one. Those that a killed run left are removed first.
    pub(crate) fn new(root: &Path) -> Result<Self, Error> {
        for entry in at(root, std::fs::read_dir(root))?.flatten() {
            let name = entry.file_name();
            let owner = name
                .to_str()
                .and_then(|name| name.strip_prefix("run-")?.split('-').next());
            if owner.is_some_and(|owner| !Path::new("/proc").join(owner).exists()) {
                // Whoever cannot remove it has another owner's in hand, and leaves it.
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
        let nanos = std::time::UNIX_EPOCH
            .elapsed()
            .map_or(0, |since| since.subsec_nanos());
        let path = root.join(format!("run-{}-{nanos}", std::process::id()));
        at(&path, std::fs::create_dir(&path))?;
        Ok(Self(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A file that cannot be removed now is removed by the next run.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
