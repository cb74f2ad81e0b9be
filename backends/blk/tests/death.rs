//! A device process dies with requests in flight; its successor finishes them.

mod process;

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use atoll_kit::driver::disk::{self, Kind};
use atoll_kit::driver::{Driver, Options};
use atoll_protocol::sidecar::{DeviceClass, GoodbyeReason, SidecarOrder, SidecarReport};
use atoll_protocol::{FrameSocket, Generation};
use process::guesses::{BLOCK, Guesses};
use process::{DATA, Process, command, fails, image, listen, with_fds};

const BLOCKS: u64 = 512;

fn killed_many_times(folder: &Path, args: &[&str], rounds: u64) -> Result<()> {
    let path = image(folder, BLOCKS * u64::from(BLOCK))?;
    let mut all = vec!["--path", path.to_str().unwrap()];
    all.extend_from_slice(args);
    let mut blk = listen(folder, &all)?;
    let mut driver = Driver::new(Options { memory: 16 << 20, ..Options::default() })?;
    driver.connect(blk.connect()?)?;
    let mut guesses = Guesses::new(BLOCKS, u64::from(BLOCK));
    let mut replayed = 0;
    for round in 0..rounds {
        let before = guesses.completed;
        let enough = before + round * 13 % 200;
        loop {
            guesses.submit(&mut driver, round)?;
            if guesses.completed >= enough {
                break;
            }
            guesses.collect(&mut driver, Duration::from_secs(20))?;
        }
        // Somewhere within the batch.
        let pause = Instant::now() + Duration::from_micros(round * 7 % 150);
        while Instant::now() < pause {
            std::hint::spin_loop();
        }
        drop(blk);
        replayed += guesses.waiting.len();
        blk = listen(folder, &all)?;
        driver.connect(blk.connect()?)?;
    }
    while !guesses.waiting.is_empty() {
        guesses.collect(&mut driver, Duration::from_secs(20))?;
    }
    ensure!(replayed > 0, "nothing was ever in flight: this test shows nothing");
    driver.stop(0)?;
    let on_disk = std::fs::read(&path)?;
    for (block, seeds) in &guesses.seeds {
        let at = *block as usize * BLOCK as usize;
        let is = on_disk.get(at..at + BLOCK as usize).context("inside")?;
        ensure!(seeds.len() == 1 && is == Guesses::content(seeds[0]), "block {block} lost an acknowledged write");
    }
    Ok(())
}

#[test]
fn every_request_completes_once_and_no_acknowledged_write_is_lost() -> Result<()> {
    let disk = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    killed_many_times(disk.path(), &["--direct"], 25)?;
    let disk = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    killed_many_times(disk.path(), &[], 25)?;
    if let Ok(memory) = tempfile::tempdir_in("/dev/shm") {
        killed_many_times(memory.path(), &[], 50)?;
    }
    Ok(())
}

/// A front end that knows the in-flight region gives used + in flight as base; QEMU gives the used index. Both mean
/// the same.
#[test]
fn both_ways_to_name_the_base_are_understood() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = image(folder.path(), 1 << 20)?;
    let args = ["--path", path.to_str().unwrap()];
    for add_in_flight in [false, true] {
        // A predecessor that took three requests and died: written into the region by hand.
        let mut blk = listen(folder.path(), &args)?;
        let mut driver = blk.driver(Options::default())?;
        assert_eq!(driver.stop(0)?, 0);
        drop(blk);
        driver.disconnect();
        let (queue, guest) = driver.queue(0)?;
        let mut heads = Vec::new();
        for n in 0..3 {
            heads.push(disk::add(queue, guest, Kind::In, n, &[(DATA, 512)]).unwrap());
        }
        queue.publish(guest)?;
        let (_, file) = driver.inflight().context("a region")?;
        for (counter, head) in heads.iter().enumerate() {
            let entry = 16 + 16 * u64::from(*head);
            rustix::io::pwrite(file, &[1], entry)?;
            rustix::io::pwrite(file, &(counter as u64).to_le_bytes(), entry + 8)?;
        }
        let mut blk = listen(folder.path(), &args)?;
        driver.connect_at(blk.connect()?, if add_in_flight { 3 } else { 0 })?;
        let (queue, guest) = driver.queue(0)?;
        for head in &heads {
            assert_eq!(queue.take_within(guest, disk::REQUEST_MAX)?.0, *head, "in the order of their counters");
        }
        assert_eq!(driver.stop(0)?, 3, "none was taken again from the avail ring");
    }
    Ok(())
}

