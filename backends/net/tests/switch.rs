//! Guests on the ports of one switch.

mod process;

use std::time::Duration;

use anyhow::{Result, ensure};
use atoll_kit::driver::LOG_ALL;
use atoll_kit::driver::net::{NetGuest, NetOptions};
use process::{ALL, PLAIN, frame, listen, mac};
use virtio_bindings::bindings::virtio_net::{VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_MRG_RXBUF};

fn quiet(guest: &mut NetGuest) -> Result<()> {
    std::thread::sleep(Duration::from_millis(30));
    ensure!(guest.poll(0)?.is_none(), "a frame that is not meant for it");
    Ok(())
}

/// The first frame goes to all; from then on each goes where its address was seen. A guest that moves takes its address
/// along, and one that leaves is forgotten.
#[test]
fn frames_go_where_addresses_were_seen() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut net = listen(folder.path(), &["--switch", "--ports", "3"])?;
    let mut a = net.guest(NetOptions::default())?;
    let mut b = net.guest(NetOptions::default())?;
    let mut c = net.guest(NetOptions::default())?;
    a.send(&frame(mac(2), mac(1), 1, 60))?;
    assert_eq!(b.receive()?.frame, frame(mac(2), mac(1), 1, 60));
    assert_eq!(c.receive()?.frame, frame(mac(2), mac(1), 1, 60), "nobody knows yet where 2 is");
    b.send(&frame(mac(1), mac(2), 2, 1514))?;
    assert_eq!(a.receive()?.frame, frame(mac(1), mac(2), 2, 1514));
    a.send(&frame(mac(2), mac(1), 3, 60))?;
    assert_eq!(b.receive()?.frame, frame(mac(2), mac(1), 3, 60));
    quiet(&mut c)?;
    a.send(&frame(ALL, mac(1), 4, 60))?;
    assert_eq!(b.receive()?.frame, c.receive()?.frame);
    // Guest 2 appears behind c's port.
    c.send(&frame(ALL, mac(2), 5, 60))?;
    a.receive()?;
    b.receive()?;
    a.send(&frame(mac(2), mac(1), 6, 60))?;
    assert_eq!(c.receive()?.frame, frame(mac(2), mac(1), 6, 60));
    quiet(&mut b)?;
    // c leaves: what is for it goes to all again, and its port is free.
    drop(c);
    let mut d = loop {
        match net.guest(NetOptions::default()) {
            Ok(guest) => break guest,
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    a.send(&frame(mac(2), mac(1), 7, 60))?;
    assert_eq!((b.receive()?.frame, d.receive()?.frame), (frame(mac(2), mac(1), 7, 60), frame(mac(2), mac(1), 7, 60)));
    // The switch is full.
    assert!(net.guest(NetOptions::default()).is_err());
    Ok(())
}

/// A guest that takes nothing loses what is for it. Nobody else does, and nobody waits.
#[test]
fn a_guest_that_takes_nothing_holds_up_nobody() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut net = listen(folder.path(), &["--switch", "--ports", "3"])?;
    let mut a = net.guest(NetOptions::default())?;
    let mut b = net.guest(NetOptions::default())?;
    let mut stuck = NetGuest::new(NetOptions::default())?;
    stuck.driver.connect(net.connect()?)?;
    for number in 0..1000 {
        a.send(&frame(ALL, mac(1), number, 100))?;
        assert_eq!(b.receive()?.frame, frame(ALL, mac(1), number, 100));
    }
    // It gets what comes after it has made buffers available.
    stuck.fill_all()?;
    a.send(&frame(ALL, mac(1), 5000, 100))?;
    assert_eq!(stuck.receive()?.frame, frame(ALL, mac(1), 5000, 100));
    Ok(())
}

