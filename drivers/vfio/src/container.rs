//! Groups, and the container: one IOMMU address space of the kernel, type1 v2.
//!
//! Lock order: the container's lock is the innermost of all. It is held during the system calls, as the kernel's own lock
//! of the container is, and nothing is allocated or freed under it.

use std::fs::{File, OpenOptions};
use std::mem::{offset_of, size_of};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use shootdown::{DeviceError, DmaWindow, Range, Rights};
use vfio_bindings::bindings::vfio as abi;

use crate::book::{Book, Inside};
use crate::caps::{Bytes, ChainError, walk};
use crate::error::{self, VfioError};
use crate::sys::{self, Call};

/// The kernel's default for `dma_entry_limit`, for kernels that do not tell what is left of it.
const MAPPINGS: u64 = 65_535;

/// So many mappings are recorded at most, whatever the kernel would allow.
const MOST: u64 = 1 << 22;

fn open(path: &str) -> Result<OwnedFd, VfioError> {
    // The standard library opens everything close-on-exec.
    let file = OpenOptions::new().read(true).write(true).open(path);
    file.map(Into::into)
        .map_err(|error| error::open(PathBuf::from(path), &error))
}

/// An IOMMU group: what the hardware can tell apart. One process has it at a time.
#[derive(Debug)]
pub struct Group {
    fd: OwnedFd,
    number: u32,
}

impl Group {
    /// Opens `/dev/vfio/NUMBER`.
    ///
    /// # Errors
    /// [`VfioError::Open`]; [`VfioError::NotViable`].
    pub fn open(number: u32) -> Result<Self, VfioError> {
        Self::of(open(&format!("/dev/vfio/{number}"))?, number)
    }

    /// A group whose descriptor this process was handed.
    ///
    /// # Errors
    /// It is no group's; [`VfioError::NotViable`].
    pub fn from_fd(fd: OwnedFd, number: u32) -> Result<Self, VfioError> {
        sys::close_on_exec(fd.as_fd())
            .map_err(|errno| error::call("F_SETFD", format!("group {number}"), errno))?;
        Self::of(fd, number)
    }

    fn of(fd: OwnedFd, number: u32) -> Result<Self, VfioError> {
        let this = Self { fd, number };
        if this.status()? & abi::VFIO_GROUP_FLAGS_VIABLE == 0 {
            return Err(VfioError::NotViable { group: number });
        }
        Ok(this)
    }

    /// The number.
    pub fn number(&self) -> u32 {
        self.number
    }

    fn name(&self) -> String {
        format!("group {}", self.number)
    }

    fn status(&self) -> Result<u32, VfioError> {
        let mut status = [0_u32; size_of::<abi::vfio_group_status>() / 4];
        sys::ioctl_sized(self.fd.as_fd(), Call::GroupGetStatus, &mut status)
            .map_err(|errno| error::call("VFIO_GROUP_GET_STATUS", self.name(), errno))?;
        Ok(status[offset_of!(abi::vfio_group_status, flags) / 4])
    }

