//! What a driver left to the card, done in software: completing checksums and cutting segments, for a receiver that has
//! not agreed to do it itself.
//!
//! Frames come from a guest: every field is checked before it is believed.

use crate::filter::Mac;
use crate::header::{ETHERNET_BYTES, GSO_ECN, GSO_TCPV4, GSO_TCPV6, Header};

const VLAN: [u16; 2] = [0x8100, 0x88a8];
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const TCP_CSUM_OFFSET: u16 = 16;
const UDP_CSUM_OFFSET: u16 = 6;
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;
/// Smallest payload of a segment that is cut: Linux' smallest segment. One frame becomes 1,366 at most.
const SEGMENT_MIN: usize = 48;

/// Adds bytes to a ones' complement sum.
fn sum(bytes: &[u8], start: u64) -> u64 {
    let (words, rest) = bytes.as_chunks::<2>();
    let all = words.iter().fold(start, |all, word| all + u64::from(u16::from_be_bytes(*word)));
    all + rest.first().map_or(0, |last| u64::from(*last) << 8)
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) -> Option<()> {
    bytes.get_mut(at..at + value.len())?.copy_from_slice(value);
    Some(())
}

/// Completes the checksum that `header` asks for; none when it lies outside the frame.
pub fn complete(frame: &mut [u8], header: &Header) -> Option<()> {
    let start = usize::from(header.csum_start);
    let value = !fold(sum(frame.get(start..)?, 0));
    // A UDP checksum of zero would say that there is none.
    let value = if value == 0 && header.csum_offset == UDP_CSUM_OFFSET { 0xffff } else { value };
    put(frame, start + usize::from(header.csum_offset), &value.to_be_bytes())
}

/// Where the network header begins, and its EtherType.
fn network(frame: &[u8]) -> Option<(usize, u16)> {
    let mut at = size_of::<Mac>() * 2;
    for _ in 0..=VLAN.len() {
        let kind = word(frame, at)?;
        if !VLAN.contains(&kind) {
            return Some((at + 2, kind));
        }
        at += 4;
    }
    None
}

/// Cuts a TCP frame into segments with complete checksums and hands each to `emit`, until that says false. False when
/// the frame is not what its header says.
pub fn segment(frame: &[u8], header: &Header, mut emit: impl FnMut(&[u8]) -> bool) -> bool {
    let Some(plan) = Plan::new(frame, header) else { return false };
    let mut out = Vec::with_capacity(plan.payload + plan.size);
    let mut at = plan.payload;
    let mut number = 0_u16;
    while at < frame.len() {
        let end = (at + plan.size).min(frame.len());
        if plan.cut(frame, at..end, number, &mut out).is_none() {
            return false;
        }
        if !emit(&out) {
            return true;
        }
        number = number.wrapping_add(1);
        at = end;
    }
    true
}

struct Plan {
    /// Where the IP header begins.
    ip: usize,
    v6: bool,
    /// Where the TCP header begins.
    tcp: usize,
    /// Where the payload begins.
    payload: usize,
    /// Payload of each segment.
    size: usize,
}

impl Plan {
    fn new(frame: &[u8], header: &Header) -> Option<Self> {
        let (ip, kind) = network(frame)?;
        let v6 = match (header.gso & !GSO_ECN, kind) {
            (GSO_TCPV4, IPV4) => false,
            (GSO_TCPV6, IPV6) => true,
            _ => return None,
        };
        let tcp = usize::from(header.csum_start);
        let ip_bytes = if v6 { 40 } else { usize::from(frame.get(ip)? & 0xf) * 4 };
        let size = usize::from(header.gso_size);
        // IPv6 may have extension headers in between; IPv4 says its length.
        let fits = ip_bytes >= 20 && if v6 { tcp >= ip + ip_bytes } else { tcp == ip + ip_bytes };
        if !fits || ip < ETHERNET_BYTES || header.csum_offset != TCP_CSUM_OFFSET || size < SEGMENT_MIN {
            return None;
        }
        let tcp_bytes = usize::from(frame.get(tcp + 12)? >> 4) * 4;
        let payload = tcp + tcp_bytes;
        (tcp_bytes >= 20 && payload < frame.len()).then_some(Self { ip, v6, tcp, payload, size })
    }

