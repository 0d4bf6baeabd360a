//! `shootdown attach ADDR`: a real device through VFIO, its driver's self check, and the proof of the shootdown.

use std::fmt::{self, Display};
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::Serialize;
use shootdown::{AddressSpace, Deadlines, DmaWindow, Interrupts, ProcessMemory, Target};
use shootdown_vfio::pci::{BindError, Bound, Pci};
use shootdown_vfio::{
    Device, FunctionReset, Iommu, IommuError, KernelLog, Kind, Report, Reuse, VfioError,
};
use thiserror::Error;

use crate::devices;

/// What `attach` does.
#[derive(Clone, Debug, Args)]
pub(crate) struct AttachOptions {
    /// The device's PCI address, as `shootdown devices` prints it.
    pub(crate) address: String,
    /// The driver, where it is not to be told from the device's identity.
    #[arg(long, value_enum)]
    pub(crate) driver: Option<Driver>,
    /// Takes the device from its kernel driver for as long as this runs, and gives it back.
    #[arg(long)]
    pub(crate) bind: bool,
    /// nvme: the namespace may be written to. Blocks are put back as they were.
    #[arg(long)]
    pub(crate) scratch: bool,
    /// Prints the report as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// A driver of this program.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Driver {
    /// QEMU's edu.
    Edu,
    /// NVMe controllers.
    Nvme,
}

