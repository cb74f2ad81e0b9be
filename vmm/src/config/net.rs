//! Network cards.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::DeviceConfig;
use super::care::{Isolation, OnFailure, Track, is_false, isolation, on_failure, track};
use super::device_flags::{SEGMENT, device};
use super::keyvalue::{FlagError, Options, Tolerated};
use super::limits::{self, RateLimiterConfig};

const NET_TOLERATED: [Tolerated; 5] = [
    SEGMENT,
    Tolerated { key: "vhost_mode", values: &["client"], remedy: "the backend listens; leave it out" },
    Tolerated { key: "offload_tso", values: &["on", "true"], remedy: "the guest may switch it off by ethtool" },
    Tolerated { key: "offload_ufo", values: &[], remedy: "" },
    Tolerated { key: "offload_csum", values: &["on", "true"], remedy: "the guest may switch it off by ethtool" },
];

/// A network card. Exactly one of `tap` (or descriptors), `user`, `switch` and `vhost_user` says what it is plugged into;
/// none of them makes a new TAP.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct NetConfig {
    /// Its name; given by Atoll (`_net0`) when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Name of a TAP interface, made if it is not there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// Address of the host's end of the TAP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip: Option<String>,
    /// Its netmask.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mask: Option<String>,
    /// Address of the card; made up when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Address of the host's end of the TAP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_mac: Option<String>,
    /// Largest packet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Queues in both directions together: an even number, 2 when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_queues: Option<u16>,
    /// Descriptors of each queue.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue_size: Option<u16>,
    /// User-mode networking: needs no rights on the host.
    #[serde(skip_serializing_if = "is_false")]
    pub user: bool,
    /// User mode: `HOSTPORT:GUESTPORT` of TCP (or `udp:HOSTPORT:GUESTPORT`), several separated by `+` on the command line.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub forward: Vec<String>,
    /// Name of a switch of this user, or the path of its socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub switch: Option<String>,
    /// Somebody else's backend serves it.
    #[serde(skip_serializing_if = "is_false")]
    pub vhost_user: bool,
    /// Where that backend listens.
    #[serde(skip_serializing_if = "Option::is_none", alias = "socket")]
    pub vhost_socket: Option<PathBuf>,
    /// Every frame of this card is written to this file (pcap).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pcap: Option<PathBuf>,
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
    /// Open TAP descriptors, as the client numbers them; those that came beside the request are meant, in this order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fds: Option<Vec<i32>>,
    /// The descriptors themselves, as they came beside the request.
    #[serde(skip)]
    pub descriptors: Descriptors,
}

/// Open descriptors that came with a configuration. Copies of the configuration share them.
#[derive(Clone, Debug, Default)]
pub struct Descriptors(pub Vec<std::sync::Arc<std::os::fd::OwnedFd>>);

impl PartialEq for Descriptors {
    /// The same open descriptors, not equal files.
    fn eq(&self, other: &Self) -> bool {
        self.0.len() == other.0.len() && self.0.iter().zip(&other.0).all(|(a, b)| std::sync::Arc::ptr_eq(a, b))
    }
}

impl Eq for Descriptors {}

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
            let options = Options::parse(text, &limits::with_keys(&keys), &NET_TOLERATED)?;
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
                rate_limiter_config: limits::read(&options)?,
                stall_timeout: options.get("stall_timeout")?,
                start_attempts: options.get("start_attempts")?,
                standby: options.on("standby")?,
                on_failure: on_failure(&options)?,
                track: track(&options)?,
                iommu: options.on("iommu")?,
                isolation: isolation(&options)?,
                fds: options.get("fd")?,
                descriptors: Descriptors::default(),
            })
        };
        device(option, text, read, DeviceConfig::Net)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_described() {
        let net = NetConfig::from_flag("--net", "user=on,forward=2222:22+udp:5353:53,mac=52:54:00:12:34:56").unwrap();
        assert_eq!(net.forward, ["2222:22", "udp:5353:53"]);
        let net = NetConfig::from_flag("--net", "fd=[3,4],num_queues=4,id=n").unwrap();
        assert_eq!(net.fds, Some(vec![3, 4]));
    }

    #[test]
    fn mistakes_are_named() {
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