    fn cut(&self, frame: &[u8], part: std::ops::Range<usize>, number: u16, out: &mut Vec<u8>) -> Option<()> {
        let (first, last) = (part.start == self.payload, part.end == frame.len());
        let offset = (part.start - self.payload) as u32;
        out.clear();
        out.extend_from_slice(frame.get(..self.payload)?);
        out.extend_from_slice(frame.get(part)?);
        let (ip, tcp) = (self.ip, self.tcp);
        let length = |from: usize| u16::try_from(out.len() - from).ok();
        if self.v6 {
            let bytes = length(ip + 40)?;
            put(out, ip + 4, &bytes.to_be_bytes())?;
        } else {
            let bytes = length(ip)?;
            put(out, ip + 2, &bytes.to_be_bytes())?;
            let id = word(out, ip + 4)?.wrapping_add(number);
            put(out, ip + 4, &id.to_be_bytes())?;
            put(out, ip + 10, &[0, 0])?;
            let check = !fold(sum(out.get(ip..tcp)?, 0));
            put(out, ip + 10, &check.to_be_bytes())?;
        }
        let sequence = u32::from_be_bytes(out.get(tcp + 4..tcp + 8)?.try_into().ok()?).wrapping_add(offset);
        put(out, tcp + 4, &sequence.to_be_bytes())?;
        let flags = out.get_mut(tcp + 13)?;
        if !last {
            *flags &= !(FIN | PSH);
        }
        if !first {
            *flags &= !CWR;
        }
        put(out, tcp + 16, &[0, 0])?;
        let addresses = if self.v6 { ip + 8..ip + 40 } else { ip + 12..ip + 20 };
        // The pseudo header: addresses, protocol (TCP: 6) and length.
        let pseudo = sum(out.get(addresses)?, 6 + (out.len() - tcp) as u64);
        let check = !fold(sum(out.get(tcp..)?, pseudo));
        put(out, tcp + 16, &check.to_be_bytes())
    }
}

