//! `shootdown devices`: the PCI functions of this machine, and what stands between each and VFIO.

use std::fmt;

use clap::Args;
use serde::Serialize;
use shootdown_vfio::VfioError;
use shootdown_vfio::pci::{Function, Pci};

/// What `devices` prints.
#[derive(Clone, Debug, Args)]
pub(crate) struct DevicesOptions {
    /// Prints the list as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// One function.
#[derive(Debug, Serialize)]
struct Entry {
    address: String,
    vendor: u16,
    device: u16,
    class: u32,
    driver: Option<String>,
    group: Option<u32>,
    /// The other functions of the group.
    with: Vec<String>,
    viable: bool,
    /// What has to be done before it can be attached; nothing if it can.
    missing: Vec<String>,
    resets: Vec<String>,
    ats: Option<bool>,
    pri: Option<bool>,
    pasid: Option<bool>,
    /// The driver of this program that `attach` would use.
    attachable_by: Option<&'static str>,
}

/// All of them.
#[derive(Debug, Serialize)]
pub(crate) struct Devices {
    devices: Vec<Entry>,
}

/// The driver of this program for a function.
pub(crate) fn driver_for(function: &Function) -> Option<&'static str> {
    match (function.vendor, function.device, function.class) {
        (0x1234, 0x11e8, _) => Some("edu"),
        (_, _, 0x01_0802) => Some("nvme"),
        _ => None,
    }
}

/// Reads sysfs.
///
/// # Errors
/// There is none.
pub(crate) fn list(pci: &Pci) -> Result<Devices, VfioError> {
    let functions = pci.functions()?;
    let devices = functions.into_iter().map(|function| entry(pci, function));
    Ok(Devices {
        devices: devices.collect(),
    })
}

fn entry(pci: &Pci, function: Function) -> Entry {
    let group = pci.group_of(&function.address);
    let missing = missing(pci, &function);
    let others = group.iter().flat_map(|group| &group.members);
    Entry {
        with: others
            .filter(|one| one.address != function.address)
            .map(|one| one.address.clone())
            .collect(),
        viable: group.is_ok_and(|group| group.is_viable()),
        missing,
        attachable_by: driver_for(&function),
        ats: function.translation.map(|one| one.ats),
        pri: function.translation.map(|one| one.pri),
        pasid: function.translation.map(|one| one.pasid),
        address: function.address,
        vendor: function.vendor,
        device: function.device,
        class: function.class,
        driver: function.driver,
        group: function.group,
        resets: function.resets,
    }
}

/// The class of bridges of all kinds: nothing that a driver here could use.
const BRIDGE: u32 = 0x06;

/// What keeps VFIO from having the function's group, the function's own driver aside; each with what would mend it.
pub(crate) fn blocking(pci: &Pci, function: &Function) -> Vec<String> {
    let group = match pci.group_of(&function.address) {
        Ok(group) => group,
        Err(error) => return vec![error.to_string()],
    };
    let others = group
        .members
        .iter()
        .filter(|one| one.blocks() && one.address != function.address);
    others
        .map(|one| {
            format!(
                "{0} of the same group {1} is bound to {2}: echo {0} > /sys/bus/pci/devices/{0}/driver/unbind",
                one.address,
                group.number,
                one.driver.as_deref().unwrap_or_default()
            )
        })
        .collect()
}

/// All that keeps VFIO from having the function.
pub(crate) fn missing(pci: &Pci, function: &Function) -> Vec<String> {
    if function.class >> 16 == BRIDGE {
        return vec!["it is a bridge: attach what is behind it".to_owned()];
    }
    let mut missing = blocking(pci, function);
    if missing.is_empty() && function.driver.as_deref() != Some("vfio-pci") {
        let has = match &function.driver {
            Some(driver) => format!("it is bound to {driver}"),
            None => "it is bound to nothing".to_owned(),
        };
        let address = &function.address;
        missing.push(match driver_for(function) {
            Some(_) => format!("{has}: shootdown attach {address} --bind"),
            None => {
                let unbind = match &function.driver {
                    Some(_) => format!("echo {address} > devices/{address}/driver/unbind; "),
                    None => String::new(),
                };
                format!(
                    "{has}: cd /sys/bus/pci; echo vfio-pci > devices/{address}/driver_override; {unbind}\
                     echo {address} > drivers_probe"
                )
            }
        });
    }
    missing
}

/// Yes, no, or not to be seen by this user.
fn mark(name: &str, has: Option<bool>) -> String {
    match has {
        Some(true) => name.to_uppercase(),
        Some(false) => "-".to_owned(),
        None => "?".to_owned(),
    }
}

impl fmt::Display for Devices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<13} {:<9} {:<6} {:>5} {:<11} {:<6} {:<12} {:<15} vfio",
            "address", "ids", "class", "group", "bound to", "driver", "resets", "ats pri pasid"
        )?;
        for one in &self.devices {
            let translation = format!(
                "{:<3} {:<3} {}",
                mark("ats", one.ats),
                mark("pri", one.pri),
                mark("pasid", one.pasid)
            );
            let line = format!(
                "{:<13} {:04x}:{:04x} {:06x} {:>5} {:<11} {:<6} {:<12} {:<15} {}",
                one.address,
                one.vendor,
                one.device,
                one.class,
                one.group.map_or("-".to_owned(), |group| group.to_string()),
                one.driver.as_deref().unwrap_or("-"),
                one.attachable_by.unwrap_or("-"),
                if one.resets.is_empty() {
                    "-".to_owned()
                } else {
                    one.resets.join(",")
                },
                translation,
                if one.missing.is_empty() { "ready" } else { "" },
            );
            writeln!(f, "{}", line.trim_end())?;
            if !one.with.is_empty() {
                writeln!(f, "{:14}shares its group with {}", "", one.with.join(", "))?;
            }
            for missing in &one.missing {
                writeln!(f, "{:14}{missing}", "")?;
            }
        }
        if self.devices.is_empty() {
            writeln!(f, "this machine has no PCI functions")?;
        }
        Ok(())
    }
}
