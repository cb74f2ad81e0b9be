//! The command line of `atoll-net`, and what it means.

use std::net::Ipv4Addr;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Arc;

use atoll_kit::limit::{BucketConfig, Limiter};
use atoll_kit::program::ServeArgs;
use clap::{ArgGroup, Parser};

use crate::card::PAIRS_MAX;
use crate::filter::{Mac, is_group};
use crate::link::tap_device::HostEnd;

/// Most front ends of a switch.
pub const PORTS_MAX: u16 = 64;

/// A virtio-net device in a process of its own, served over vhost-user.
///
/// Any vhost-user front end can use it: Atoll starts it by itself; for QEMU start it with --socket and use
/// `-chardev socket,id=c,path=S,reconnect=1 -netdev vhost-user,id=n,chardev=c -device virtio-net-pci,netdev=n` with shared
/// guest memory.
#[derive(Debug, Parser)]
#[command(name = "atoll-net", version)]
#[command(group(ArgGroup::new("link").required(true).args(["tap", "fd", "stream", "stream_fd", "switch", "none"])))]
pub struct Options {
    /// Where the front end is, and who supervises.
    #[command(flatten)]
    pub serve: ServeArgs,

    /// A TAP interface of the host, made if it is not there and that is permitted
    #[arg(long, value_name = "NAME")]
    pub tap: Option<String>,
    /// Serve nothing: open --tap, send its queues over this inherited socket, and end
    #[arg(long, value_name = "N", requires = "tap", conflicts_with_all = ["socket", "vhost_fd"])]
    pub hand_over: Option<RawFd>,
    /// An inherited queue of a TAP interface (IFF_TAP, IFF_NO_PI, IFF_VNET_HDR); once for each queue pair
    #[arg(long, value_name = "N")]
    pub fd: Vec<RawFd>,
    /// A stream socket that carries frames behind their lengths (passt), connected anew when it breaks
    #[arg(long, value_name = "PATH")]
    pub stream: Option<PathBuf>,
    /// The same as an inherited, connected socket; the process ends with its other end
    #[arg(long, value_name = "N")]
    pub stream_fd: Option<RawFd>,
    /// A learning switch: each front end that connects to --socket is a port, several at a time
    #[arg(long, conflicts_with = "vhost_fd")]
    pub switch: bool,
    /// Nothing: frames go nowhere
    #[arg(long)]
    pub none: bool,

    /// Most queue pairs that the driver may use
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=i64::from(PAIRS_MAX)))]
    pub queue_pairs: u16,
    /// The card's address; made up from the socket's or interface's name when left out
    #[arg(long, value_name = "MAC", value_parser = parse_mac)]
    pub mac: Option<Mac>,
    /// The largest packet that the card suggests to its driver
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u16).range(68..))]
    pub mtu: Option<u16>,
    /// Most front ends of a switch at a time
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(2..=i64::from(PORTS_MAX)))]
    pub ports: u16,
    /// Write all frames to this file for Wireshark; with --switch PORT=FILE writes those of one port. May be repeated
    #[arg(long, value_name = "[PORT=]FILE", value_parser = parse_capture)]
    pub pcap: Vec<CaptureOption>,
    /// Offer no checksum and segmentation offloads
    #[arg(long)]
    pub no_offload: bool,

    /// Limit the bytes in each direction: BYTES tokens that come back within MS milliseconds, BURST more once
    #[arg(long, value_name = "BYTES,MS[,BURST]")]
    pub rate_bytes: Option<BucketConfig>,
    /// Limit the frames in each direction, likewise
    #[arg(long, value_name = "FRAMES,MS[,BURST]")]
    pub rate_ops: Option<BucketConfig>,

    /// IPv4 address of the host's end of --tap
    #[arg(long, value_name = "ADDR", requires = "tap")]
    pub host_ip: Option<Ipv4Addr>,
    /// Netmask of the host's end of --tap
    #[arg(long, value_name = "MASK", requires = "host_ip")]
    pub host_mask: Option<Ipv4Addr>,
    /// Ethernet address of the host's end of --tap
    #[arg(long, value_name = "MAC", requires = "tap", value_parser = parse_mac)]
    pub host_mac: Option<Mac>,
}

/// A capture: of one port, or of all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaptureOption {
    /// Number of the port.
    pub port: Option<u16>,
    /// The file.
    pub path: PathBuf,
}

fn parse_capture(text: &str) -> Result<CaptureOption, String> {
    let named = text.split_once('=').and_then(|(port, path)| Some((port.parse().ok()?, path)));
    let (port, path) = match named {
        Some((port, path)) => (Some(port), path),
        None => (None, text),
    };
    if path.is_empty() {
        return Err("a capture needs a file, for example net.pcap or 0=port.pcap".to_owned());
    }
    Ok(CaptureOption { port, path: path.into() })
}

/// Reads an address as six pairs of hexadecimal digits.
pub fn parse_mac(text: &str) -> Result<Mac, String> {
    let wrong = || format!("{text} is no address of a card; write for example 52:54:00:12:34:56");
    let mut mac = Mac::default();
    let mut parts = text.split([':', '-']);
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2).ok_or_else(wrong)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
    }
    if parts.next().is_some() {
        return Err(wrong());
    }
    if is_group(&mac) {
        return Err(format!("{text} is the address of a group; the first byte must be even"));
    }
    Ok(mac)
}

