//! Captures of a switch, and what its process can no longer do.

mod process;

use std::path::Path;

use anyhow::{Context, Result};
use atoll_kit::driver::net::NetOptions;
use process::{ALL, fails, frame, listen, mac};

/// The frames in a capture.
fn frames(path: &Path) -> Result<Vec<Vec<u8>>> {
    let bytes = std::fs::read(path)?;
    assert_eq!(bytes.get(..4), Some(&[0x4d, 0x3c, 0xb2, 0xa1][..]), "nanosecond pcap");
    let mut rest = bytes.get(24..).context("a header")?;
    let mut all = Vec::new();
    while let Some(len) = rest.get(8..12) {
        let end = 16 + u32::from_le_bytes(len.try_into()?) as usize;
        all.push(rest.get(16..end).context("a whole record")?.to_vec());
        rest = &rest[end..];
    }
    Ok(all)
}

#[test]
fn captures_hold_what_passed_their_port() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (all, one) = (folder.path().join("all.pcap"), folder.path().join("one.pcap"));
    let port = format!("1={}", one.display());
    let mut net =
        listen(folder.path(), &["--switch", "--ports", "3", "--pcap", all.to_str().unwrap(), "--pcap", &port])?;
    let mut a = net.guest(NetOptions::default())?;
    let mut b = net.guest(NetOptions::default())?;
    let mut c = net.guest(NetOptions::default())?;
    a.send(&frame(ALL, mac(1), 1, 60))?;
    b.receive()?;
    c.receive()?;
    b.send(&frame(mac(1), mac(2), 2, 1514))?;
    a.receive()?;
    c.send(&frame(mac(1), mac(3), 3, 60))?;
    a.receive()?;
    let sent = [frame(ALL, mac(1), 1, 60), frame(mac(1), mac(2), 2, 1514), frame(mac(1), mac(3), 3, 60)];
    process::until("the capture of the switch", || Ok(frames(&all)? == sent))?;
    process::until("the capture of a port", || Ok(frames(&one)? == sent[..2]))?;
    let (status, text) = fails(&["--socket", "/tmp/atoll-never.sock", "--none", "--pcap", "/nowhere/x.pcap"]);
    assert!(status.code() == Some(1) && text.contains("/nowhere/x.pcap") && text.contains("choose"), "{text}");
    Ok(())
}

/// The value of a line in a thread's status.
fn status(task: &Path, name: &str) -> Result<String> {
    let text = std::fs::read_to_string(task.join("status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)).context("no such line")?;
    Ok(line.trim_start_matches(':').trim().to_owned())
}

#[test]
fn every_thread_of_a_switch_is_jailed() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut net = listen(folder.path(), &["--switch", "--ports", "4", "--queue-pairs", "2"])?;
    let mut a = net.guest(NetOptions { pairs_max: 2, ..NetOptions::default() })?;
    a.send(&frame(ALL, mac(1), 1, 60))?;
    let mut threads = 0;
    for task in std::fs::read_dir(format!("/proc/{}/task", net.child.id()))? {
        let task = task?.path();
        let name = status(&task, "Name")?;
        assert_eq!(status(&task, "NoNewPrivs")?, "1", "{name}");
        assert_eq!(status(&task, "Seccomp")?, "2", "{name}");
        assert_eq!(u64::from_str_radix(&status(&task, "CapEff")?, 16)?, 0, "{name}");
        threads += 1;
    }
    assert!(threads >= 4 * 6, "five queues and a conversation for each port: {threads}");
    Ok(())
}
