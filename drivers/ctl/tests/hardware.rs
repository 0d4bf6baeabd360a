//! `devices` and `attach`, as far as they go on any machine. With devices they run in the VM tier.

use std::path::Path;
use std::process::{Command, Output};

fn shootdown(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_shootdown"))
        .args(arguments)
        .output()
        .unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_device_that_is_not_there_is_named_and_the_status_is_3() {
    for address in ["ffff:ff:1f.7", "../../etc", "nvme0"] {
        let output = shootdown(&["attach", address]);
        assert_eq!(output.status.code(), Some(3));
        let stderr = stderr(&output);
        assert!(
            stderr.contains(&format!("no PCI device {address}")),
            "{stderr}"
        );
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn wrong_usage_is_2() {
    for arguments in [
        &["attach"][..],
        &["attach", "0000:00:00.0", "--driver", "gpu"],
        &["devices", "extra"],
    ] {
        assert_eq!(shootdown(arguments).status.code(), Some(2), "{arguments:?}");
    }
}

#[test]
fn devices_lists_what_sysfs_has_and_says_what_each_lacks() {
    let output = shootdown(&["devices", "--json"]);
    let Ok(entries) = std::fs::read_dir(Path::new("/sys/bus/pci/devices")) else {
        assert_eq!(output.status.code(), Some(3));
        assert!(stderr(&output).contains("/sys/bus/pci/devices"));
        return;
    };
    assert_eq!(output.status.code(), Some(0));
    let list: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let devices = list["devices"].as_array().unwrap();
    assert_eq!(devices.len(), entries.count());
    for device in devices {
        let ready = device["viable"] == true && device["driver"] == "vfio-pci";
        let missing = device["missing"].as_array().unwrap();
        assert_eq!(missing.is_empty(), ready, "{device}");
    }
}
