//! A card on a stream socket, as passt has one.

mod process;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use anyhow::Result;
use atoll_kit::driver::net::NetOptions;
use process::{ALL, PLAIN, frame, listen, listen_with, mac, until};

fn read_frame(stream: &mut UnixStream) -> Result<Vec<u8>> {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix)?;
    let mut frame = vec![0; u32::from_be_bytes(prefix) as usize];
    stream.read_exact(&mut frame)?;
    Ok(frame)
}

fn write_frame(stream: &mut UnixStream, frame: &[u8]) -> Result<()> {
    stream.write_all(&(frame.len() as u32).to_be_bytes())?;
    Ok(stream.write_all(frame)?)
}

fn accept(listener: &UnixListener) -> Result<UnixStream> {
    let (stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    Ok(stream)
}

/// Frames go both ways; a peer that goes away is found again, and one that talks nonsense is left.
#[test]
fn a_stream_is_connected_anew_whenever_it_breaks() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("stream");
    let listener = UnixListener::bind(&path)?;
    let mut net = listen(folder.path(), &["--stream", path.to_str().unwrap()])?;
    let mut guest = net.guest(NetOptions::default())?;
    let mut peer = accept(&listener)?;
    for round in 0..3 {
        write_frame(&mut peer, &frame(mac(1), mac(9), round, 1000))?;
        assert_eq!(guest.receive()?.frame, frame(mac(1), mac(9), round, 1000));
        guest.send(&frame(mac(9), mac(1), round, 60))?;
        assert_eq!(read_frame(&mut peer)?, frame(mac(9), mac(1), round, 60));
        assert_eq!(guest.driver.config(8)?[6], 1, "the link is up");
        if round == 1 {
            // No frame is that long.
            peer.write_all(&[0xff, 0xff, 0xff, 0xff, 1, 2, 3])?;
        } else {
            drop(peer);
        }
        peer = accept(&listener)?;
    }
    // Nobody listens for a while.
    drop(listener);
    std::fs::remove_file(&path)?;
    drop(peer);
    until("the link goes down", || Ok(guest.driver.config(8)?[6] == 0))?;
    guest.send(&frame(mac(9), mac(1), 7, 60))?;
    let listener = UnixListener::bind(&path)?;
    let mut peer = accept(&listener)?;
    write_frame(&mut peer, &frame(mac(1), mac(9), 8, 100))?;
    assert_eq!(guest.receive()?.frame, frame(mac(1), mac(9), 8, 100));
    Ok(())
}

/// A peer that reads nothing holds the guest's queue back; nothing is lost, and the queue can be stopped meanwhile.
#[test]
fn a_slow_peer_holds_the_guest_back_and_loses_nothing() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (mut peer, theirs) = UnixStream::pair()?;
    peer.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut net = listen_with(folder.path(), &[], &[("--stream-fd", theirs.into())])?;
    let mut guest = net.guest(NetOptions::default())?;
    let count = 600;
    let mut sent = 0;
    let mut held = 0;
    while held < 3 {
        let taken = sent;
        while sent < count && guest.add(0, &PLAIN, &frame(mac(9), mac(1), sent, 1500))? {
            sent += 1;
        }
        guest.publish(0)?;
        std::thread::sleep(Duration::from_millis(10));
        held = if sent == taken { held + 1 } else { 0 };
    }
    assert!(sent < count, "600 frames of 1500 bytes fit into no socket");
    guest.driver.stop(1)?;
    guest.driver.start(1)?;
    let reader = std::thread::spawn(move || -> Result<()> {
        for number in 0..count {
            assert_eq!(read_frame(&mut peer)?, frame(mac(9), mac(1), number, 1500));
        }
        Ok(())
    });
    while sent < count {
        while sent < count && guest.add(0, &PLAIN, &frame(mac(9), mac(1), sent, 1500))? {
            sent += 1;
        }
        guest.publish(0)?;
        std::thread::yield_now();
    }
    reader.join().map_err(|_| anyhow::anyhow!("the reader"))??;
    // The other end is gone now, for good.
    assert_eq!(net.end()?.code(), Some(1));
    Ok(())
}

/// A burst of frames in one piece, longer ones than a buffer among them, waits until the guest has buffers.
#[test]
fn frames_wait_for_buffers() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (mut peer, theirs) = UnixStream::pair()?;
    let mut net = listen_with(folder.path(), &[], &[("--stream-fd", theirs.into())])?;
    let mut guest = net.guest(NetOptions { size: 16, ..NetOptions::default() })?;
    let lens = |number: u32| if number.is_multiple_of(10) { 9000 } else { 200 };
    let mut burst = Vec::new();
    for number in 0..100 {
        let frame = frame(ALL, mac(9), number, lens(number));
        burst.extend_from_slice(&(frame.len() as u32).to_be_bytes());
        burst.extend_from_slice(&frame);
    }
    let writer = std::thread::spawn(move || peer.write_all(&burst).map(|()| peer));
    for number in 0..100 {
        assert_eq!(guest.receive()?.frame, frame(ALL, mac(9), number, lens(number)));
    }
    let _peer = writer.join().map_err(|_| anyhow::anyhow!("the writer"))??;
    Ok(())
}
