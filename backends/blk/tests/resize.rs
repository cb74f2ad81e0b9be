//! An image that gets another size under a running driver.

mod process;

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result};
use atoll_kit::driver::Options;
use atoll_kit::driver::disk::Kind;
use atoll_protocol::sidecar::{DeviceClass, SidecarFeatures, SidecarOrder, SidecarReport};
use atoll_protocol::{FrameSocket, Generation};
use rustix::process::{Pid, Signal, kill_process};
use vhost::vhost_user::VhostUserFrontend;

use process::{DATA, Process, command, image, listen, run, with_fds};

const PATIENCE: Duration = Duration::from_secs(20);

fn sectors(config: &[u8]) -> u64 {
    config.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// A front end that has no supervisor beside it hears of the new size by its back channel, once somebody sends SIGHUP: it
/// grows and is cut, on either engine. What lies behind the end fails; a size that no disk can have changes nothing.
#[test]
fn the_front_end_is_told_of_a_new_size() -> Result<()> {
    for folder in [tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?, tempfile::tempdir_in("/dev/shm")?] {
        let path = image(folder.path(), 1 << 20)?;
        let file = std::fs::File::options().write(true).open(&path)?;
        let mut blk = listen(folder.path(), &["--path", path.to_str().context("a path")?])?;
        let mut driver = blk.driver(Options::default())?;
        let (mut ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(PATIENCE))?;
        driver.front()?.set_backend_request_fd(&theirs)?;
        drop(theirs);
        assert_eq!(run(&mut driver, Kind::Out, 2048, &[(DATA, 512)])?.0, 1, "behind the end");
        for (bytes, shown) in [(3 << 20, 3 << 20), ((5 << 20) + 100, 3 << 20), (0, 3 << 20), (1 << 19, 1 << 19)] {
            file.set_len(bytes)?;
            let pid = Pid::from_raw(blk.child.id().cast_signed()).context("a process")?;
            kill_process(pid, Signal::HUP)?;
            let mut told = [0; 12];
            ours.read_exact(&mut told)?;
            assert_eq!(told, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], "CONFIG_CHANGE");
            assert_eq!(sectors(&driver.config(60)?) * 512, shown, "after {bytes}");
            let last = shown / 512 - 1;
            if bytes >= shown {
                assert_eq!(run(&mut driver, Kind::Out, last, &[(DATA, 512)])?.0, 0);
            }
            assert_eq!(run(&mut driver, Kind::In, last + 1, &[(DATA, 512)])?.0, 1, "behind the end");
        }
        // A request that ends behind the new end moves nothing.
        assert_eq!(run(&mut driver, Kind::Out, 1023, &[(DATA, 1024)])?.0, 1);
        assert_eq!(file.metadata()?.len(), 1 << 19);
    }
    Ok(())
}

/// The supervisor's word, and its answer: by then the configuration space shows the new size.
#[test]
fn the_supervisor_is_told_what_was_measured() -> Result<()> {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let path = image(folder.path(), 1 << 20)?;
    let (ours, theirs) = UnixStream::pair()?;
    let (front, back) = UnixStream::pair()?;
    let fds = [("--vhost-fd", back.into()), ("--sidecar-fd", theirs.into())];
    let child = with_fds(command().arg("--path").arg(&path), &fds).spawn()?;
    let _blk = Process { child, socket: None };
    let mut sidecar = FrameSocket::new(ours.into());
    let hello: SidecarReport = sidecar.reader.receive_message(Some(PATIENCE))?;
    let SidecarReport::Hello { class: DeviceClass::Block, features, .. } = hello else { panic!("{hello:?}") };
    atoll_kit::driver::is_jailed(&mut sidecar)?;
    assert!(features.contains(SidecarFeatures::MEASURE));
    let start = SidecarOrder::Start { generation: Generation(1), progress_ms: 0 };
    sidecar.writer.send(&start, &[], PATIENCE)?;
    let ready: SidecarReport = sidecar.reader.receive_message(Some(PATIENCE))?;
    assert_eq!(ready, SidecarReport::Ready { generation: Generation(1) });
    let mut driver = atoll_kit::driver::Driver::connected(Options::default(), front)?;
    std::fs::File::options().write(true).open(&path)?.set_len(4 << 20)?;
    sidecar.writer.send(&SidecarOrder::Measure, &[], PATIENCE)?;
    let measured = loop {
        match sidecar.reader.receive_message(Some(PATIENCE))? {
            SidecarReport::Log { .. } => {}
            report => break report,
        }
    };
    assert_eq!(measured, SidecarReport::Measured { bytes: 4 << 20 });
    assert_eq!(sectors(&driver.config(60)?), 8192);
    Ok(())
}
