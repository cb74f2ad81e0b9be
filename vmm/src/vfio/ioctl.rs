//! VFIO's calls as functions with types and errors.
//!
//! `vfio-ioctls` has them too, and is not used: it panics when a function's folder is gone from sysfs by the time its device
//! is closed, which is what surprise removal is; it drops the errors of reads, writes and resets, where a guest must read
//! ones; and it maps everything writable, where a guest's IOMMU may permit reads only. Its structures (`vfio-bindings`) are.
#![allow(unsafe_code, reason = "ioctls take pointers to structures that say how long they are")]

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

use vfio_bindings::bindings::vfio;
use vmm_sys_util::ioctl::{
    ioctl, ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref, ioctl_with_val,
};

/// All of VFIO's calls are numbered from here on (linux/vfio.h), and carry no size.
const FIRST: libc::c_ulong = (vfio::VFIO_TYPE as libc::c_ulong) << 8 | vfio::VFIO_BASE as libc::c_ulong;
const GET_API_VERSION: libc::c_ulong = FIRST;
const CHECK_EXTENSION: libc::c_ulong = FIRST + 1;
const SET_IOMMU: libc::c_ulong = FIRST + 2;
const GROUP_GET_STATUS: libc::c_ulong = FIRST + 3;
const GROUP_SET_CONTAINER: libc::c_ulong = FIRST + 4;
const GROUP_UNSET_CONTAINER: libc::c_ulong = FIRST + 5;
const GROUP_GET_DEVICE_FD: libc::c_ulong = FIRST + 6;
const DEVICE_GET_INFO: libc::c_ulong = FIRST + 7;
const DEVICE_GET_REGION_INFO: libc::c_ulong = FIRST + 8;
const DEVICE_GET_IRQ_INFO: libc::c_ulong = FIRST + 9;
const DEVICE_SET_IRQS: libc::c_ulong = FIRST + 10;
const DEVICE_RESET: libc::c_ulong = FIRST + 11;
const IOMMU_MAP_DMA: libc::c_ulong = FIRST + 13;
const IOMMU_UNMAP_DMA: libc::c_ulong = FIRST + 14;

/// What a vCPU's thread needs of them: interrupts that the guest's driver sets up, a reset.
pub(crate) const VCPU_CALLS: [libc::c_ulong; 2] = [DEVICE_SET_IRQS, DEVICE_RESET];
/// What the threads of lines and of the virtual IOMMU need; the first also closes a function that is wanted back.
pub(crate) const EVENT_CALLS: [libc::c_ulong; 4] =
    [DEVICE_SET_IRQS, IOMMU_MAP_DMA, IOMMU_UNMAP_DMA, GROUP_UNSET_CONTAINER];

/// The largest description of a region that is read: a page of stretches that may be mapped.
const REGION_INFO_MAX: usize = 8192;

fn done(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn size<T>() -> u32 {
    size_of::<T>() as u32
}

/// The version of the interface, which is 0.
pub(super) fn api_version(container: &File) -> io::Result<i32> {
    // SAFETY: the call takes no argument.
    done(unsafe { ioctl(container, GET_API_VERSION) })
}

/// Whether a container can have an IOMMU of this type.
pub(super) fn has_extension(container: &File, extension: u32) -> io::Result<bool> {
    // SAFETY: the argument is a number.
    done(unsafe { ioctl_with_val(container, CHECK_EXTENSION, extension.into()) }).map(|there| there > 0)
}

/// Chooses the type, once there is a group.
pub(super) fn set_iommu(container: &File, kind: u32) -> io::Result<()> {
    // SAFETY: the argument is a number.
    done(unsafe { ioctl_with_val(container, SET_IOMMU, kind.into()) }).map(drop)
}

/// A group's flags.
pub(super) fn group_flags(group: &File) -> io::Result<u32> {
    let mut status = vfio::vfio_group_status { argsz: size::<vfio::vfio_group_status>(), flags: 0 };
    // SAFETY: the structure says how long it is, and lives through the call.
    done(unsafe { ioctl_with_mut_ref(group, GROUP_GET_STATUS, &mut status) }).map(|_| status.flags)
}

/// Puts a group into a container.
pub(super) fn set_container(group: &File, container: &File) -> io::Result<()> {
    let descriptor: RawFd = container.as_raw_fd();
    // SAFETY: the call reads one descriptor, which is open.
    done(unsafe { ioctl_with_ref(group, GROUP_SET_CONTAINER, &descriptor) }).map(drop)
}

/// Takes a group out of its container.
pub(super) fn unset_container(group: &File) -> io::Result<()> {
    // SAFETY: the call takes no argument.
    done(unsafe { ioctl(group, GROUP_UNSET_CONTAINER) }).map(drop)
}

/// Opens a function of a group by its name.
pub(super) fn device(group: &File, name: &str) -> io::Result<File> {
    let name = std::ffi::CString::new(name).map_err(io::Error::other)?;
    // SAFETY: the call reads a string that ends with a zero.
    let descriptor = done(unsafe { ioctl_with_ptr(group, GROUP_GET_DEVICE_FD, name.as_ptr()) })?;
    // SAFETY: the kernel has just made this descriptor for us.
    let file = unsafe { File::from_raw_fd(descriptor) };
    rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::CLOEXEC)?;
    Ok(file)
}

