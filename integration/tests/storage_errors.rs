//! The storage under a disk fails: the guest is told so, request by request, and nothing else happens.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use atoll_integration::chaos::page::Page;
use atoll_integration::chaos::rig::{House, Rig};
use atoll_kit::driver::disk::{self, Kind};
use atoll_kit::driver::{Driver, Options};
use atoll_vmm::config::{DeviceConfig, DiskConfig};
use atoll_vmm::vhost::DeviceState;
use rustix::process::Pid;
use xtask::place;

const MEMORY: u64 = 16 << 20;
const DATA: u64 = MEMORY / 2;
const BLOCKS: u64 = 64;
const BLOCK: u32 = 4096;
const LIMIT: Duration = Duration::from_secs(60);

/// VIRTIO_BLK_S_OK, VIRTIO_BLK_S_IOERR.
const OK: u8 = 0;
const FAILED: u8 = 1;

/// A disk of `BLOCKS` blocks with a driver.
struct Stage {
    rig: Rig,
    driver: Driver,
    image: PathBuf,
    _house: House,
    _folder: tempfile::TempDir,
}

impl Stage {
    fn open(programs: &Path, place: &Path) -> Result<Self> {
        let folder = tempfile::tempdir_in(place)?;
        let image = folder.path().join("image");
        File::create(&image)?.set_len(BLOCKS * u64::from(BLOCK))?;
        let house = House::new(programs)?;
        let config = DeviceConfig::Disk(DiskConfig { path: Some(image.clone()), ..DiskConfig::default() });
        let mut rig = house.device(&config, MEMORY)?;
        let driver = rig.start(options())?;
        Ok(Self { rig, driver, image, _house: house, _folder: folder })
    }

    /// The process that serves.
    fn pid(&self) -> Result<Pid> {
        let pid = self.rig.status().pid.and_then(|pid| Pid::from_raw(pid.cast_signed()));
        pid.context("a process")
    }
}

fn options() -> Options {
    Options { queues: 1, size: 64, memory: MEMORY as usize, ..Options::default() }
}

/// One request; its status.
fn ask(driver: &mut Driver, kind: Kind, block: u64) -> Result<u8> {
    let (queue, guest) = driver.queue(0)?;
    let data = [(DATA, BLOCK)];
    let (sector, parts) = if kind == Kind::Flush { (0, &[][..]) } else { (block * u64::from(BLOCK) / 512, &data[..]) };
    let head = disk::add(queue, guest, kind, sector, parts).context("a free descriptor")?;
    queue.publish(guest)?;
    let deadline = Instant::now() + LIMIT;
    while queue.take(guest).is_none() {
        ensure!(Instant::now() < deadline, "a request is never completed");
        queue.wait(guest, Duration::from_millis(10))?;
    }
    Ok(disk::status(queue, guest, head))
}

fn write(driver: &mut Driver, block: u64, byte: u8) -> Result<u8> {
    driver.queue(0)?.1.write(DATA, &[byte; BLOCK as usize]);
    ask(driver, Kind::Out, block)
}

/// Reads, writes and flushes end with an error of the file, in memory (by system calls) and on a disk (by a ring): each of them
/// fails once, those before and after it do not. A failed write can be repeated; the process lives on, and its device is not
/// recovered from anything.
#[test]
fn an_error_of_the_file_fails_its_request_and_no_other() -> Result<()> {
    for place in [Path::new("/dev/shm"), Path::new(env!("CARGO_TARGET_TMPDIR"))] {
        if !place.is_dir() {
            continue;
        }
        let page = Page::new(&place::steps(), None)?;
        let Stage { mut rig, mut driver, image, _house, _folder } = Stage::open(page.programs(), place)?;
        let pid = rig.status().pid;
        for errno in [libc::EIO, libc::ENOSPC] {
            for block in 0..BLOCKS {
                ensure!(write(&mut driver, block, 1)? == OK, "block {block}");
            }
            for kind in [Kind::Out, Kind::In, Kind::Flush] {
                driver.queue(0)?.1.write(DATA, &[2; BLOCK as usize]);
                page.fail(3, errno);
                for block in 10..13 {
                    ensure!(ask(&mut driver, kind, block)? == FAILED, "errno {errno}: {kind:?} of block {block}");
                }
                ensure!(page.failures_left() == 0, "each was met once");
                ensure!(ask(&mut driver, kind, 13)? == OK, "errno {errno}: {kind:?} afterwards");
            }
            for block in 10..14 {
                ensure!(write(&mut driver, block, 3)? == OK, "a write that failed is repeated");
            }
            ensure!(ask(&mut driver, Kind::Flush, 0)? == OK, "a flush");
        }
        let status = rig.status();
        ensure!((status.pid, status.lost, &status.state) == (pid, 0, &DeviceState::Running), "{status:?}");
        rig.reset()?;
        let contents = std::fs::read(&image)?;
        for (block, bytes) in (0..).zip(contents.chunks(BLOCK as usize)) {
            let expected = if (10..14).contains(&block) { 3 } else { 1 };
            ensure!(bytes.iter().all(|byte| *byte == expected), "block {block}");
        }
    }
    Ok(())
}

/// The file may not grow any more, as on a full disk: writes into its holes that need room fail, others go on; with room they
/// succeed.
#[test]
fn a_full_disk_fails_what_needs_room() -> Result<()> {
    let mut stage = Stage::open(&place::release(), &std::env::temp_dir())?;
    let pid = stage.pid()?;
    let Stage { rig, driver, .. } = &mut stage;
    let limit = |bytes: Option<u64>| {
        let limit = rustix::process::Rlimit { current: bytes, maximum: None };
        rustix::process::prlimit(Some(pid), rustix::process::Resource::Fsize, limit)
    };
    limit(Some(BLOCKS / 2 * u64::from(BLOCK)))?;
    for block in 0..BLOCKS {
        let expected = if block < BLOCKS / 2 { OK } else { FAILED };
        ensure!(write(driver, block, 4)? == expected, "block {block} of a file that is full");
        ensure!(ask(driver, Kind::In, block)? == OK, "reads go on");
    }
    limit(None)?;
    ensure!(write(driver, BLOCKS - 1, 5)? == OK, "with room again");
    let status = rig.status();
    let serves = status.pid.map(u32::cast_signed);
    ensure!((serves, status.lost) == (Some(pid.as_raw_nonzero().get()), 0), "{status:?}");
    Ok(())
}

/// Memory is short, and the kernel ends the process that has most (SIGKILL, as its OOM killer sends it): a death like any other.
/// Before that a process that cannot have memory fails: its heap has a ceiling of its own.
#[test]
fn a_process_that_may_have_no_memory_is_replaced() -> Result<()> {
    let mut stage = Stage::open(&place::release(), &std::env::temp_dir())?;
    let pid = stage.pid()?;
    let Stage { rig, driver, .. } = &mut stage;
    // As little as it has: whatever it wants next it does not get, and serves all the same, or ends and has a successor.
    let limit = rustix::process::Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::prlimit(Some(pid), rustix::process::Resource::Data, limit)?;
    for block in 0..BLOCKS {
        ensure!(write(driver, block, 6)? == OK, "block {block}");
    }
    rig.reset()?;
    let driver = &mut rig.start(options())?;
    for block in 0..BLOCKS {
        ensure!(ask(driver, Kind::In, block)? == OK, "block {block}");
    }
    Ok(())
}
