//! Devices, as they are written on the command line. What is accepted of Cloud Hypervisor's keys and has no field here
//! says in [`Tolerated`] which values ask for nothing.

use super::flags::named;
use super::keyvalue::{Bytes, FlagError, KeyError, OptionValue, Options, Tolerated};
use super::{
    DeviceConfig, DiskConfig, FsConfig, GenericVhostUserConfig, ImageType, Isolation, NetConfig, NvmeConfig, OnFailure,
    PassthroughConfig, RateLimiterConfig, RngConfig, TokenBucketConfig, Track, UserDeviceConfig, VsockConfig,
};

const SEGMENT: Tolerated =
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
const DISK_TOLERATED: [Tolerated; 4] = [
    SEGMENT,
    Tolerated { key: "queue_affinity", values: &["[]"], remedy: "pin the threads of atoll-blk with taskset" },
    Tolerated { key: "_disable_io_uring", values: &["off", "false"], remedy: "leave it out" },
    Tolerated { key: "_disable_aio", values: &[], remedy: "" },
];
const NET_TOLERATED: [Tolerated; 5] = [
    SEGMENT,
    Tolerated { key: "vhost_mode", values: &["client"], remedy: "the backend listens; leave it out" },
    Tolerated { key: "offload_tso", values: &["on", "true"], remedy: "the guest may switch it off by ethtool" },
    Tolerated { key: "offload_ufo", values: &[], remedy: "" },
    Tolerated { key: "offload_csum", values: &["on", "true"], remedy: "the guest may switch it off by ethtool" },
];

/// Keys of the rate limits.
const LIMITS: [&str; 6] =
    ["bw_size", "bw_one_time_burst", "bw_refill_time", "ops_size", "ops_one_time_burst", "ops_refill_time"];

