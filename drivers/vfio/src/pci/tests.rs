use std::os::unix::fs::symlink;

use super::*;

/// A directory that looks like sysfs and proc; gone when dropped.
struct Tree(PathBuf);

impl Tree {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("shootdown-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        for directory in ["pci/devices", "pci/drivers", "groups", "proc/self"] {
            fs::create_dir_all(path.join(directory)).unwrap();
        }
        Self(path)
    }

    fn pci(&self) -> Pci {
        Pci {
            root: self.0.join("pci"),
            proc: self.0.join("proc"),
            dev: self.0.join("dev"),
        }
    }

    fn write(&self, path: &str, bytes: impl AsRef<[u8]>) {
        let path = self.0.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn function(&self, address: &str, class: u32, driver: Option<&str>, group: Option<u32>) {
        let at = |file: &str| format!("pci/devices/{address}/{file}");
        self.write(&at("vendor"), "0x1234\n");
        self.write(&at("device"), "0x11e8\n");
        self.write(&at("class"), format!("{class:#08x}\n"));
        if let Some(driver) = driver {
            let path = self.0.join("pci/drivers").join(driver);
            fs::create_dir_all(&path).unwrap();
            symlink(path, self.0.join(at("driver"))).unwrap();
        }
        if let Some(group) = group {
            let path = self.0.join(format!("groups/{group}"));
            fs::create_dir_all(path.join("devices")).unwrap();
            let device = self.0.join(format!("pci/devices/{address}"));
            symlink(&device, path.join("devices").join(address)).unwrap();
            symlink(path, device.join("iommu_group")).unwrap();
        }
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn what_is_no_device_is_an_error_that_names_it() {
    for address in ["ffff:ff:1f.7", "", "..", "../devices", "/", ".", "0:0/.."] {
        let error = group(address).unwrap_err();
        let expected = VfioError::NoDevice {
            address: address.to_owned(),
        };
        assert_eq!(error, expected);
    }
}

#[test]
fn a_group_is_viable_when_nobody_else_has_a_part_of_it() {
    let tree = Tree::new("viable");
    tree.function("0000:00:01.0", 0x060400, Some("pcieport"), Some(7));
    tree.function("0000:01:00.0", 0x00ff00, Some("vfio-pci"), Some(7));
    tree.function("0000:01:00.1", 0x00ff00, None, Some(7));
    let group = tree.pci().group_of("0000:01:00.0").unwrap();
    assert_eq!((group.number, group.members.len()), (7, 3));
    assert!(group.is_viable());
    tree.function("0000:01:00.2", 0x020000, Some("e1000e"), Some(7));
    let group = tree.pci().group_of("0000:01:00.0").unwrap();
    assert!(!group.is_viable());
    let blocking: Vec<_> = group.members.iter().filter(|one| one.blocks()).collect();
    assert_eq!(blocking.len(), 1);
    assert_eq!(blocking[0].address, "0000:01:00.2");
}

#[test]
fn a_function_without_a_group_is_told_what_is_missing() {
    let tree = Tree::new("groupless");
    tree.function("0000:00:03.0", 0x00ff00, None, None);
    let function = tree.pci().function("0000:00:03.0").unwrap();
    assert_eq!((function.vendor, function.device), (0x1234, 0x11e8));
    assert_eq!((function.class, function.group), (0x00ff00, None));
    let error = tree.pci().group_of("0000:00:03.0").unwrap_err();
    assert!(error.to_string().contains("intel_iommu=on"), "{error}");
}

/// A configuration space with these extended capabilities: offset, number, next.
fn config(chain: &[(usize, u32, u32)]) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    for (at, number, next) in chain {
        let header = number | 1 << 16 | next << 20;
        bytes[*at..at + 4].copy_from_slice(&header.to_le_bytes());
    }
    bytes
}

#[test]
fn extended_capabilities_are_walked_and_a_loop_ends() {
    let chain = config(&[(0x100, 0x1, 0x140), (0x140, ATS, 0x200), (0x200, PASID, 0)]);
    let found = translation(&chain).unwrap();
    assert_eq!((found.ats, found.pri, found.pasid), (true, false, true));
    let looping = config(&[(0x100, 0x1, 0x140), (0x140, PRI, 0x100)]);
    assert!(translation(&looping).unwrap().pri);
    assert_eq!(translation(&chain[..64]), None, "an ordinary user's view");
    assert!(!translation(&chain[..256]).unwrap().ats);
    assert!(!translation(&config(&[(0x100, 0xffff, 0xfff)])).unwrap().ats);
}

proptest::proptest! {
    #[test]
    fn hostile_configuration_space_neither_panics_nor_hangs(
        bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..1024)
    ) {
        let _ = translation(&bytes);
    }
}

#[test]
fn a_function_that_somebody_uses_is_not_taken_away() {
    let tree = Tree::new("used");
    let address = "0000:02:00.0";
    tree.function(address, 0x010802, Some("nvme"), Some(9));
    tree.write("pci/drivers/vfio-pci/new_id", "");
    let namespace = format!("pci/devices/{address}/nvme/nvme0/nvme0n1");
    tree.write(&format!("{namespace}/dev"), "259:0\n");
    tree.write(&format!("{namespace}/nvme0n1p1/dev"), "259:1\n");
    tree.write("proc/swaps", "Filename Type\n");
    for path in ["holders", "nvme0n1p1/holders"] {
        fs::create_dir_all(tree.0.join(&namespace).join(path)).unwrap();
    }
    assert_eq!(tree.pci().uses(address).unwrap(), []);
    tree.write(
        "proc/self/mountinfo",
        "22 1 259:1 / /home rw,relatime - ext4 /dev/nvme0n1p1 rw\n23 1 0:5 / /proc rw - proc proc rw\n",
    );
    let mounted = Use::Mounted {
        block: "nvme0n1p1".into(),
        at: "/home".into(),
    };
    assert_eq!(tree.pci().uses(address).unwrap(), [mounted]);
    let error = tree.pci().bind(address).unwrap_err();
    assert!(matches!(error, BindError::InUse { .. }), "{error}");
    assert!(error.to_string().contains("umount /home"), "{error}");
    tree.write("proc/swaps", "Filename Type\n/dev/nvme0n1 partition\n");
    tree.write(&format!("{namespace}/nvme0n1p1/holders/dm-0"), "");
    tree.write(&format!("pci/devices/{address}/net/eth7/operstate"), "up\n");
    assert_eq!(tree.pci().uses(address).unwrap().len(), 4);
}

#[test]
fn without_vfio_pci_nothing_is_touched() {
    let tree = Tree::new("unloaded");
    tree.function("0000:00:03.0", 0x00ff00, None, Some(1));
    let error = tree.pci().bind("0000:00:03.0").unwrap_err();
    assert!(matches!(error, BindError::NoVfioPci), "{error}");
    assert!(
        !tree
            .0
            .join("pci/devices/0000:00:03.0/driver_override")
            .exists()
    );
}
