//! A card on a TAP interface of this machine. Needs the right to make one.

mod process;

use std::net::UdpSocket;
use std::os::fd::OwnedFd;

use anyhow::{Context, Result, bail};
use atoll_kit::driver::net::{NetGuest, NetOptions};
use atoll_net::link::tap_device::{self, HostEnd};
use process::{ALL, PLAIN, fails, listen, listen_with, mac};

/// Whether a TAP can be made here; where it cannot, only a run that allows it may go on without.
fn permitted(test: &str) -> Result<bool> {
    if tap_device::open(&name(test), 1, &HostEnd::default()).is_ok() {
        return Ok(true);
    }
    if std::env::var_os("ATOLL_ALLOW_SKIP").is_none_or(|value| value != "1") {
        bail!("this user may make no TAP interface: run as root, or set ATOLL_ALLOW_SKIP=1 to go on without");
    }
    #[allow(clippy::print_stderr, reason = "a test that skips says so")]
    {
        eprintln!("skipped: this user may make no TAP interface");
    }
    Ok(false)
}

/// A name that no other run uses at the same time.
fn name(test: &str) -> String {
    format!("at{test}{}", std::process::id() % 1_000_000)
}

const GUEST_IP: [u8; 4] = [198, 18, 77, 2];
const HOST_IP: [u8; 4] = [198, 18, 77, 1];

/// Answers ARP questions for the guest's address until something else comes.
fn next(guest: &mut NetGuest) -> Result<Vec<u8>> {
    loop {
        let received = guest.receive()?;
        let frame = &received.frame;
        match frame.get(12..14) {
            Some([8, 6]) if frame.get(38..42) == Some(&GUEST_IP) && frame.get(20..22) == Some(&[0, 1]) => {
                let host = frame.get(22..32).context("a sender")?.to_vec();
                let mut answer = [&host[..6], &mac(1), &[8, 6, 0, 1, 8, 0, 6, 4, 0, 2], &mac(1), &GUEST_IP].concat();
                answer.extend_from_slice(&host);
                guest.send(&answer)?;
            }
            Some([8, 0]) if frame.get(30..34) == Some(&GUEST_IP) => return Ok([&received.header[..], frame].concat()),
            _ => {}
        }
    }
}