#[test]
fn a_damaged_region_or_an_impossible_base_is_refused_and_the_process_lives() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = image(folder.path(), 1 << 20)?;
    let mut blk = listen(folder.path(), &["--path", path.to_str().unwrap()])?;
    for damage in [(8_u64, 9_u16), (10, 64), (14, 700)] {
        let mut driver = blk.driver(Options::default())?;
        driver.stop(0)?;
        driver.disconnect();
        let (_, file) = driver.inflight().context("a region")?;
        rustix::io::pwrite(file, &[1], 16 + 16 * 5)?;
        rustix::io::pwrite(file, &damage.1.to_le_bytes(), damage.0)?;
        assert!(driver.connect(blk.connect()?).is_err(), "{damage:?}");
    }
    let mut driver = blk.driver(Options::default())?;
    assert_eq!(process::run(&mut driver, Kind::In, 0, &[(DATA, 512)])?.0, 0);
    Ok(())
}

#[test]
fn an_image_in_use_is_refused_with_a_remedy() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = image(folder.path(), 1 << 20)?;
    let mut first = listen(folder.path(), &["--path", path.to_str().unwrap()])?;
    first.connect()?;
    let other = folder.path().join("other.sock");
    let (status, text) = fails(&["--socket", other.to_str().unwrap(), "--path", path.to_str().unwrap()]);
    assert_eq!(status.code(), Some(1));
    assert!(text.contains("disk.img") && text.contains("stop that program") && text.lines().count() == 1, "{text}");
    assert!(!other.exists(), "no socket is left");
    Ok(())
}

/// A process as the VMM starts it: front end and sidecar on inherited sockets, the image on a descriptor.
fn supervised(path: &Path, args: &[&str]) -> Result<(Process, UnixStream, FrameSocket)> {
    let (front, theirs) = UnixStream::pair()?;
    let (side, sidecar) = UnixStream::pair()?;
    let file = std::fs::File::options().read(true).write(true).open(path)?;
    let fds = [("--vhost-fd", theirs.into()), ("--sidecar-fd", sidecar.into()), ("--fd", file.into())];
    let mut command = command();
    let child = with_fds(command.args(args), &fds).stderr(std::process::Stdio::piped()).spawn()?;
    drop(command);
    drop(fds);
    Ok((Process { child, socket: None }, front, FrameSocket::new(side.into())))
}

const SOON: Option<Duration> = Some(Duration::from_secs(20));

#[test]
fn the_sidecar_speaks_its_part_and_its_hang_up_ends_the_process() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = image(folder.path(), 1 << 20)?;
    let (mut blk, front, mut sidecar) = supervised(&path, &[])?;
    let hello: SidecarReport = sidecar.reader.receive_message(SOON)?;
    assert!(matches!(hello, SidecarReport::Hello { class: DeviceClass::Block, pid, .. } if pid.0 == blk.child.id()));
    atoll_kit::driver::is_jailed(&mut sidecar)?;
    let start = SidecarOrder::Start { generation: Generation(1), progress_ms: 20 };
    assert_eq!(
        sidecar.ask::<_, SidecarReport>(&start, Duration::from_secs(20))?,
        SidecarReport::Ready { generation: Generation(1) }
    );
    let mut driver = Driver::connected(Options::default(), front)?;
    assert_eq!(process::run(&mut driver, Kind::Out, 0, &[(DATA, 512)])?.0, 0);
    let completed = loop {
        match sidecar.reader.receive_message(SOON)? {
            SidecarReport::Progress { queues } if queues[0].completed > 0 => break queues[0],
            SidecarReport::Progress { .. } | SidecarReport::Log { .. } => {}
            other => anyhow::bail!("{other:?}"),
        }
    };
    assert_eq!((completed.completed, completed.in_flight), (1, 0));
    assert_eq!(
        sidecar.ask::<_, SidecarReport>(&SidecarOrder::Ping { nonce: 9 }, Duration::from_secs(20))?,
        SidecarReport::Pong { nonce: 9 }
    );
    drop(sidecar);
    assert_eq!(blk.end()?.code(), Some(71));
    Ok(())
}

