//! Devices of the outer machine that scenarios pass through, and the IOMMU in front of them.
//!
//! Two NVMe drives (one of them with virtual functions), a network card and QEMU's teaching device, each behind a root port of
//! its own or on the root bus, so that each is alone in its IOMMU group; and a third drive that shares a slot, and thus its
//! group, with a source of entropy. Machines whose scenarios pass nothing through have none of it.

use std::fs::File;
use std::path::Path;

use anyhow::Result;

/// Scenarios that need these devices begin with this.
pub const PREFIX: &str = "vfio-";
/// What the outer kernel is told besides.
pub const CMDLINE: &str = "intel_iommu=on lab.vfio";
/// Serial numbers of the drives, by which scenarios find them.
pub const PLAIN_DRIVE: &str = "LAB0";
/// The one with virtual functions.
pub const SHARED_DRIVE: &str = "LAB1";
/// The one that shares its group with a device that the lab's own driver has.
pub const CROWDED_DRIVE: &str = "LAB2";
/// Bytes of each drive.
const DRIVE_LEN: u64 = 64 << 20;

/// Whether a machine that runs these scenarios has them.
pub fn wanted(scenarios: &[String]) -> bool {
    scenarios.iter().any(|name| name.starts_with(PREFIX))
}

/// QEMU's arguments for them; drives are files in `folder`.
///
/// # Errors
/// When the files cannot be made.
pub fn arguments(folder: &Path) -> Result<Vec<String>> {
    let drive = |name: &str| -> Result<String> {
        let path = folder.join(format!("{name}.drive"));
        File::create(&path)?.set_len(DRIVE_LEN)?;
        Ok(format!("file={},format=raw,if=none,id={name}", path.display()))
    };
    let (plain, shared) = (drive("plain")?, drive("shared")?);
    let port = |number: u32| format!("pcie-root-port,id=port{number},chassis={number},slot={number}");
    let devices = [
        "intel-iommu,intremap=on".to_owned(),
        port(1),
        format!("nvme,serial={PLAIN_DRIVE},drive=plain,bus=port1"),
        port(2),
        "nvme-subsys,id=subsystem".to_owned(),
        format!(
            "nvme,id=shared-nvme,serial={SHARED_DRIVE},subsys=subsystem,bus=port2,sriov_max_vfs=2,sriov_vq_flexible=4,\
             sriov_vi_flexible=2,max_ioqpairs=6,msix_qsize=5"
        ),
        "nvme-ns,drive=shared,bus=shared-nvme,nsid=1,shared=on".to_owned(),
        port(3),
        "e1000e,netdev=wire,bus=port3,mac=52:54:00:00:77:03".to_owned(),
        port(4),
        format!("nvme,serial={CROWDED_DRIVE},bus=port4,addr=0.0,multifunction=on"),
        "virtio-rng-pci,bus=port4,addr=0.1".to_owned(),
        "edu".to_owned(),
    ];
    let mut arguments = Vec::new();
    for (option, value) in [("-drive", plain), ("-drive", shared), ("-netdev", "user,id=wire,restrict=on".to_owned())] {
        arguments.extend([option.to_owned(), value]);
    }
    arguments.extend(devices.into_iter().flat_map(|device| ["-device".to_owned(), device]));
    Ok(arguments)
}
