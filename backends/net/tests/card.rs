//! What a card shows its driver, and what a driver can ask of it.

mod process;

use std::time::Duration;

use anyhow::Result;
use atoll_kit::driver::LOG_ALL;
use atoll_kit::driver::net::{NetGuest, NetOptions};
use process::{ALL, frame, listen, mac};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU,
};

#[test]
fn features_and_configuration_space_say_what_is_served() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let args = ["--none", "--mac", "52:54:00:12:34:56", "--mtu", "9000", "--queue-pairs", "4"];
    let mut net = listen(folder.path(), &args)?;
    let mut guest = net.guest(NetOptions { pairs: 4, pairs_max: 4, ..NetOptions::default() })?;
    for bit in [VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MTU] {
        assert_ne!(guest.driver.features() & 1 << bit, 0, "bit {bit}");
    }
    assert_eq!(guest.driver.config(12)?, [0x52, 0x54, 0, 0x12, 0x34, 0x56, 1, 0, 4, 0, 0x28, 0x23]);
    // A front end that gives cards their addresses writes them; nothing else can be changed.
    guest.driver.front()?.set_config(0, VhostUserConfigFlags::empty(), &mac(9))?;
    assert_eq!(guest.driver.config(6)?, mac(9));
    assert!(guest.driver.front()?.set_config(6, VhostUserConfigFlags::empty(), &[0, 0]).is_err());
    drop(guest);
    drop(net);
    let plain = tempfile::tempdir()?;
    let mut net = listen(plain.path(), &["--none", "--no-offload"])?;
    let guest = net.guest(NetOptions::default())?;
    for bit in [VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MTU] {
        assert_eq!(guest.driver.features() & 1 << bit, 0, "bit {bit}");
    }
    Ok(())
}

/// A driver narrows down what it gets; a reset forgets that.
#[test]
fn commands_decide_which_frames_come() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut net = listen(folder.path(), &["--switch", "--ports", "2"])?;
    let mut a = net.guest(NetOptions::default())?;
    let mut b = net.guest(NetOptions::default())?;
    let control = b.control();
    let group = [0x33, 0x33, 0, 0, 0, 1];
    let comes = |a: &mut NetGuest, b: &mut NetGuest, to, number| -> Result<bool> {
        a.send(&frame(to, mac(1), number, 60))?;
        // The one behind it tells that the first is not merely late.
        a.send(&frame(ALL, mac(1), number + 1, 60))?;
        let came = b.receive()?.frame;
        if came == frame(to, mac(1), number, 60) {
            assert_eq!(b.receive()?.frame, frame(ALL, mac(1), number + 1, 60));
            return Ok(true);
        }
        assert_eq!(came, frame(ALL, mac(1), number + 1, 60));
        Ok(false)
    };
    assert!(comes(&mut a, &mut b, mac(7), 0)?, "a silent driver gets everything");
    assert_eq!(b.command(control, &[0, 0, 0])?, 0, "not promiscuous");
    assert_eq!(b.command(control, &[&[1, 1][..], &mac(2)].concat())?, 0, "an address");
    assert!(comes(&mut a, &mut b, mac(2), 10)?);
    assert!(!comes(&mut a, &mut b, mac(7), 20)?);
    assert!(!comes(&mut a, &mut b, group, 30)?);
    let table = [&[1, 0, 1, 0, 0, 0][..], &mac(7), &[1, 0, 0, 0], &group].concat();
    assert_eq!(b.command(control, &table)?, 0, "tables");
    assert!(comes(&mut a, &mut b, mac(7), 40)? && comes(&mut a, &mut b, group, 50)?);
    assert_eq!(b.command(control, &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0])?, 0, "empty tables");
    assert!(!comes(&mut a, &mut b, group, 60)?);
    assert_eq!(b.command(control, &[0, 1, 1])?, 0, "all groups");
    assert!(comes(&mut a, &mut b, group, 70)?);
    for wrong in [&[0_u8, 0][..], &[9, 0, 0], &[1, 1, 1, 2, 3, 4, 5, 6], &[1, 0, 255, 255, 255, 255], &[4, 0, 1, 0]] {
        assert_eq!(b.command(control, wrong)?, 1, "{wrong:?}");
    }
    Ok(())
}

/// Without multi-queue the control queue is the third one, also of a card that has more pairs.
#[test]
fn a_driver_without_multi_queue_finds_its_control_queue() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut net = listen(folder.path(), &["--switch", "--ports", "2", "--queue-pairs", "4"])?;
    let options = NetOptions { pairs_max: 4, without: LOG_ALL | 1 << VIRTIO_NET_F_MQ, ..NetOptions::default() };
    let mut guest = net.guest(options)?;
    assert_eq!(guest.command(2, &[0, 1, 1])?, 0);
    assert_eq!(guest.command(2, &[4, 0, 2, 0])?, 1, "pairs without multi-queue");
    Ok(())
}

/// A driver from before virtio 1.0 has headers of ten bytes and one buffer for each frame.
#[test]
fn a_driver_with_short_headers_and_single_buffers_is_served() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut net = listen(folder.path(), &["--switch", "--ports", "2"])?;
    let mut a = net.guest(NetOptions::default())?;
    let without = LOG_ALL | 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_NET_F_MRG_RXBUF;
    let mut old = net.guest(NetOptions { without, ..NetOptions::default() })?;
    a.send(&frame(ALL, mac(1), 1, 100))?;
    let received = {
        let (queue, guest) = old.queue(0)?;
        let (head, len) = queue.take_within(guest, Duration::from_secs(20))?;
        assert_eq!(len, 110);
        let mut bytes = vec![0; 110];
        guest.read(u64::from_le(guest.load(queue.desc + 16 * u64::from(head))), &mut bytes);
        bytes
    };
    assert_eq!(received[10..], frame(ALL, mac(1), 1, 100));
    let (queue, guest) = old.queue(1)?;
    let bytes = [&[0; 10][..], &frame(mac(1), mac(2), 2, 60)].concat();
    guest.write(queue.small, &bytes);
    queue.add(guest, &[(queue.small, 70)], &[]).unwrap();
    queue.publish(guest)?;
    assert_eq!(a.receive()?.frame, frame(mac(1), mac(2), 2, 60));
    Ok(())
}

/// So many frames a second, and no more; what comes too fast for a receiver behind a switch is dropped.
#[test]
fn limits_hold_for_what_a_guest_sends() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut net = listen(folder.path(), &["--none", "--rate-ops", "50,100"])?;
    let mut guest = net.guest(NetOptions::default())?;
    let begun = std::time::Instant::now();
    for round in 0..4 {
        for number in 0..50 {
            assert!(guest.add(0, &process::PLAIN, &frame(ALL, mac(1), round * 50 + number, 60))?);
        }
        guest.publish(0)?;
        guest.sent(0)?;
    }
    // Fifty at once and the others as they come back: 150 in 300 ms.
    assert!(begun.elapsed() >= Duration::from_millis(290), "{:?}", begun.elapsed());
    Ok(())
}