/// What a device is: its flags.
pub(super) fn device_flags(device: &File) -> io::Result<u32> {
    let mut info = vfio::vfio_device_info { argsz: size::<vfio::vfio_device_info>(), ..Default::default() };
    // SAFETY: the structure says how long it is, and lives through the call.
    done(unsafe { ioctl_with_mut_ref(device, DEVICE_GET_INFO, &mut info) }).map(|_| info.flags)
}

/// One region of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Region {
    /// Bytes; 0 for none.
    pub(super) len: u64,
    /// Where it is in the device's file.
    pub(super) offset: u64,
    /// It can be mapped.
    pub(super) mappable: bool,
    /// If only parts of it can be, those: offset and length.
    pub(super) sparse: Option<Vec<(u64, u64)>>,
}

/// Reads the stretches of a region that may be mapped out of its description.
fn sparse(words: &[u64], first: u32) -> Option<Vec<(u64, u64)>> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let number = |at: usize| Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk::<4>()?));
    let wide = |at: usize| Some(u64::from_ne_bytes(*bytes.get(at..)?.first_chunk::<8>()?));
    let mut at = first as usize;
    // A list leads onward, whoever made it.
    while at >= size_of::<vfio::vfio_region_info>() {
        let id = number(at)? & 0xffff;
        if id == vfio::VFIO_REGION_INFO_CAP_SPARSE_MMAP {
            let count = number(at + 8)? as usize;
            return (0..count).map(|index| Some((wide(at + 16 + 16 * index)?, wide(at + 24 + 16 * index)?))).collect();
        }
        let next = number(at + 4)? as usize;
        if next <= at {
            return None;
        }
        at = next;
    }
    None
}

/// A region by its number; one that the device does not have is empty.
pub(super) fn region(device: &File, index: u32) -> io::Result<Region> {
    let mut info = vfio::vfio_region_info { argsz: size::<vfio::vfio_region_info>(), index, ..Default::default() };
    // SAFETY: the structure says how long it is, and lives through the call.
    match done(unsafe { ioctl_with_mut_ref(device, DEVICE_GET_REGION_INFO, &mut info) }) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(Region::default()),
        other => other?,
    };
    let mut region = Region {
        len: info.size,
        offset: info.offset,
        mappable: info.flags & vfio::VFIO_REGION_INFO_FLAG_MMAP != 0,
        sparse: None,
    };
    let whole = (info.argsz as usize).min(REGION_INFO_MAX);
    if info.flags & vfio::VFIO_REGION_INFO_FLAG_CAPS != 0 && whole > size_of::<vfio::vfio_region_info>() {
        let mut words = vec![0_u64; whole.div_ceil(8)];
        // The first words: its length and no flags; the region's number and no capability.
        words[0] = whole as u64;
        words[1] = index.into();
        // SAFETY: the buffer is as long as its first number says, and aligned as the structure is.
        done(unsafe { ioctl_with_mut_ptr(device, DEVICE_GET_REGION_INFO, words.as_mut_ptr()) })?;
        region.sparse = sparse(&words, (words[1] >> 32) as u32);
    }
    Ok(region)
}

/// How many interrupts of a kind a device has.
pub(super) fn irq_count(device: &File, index: u32) -> io::Result<u32> {
    let mut info = vfio::vfio_irq_info { argsz: size::<vfio::vfio_irq_info>(), index, ..Default::default() };
    // SAFETY: the structure says how long it is, and lives through the call.
    match done(unsafe { ioctl_with_mut_ref(device, DEVICE_GET_IRQ_INFO, &mut info) }) {
        // Kinds that it does not know, or the device does not have.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(0),
        other => other.map(|_| info.count),
    }
}

/// What is done about interrupts.
#[derive(Clone, Copy, Debug)]
pub(super) enum IrqAction<'a> {
    /// Each of these descriptors is signalled when the interrupt of its number comes.
    Trigger(&'a [RawFd]),
    /// None is any more.
    Disable,
    /// This descriptor unmasks the pin when it is signalled.
    UnmaskBy(RawFd),
    /// The pin is unmasked.
    Unmask,
}