impl Options {
    /// What contradicts itself beyond what clap can see.
    pub fn check(&self) -> Result<(), String> {
        if self.hand_over.is_none() {
            self.serve.check()?;
        }
        if !self.fd.is_empty() && self.fd.len() != usize::from(self.queue_pairs) {
            return Err(format!("{} queue pairs need as many --fd, not {}", self.queue_pairs, self.fd.len()));
        }
        // clap does not see it where another link is given.
        if self.tap.is_none() && (self.host_ip.is_some() || self.host_mac.is_some()) {
            return Err("--host-ip and --host-mac are for --tap".to_owned());
        }
        if self.tap.is_none() && self.hand_over.is_some() {
            return Err("--hand-over is for --tap".to_owned());
        }
        if self.queue_pairs > 1 && (self.stream.is_some() || self.stream_fd.is_some()) {
            return Err("a stream has one queue pair: leave --queue-pairs out".to_owned());
        }
        let ports = if self.switch { self.ports } else { 1 };
        match self.pcap.iter().find_map(|capture| capture.port.filter(|port| *port >= ports)) {
            Some(port) => Err(format!("--pcap names port {port}; they are numbered from 0 to {}", ports - 1)),
            None => Ok(()),
        }
    }

    /// The inherited descriptors of its links.
    pub fn inherited(&self) -> Vec<RawFd> {
        let one = [self.stream_fd, self.hand_over].into_iter().flatten();
        one.chain(self.fd.iter().copied()).collect()
    }

    /// The limits of one direction of one card; each has buckets of its own.
    pub fn limiter(&self) -> Option<Arc<Limiter>> {
        Limiter::new(self.rate_bytes, self.rate_ops)
    }

    /// How the host's end of a TAP shall be set up.
    pub fn host_end(&self) -> HostEnd {
        HostEnd { ip: self.host_ip, mask: self.host_mask, mac: self.host_mac, mtu: self.mtu }
    }

    /// The address of a port's card. One that is made up is locally administered, stays the same for the same socket or
    /// interface, and differs from port to port.
    pub fn mac(&self, port: u16) -> Mac {
        let given = self.mac.unwrap_or_else(|| {
            let name = match (&self.serve.socket, &self.tap) {
                (Some(path), _) => std::path::absolute(path).unwrap_or_else(|_| path.clone()).into_os_string(),
                (None, Some(tap)) => tap.into(),
                (None, None) => "atoll".into(),
            };
            // FNV-1a: stable over builds, unlike the standard library's hash.
            let hash = name
                .as_encoded_bytes()
                .iter()
                .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
            let [a, b, c, d, e, ..] = hash.to_be_bytes();
            [0x02, a, b, c, d, e]
        });
        let [a, b, c, d, e, f] = given;
        let [d, e, f] = {
            let low = (u32::from_be_bytes([0, d, e, f]) + u32::from(port)) & 0xff_ffff;
            let [_, d, e, f] = low.to_be_bytes();
            [d, e, f]
        };
        [a, b, c, d, e, f]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options, String> {
        let words = std::iter::once("atoll-net").chain(line.split_whitespace());
        let options = Options::try_parse_from(words).map_err(|e| e.to_string())?;
        options.check().map(|()| options)
    }

    #[test]
    fn what_contradicts_itself_is_refused_with_a_reason() {
        let cases = [
            ("--socket s", "required"),
            ("--tap t", "where the front end is"),
            ("--socket s --tap t --none", "cannot be used with"),
            ("--vhost-fd 5 --switch", "cannot be used with"),
            ("--socket s --fd 4 --queue-pairs 2", "as many --fd"),
            ("--socket s --stream p --queue-pairs 2", "one queue pair"),
            ("--socket s --none --queue-pairs 9", "1..=8"),
            ("--socket s --none --mac 01:00:00:00:00:00", "group"),
            ("--socket s --none --mac 52:54:00:12:34", "write for example"),
            ("--socket s --switch --pcap 8=x", "from 0 to 7"),
            ("--socket s --none --host-ip 10.0.0.1", "--tap"),
            ("--none --hand-over 5", "--tap"),
            ("--socket s --tap t --hand-over 5", "cannot be used with"),
        ];
        for (line, reason) in cases {
            let text = parse(line).unwrap_err();
            assert!(text.contains(reason), "{line}: {text}");
        }
    }

    #[test]
    fn addresses_of_ports_differ_and_stay() {
        let options = parse("--socket /a/s --switch --mac 52:54:00:12:34:ff").unwrap();
        assert_eq!(
            (options.mac(0), options.mac(1)),
            ([0x52, 0x54, 0, 0x12, 0x34, 0xff], [0x52, 0x54, 0, 0x12, 0x35, 0])
        );
        let made_up = parse("--socket /a/s --none").unwrap();
        assert_eq!(made_up.mac(0), parse("--socket /a/s --none").unwrap().mac(0));
        assert_ne!(made_up.mac(0), parse("--socket /a/t --none").unwrap().mac(0));
        assert!(!is_group(&made_up.mac(0)));
    }

    #[test]
    fn captures_name_a_port_or_all() {
        let options = parse("--socket s --switch --pcap all.pcap --pcap 3=three.pcap").unwrap();
        let expected = [(None, "all.pcap"), (Some(3), "three.pcap")];
        for (capture, (port, path)) in options.pcap.iter().zip(expected) {
            assert_eq!((capture.port, capture.path.as_path()), (port, std::path::Path::new(path)));
        }
    }
}