#[test]
fn a_supervised_process_ends_with_its_front_end_and_says_goodbye() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = image(folder.path(), 1 << 20)?;
    let (mut blk, front, mut sidecar) = supervised(&path, &[])?;
    let _hello: SidecarReport = sidecar.reader.receive_message(SOON)?;
    atoll_kit::driver::is_jailed(&mut sidecar)?;
    let start = SidecarOrder::Start { generation: Generation(1), progress_ms: 0 };
    sidecar.ask::<_, SidecarReport>(&start, Duration::from_secs(20))?;
    drop(front);
    let goodbye: SidecarReport = sidecar.reader.receive_message(SOON)?;
    assert_eq!(goodbye, SidecarReport::Goodbye { reason: GoodbyeReason::Asked });
    assert_eq!(blk.end()?.code(), Some(0));
    Ok(())
}

/// The successor starts while its predecessor still holds the lock, and says ready only when it has fallen.
#[test]
fn a_successor_is_ready_when_the_fence_has_fallen() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = image(folder.path(), 1 << 20)?;
    let (mut old, _front, mut old_side) = supervised(&path, &["--lock-byte", "77"])?;
    let _hello: SidecarReport = old_side.reader.receive_message(SOON)?;
    atoll_kit::driver::is_jailed(&mut old_side)?;
    let start = SidecarOrder::Start { generation: Generation(1), progress_ms: 0 };
    old_side.ask::<_, SidecarReport>(&start, Duration::from_secs(20))?;
    let (_new, _front, mut new_side) = supervised(&path, &["--lock-byte", "77"])?;
    let _hello: SidecarReport = new_side.reader.receive_message(SOON)?;
    atoll_kit::driver::is_jailed(&mut new_side)?;
    let start = SidecarOrder::Start { generation: Generation(2), progress_ms: 0 };
    new_side.writer.send(&start, &[], Duration::from_secs(20))?;
    let early = new_side.reader.receive_message::<SidecarReport>(Some(Duration::from_millis(200)));
    assert!(early.is_err(), "{early:?}");
    old.child.kill()?;
    let ready: SidecarReport = new_side.reader.receive_message(SOON)?;
    assert_eq!(ready, SidecarReport::Ready { generation: Generation(2) });
    Ok(())
}

/// A process whose parent is killed must not live on, even when something else keeps its sockets open.
#[test]
fn the_process_dies_with_the_thread_that_started_it() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = image(folder.path(), 1 << 20)?;
    let started = std::thread::spawn(move || -> Result<_> {
        let (blk, front, mut sidecar) = supervised(&path, &[])?;
        let _hello: SidecarReport = sidecar.reader.receive_message(SOON)?;
        atoll_kit::driver::is_jailed(&mut sidecar)?;
        let start = SidecarOrder::Start { generation: Generation(1), progress_ms: 0 };
        sidecar.ask::<_, SidecarReport>(&start, Duration::from_secs(20))?;
        Ok((blk, front, sidecar))
    });
    let (mut blk, _front, _sidecar) = started.join().map_err(|_| anyhow::anyhow!("the thread panicked"))??;
    let status = blk.end()?;
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9), "{status}");
    Ok(())
}