/// Does it.
pub(super) fn set_irqs(device: &File, index: u32, action: IrqAction<'_>) -> io::Result<()> {
    let (flags, count, data): (u32, u32, &[RawFd]) = match &action {
        IrqAction::Trigger(events) => {
            (vfio::VFIO_IRQ_SET_DATA_EVENTFD | vfio::VFIO_IRQ_SET_ACTION_TRIGGER, events.len() as u32, events)
        }
        IrqAction::Disable => (vfio::VFIO_IRQ_SET_DATA_NONE | vfio::VFIO_IRQ_SET_ACTION_TRIGGER, 0, &[]),
        IrqAction::UnmaskBy(event) => {
            (vfio::VFIO_IRQ_SET_DATA_EVENTFD | vfio::VFIO_IRQ_SET_ACTION_UNMASK, 1, std::slice::from_ref(event))
        }
        IrqAction::Unmask => (vfio::VFIO_IRQ_SET_DATA_NONE | vfio::VFIO_IRQ_SET_ACTION_UNMASK, 1, &[]),
    };
    // `struct vfio_irq_set`: five numbers, and the descriptors behind them.
    let mut words = vec![0, flags, index, 0, count];
    words.extend(data.iter().map(|event| event.cast_unsigned()));
    words[0] = (words.len() * size_of::<u32>()) as u32;
    // SAFETY: the buffer is as long as its first number says.
    let left = done(unsafe { ioctl_with_ptr(device, DEVICE_SET_IRQS, words.as_ptr()) })?;
    // More vectors than the host has to give: it says how many there are.
    if left > 0 {
        return Err(io::Error::other(format!("the host has only {left} interrupts left for it")));
    }
    Ok(())
}

/// Resets a device.
pub(super) fn reset(device: &File) -> io::Result<()> {
    // SAFETY: the call takes no argument.
    done(unsafe { ioctl(device, DEVICE_RESET) }).map(drop)
}

/// Lets the devices of a container reach `len` bytes of this process' memory at `iova`.
///
/// # Safety
/// The memory is mapped, and is nobody's but the guest's and its devices', until it is unmapped from the container again or
/// the container is gone.
pub(super) unsafe fn map_dma(container: &File, iova: u64, len: u64, host: u64, writable: bool) -> io::Result<()> {
    let write = if writable { vfio::VFIO_DMA_MAP_FLAG_WRITE } else { 0 };
    let map = vfio::vfio_iommu_type1_dma_map {
        argsz: size::<vfio::vfio_iommu_type1_dma_map>(),
        flags: vfio::VFIO_DMA_MAP_FLAG_READ | write,
        vaddr: host,
        iova,
        size: len,
    };
    // SAFETY: the structure lives through the call; about the memory the caller has promised.
    done(unsafe { ioctl_with_ref(container, IOMMU_MAP_DMA, &map) }).map(drop)
}

/// Undoes what [`map_dma`] did in these addresses, which split no mapping.
pub(super) fn unmap_dma(container: &File, iova: u64, len: u64) -> io::Result<u64> {
    let mut unmap = vfio::vfio_iommu_type1_dma_unmap {
        argsz: size::<vfio::vfio_iommu_type1_dma_unmap>(),
        flags: 0,
        iova,
        size: len,
        ..Default::default()
    };
    // SAFETY: the structure says how long it is, and lives through the call.
    done(unsafe { ioctl_with_mut_ref(container, IOMMU_UNMAP_DMA, &mut unmap) }).map(|_| unmap.size)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers of linux/vfio.h, as filters of system calls name them.
    #[test]
    fn calls_have_their_numbers() {
        assert_eq!((GET_API_VERSION, DEVICE_SET_IRQS, IOMMU_UNMAP_DMA), (0x3b64, 0x3b6e, 0x3b72));
    }

    /// A description with one capability that is not the one, and then two stretches.
    #[test]
    fn stretches_are_found() {
        let words = [0, 0, 0, 0, 3 | 1 << 16 | 48 << 32, 0, 1 | 1 << 16, 2, 0x1000, 0x2000, 0x8000, 0x1000];
        assert_eq!(sparse(&words, 32), Some(vec![(0x1000, 0x2000), (0x8000, 0x1000)]));
        // A list that ends nowhere, one that turns in a circle, one of more than there is.
        assert_eq!(sparse(&words, 0), None);
        assert_eq!(sparse(&[0, 0, 0, 0, 3 | 32 << 32, 0], 32), None);
        assert_eq!(sparse(&[0, 0, 0, 0, 1, 9, 0, 0], 32), None);
        assert_eq!(sparse(&words, 4096), None);
    }
}
