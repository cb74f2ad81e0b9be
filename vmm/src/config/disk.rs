//! Disks over vhost-user.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

use super::DeviceConfig;
use super::care::{Isolation, OnFailure, Track, is_false, isolation, on_failure, track};
use super::device_flags::{SEGMENT, device};
use super::keyvalue::{FlagError, OptionValue, Options, Tolerated};
use super::limits::{self, RateLimiterConfig};

const DISK_TOLERATED: [Tolerated; 4] = [
    SEGMENT,
    Tolerated { key: "queue_affinity", values: &["[]"], remedy: "pin the threads of atoll-blk with taskset" },
    Tolerated { key: "_disable_io_uring", values: &["off", "false"], remedy: "leave it out" },
    Tolerated { key: "_disable_aio", values: &[], remedy: "" },
];

/// What a disk's image is. In small letters it is understood, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ImageType {
    /// The disk, byte for byte.
    #[serde(alias = "raw")]
    Raw,
    /// qcow2, of version 2 or 3.
    #[serde(alias = "qcow2")]
    Qcow2,
}

/// Reads an image's type; clients of Cloud Hypervisor say `Unknown` where nobody has said it.
pub(super) fn image_type<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<ImageType>, D::Error> {
    #[derive(Deserialize)]
    enum Said {
        #[serde(alias = "raw")]
        Raw,
        #[serde(alias = "qcow2")]
        Qcow2,
        Unknown,
    }
    Ok(match Option::<Said>::deserialize(deserializer)? {
        Some(Said::Raw) => Some(ImageType::Raw),
        Some(Said::Qcow2) => Some(ImageType::Qcow2),
        Some(Said::Unknown) | None => None,
    })
}

/// A disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct DiskConfig {
    /// Its name; given by Atoll (`_disk0`) when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Its image, served by a process of ours.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// What that image is. Left out, an image that begins like qcow2 is refused, and any other is raw.
    #[serde(deserialize_with = "image_type", skip_serializing_if = "Option::is_none")]
    pub image_type: Option<ImageType>,
    /// The files that a qcow2 image names, what it stands on and where its data is, may be opened.
    #[serde(skip_serializing_if = "is_false")]
    pub backing_files: bool,
    /// The guest cannot write it.
    #[serde(skip_serializing_if = "is_false")]
    pub readonly: bool,
    /// The host's page cache is bypassed.
    #[serde(skip_serializing_if = "is_false")]
    pub direct: bool,
    /// Request queues; one when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_queues: Option<u16>,
    /// Descriptors of each queue.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue_size: Option<u16>,
    /// What the guest reads as its serial number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Somebody else's backend serves it.
    #[serde(skip_serializing_if = "is_false")]
    pub vhost_user: bool,
    /// Where that backend listens.
    #[serde(skip_serializing_if = "Option::is_none", alias = "socket")]
    pub vhost_socket: Option<PathBuf>,
    /// Limits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter_config: Option<RateLimiterConfig>,
    /// What becomes of it when its backend cannot be had again.
    #[serde(skip_serializing_if = "OnFailure::is_default")]
    pub on_failure: OnFailure,
    /// A spare process waits beside the one that serves, and takes its place at once when it dies.
    #[serde(default, skip_serializing_if = "is_false")]
    pub standby: bool,
    /// Seconds for which a queue may stand with work in it before its backend is replaced; 0: for ever. 30 when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stall_timeout: Option<u32>,
    /// Starts of a process of ours in a row that may fail before the device is given up; 0: any number. 20 when left out, which
    /// with the pauses between them is not quite half a minute.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_attempts: Option<u32>,
    /// Who keeps account of requests in flight, where somebody else's backend does not.
    #[serde(skip_serializing_if = "Track::is_default")]
    pub track: Track,
    /// It is behind the machine's virtual IOMMU: it reaches what the guest's driver has mapped for it.
    #[serde(skip_serializing_if = "is_false")]
    pub iommu: bool,
    /// What its backend has of the guest's memory.
    #[serde(skip_serializing_if = "Isolation::is_default")]
    pub isolation: Isolation,
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
            let options = Options::parse(text, &limits::with_keys(&keys), &DISK_TOLERATED)?;
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
                rate_limiter_config: limits::read(&options)?,
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

#[cfg(test)]
mod tests {
    use super::super::limits::TokenBucketConfig;
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
    }
}