    fn is_attached(&self) -> Result<bool, VfioError> {
        Ok(self.status()? & abi::VFIO_GROUP_FLAGS_CONTAINER_SET != 0)
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What a container's IOMMU can do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct IommuInfo {
    /// Its page sizes in bytes, as a bit mask.
    pub page_sizes: u64,
    /// The IOVAs that can be mapped. The window of the interrupt controller is not among them.
    pub iova_ranges: Vec<Range>,
    /// Mappings that can still be made; `None` on kernels before 5.10.
    pub dma_avail: Option<u64>,
    /// Page sizes, in bytes, of which written pages can be tracked, as a bit mask; `None` where none can.
    pub dirty_page_sizes: Option<u64>,
}

impl IommuInfo {
    /// Reads the kernel's answer.
    pub(crate) fn parse(answer: &[u8]) -> Result<Self, ChainError> {
        let bytes = Bytes(answer);
        let flags = bytes.u32(offset_of!(abi::vfio_iommu_type1_info, flags))?;
        let mut this = Self {
            page_sizes: 4096,
            iova_ranges: Vec::new(),
            dma_avail: None,
            dirty_page_sizes: None,
        };
        if flags & abi::VFIO_IOMMU_INFO_PGSIZES != 0 {
            let page_sizes = bytes.u64(offset_of!(abi::vfio_iommu_type1_info, iova_pgsizes))?;
            // A mask without a page would make every range misaligned; the smallest of any IOMMU serves.
            this.page_sizes = if page_sizes == 0 { 4096 } else { page_sizes };
        }
        let first = if flags & abi::VFIO_IOMMU_INFO_CAPS == 0 {
            0
        } else {
            bytes.u32(offset_of!(abi::vfio_iommu_type1_info, cap_offset))?
        };
        for one in walk(answer, first)? {
            match u32::from(one.id) {
                abi::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE => {
                    let pairs = one.pairs(
                        offset_of!(abi::vfio_iommu_type1_info_cap_iova_range, nr_iovas),
                        offset_of!(abi::vfio_iommu_type1_info_cap_iova_range, iova_ranges),
                    )?;
                    let ranges = pairs
                        .into_iter()
                        .filter_map(|(start, last)| Range::inclusive(start, last).ok());
                    this.iova_ranges.extend(ranges);
                }
                abi::VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION => {
                    this.dirty_page_sizes = Some(one.u64(offset_of!(
                        abi::vfio_iommu_type1_info_cap_migration,
                        pgsize_bitmap
                    ))?);
                }
                abi::VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL => {
                    let avail = one.u32(offset_of!(abi::vfio_iommu_type1_info_dma_avail, avail))?;
                    this.dma_avail = Some(avail.into());
                }
                _ => {}
            }
        }
        if this.iova_ranges.is_empty() {
            // Kernels before 5.4 do not tell: what every IOMMU translates, below the window of the interrupt controller.
            this.iova_ranges
                .extend(Range::inclusive(0_u64, 0xfedf_ffff_u64).ok());
        }
        Ok(this)
    }

    /// The smallest page in bytes.
    pub fn page(&self) -> u64 {
        1 << self.page_sizes.trailing_zeros()
    }
}

/// One IOMMU address space, which the groups in it share. Everything is unmapped when it is dropped.
#[derive(Debug)]
pub struct Container {
    fd: OwnedFd,
    groups: Mutex<Vec<Group>>,
    info: IommuInfo,
    book: Mutex<Book>,
    owner: u32,
}

impl Container {
    /// A new container with `groups` in it; at least one.
    ///
    /// # Errors
    /// [`VfioError`].
    pub fn open(groups: Vec<Group>) -> Result<Arc<Self>, VfioError> {
        Self::of(open("/dev/vfio/vfio")?, groups)
    }

    /// A container whose descriptor this process was handed, with the groups that belong to it; both can have been set up by
    /// whoever handed them in, or not. What is mapped in it already is not known here, and stays.
    ///
    /// # Errors
    /// [`VfioError`].
    pub fn from_fd(fd: OwnedFd, groups: Vec<Group>) -> Result<Arc<Self>, VfioError> {
        sys::close_on_exec(fd.as_fd())
            .map_err(|errno| error::call("F_SETFD", "the container", errno))?;
        Self::of(fd, groups)
    }

