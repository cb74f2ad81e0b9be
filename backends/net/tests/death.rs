//! A card that is killed under load: no descriptor is lost or completed twice, frames may be lost, none is corrupted.

mod process;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use atoll_kit::driver::net::{NetGuest, NetOptions, Received};
use atoll_protocol::sidecar::{DeviceClass, SidecarReport};
use process::{ALL, PLAIN, frame, listen, listen_with, mac};

const SIZE: u16 = 64;

fn check(received: &Received, from: u8) -> Result<()> {
    let number = u32::from_be_bytes(received.frame.get(14..18).context("a number")?.try_into()?);
    ensure!(received.frame == frame(ALL, mac(from), number, received.frame.len()), "frame {number} is corrupted");
    Ok(())
}

/// Sends what fits, of lengths that take one to three buffers.
fn load(guest: &mut NetGuest, from: u8, number: &mut u32) -> Result<()> {
    for _ in 0..16 {
        let len = 60 + (*number as usize * 131) % 3000;
        if !guest.add(0, &PLAIN, &frame(ALL, mac(from), *number, len))? {
            break;
        }
        *number += 1;
    }
    guest.publish(0)
}

#[test]
fn no_descriptor_is_lost_over_many_deaths() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let args = ["--switch", "--ports", "2"];
    let options = NetOptions { size: SIZE, buffer_bytes: 1100, ..NetOptions::default() };
    let mut guests = [NetGuest::new(options.clone())?, NetGuest::new(options)?];
    let mut number = 0;
    let mut arrived = 0;
    for round in 0..40_u64 {
        let mut net = listen(folder.path(), &args)?;
        for guest in &mut guests {
            guest.driver.connect(net.connect()?)?;
            guest.fill(0)?;
        }
        let before = arrived;
        let deadline = Instant::now() + Duration::from_secs(20);
        while arrived < before + round % 50 {
            ensure!(Instant::now() < deadline, "round {round}: nothing comes any more");
            for (guest, from) in guests.iter_mut().zip([1, 2]) {
                load(guest, from, &mut number)?;
            }
            for (guest, from) in guests.iter_mut().zip([2, 1]) {
                while let Some(received) = guest.poll(0)? {
                    check(&received, from)?;
                    arrived += 1;
                }
            }
        }
        // Somewhere within a batch.
        for (guest, from) in guests.iter_mut().zip([1, 2]) {
            load(guest, from, &mut number)?;
        }
        let pause = Instant::now() + Duration::from_micros(round * 11 % 200);
        while Instant::now() < pause {
            std::hint::spin_loop();
        }
        drop(net);
    }
    ensure!(arrived > 200, "hardly anything came: this test shows nothing");
    let mut net = listen(folder.path(), &args)?;
    for guest in &mut guests {
        guest.driver.connect(net.connect()?)?;
        // What was sent when the last one died is taken, and every buffer is still there once.
        guest.sent(0)?;
    }
    let [a, b] = &mut guests;
    while b.poll(0)?.is_some() {}
    let mut heads = BTreeSet::new();
    while heads.len() < usize::from(SIZE) {
        a.send(&frame(ALL, mac(1), 1, 60))?;
        let (queue, memory) = b.queue(0)?;
        let (head, len) = queue.take_within(memory, Duration::from_secs(20))?;
        ensure!(len == 72 && heads.insert(head), "buffer {head} was used twice");
    }
    a.send(&frame(ALL, mac(1), 1, 60))?;
    let (queue, memory) = b.queue(0)?;
    ensure!(queue.take(memory).is_none(), "there are more buffers than were made");
    for index in 0..2 {
        let base = b.driver.stop(usize::from(index))?;
        let (queue, memory) = b.queue(index)?;
        ensure!(base == u32::from(queue.used_index(memory)), "queue {index}: something is in flight");
    }
    Ok(())
}

/// A front end that stops a ring gets back the buffers that were in the card's hand, and may start it elsewhere.
#[test]
fn a_ring_that_is_stopped_gives_its_buffers_back() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut net = listen(folder.path(), &["--switch", "--ports", "2"])?;
    let options = NetOptions { size: 8, buffer_bytes: 200, ..NetOptions::default() };
    let mut a = net.guest(NetOptions::default())?;
    let mut b = net.guest(options)?;
    // Too long for all of its buffers together: they are all taken, and stay in the hand.
    a.send(&frame(ALL, mac(1), 1, 1514))?;
    a.send(&frame(ALL, mac(1), 2, 3000))?;
    assert_eq!(b.receive()?.frame.len(), 1514, "this one takes all eight");
    assert_eq!(b.driver.stop(0)?, 8, "nothing is in flight, whatever was in the hand");
    b.driver.start(0)?;
    a.send(&frame(ALL, mac(1), 3, 1514))?;
    assert_eq!(b.receive()?.frame, frame(ALL, mac(1), 3, 1514));
    Ok(())
}

/// On its sidecar a card says what it is.
#[test]
fn a_card_introduces_itself_to_its_supervisor() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    let net = listen_with(folder.path(), &["--none"], &[("--sidecar-fd", theirs.into())])?;
    let mut sidecar = atoll_protocol::FrameSocket::new(ours.into());
    let hello: SidecarReport = sidecar.reader.receive_message(Some(Duration::from_secs(20)))?;
    assert!(matches!(hello, SidecarReport::Hello { class: DeviceClass::Net, pid, .. } if pid.0 == net.child.id()));
    atoll_kit::driver::is_jailed(&mut sidecar)?;
    Ok(())
}
