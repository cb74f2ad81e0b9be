//! Devices, as they are written on the command line. What is accepted of Cloud Hypervisor's keys and has no field here
//! says in [`Tolerated`] which values ask for nothing.

use super::care::{isolation, on_failure, track};
use super::flags::named;
use super::keyvalue::{FlagError, KeyError, Options, Tolerated};
use super::{
    DeviceConfig, FsConfig, GenericVhostUserConfig, NvmeConfig, PassthroughConfig, RngConfig, UserDeviceConfig,
    VsockConfig,
};

pub(super) const SEGMENT: Tolerated =
    Tolerated { key: "pci_segment", values: &["0"], remedy: "there is one PCI segment; leave it out" };

/// Keys of what another process serves over vfio-user.
const USER_TOLERATED: [Tolerated; 3] = [
    Tolerated {
        key: "iommu",
        values: &["off", "false"],
        remedy: "a vfio-user device reaches all of the guest's memory; leave it out",
    },
    Tolerated {
        key: "isolation",
        values: &["shared"],
        remedy: "a vfio-user device reaches all of the guest's memory; --disk has isolation=copy",
    },
    SEGMENT,
];
/// Reads a device and checks it.
pub(super) fn device<T: Clone>(
    option: &'static str,
    text: &str,
    read: impl FnOnce() -> Result<T, KeyError>,
    kind: impl FnOnce(T) -> DeviceConfig,
) -> Result<T, FlagError> {
    let checked = read().and_then(|config| {
        kind(config.clone()).check()?;
        Ok(config)
    });
    named(option, text, checked)
}

impl FsConfig {
    /// Reads `tag=NAME,socket=PATH…`.
    ///
    /// # Errors
    /// What is wrong with it, naming `option`.
    pub fn from_flag(option: &'static str, text: &str) -> Result<Self, FlagError> {
        let read = || {
            let keys = [
                "tag",
                "socket",
                "num_queues",
                "queue_size",
                "stall_timeout",
                "on_failure",
                "track",
                "iommu",
                "isolation",
                "id",
            ];
            let options = Options::parse(text, &keys, &[SEGMENT])?;
            Ok(Self {
                id: options.get("id")?,
                tag: options.need("tag")?,
                socket: options.need("socket")?,
                num_queues: options.get("num_queues")?,
                queue_size: options.get("queue_size")?,
                stall_timeout: options.get("stall_timeout")?,
                on_failure: on_failure(&options)?,
                track: track(&options)?,
                iommu: options.on("iommu")?,
                isolation: isolation(&options)?,
            })
        };
        device(option, text, read, DeviceConfig::Fs)
    }
}

impl VsockConfig {
    /// Reads `cid=3,socket=PATH…`.
    ///
    /// # Errors
    /// What is wrong with it, naming `option`.
    pub fn from_flag(option: &'static str, text: &str) -> Result<Self, FlagError> {
        let read = || {
            let keys = [
                "cid",
                "socket",
                "vhost_user",
                "stall_timeout",
                "start_attempts",
                "standby",
                "on_failure",
                "track",
                "iommu",
                "isolation",
                "id",
            ];
            let options = Options::parse(text, &keys, &[SEGMENT])?;
            Ok(Self {
                id: options.get("id")?,
                cid: options.need("cid")?,
                socket: options.need("socket")?,
                vhost_user: options.on("vhost_user")?,
                stall_timeout: options.get("stall_timeout")?,
                start_attempts: options.get("start_attempts")?,
                standby: options.on("standby")?,
                on_failure: on_failure(&options)?,
                track: track(&options)?,
                iommu: options.on("iommu")?,
                isolation: isolation(&options)?,
            })
        };
        device(option, text, read, DeviceConfig::Vsock)
    }
}