    fn of(fd: OwnedFd, groups: Vec<Group>) -> Result<Arc<Self>, VfioError> {
        let number = |call, name, argument| {
            sys::ioctl_number(fd.as_fd(), call, argument)
                .map_err(|errno| error::call(name, "the container", errno))
        };
        let version = number(Call::GetApiVersion, "VFIO_GET_API_VERSION", 0)?;
        if u32::try_from(version) != Ok(abi::VFIO_API_VERSION) {
            return Err(VfioError::ApiVersion {
                found: version,
                expected: abi::VFIO_API_VERSION,
            });
        }
        let type1v2 = abi::VFIO_TYPE1v2_IOMMU as usize;
        if number(Call::CheckExtension, "VFIO_CHECK_EXTENSION", type1v2)? == 0 {
            return Err(VfioError::NoType1v2);
        }
        for group in &groups {
            attach(group, fd.as_fd())?;
        }
        let info = match info(fd.as_fd()) {
            // Whoever handed it in has chosen the IOMMU.
            Ok(info) => info,
            Err(_) => {
                number(Call::SetIommu, "VFIO_SET_IOMMU", type1v2)?;
                info(fd.as_fd())?
            }
        };
        let most = info.dma_avail.unwrap_or(MAPPINGS).min(MOST);
        Ok(Arc::new(Self {
            groups: Mutex::new(groups),
            book: Mutex::new(Book::new(most)),
            owner: sys::process(),
            info,
            fd,
        }))
    }

    /// Puts one more group into the container. Its devices reach what is mapped.
    ///
    /// # Errors
    /// The group is in another container, or its IOMMU is too different.
    pub fn attach(&self, group: Group) -> Result<(), VfioError> {
        attach(&group, self.fd.as_fd())?;
        self.groups().push(group);
        Ok(())
    }

    /// What the IOMMU could do when the container was opened.
    pub fn info(&self) -> &IommuInfo {
        &self.info
    }

    /// What the IOMMU can do now: as mappings come and go, `dma_avail` changes.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn query(&self) -> Result<IommuInfo, VfioError> {
        info(self.fd.as_fd())
    }

    /// How many granules are mapped.
    pub fn granules(&self) -> u64 {
        self.book().granules()
    }

    /// The device called `name` in group `number`.
    pub(crate) fn device_fd(&self, number: u32, name: &str) -> Result<File, VfioError> {
        let no_device = || VfioError::NoDevice {
            address: name.to_owned(),
        };
        let groups = self.groups();
        let group = groups.iter().find(|one| one.number == number);
        let group = group.ok_or_else(no_device)?;
        let name = std::ffi::CString::new(name).map_err(|_| no_device())?;
        sys::device_fd(group.as_fd(), &name)
            .map(File::from)
            .map_err(|errno| {
                let on = name.to_string_lossy();
                error::call("VFIO_GROUP_GET_DEVICE_FD", on, errno)
            })
    }

    /// The groups' descriptors, by number.
    pub(crate) fn groups(&self) -> MutexGuard<'_, Vec<Group>> {
        // Changed by push only.
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        // Nothing that panics happens under it.
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self) -> Result<(), DeviceError> {
        check_owner(self.owner)
    }
}

/// Refuses in a child of the process that opened it.
pub(crate) fn check_owner(owner: u32) -> Result<(), DeviceError> {
    let child = sys::process();
    if child == owner {
        Ok(())
    } else {
        Err(DeviceError::Forked { owner, child })
    }
}

fn attach(group: &Group, container: BorrowedFd<'_>) -> Result<(), VfioError> {
    if group.is_attached()? {
        return Ok(());
    }
    sys::set_container(group.as_fd(), container)
        .map_err(|errno| error::call("VFIO_GROUP_SET_CONTAINER", group.name(), errno))
}

fn info(fd: BorrowedFd<'_>) -> Result<IommuInfo, VfioError> {
    let call = "VFIO_IOMMU_GET_INFO";
    let least = size_of::<abi::vfio_iommu_type1_info>();
    let answer = sys::query(fd, Call::Get12, least, |_| ())
        .map_err(|errno| error::call(call, "the container", errno))?;
    IommuInfo::parse(&answer).map_err(|error| VfioError::Chain { call, error })
}

impl AsFd for Container {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl DmaWindow for Container {
    fn iova_ranges(&self) -> Vec<Range> {
        self.info.iova_ranges.clone()
    }

    fn page(&self) -> u64 {
        self.info.page()
    }