/// A long TCP segment between guests that have agreed on different things: one takes it as it is, in several buffers; one
/// gets it cut; one in single buffers.
#[test]
fn each_receiver_gets_what_it_has_agreed_to() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut net = listen(folder.path(), &["--switch", "--ports", "4"])?;
    let no_offload = LOG_ALL | 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_CSUM;
    let mut a = net.guest(NetOptions::default())?;
    let mut whole = net.guest(NetOptions::default())?;
    let mut cut = net.guest(NetOptions { without: no_offload, ..NetOptions::default() })?;
    let single = no_offload | 1 << VIRTIO_NET_F_MRG_RXBUF;
    let mut single = net.guest(NetOptions { without: single, buffer_bytes: 1600, ..NetOptions::default() })?;
    let payload: Vec<u8> = (0..5000_u32).map(|n| (n * 7 % 251) as u8).collect();
    let (frame, header) = tcp_frame(&payload, 1448);
    a.send_with(0, &header, &frame)?;
    let received = whole.receive()?;
    assert_eq!((received.frame, received.buffers), (frame.clone(), 4));
    assert_eq!(received.header[..10], header[..10], "the receiver completes the checksum");
    for guest in [&mut cut, &mut single] {
        let mut stream = Vec::new();
        for part in 0..4 {
            let received = guest.receive()?;
            assert_eq!((&received.header[..10], received.buffers), (&PLAIN[..10], 1), "part {part}");
            assert!(received.frame.len() <= 54 + 1448);
            stream.extend_from_slice(&received.frame[54..]);
        }
        assert_eq!(stream, payload);
    }
    Ok(())
}

/// A TCP frame over IPv4 from guest 1 to everybody, and the header that leaves checksum and segments to others.
fn tcp_frame(payload: &[u8], segment: u16) -> (Vec<u8>, [u8; 12]) {
    let mut frame = [&ALL[..], &mac(1)[..], &[8, 0]].concat();
    let total = (40 + payload.len()) as u16;
    frame.extend_from_slice(&[0x45, 0, total.to_be_bytes()[0], total.to_be_bytes()[1], 0, 1, 0, 0, 64, 6, 0, 0]);
    frame.extend_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend_from_slice(&[0x10, 0, 0, 80, 0, 0, 0, 1, 0, 0, 0, 2, 5 << 4, 0x18, 1, 0, 0, 0, 0, 0]);
    frame.extend_from_slice(payload);
    let [s0, s1] = segment.to_le_bytes();
    (frame, [1, 1, 54, 0, s0, s1, 34, 0, 16, 0, 0, 0])
}

/// Frames of both directions at once, on two pairs, through rings that wrap many times.
#[test]
fn many_frames_both_ways_arrive_whole_and_in_order() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut net = listen(folder.path(), &["--switch", "--ports", "2", "--queue-pairs", "2"])?;
    let options = NetOptions { pairs: 2, pairs_max: 2, size: 64, ..NetOptions::default() };
    let mut a = net.guest(options.clone())?;
    let mut b = net.guest(options)?;
    for guest in [&mut a, &mut b] {
        assert_eq!(guest.command(4, &[4, 0, 2, 0])?, 0, "two pairs");
    }
    for round in 0..500_u32 {
        for n in 0..8 {
            let number = round * 8 + n;
            let len = 60 + (number as usize * 37) % 1455;
            assert!(a.add((n % 2) as u16, &PLAIN, &frame(mac(2), mac(1), number, len))?);
            assert!(b.add(0, &PLAIN, &frame(mac(1), mac(2), number, len))?);
        }
        a.publish(0)?;
        a.publish(1)?;
        b.publish(0)?;
        let mut seen = Vec::new();
        for _ in 0..8 {
            // Frames that are neither TCP nor UDP are one flow.
            let received = b.receive()?.frame;
            let number = u32::from_be_bytes(received[14..18].try_into()?);
            assert_eq!(received, frame(mac(2), mac(1), number, received.len()));
            seen.push(number);
        }
        let (even, odd): (Vec<u32>, Vec<u32>) = seen.iter().partition(|number| *number % 2 == 0);
        assert!(even.is_sorted() && odd.is_sorted() && even.len() == odd.len(), "{seen:?}");
        for n in 0..8 {
            let number = round * 8 + n;
            assert_eq!(a.receive()?.frame[14..18], number.to_be_bytes());
        }
    }
    Ok(())
}