/// Device types by the names that people give them (virtio 1.2, section 5).
const TYPES: [(&str, u32); 14] = [
    ("net", 1),
    ("block", 2),
    ("console", 3),
    ("rng", 4),
    ("balloon", 5),
    ("scsi", 8),
    ("gpu", 16),
    ("input", 18),
    ("vsock", 19),
    ("crypto", 20),
    ("fs", 26),
    ("i2c", 34),
    ("sound", 25),
    ("gpio", 41),
];

fn device_type(options: &Options) -> Result<u32, KeyError> {
    let key = if options.has("virtio_id") { "virtio_id" } else { "device_type" };
    let text: String = options.need(key)?;
    let known = TYPES.iter().find(|(name, _)| *name == text).map(|(_, number)| *number);
    let expected = "a virtio device type, as a number or one of net, block, console, rng, balloon, scsi, gpu, input, \
                    vsock, crypto, fs, i2c, sound, gpio,";
    known.or_else(|| text.parse().ok()).ok_or(KeyError::Value { key, value: text, expected })
}

impl GenericVhostUserConfig {
    /// Reads `device_type=N,socket=PATH,queue_sizes=[256,…]`.
    ///
    /// # Errors
    /// What is wrong with it, naming `option`.
    pub fn from_flag(option: &'static str, text: &str) -> Result<Self, FlagError> {
        let read = || {
            let keys = [
                "device_type",
                "virtio_id",
                "socket",
                "queue_sizes",
                "stall_timeout",
                "on_failure",
                "track",
                "iommu",
                "isolation",
                "id",
            ];
            let options = Options::parse(text, &keys, &[SEGMENT])?;
            Ok(Self {
                id: options.get("id")?,
                device_type: device_type(&options)?,
                socket: options.need("socket")?,
                queue_sizes: options.need("queue_sizes")?,
                stall_timeout: options.get("stall_timeout")?,
                on_failure: on_failure(&options)?,
                track: track(&options)?,
                iommu: options.on("iommu")?,
                isolation: isolation(&options)?,
            })
        };
        device(option, text, read, DeviceConfig::Generic)
    }
}

impl NvmeConfig {
    /// Reads `path=FILE[,readonly=on][,num_queues=N][,serial=TEXT][,id=NAME]`.
    ///
    /// # Errors
    /// [`FlagError`], for the whole option.
    pub fn from_flag(option: &'static str, text: &str) -> Result<Self, FlagError> {
        let read = || {
            let keys = [
                "path",
                "image_type",
                "readonly",
                "num_queues",
                "serial",
                "stall_timeout",
                "start_attempts",
                "on_failure",
                "id",
            ];
            let options = Options::parse(text, &keys, &USER_TOLERATED)?;
            Ok(Self {
                id: options.get("id")?,
                path: options.need("path")?,
                image_type: options.get("image_type")?,
                readonly: options.on("readonly")?,
                num_queues: options.get("num_queues")?,
                serial: options.get("serial")?,
                on_failure: on_failure(&options)?,
                stall_timeout: options.get("stall_timeout")?,
                start_attempts: options.get("start_attempts")?,
            })
        };
        device(option, text, read, DeviceConfig::Nvme)
    }
}

impl UserDeviceConfig {
    /// Reads `socket=PATH[,on_failure=wait][,id=NAME]`.
    ///
    /// # Errors
    /// [`FlagError`], for the whole option.
    pub fn from_flag(option: &'static str, text: &str) -> Result<Self, FlagError> {
        let read = || {
            let options = Options::parse(text, &["socket", "on_failure", "id"], &USER_TOLERATED)?;
            let (id, socket) = (options.get("id")?, options.need("socket")?);
            Ok(Self { id, socket, on_failure: on_failure(&options)?, ..Self::default() })
        };
        device(option, text, read, DeviceConfig::User)
    }
}