/// Why nothing could be checked.
#[derive(Debug, Error)]
pub(crate) enum AttachError {
    /// What VFIO says.
    #[error(transparent)]
    Vfio(#[from] VfioError),
    /// It could not be handed to vfio-pci.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// What stands in the way, line by line.
    #[error("{address} cannot be attached:\n  {}", missing.join("\n  "))]
    Missing {
        address: String,
        missing: Vec<String>,
    },
    /// No driver for it.
    #[error(
        "there is no driver here for {device}: edu and nvme are there; name one with --driver if it is one of them"
    )]
    NoDriver { device: String },
    /// No address space.
    #[error("no address space could be reserved: {0}")]
    Reserve(#[from] std::io::Error),
    /// No IOMMU.
    #[error(transparent)]
    Iommu(#[from] IommuError),
}

/// A step of the check.
#[derive(Debug, Serialize)]
struct Step {
    check: &'static str,
    microseconds: u64,
    /// The shootdown in it, from the call to its return.
    shootdown_microseconds: Option<u64>,
    /// The fault of the device that the kernel's log told of, if it did.
    fault: Option<String>,
    error: Option<String>,
}

/// What came of it.
#[derive(Debug, Serialize)]
pub(crate) struct Attached {
    address: String,
    vendor: u16,
    device: u16,
    group: u32,
    driver: Driver,
    /// Who had it before, and has it again.
    lent_by: Option<String>,
    steps: Vec<Step>,
    passed: bool,
}

impl Attached {
    pub(crate) fn passed(&self) -> bool {
        self.passed
    }
}

/// Addresses up to here every edu can form, whatever `dma_mask` QEMU gave it: 28 bits are its default.
const EDU_LAST: u64 = (1 << 28) - 1;
/// Address space for what the checks map.
const ARENA: usize = 64 << 20;

/// Attaches the device, checks it, and gives it back.
///
/// # Errors
/// Something is missing: what, and what would mend it.
pub(crate) fn run(options: &AttachOptions) -> Result<Attached, AttachError> {
    let pci = Pci::default();
    let function = pci.function(&options.address)?;
    let driver = match (options.driver, devices::driver_for(&function)) {
        (Some(driver), _) => driver,
        (None, Some("edu")) => Driver::Edu,
        (None, Some("nvme")) => Driver::Nvme,
        _ => {
            return Err(AttachError::NoDriver {
                device: function.to_string(),
            });
        }
    };
    let complete = |missing: Vec<String>| {
        if missing.is_empty() {
            return Ok(());
        }
        Err(AttachError::Missing {
            address: options.address.clone(),
            missing,
        })
    };
    // Before anything is taken from anybody.
    complete(devices::blocking(&pci, &function))?;
    let bound = if options.bind {
        pci.bind(&options.address)?
    } else {
        None
    };
    complete(devices::missing(&pci, &pci.function(&options.address)?))?;
    let device = Arc::new(shootdown_vfio::open(&options.address)?);
    let steps = check(&device, driver, options.scratch);
    // The device before the loan: its driver gets it back when nobody has it any more.
    drop(device);
    let lent_by = bound.as_ref().and_then(Bound::before).map(str::to_owned);
    drop(bound);
    let (steps, passed) = steps?;
    Ok(Attached {
        address: function.address,
        vendor: function.vendor,
        device: function.device,
        group: function.group.unwrap_or_default(),
        driver,
        lent_by,
        steps,
        passed,
    })
}

fn check(
    device: &Arc<Device>,
    driver: Driver,
    scratch: bool,
) -> Result<(Vec<Step>, bool), AttachError> {
    device.set_bus_master(true)?;
    let endpoints = device.container().cloned();
    let endpoints = endpoints.map(|one| one as Arc<dyn DmaWindow>);
    let iommu = Iommu::new(endpoints.into_iter().collect(), Reuse::Never)?;
    // Without the right to read it the check proves as much, and shows less.
    if let Ok(log) = KernelLog::open(device.address()) {
        iommu.watch(Arc::new(log));
    }
    let memory = Arc::new(ProcessMemory::reserve(ARENA)?);
    let space = AddressSpace::managed(memory, Deadlines::default());
    let registers = Arc::new(device.region(0)?);
    let interrupts = interrupts(device)?;
    Ok(match driver {
        Driver::Edu => {
            let ports = shootdown_edu::CheckPorts {
                registers,
                interrupts,
                iommu: &iommu,
                space: &space,
                last: EDU_LAST,
                config: shootdown_edu::EduConfig::default(),
            };
            steps(
                shootdown_edu::self_check(&ports),
                shootdown_edu::Check::name,
            )
        }
        Driver::Nvme => {
            let reset = FunctionReset::new(device.clone());
            let target = Target {
                device: shootdown::Device::new(device.address(), reset),
                tag: 0,
            };
            let ports = shootdown_nvme::NvmePorts {
                registers,
                interrupts,
                iommu,
                space,
                targets: vec![target],
            };
            let config = shootdown_nvme::NvmeConfig::default();
            steps(
                shootdown_nvme::self_check(&ports, config, scratch),
                shootdown_nvme::Check::name,
            )
        }
    })
}

/// One vector of the best kind that the device has.
fn interrupts(device: &Device) -> Result<Arc<dyn Interrupts>, VfioError> {
    for kind in [Kind::MsiX, Kind::Msi] {
        if device.vectors(kind)? > 0 {
            return Ok(Arc::new(device.interrupts(kind, 1)?));
        }
    }
    Ok(Arc::new(device.interrupts(Kind::Intx, 1)?))
}

fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn steps<C: Copy, E: Display>(
    report: Report<C, E>,
    name: impl Fn(C) -> &'static str,
) -> (Vec<Step>, bool) {
    let passed = report.passed();
    let steps = report.steps.into_iter().map(|step| Step {
        check: name(step.check),
        microseconds: microseconds(step.took),
        shootdown_microseconds: step.shootdown.map(microseconds),
        fault: step.fault.map(|fault| fault.to_string()),
        error: step.result.err().map(|error| error.to_string()),
    });
    (steps.collect(), passed)
}

impl Display for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            address,
            vendor,
            device,
            group,
            driver,
            ..
        } = self;
        let driver = format!("{driver:?}").to_lowercase();
        writeln!(
            f,
            "{address} ({vendor:04x}:{device:04x}), group {group}, driver {driver}"
        )?;
        if let Some(before) = &self.lent_by {
            writeln!(f, "lent by {before}, which has it again")?;
        }
        writeln!(f)?;
        for step in &self.steps {
            let verdict = if step.error.is_none() { "ok" } else { "FAILED" };
            let milliseconds = step.microseconds as f64 / 1000.0;
            write!(f, "  {:<66} {milliseconds:>9.1} ms  {verdict}", step.check)?;
            if let Some(shootdown) = step.shootdown_microseconds {
                write!(f, ", shootdown in {shootdown} us")?;
            }
            writeln!(f)?;
            if let Some(fault) = &step.fault {
                writeln!(f, "    IOMMU fault: {fault}")?;
            }
            if let Some(error) = &step.error {
                writeln!(f, "    {error}")?;
            }
        }
        writeln!(f)?;
        if self.passed {
            writeln!(
                f,
                "PASS: what was cut off was out of the device's reach when the call returned"
            )
        } else {
            writeln!(f, "FAIL")
        }
    }
}