    fn map(&self, iova: Range, memory: Range, rights: Rights) -> Result<(), DeviceError> {
        self.check()?;
        let page = self.page();
        if iova.len() != memory.len() {
            return Err(DeviceError::Misaligned { iova, memory, page });
        }
        let flag = |right, flag| if rights.contains(right) { flag } else { 0 };
        let flags = flag(Rights::READ, abi::VFIO_DMA_MAP_FLAG_READ)
            | flag(Rights::WRITE, abi::VFIO_DMA_MAP_FLAG_WRITE);
        let mut book = self.book();
        if book.is_full() {
            return Err(DeviceError::OutOfMappings {
                iova,
                limit: book.most(),
            });
        }
        sys::map_dma(self.fd.as_fd(), iova, memory, flags)
            .map_err(|errno| error::map(errno, iova, memory, page, book.granules()))?;
        book.add(iova);
        Ok(())
    }

    fn unmap(&self, iova: Range) -> Result<(), DeviceError> {
        self.check()?;
        let mut book = self.book();
        let expected = match book.inside(iova) {
            Inside::Nothing => return Err(DeviceError::NotMapped { iova }),
            Inside::Cuts(mapping) => return Err(DeviceError::Cut { iova, mapping }),
            Inside::Bytes(bytes) => bytes,
        };
        let unmapped = sys::unmap_dma(self.fd.as_fd(), iova)
            .map_err(|errno| error::system("VFIO_IOMMU_UNMAP_DMA", errno))?;
        if unmapped != expected {
            return Err(DeviceError::Mismatch {
                iova,
                expected,
                unmapped,
            });
        }
        book.remove(iova);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn word(value: u32) -> [u8; 4] {
        value.to_ne_bytes()
    }

    /// An answer as Linux 6.12 gives it, with all three capabilities.
    fn answer() -> Vec<u8> {
        let mut bytes: Vec<u8> = Vec::new();
        bytes.extend(word(0)); // argsz
        bytes.extend(word(3)); // flags: page sizes, capabilities
        bytes.extend(0x4020_1000_u64.to_ne_bytes());
        bytes.extend(word(24)); // the first capability
        bytes.extend(word(0));
        bytes.extend([2_u16.to_ne_bytes(), 1_u16.to_ne_bytes()].concat()); // migration
        bytes.extend(word(56));
        bytes.extend(word(0));
        bytes.extend(word(0));
        bytes.extend(0x1000_u64.to_ne_bytes());
        bytes.extend(0x1000_0000_u64.to_ne_bytes());
        assert_eq!(bytes.len(), 56);
        bytes.extend([3_u16.to_ne_bytes(), 1_u16.to_ne_bytes()].concat()); // dma_avail
        bytes.extend(word(68));
        bytes.extend(word(65_535));
        bytes.extend([1_u16.to_ne_bytes(), 1_u16.to_ne_bytes()].concat()); // IOVA ranges
        bytes.extend(word(0));
        bytes.extend(word(2));
        bytes.extend(word(0));
        for end in [0_u64, 0xfedf_ffff, 0xfef0_0000, 0x7f_ffff_ffff] {
            bytes.extend(end.to_ne_bytes());
        }
        bytes
    }

    #[test]
    fn an_answer_of_the_kernel_is_understood() {
        let info = IommuInfo::parse(&answer()).unwrap();
        assert_eq!(info.page(), 4096);
        assert_eq!(info.dma_avail, Some(65_535));
        assert_eq!(info.dirty_page_sizes, Some(4096));
        assert_eq!(
            info.iova_ranges,
            [
                Range::inclusive(0, 0xfedf_ffff).unwrap(),
                Range::inclusive(0xfef0_0000, 0x7f_ffff_ffff).unwrap()
            ]
        );
    }

    proptest! {
        #[test]
        fn a_damaged_answer_never_panics(at in 0_usize..116, value in any::<u8>(), len in 0_usize..117) {
            let mut bytes = answer();
            bytes[at] = value;
            bytes.truncate(len);
            if let Ok(info) = IommuInfo::parse(&bytes) {
                prop_assert!(info.page().is_power_of_two());
            }
        }
    }
}