/// `keys` and those of the rate limits.
fn limited(keys: &[&'static str]) -> Vec<&'static str> {
    keys.iter().chain(&LIMITS).copied().collect()
}

fn bucket(options: &Options, [size, burst, refill]: [&'static str; 3]) -> Result<Option<TokenBucketConfig>, KeyError> {
    let given: Option<Bytes> = options.get(size)?;
    let one_time_burst = options.get::<Bytes>(burst)?.map(|bytes| bytes.0);
    let refill_time = options.get::<u64>(refill)?;
    match (given, refill_time) {
        (Some(Bytes(size)), Some(refill_time)) => Ok(Some(TokenBucketConfig { size, one_time_burst, refill_time })),
        (None, None) if one_time_burst.is_none() => Ok(None),
        (None, _) => Err(KeyError::Missing(size)),
        (_, None) => Err(KeyError::Missing(refill)),
    }
}

fn limits(options: &Options) -> Result<Option<RateLimiterConfig>, KeyError> {
    let [bw_size, bw_burst, bw_refill, ops_size, ops_burst, ops_refill] = LIMITS;
    let bandwidth = bucket(options, [bw_size, bw_burst, bw_refill])?;
    let ops = bucket(options, [ops_size, ops_burst, ops_refill])?;
    Ok((bandwidth.is_some() || ops.is_some()).then_some(RateLimiterConfig { bandwidth, ops }))
}

impl OptionValue for ImageType {
    const EXPECTED: &'static str = "raw or qcow2";
    fn read(text: &str) -> Option<Self> {
        match text {
            "raw" => Some(Self::Raw),
            "qcow2" => Some(Self::Qcow2),
            _ => None,
        }
    }
}

impl OptionValue for OnFailure {
    const EXPECTED: &'static str = "error, wait or unplug";
    fn read(text: &str) -> Option<Self> {
        match text {
            "error" => Some(Self::Error),
            "wait" => Some(Self::Wait),
            "unplug" => Some(Self::Unplug),
            _ => None,
        }
    }
}

impl OptionValue for Track {
    const EXPECTED: &'static str = "auto or shadow";
    fn read(text: &str) -> Option<Self> {
        match text {
            "auto" => Some(Self::Auto),
            "shadow" => Some(Self::Shadow),
            _ => None,
        }
    }
}

impl OptionValue for Isolation {
    const EXPECTED: &'static str = "shared or copy";
    fn read(text: &str) -> Option<Self> {
        match text {
            "shared" => Some(Self::Shared),
            "copy" => Some(Self::Copy),
            _ => None,
        }
    }
}

fn isolation(options: &Options) -> Result<Isolation, KeyError> {
    options.get("isolation").map(Option::unwrap_or_default)
}

pub(super) fn on_failure(options: &Options) -> Result<OnFailure, KeyError> {
    options.get("on_failure").map(Option::unwrap_or_default)
}

fn track(options: &Options) -> Result<Track, KeyError> {
    options.get("track").map(Option::unwrap_or_default)
}

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

impl DiskConfig {
    /// Reads `path=FILE[,readonly=on]…` or `vhost_user=true,socket=PATH`.
    ///
    /// # Errors
    /// What is wrong with it, naming `option`.
    pub fn from_flag(option: &'static str, text: &str) -> Result<Self, FlagError> {
        let keys = [
            "path",
            "image_type",
            "backing_files",
            "readonly",
            "direct",
            "num_queues",
            "queue_size",
            "serial",
            "vhost_user",
            "socket",
            "stall_timeout",
            "start_attempts",
            "standby",
            "on_failure",
            "track",
            "iommu",
            "isolation",
            "id",
        ];
        let read = || {
            let options = Options::parse(text, &limited(&keys), &DISK_TOLERATED)?;
            Ok(Self {
                id: options.get("id")?,
                path: options.get("path")?,
                image_type: options.get("image_type")?,
                backing_files: options.on("backing_files")?,
                readonly: options.on("readonly")?,
                direct: options.on("direct")?,
                num_queues: options.get("num_queues")?,
                queue_size: options.get("queue_size")?,
                serial: options.get("serial")?,
                vhost_user: options.on("vhost_user")?,
                vhost_socket: options.get("socket")?,
                rate_limiter_config: limits(&options)?,
                stall_timeout: options.get("stall_timeout")?,
                start_attempts: options.get("start_attempts")?,
                standby: options.on("standby")?,
                on_failure: on_failure(&options)?,
                track: track(&options)?,
                iommu: options.on("iommu")?,
                isolation: isolation(&options)?,
            })
        };
        device(option, text, read, DeviceConfig::Disk)
    }
}

impl NetConfig {
    /// Reads `tap=NAME…`, `user=on[,forward=2222:22]…`, `switch=NAME…` or `vhost_user=true,socket=PATH…`.
    ///
    /// # Errors
    /// What is wrong with it, naming `option`.
    pub fn from_flag(option: &'static str, text: &str) -> Result<Self, FlagError> {
        let keys = [
            "tap",
            "ip",
            "mask",
            "mac",
            "host_mac",
            "mtu",
            "num_queues",
            "queue_size",
            "user",
            "forward",
            "switch",
            "vhost_user",
            "socket",
            "pcap",
            "fd",
            "stall_timeout",
            "start_attempts",
            "standby",
            "on_failure",
            "track",
            "iommu",
            "isolation",
            "id",
        ];
        let read = || {
            let options = Options::parse(text, &limited(&keys), &NET_TOLERATED)?;
            let forward: Option<String> = options.get("forward")?;
            Ok(Self {
                id: options.get("id")?,
                tap: options.get("tap")?,
                ip: options.get("ip")?,
                mask: options.get("mask")?,
                mac: options.get("mac")?,
                host_mac: options.get("host_mac")?,
                mtu: options.get("mtu")?,
                num_queues: options.get("num_queues")?,
                queue_size: options.get("queue_size")?,
                user: options.on("user")?,
                forward: forward.iter().flat_map(|rules| rules.split('+')).map(str::to_owned).collect(),
                switch: options.get("switch")?,
                vhost_user: options.on("vhost_user")?,
                vhost_socket: options.get("socket")?,
                pcap: options.get("pcap")?,
                rate_limiter_config: limits(&options)?,
                stall_timeout: options.get("stall_timeout")?,
                start_attempts: options.get("start_attempts")?,
                standby: options.on("standby")?,
                on_failure: on_failure(&options)?,
                track: track(&options)?,
                iommu: options.on("iommu")?,
                isolation: isolation(&options)?,
                fds: options.get("fd")?,
                descriptors: super::Descriptors::default(),
            })
        };
        device(option, text, read, DeviceConfig::Net)
    }
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

    use super::*;

    #[test]
    fn disks_are_described() {
        let text = "path=/tmp/a,readonly=on,direct=true,serial=S1,num_queues=4,bw_size=1M,bw_refill_time=100,id=root";
        let disk = DiskConfig::from_flag("--disk", text).unwrap();
        assert_eq!((disk.readonly, disk.direct, disk.num_queues), (true, true, Some(4)));
        let limits = disk.rate_limiter_config.unwrap();
        assert_eq!(limits.bandwidth, Some(TokenBucketConfig { size: 1 << 20, one_time_burst: None, refill_time: 100 }));
        let disk = DiskConfig::from_flag("--disk", "vhost_user=true,socket=/run/s,iommu=off,pci_segment=0").unwrap();
        assert_eq!(disk.vhost_socket, Some("/run/s".into()));
        let disk = DiskConfig::from_flag("--disk", "path=a,image_type=qcow2,backing_files=on").unwrap();
        assert_eq!((disk.image_type, disk.backing_files), (Some(ImageType::Qcow2), true));
    }

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
    fn networks_are_described() {
        let net = NetConfig::from_flag("--net", "user=on,forward=2222:22+udp:5353:53,mac=52:54:00:12:34:56").unwrap();
        assert_eq!(net.forward, ["2222:22", "udp:5353:53"]);
        let net = NetConfig::from_flag("--net", "fd=[3,4],num_queues=4,id=n").unwrap();
        assert_eq!(net.fds, Some(vec![3, 4]));
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
        let cases = [
            ("", "'' is none"),
            ("vhost_user=on", "needs socket=PATH"),
            ("path=a,socket=b", "needs vhost_user=true"),
            ("path=a,vhost_user=on,socket=b", "path does not go with"),
            ("vhost_user=on,socket=s,direct=on", "direct does not go with"),
            ("path=a,image_type=vhdx", "raw or qcow2"),
            ("path=a,backing_files=on", "needs image_type=qcow2"),
            ("path=a,colour=red", "no key 'colour'"),
            ("path=a,path=b", "'path' is given twice"),
            ("path", "'path' is none"),
            ("path=a,serial=", "serial needs a value"),
            ("path=a,readonly=maybe", "on or off"),
            ("path=a,num_queues=0", "from 1 to 64"),
            ("path=a,num_queues=65", "from 1 to 64"),
            ("path=a,queue_size=100", "power of two"),
            ("path=a,serial=123456789012345678901", "20 bytes"),
            ("path=a,bw_size=1M", "bw_refill_time= is needed"),
            ("path=a,id=a/b", "letters"),
            ("path=a,on_failure=panic", "error, wait or unplug"),
            ("path=a,stall_timeout=soon", "stall_timeout"),
            ("path=a,start_attempts=few", "start_attempts"),
            ("path=a,isolation=none", "shared or copy"),
            ("path=a,track=shadow", "keeps that record by itself"),
            ("vhost_user=on,socket=s,standby=on", "start a second one"),
        ];
        for (text, expected) in cases {
            let error = DiskConfig::from_flag("--disk", text).unwrap_err().to_string();
            assert!(error.contains(expected) && error.starts_with(&format!("--disk {text}: ")), "{text}: {error}");
        }
        let bare = PassthroughConfig::from_flag("--device", "path=00:02.0").unwrap_err().to_string();
        assert!(bare.contains("is wanted: path=/sys/bus/pci/devices/0000:00:02.0"), "{bare}");
        for refused in ["iommu=on", "isolation=copy"] {
            let nvme = NvmeConfig::from_flag("--nvme", &format!("path=a,{refused}")).unwrap_err();
            let user = UserDeviceConfig::from_flag("--user-device", &format!("socket=a,{refused}")).unwrap_err();
            for error in [nvme.to_string(), user.to_string()] {
                assert!(error.contains(&format!("{refused} is not supported: ")), "{error}");
            }
        }
        let cases = [
            ("tap=t,user=on", "exclude each other"),
            ("tap=t,forward=1:2", "needs user=on"),
            ("user=on,forward=99999:22", "99999:22"),
            ("user=on,forward=22", "HOSTPORT:GUESTPORT"),
            ("tap=t,num_queues=3", "even number"),
            ("tap=t,mac=52:54:00:12:34", "six bytes"),
            ("tap=t,mac=01:54:00:12:34:56", "multicast"),
            ("tap=averyverylongname", "15 bytes"),
            ("tap=t,mtu=20", "from 68"),
            ("tap=t,ip=1.2.3", "IPv4"),
            ("user=on,switch=s", "exclude each other"),
            ("socket=/s", "go together"),
            ("user=on,ip=10.0.0.1", "need tap=NAME"),
            ("switch=lan,pcap=f", "atoll switch lan --pcap"),
            ("switch=lan,bw_size=1,bw_refill_time=1", "do not go with switch"),
            ("vhost_user=true,socket=/s,pcap=f", "do not go with vhost_user"),
        ];
        for (text, expected) in cases {
            let error = NetConfig::from_flag("--net", text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