impl PassthroughConfig {
    /// Reads `path=/sys/bus/pci/devices/0000:01:00.0[,iommu=on][,fd=N][,id=NAME]`.
    ///
    /// # Errors
    /// What is wrong with it, naming `option`.
    pub fn from_flag(option: &'static str, text: &str) -> Result<Self, FlagError> {
        let read = || {
            let options = Options::parse(text, &["path", "iommu", "fd", "id"], &[SEGMENT])?;
            Ok(Self {
                id: options.get("id")?,
                path: options.need("path")?,
                iommu: options.on("iommu")?,
                fd: options.get("fd")?,
                group: super::Descriptors::default(),
            })
        };
        device(option, text, read, DeviceConfig::Passthrough)
    }
}

impl RngConfig {
    /// Reads `src=/dev/urandom` or `off`, which is `None`.
    ///
    /// # Errors
    /// What is wrong with it, naming `option`.
    pub fn from_flag(option: &'static str, text: &str) -> Result<Option<Self>, FlagError> {
        if text == "off" {
            return Ok(None);
        }
        let read = || {
            let options = Options::parse(
                text,
                &["src", "stall_timeout", "start_attempts", "on_failure", "iommu", "isolation", "id"],
                &[SEGMENT],
            )?;
            Ok(Self {
                src: options.need("src")?,
                id: options.get("id")?,
                stall_timeout: options.get("stall_timeout")?,
                start_attempts: options.get("start_attempts")?,
                on_failure: on_failure(&options)?,
                iommu: options.on("iommu")?,
                isolation: isolation(&options)?,
            })
        };
        device(option, text, read, DeviceConfig::Rng).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{DiskConfig, NetConfig};
    use super::*;

    proptest! {
        /// Whatever is typed, it is a device that passes the checks of the API too, or one line that begins with it.
        #[test]
        fn anything_may_be_typed(text in r#"(((path|tap|mac|id|forward|bw_size|queue_size|x)=)?[a-z0-9:,=+"\[\]é-]{0,12}){0,4}"#) {
            let devices = [
                DiskConfig::from_flag("--disk", &text).map(DeviceConfig::Disk),
                NetConfig::from_flag("--net", &text).map(DeviceConfig::Net),
                FsConfig::from_flag("--fs", &text).map(DeviceConfig::Fs),
                VsockConfig::from_flag("--vsock", &text).map(DeviceConfig::Vsock),
                GenericVhostUserConfig::from_flag("--generic-vhost-user", &text).map(DeviceConfig::Generic),
                PassthroughConfig::from_flag("--device", &text).map(DeviceConfig::Passthrough),
            ];
            for device in devices {
                match device {
                    Ok(device) => prop_assert_eq!(device.check(), Ok(())),
                    Err(error) => prop_assert!(error.to_string().starts_with("--"), "{}", error),
                }
            }
        }
    }

    #[test]
    fn other_devices_are_described() {
        let text = "device_type=rng,socket=/run/rng,queue_sizes=[1024]";
        let device = GenericVhostUserConfig::from_flag("--generic-vhost-user", text).unwrap();
        assert_eq!((device.device_type, device.queue_sizes), (4, vec![1024]));
        assert_eq!(RngConfig::from_flag("--rng", "off"), Ok(None));
        assert_eq!(VsockConfig::from_flag("--vsock", "cid=3,socket=/run/v").unwrap().cid, 3);
        assert_eq!(FsConfig::from_flag("--fs", "tag=t,socket=/run/f").unwrap().tag, "t");
    }

    #[test]
    fn mistakes_are_named() {
        let bare = PassthroughConfig::from_flag("--device", "path=00:02.0").unwrap_err().to_string();
        assert!(bare.contains("is wanted: path=/sys/bus/pci/devices/0000:00:02.0"), "{bare}");
        for refused in ["iommu=on", "isolation=copy"] {
            let nvme = NvmeConfig::from_flag("--nvme", &format!("path=a,{refused}")).unwrap_err();
            let user = UserDeviceConfig::from_flag("--user-device", &format!("socket=a,{refused}")).unwrap_err();
            for error in [nvme.to_string(), user.to_string()] {
                assert!(error.contains(&format!("{refused} is not supported: ")), "{error}");
            }
        }
    }
}