/// The host's own stack is the other end: datagrams from it, also such as take several buffers, and an echo back.
#[test]
fn datagrams_of_the_host_reach_the_guest_and_back() -> Result<()> {
    if !permitted("x")? {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let name = name("d");
    let args = ["--tap", &name, "--host-ip", "198.18.77.1", "--host-mask", "255.255.255.0", "--mtu", "9000"];
    let mut net = listen(folder.path(), &args)?;
    let mut guest = net.guest(NetOptions::default())?;
    let socket = UdpSocket::bind("198.18.77.1:0")?;
    let port = socket.local_addr()?.port();
    for len in [10, 1400, 8000, 20, 8900, 1400] {
        let payload: Vec<u8> = (0..len).map(|n| (n * 13) as u8).collect();
        socket.send_to(&payload, "198.18.77.2:4000")?;
        let received = next(&mut guest)?;
        assert_eq!(received[0] & 1, 1, "the checksum was left to the guest");
        assert_eq!(received[12 + 42..], payload, "{len} bytes");
        assert_eq!(usize::from(received[10]), (12 + 42 + payload.len()).div_ceil(1536), "buffers for {len} bytes");
        // Back, with the checksum left to the kernel.
        let host_mac = &received[12 + 6..12 + 12];
        let mut back = [host_mac, &mac(1), &[8, 0]].concat();
        let (total, udp) = ((28 + len) as u16, (8 + len) as u16);
        let mut ip = [&[0x45, 0][..], &total.to_be_bytes(), &[0, 1, 0, 0, 64, 17, 0, 0], &GUEST_IP, &HOST_IP].concat();
        let check = !sum(&ip);
        ip[10..12].copy_from_slice(&check.to_be_bytes());
        back.extend_from_slice(&ip);
        let pseudo = sum(&[&GUEST_IP[..], &HOST_IP, &[0, 17], &udp.to_be_bytes()].concat());
        back.extend_from_slice(&[4000_u16.to_be_bytes(), port.to_be_bytes(), udp.to_be_bytes()].concat());
        back.extend_from_slice(&pseudo.to_be_bytes());
        back.extend_from_slice(&payload);
        let mut header = PLAIN;
        (header[0], header[6], header[8]) = (1, 34, 6);
        guest.send_with(0, &header, &back)?;
        let mut bytes = vec![0; 10_000];
        socket.set_read_timeout(Some(std::time::Duration::from_secs(20)))?;
        let (got, from) = socket.recv_from(&mut bytes)?;
        assert_eq!((bytes.get(..got), from.to_string().as_str()), (Some(&payload[..]), "198.18.77.2:4000"));
    }
    Ok(())
}

fn sum(bytes: &[u8]) -> u16 {
    let total: u32 = bytes.chunks(2).map(|two| u32::from(two[0]) << 8 | u32::from(two[1])).sum();
    ((total & 0xffff) + (total >> 16)) as u16
}

/// Queues are passed as descriptors; the kernel spreads frames over those that the guest has asked for.
#[test]
fn passed_queues_are_used_as_the_guest_asks() -> Result<()> {
    if !permitted("y")? {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let name = name("q");
    let host =
        HostEnd { ip: Some([198, 18, 78, 1].into()), mask: Some([255, 255, 255, 0].into()), ..HostEnd::default() };
    let queues = tap_device::open(&name, 2, &host)?;
    let fds: Vec<(&str, OwnedFd)> = queues.into_iter().map(|queue| ("--fd", queue.into())).collect();
    let mut net = listen_with(folder.path(), &["--queue-pairs", "2"], &fds)?;
    drop(fds);
    let mut guest = net.guest(NetOptions { pairs: 2, pairs_max: 2, ..NetOptions::default() })?;
    let socket = UdpSocket::bind("198.18.78.1:0")?;
    socket.set_broadcast(true)?;
    let pairs_seen = |guest: &mut NetGuest, count: u16| -> Result<[u32; 2]> {
        let mut seen = [0; 2];
        for port in 0..count {
            UdpSocket::bind("198.18.78.1:0").and_then(|socket| {
                socket.set_broadcast(true)?;
                socket.send_to(b"x", ("198.18.78.255", 5000 + port))
            })?;
        }
        socket.send_to(b"the end", "198.18.78.255:4999")?;
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while seen.iter().sum::<u32>() < u32::from(count) {
            assert!(std::time::Instant::now() < deadline, "{seen:?} of {count}");
            for (pair, seen) in (0..).zip(&mut seen) {
                while let Some(received) = guest.poll(pair)? {
                    let port = received.frame.get(36..38).map(|port| u16::from_be_bytes([port[0], port[1]]));
                    *seen += u32::from(port.is_some_and(|port| (5000..5000 + count).contains(&port)));
                }
            }
        }
        Ok(seen)
    };
    assert_eq!(pairs_seen(&mut guest, 50)?, [50, 0], "one pair until the guest asks for more");
    assert_eq!(guest.command(4, &[4, 0, 2, 0])?, 0);
    let [first, second] = pairs_seen(&mut guest, 100)?;
    assert!(first > 0 && second > 0, "{first} and {second}");
    assert_eq!(guest.command(4, &[4, 0, 1, 0])?, 0);
    assert_eq!(pairs_seen(&mut guest, 20)?, [20, 0]);
    guest.send(&[&ALL[..], &mac(1), &[8, 0], &[0; 46]].concat())?;
    Ok(())
}

/// Somebody deletes the interface while the guest uses it: what it sends goes nowhere and its buffers come back, nothing spins and
/// nothing ends; the log says so. A successor makes the interface anew.
#[test]
fn an_interface_that_is_taken_away_costs_frames_and_nothing_else() -> Result<()> {
    if !permitted("z")? {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let name = name("g");
    let args = ["--tap", &name, "--host-ip", "198.18.79.1", "--host-mask", "255.255.255.0"];
    let mut net = listen(folder.path(), &args)?;
    let mut guest = net.guest(NetOptions::default())?;
    let frame = [&ALL[..], &mac(1), &[8, 0], &[0; 46]].concat();
    guest.send(&frame)?;
    let deleted = std::process::Command::new("ip").args(["link", "delete", &name]).output()?;
    anyhow::ensure!(deleted.status.success(), "{}", String::from_utf8_lossy(&deleted.stderr));
    let used = processor_ms(net.child.id())?;
    let began = std::time::Instant::now();
    for _ in 0..300 {
        // Returns when its descriptor has come back.
        guest.send(&frame)?;
    }
    std::thread::sleep(std::time::Duration::from_millis(1000).saturating_sub(began.elapsed()));
    let (used, wall) = (processor_ms(net.child.id())? - used, began.elapsed().as_millis() as u64);
    anyhow::ensure!(used < wall / 2, "{used} of {wall} ms: it spins");
    anyhow::ensure!(net.child.try_wait()?.is_none(), "it has ended");
    drop(guest);
    drop(net);
    let mut net = listen(folder.path(), &args)?;
    net.guest(NetOptions::default())?.send(&frame)?;
    Ok(())
}

/// What a process has used of a processor so far.
fn processor_ms(pid: u32) -> Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit(')').next().context("a name")?.split_ascii_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok()).context("a time");
    Ok((ticks(11)? + ticks(12)?) * 10)
}

/// More frames than the guest has buffers for, while it sends, and a limit on what it gets: whoever waits for frames hands
/// that over again and again, and each frame that the interface kept comes, in its order.
#[test]
fn a_burst_comes_whole_through_few_buffers_and_a_limit() -> Result<()> {
    if !permitted("w")? {
        return Ok(());
    }
    for (at, limit) in [("80", &[][..]), ("81", &["--rate-ops", "2000,1000,50"])] {
        let folder = tempfile::tempdir()?;
        let name = name(at);
        let (host, all) = (format!("198.18.{at}.1"), format!("198.18.{at}.255:4000"));
        let args = [&["--tap", &name, "--host-ip", &host, "--host-mask", "255.255.255.0"], limit].concat();
        let mut net = listen(folder.path(), &args)?;
        let mut guest = net.guest(NetOptions { size: 32, ..NetOptions::default() })?;
        let socket = UdpSocket::bind((host.as_str(), 0))?;
        socket.set_broadcast(true)?;
        let noise = [&ALL[..], &mac(1), &[0x88, 0xb5], &[0; 46]].concat();
        for burst in 0..4_u8 {
            // The interface holds 500.
            for number in 0..200_u8 {
                socket.send_to(&[burst, number], &all)?;
            }
            for number in 0..200_u8 {
                if number % 7 == 0 {
                    guest.send(&noise)?;
                }
                let payload = loop {
                    let frame = guest.receive()?.frame;
                    if frame.get(36..38) == Some(&4000_u16.to_be_bytes()) && frame.get(12..14) == Some(&[8, 0]) {
                        break frame.get(42..44).map(<[u8]>::to_vec);
                    }
                };
                assert_eq!(payload, Some(vec![burst, number]), "limit {limit:?}");
            }
        }
    }
    Ok(())
}

/// A mistake with an interface is one line that says what to do.
#[test]
fn mistakes_with_interfaces_are_named() -> Result<()> {
    let (status, text) = fails(&["--socket", "/tmp/atoll-never.sock", "--tap", "much-too-long-a-name"]);
    assert!(status.code() == Some(1) && text.contains("1 to 15 bytes") && text.lines().count() == 1, "{text}");
    if !permitted("z")? {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let name = name("m");
    let _net = {
        let mut net = listen(folder.path(), &["--tap", &name])?;
        net.connect()?;
        net
    };
    let other = folder.path().join("other.sock");
    let (status, text) = fails(&["--socket", other.to_str().unwrap(), "--tap", &name]);
    assert!(status.code() == Some(1) && text.contains("in use by another process"), "{text}");
    assert!(!other.exists(), "no socket is left");
    let (_, text) = fails(&["--socket", other.to_str().unwrap(), "--tap", &name, "--queue-pairs", "2"]);
    assert!(text.contains("multi_queue") || text.contains("in use"), "{text}");
    let (_, text) = fails(&["--socket", other.to_str().unwrap(), "--tap", "lo"]);
    assert!(text.contains("is there and is no TAP"), "{text}");
    Ok(())
}