/// A number that is the same for all frames of one flow, in both directions.
pub fn flow(frame: &[u8]) -> u32 {
    let Some((ip, kind)) = network(frame) else { return 0 };
    let (addresses, protocol, ports) = match kind {
        IPV4 => {
            let Some(first) = frame.get(ip) else { return 0 };
            // A fragment has no ports.
            let whole = word(frame, ip + 6).is_some_and(|fragment| fragment & 0x3fff == 0);
            (ip + 12..ip + 20, frame.get(ip + 9), whole.then_some(ip + usize::from(first & 0xf) * 4))
        }
        IPV6 => (ip + 8..ip + 40, frame.get(ip + 6), Some(ip + 40)),
        _ => return 0,
    };
    let mix =
        |bytes: &[u8]| bytes.chunks(2).fold(0_u32, |all, two| all + two.iter().fold(0, |w, b| w << 8 | u32::from(*b)));
    let ported = protocol.is_some_and(|protocol| matches!(protocol, 6 | 17));
    let ports = ports.filter(|_| ported).and_then(|at| frame.get(at..at + 4));
    // Sums do not care for the direction.
    let sum = mix(frame.get(addresses).unwrap_or_default()) + ports.map_or(0, mix);
    sum.wrapping_mul(0x9e37_79b1) >> 16
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header::NEEDS_CSUM;
    use proptest::prelude::*;

    /// A TCP frame with a pseudo header's sum where its checksum goes, and the header for it.
    fn tcp(v6: bool, payload: &[u8], gso_size: u16, flags: u8) -> (Vec<u8>, Header) {
        let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
        let ip_bytes = if v6 { 40 } else { 20 };
        frame.extend_from_slice(&(if v6 { IPV6 } else { IPV4 }).to_be_bytes());
        let mut ip = vec![0_u8; ip_bytes];
        if v6 {
            (ip[0], ip[6], ip[7]) = (0x60, 6, 64);
            (8..40).for_each(|n| ip[n] = n as u8);
        } else {
            (ip[0], ip[8], ip[9]) = (0x45, 64, 6);
            ip[4..6].copy_from_slice(&0xfffe_u16.to_be_bytes());
            ip[12..20].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        }
        frame.extend_from_slice(&ip);
        let mut header = [0_u8; 20];
        header[..4].copy_from_slice(&[0x12, 0x34, 0, 80]);
        header[4..8].copy_from_slice(&0xffff_fff0_u32.to_be_bytes());
        (header[12], header[13]) = (5 << 4, flags);
        frame.extend_from_slice(&header);
        frame.extend_from_slice(payload);
        let start = ETHERNET_BYTES + ip_bytes;
        let addresses = if v6 { 22..54 } else { 26..34 };
        let pseudo = fold(sum(&frame[addresses], 6 + 20 + payload.len() as u64));
        frame[start + 16..start + 18].copy_from_slice(&pseudo.to_be_bytes());
        let header = Header {
            flags: NEEDS_CSUM,
            gso: if v6 { GSO_TCPV6 } else { GSO_TCPV4 },
            header_len: (start + 20) as u16,
            gso_size,
            csum_start: start as u16,
            csum_offset: TCP_CSUM_OFFSET,
        };
        (frame, header)
    }

    /// A receiver's view: checks every checksum and length, gives sequence number, flags and payload.
    fn receive(frame: &[u8], v6: bool) -> (u32, u8, Vec<u8>) {
        let (ip, tcp, addresses) = if v6 { (14, 54, 22..54) } else { (14, 34, 26..34) };
        if v6 {
            assert_eq!(usize::from(word(frame, ip + 4).unwrap()), frame.len() - 54);
        } else {
            assert_eq!(usize::from(word(frame, ip + 2).unwrap()), frame.len() - 14);
            assert_eq!(fold(sum(&frame[ip..tcp], 0)), 0xffff, "IP header");
        }
        let pseudo = sum(&frame[addresses], 6 + (frame.len() - tcp) as u64);
        assert_eq!(fold(sum(&frame[tcp..], pseudo)), 0xffff, "TCP");
        let sequence = u32::from_be_bytes(frame[tcp + 4..tcp + 8].try_into().unwrap());
        (sequence, frame[tcp + 13], frame[tcp + 20..].to_vec())
    }

    proptest! {
        #[test]
        fn segments_carry_the_stream_and_right_checksums(
            v6 in any::<bool>(), payload in proptest::collection::vec(any::<u8>(), 1..5000), size in 48_u16..1500,
        ) {
            let (frame, header) = tcp(v6, &payload, size, FIN | PSH | CWR | 0x10);
            let mut stream = Vec::new();
            let mut seen = Vec::new();
            let whole = segment(&frame, &header, |part| {
                let (sequence, flags, data) = receive(part, v6);
                assert_eq!(sequence, 0xffff_fff0_u32.wrapping_add(stream.len() as u32));
                assert!(data.len() <= usize::from(size));
                stream.extend(data);
                seen.push(flags);
                true
            });
            prop_assert!(whole);
            prop_assert_eq!(stream, payload);
            let last = seen.len() - 1;
            for (n, flags) in seen.iter().enumerate() {
                prop_assert_eq!((flags & CWR != 0, flags & (FIN | PSH) != 0), (n == 0, n == last));
            }
        }

        #[test]
        fn a_completed_checksum_is_right(v6 in any::<bool>(), payload in proptest::collection::vec(any::<u8>(), 1..100)) {
            let (mut frame, header) = tcp(v6, &payload, 0, 0);
            complete(&mut frame, &header).unwrap();
            let mut cut = frame.clone();
            // The lengths in the IP header are what segmentation writes; here they are the sender's.
            if v6 {
                put(&mut cut, 18, &((frame.len() - 54) as u16).to_be_bytes()).unwrap();
            } else {
                put(&mut cut, 16, &((frame.len() - 14) as u16).to_be_bytes()).unwrap();
                let check = !fold(sum(&cut[14..34], 0));
                put(&mut cut, 24, &check.to_be_bytes()).unwrap();
            }
            receive(&cut, v6);
        }

        #[test]
        fn no_frame_and_no_header_makes_it_panic(
            frame in proptest::collection::vec(any::<u8>(), 0..200), raw in any::<[u8; 12]>(), kind in 0..4_u8,
        ) {
            let mut frame = frame;
            let kind = [[0x08, 0x00], [0x86, 0xdd], [0x81, 0x00], [0, 0]][usize::from(kind)];
            let _ = put(&mut frame, 12, &kind);
            let header = Header::parse(&raw);
            let mut count = 0;
            segment(&frame, &header, |_| { count += 1; true });
            prop_assert!(count <= frame.len());
            let _ = complete(&mut frame, &header);
            flow(&frame);
        }
    }

    #[test]
    fn both_directions_of_a_flow_are_one_flow() {
        let (there, _) = tcp(false, b"x", 0, 0);
        let mut back = there.clone();
        back[26..34].copy_from_slice(&[10, 0, 0, 2, 10, 0, 0, 1]);
        back[34..38].copy_from_slice(&[0, 80, 0x12, 0x34]);
        assert_eq!(flow(&there), flow(&back));
        back[35] = 81;
        assert_ne!(flow(&there), flow(&back));
    }
}
