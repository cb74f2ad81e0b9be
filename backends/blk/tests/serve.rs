//! What a driver can do with `atoll-blk`, on a tmpfs (inline I/O) and on the build folder's file system (io_uring).

mod process;

use std::os::fd::AsRawFd;

use anyhow::Result;
use atoll_kit::driver::disk::{self, Kind};
use atoll_kit::driver::queue::EVENT_IDX;
use atoll_kit::driver::{Driver, Guest, LOG_ALL, Options, USER_OFFSET};
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo};

use process::{DATA, image, listen, pattern, run};

/// A tmpfs, where there is one, and a disk.
fn folders() -> Vec<tempfile::TempDir> {
    let mut folders = vec![tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()];
    folders.extend(tempfile::tempdir_in("/dev/shm"));
    folders
}

#[test]
fn what_is_written_is_read_back_and_lies_in_the_image() -> Result<()> {
    for folder in folders() {
        let path = image(folder.path(), 8 << 20)?;
        let mut blk = listen(folder.path(), &["--path", path.to_str().unwrap(), "--serial", "atoll-42"])?;
        let mut driver = blk.driver(Options::default())?;
        let config = driver.config(60)?;
        assert_eq!(config.get(..8).unwrap(), (8_u64 << 11).to_le_bytes());
        // Written in three pieces of odd shapes, read back in one.
        let data = pattern(1, 128 << 10);
        driver.guest().write(DATA, &data);
        let pieces = [(DATA, 512), (DATA + 512, 64 << 10), (DATA + 512 + (64 << 10), (64 << 10) - 512)];
        assert_eq!(run(&mut driver, Kind::Out, 16, &pieces)?, (0, 1));
        assert_eq!(run(&mut driver, Kind::Flush, 0, &[])?, (0, 1));
        let back = DATA + (1 << 20);
        assert_eq!(run(&mut driver, Kind::In, 16, &[(back, 128 << 10)])?, (0, (128 << 10) + 1));
        let mut read = vec![0; data.len()];
        driver.guest().read(back, &mut read);
        assert!(read == data, "the guest reads what it wrote");
        let on_disk = std::fs::read(&path)?;
        assert!(on_disk.get(8192..8192 + data.len()) == Some(&data[..]), "the image holds it");
        // Identification.
        assert_eq!(run(&mut driver, Kind::GetId, 0, &[(back, 20)])?, (0, 21));
        let mut id = [0; 20];
        driver.guest().read(back, &mut id);
        assert_eq!(&id, b"atoll-42\0\0\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(driver.stop(0)?, 4);
    }
    Ok(())
}

#[test]
fn discard_and_write_zeroes_clear_exactly_their_ranges() -> Result<()> {
    for folder in folders() {
        let path = image(folder.path(), 8 << 20)?;
        std::fs::write(&path, pattern(2, 8 << 20))?;
        let mut expected = std::fs::read(&path)?;
        let mut blk = listen(folder.path(), &["--path", path.to_str().unwrap()])?;
        let mut driver = blk.driver(Options::default())?;
        // (kind, flags, first sector, sectors)
        let requests: &[(Kind, u32, u64, u32)] = &[
            (Kind::WriteZeroes, 0, 3, 5),
            (Kind::WriteZeroes, 1, 100, 1),
            (Kind::WriteZeroes, 0, 4096, 4096),
            (Kind::Discard, 0, 1024, 1024),
        ];
        for (kind, flags, sector, sectors) in requests {
            range(&driver, 0, *sector, *sectors, *flags);
            assert_eq!(run(&mut driver, *kind, 0, &[(DATA, 16)])?, (0, 1), "{kind:?} of {sectors} sectors");
            let (from, len) = (*sector as usize * 512, *sectors as usize * 512);
            expected.get_mut(from..from + len).unwrap().fill(0);
        }
        // Two ranges in one request.
        range(&driver, 0, 9000, 8, 0);
        range(&driver, 1, 9100, 8, 1);
        assert_eq!(run(&mut driver, Kind::WriteZeroes, 0, &[(DATA, 32)])?, (0, 1));
        expected.get_mut(9000 * 512..9008 * 512).unwrap().fill(0);
        expected.get_mut(9100 * 512..9108 * 512).unwrap().fill(0);
        driver.stop(0)?;
        assert!(std::fs::read(&path)? == expected);
    }
    Ok(())
}

/// Writes the n-th range of a discard or write-zeroes request.
fn range(driver: &Driver, n: u64, sector: u64, sectors: u32, flags: u32) {
    driver.guest().store(DATA + 16 * n, sector);
    driver.guest().store(DATA + 16 * n + 8, sectors);
    driver.guest().store(DATA + 16 * n + 12, flags);
}

#[test]
fn what_does_not_fit_the_disk_is_an_error_and_changes_nothing() -> Result<()> {
    const IOERR: u8 = 1;
    const UNSUPP: u8 = 2;
    for folder in folders() {
        let path = image(folder.path(), 1 << 20)?;
        let before = pattern(3, 1 << 20);
        std::fs::write(&path, &before)?;
        let mut blk = listen(folder.path(), &["--path", path.to_str().unwrap()])?;
        let mut driver = blk.driver(Options::default())?;
        let last = (1 << 20) / 512;
        type Case = (&'static str, Kind, u64, &'static [(u64, u32)], u8);
        let cases: &[Case] = &[
            ("one sector behind the end", Kind::Out, last, &[(DATA, 512)], IOERR),
            ("across the end", Kind::Out, last - 1, &[(DATA, 1024)], IOERR),
            ("sector overflow", Kind::Out, u64::MAX, &[(DATA, 512)], IOERR),
            ("byte overflow", Kind::In, u64::MAX / 512, &[(DATA, 512)], IOERR),
            ("half a sector", Kind::Out, 0, &[(DATA, 256)], IOERR),
            ("data outside guest memory", Kind::Out, 0, &[(1 << 40, 512)], IOERR),
            ("data across the end of guest memory", Kind::In, 0, &[((16 << 20) - 256, 512)], IOERR),
            ("data at the end of the address space", Kind::In, 0, &[(u64::MAX - 100, 512)], IOERR),
            ("discard without a range", Kind::Discard, 0, &[], IOERR),
            ("discard with half a range", Kind::Discard, 0, &[(DATA, 8)], IOERR),
        ];
        for (name, kind, sector, data, status) in cases {
            assert_eq!(run(&mut driver, *kind, *sector, data)?.0, *status, "{name}");
        }
        range(&driver, 0, last - 1, 2, 0);
        assert_eq!(run(&mut driver, Kind::Discard, 0, &[(DATA, 16)])?.0, IOERR, "discard across the end");
        range(&driver, 0, 0, u32::MAX, 0);
        assert_eq!(run(&mut driver, Kind::WriteZeroes, 0, &[(DATA, 16)])?.0, IOERR, "zeroes without end");
        range(&driver, 0, 0, 1, 1);
        assert_eq!(run(&mut driver, Kind::Discard, 0, &[(DATA, 16)])?.0, UNSUPP, "discard with a flag");
        driver.stop(0)?;
        assert!(std::fs::read(&path)? == before);
    }
    Ok(())
}

#[test]
fn a_read_only_disk_says_so_and_refuses_writes() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = image(folder.path(), 1 << 20)?;
    let mut blk = listen(folder.path(), &["--path", path.to_str().unwrap(), "--read-only"])?;
    let mut driver = blk.driver(Options::default())?;
    assert_ne!(driver.features() & (1 << 5), 0, "VIRTIO_BLK_F_RO");
    assert_eq!(run(&mut driver, Kind::Out, 0, &[(DATA, 512)])?.0, 1);
    assert_eq!(run(&mut driver, Kind::In, 0, &[(DATA, 512)])?.0, 0);
    Ok(())
}

#[test]
fn direct_io_bounces_what_the_guest_did_not_align() -> Result<()> {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let path = image(folder.path(), 8 << 20)?;
    let mut blk = listen(folder.path(), &["--path", path.to_str().unwrap(), "--direct"])?;
    let mut driver = blk.driver(Options::default())?;
    let data = pattern(4, 200 << 10);
    // One byte off any alignment, and longer than one bounce buffer.
    driver.guest().write(DATA + 1, &data);
    let bytes = data.len() as u32;
    assert_eq!(run(&mut driver, Kind::Out, 8, &[(DATA + 1, 1000), (DATA + 1001, bytes - 1000)])?, (0, 1));
    let back = DATA + (1 << 20) + 3;
    assert_eq!(run(&mut driver, Kind::In, 8, &[(back, bytes)])?, (0, bytes + 1));
    let mut read = vec![0; data.len()];
    driver.guest().read(back, &mut read);
    assert!(read == data);
    Ok(())
}

#[test]
fn queues_work_side_by_side_and_front_ends_one_after_another() -> Result<()> {
    for folder in folders() {
        let path = image(folder.path(), 8 << 20)?;
        let mut blk = listen(folder.path(), &["--path", path.to_str().unwrap(), "--num-queues", "4"])?;
        for round in 0..3_u64 {
            let mut driver = blk.driver(Options { queues: 4, ..Options::default() })?;
            assert_eq!(driver.config(60)?.get(34..36).unwrap(), [4, 0]);
            let mut heads = Vec::new();
            for index in 0..4_usize {
                let (queue, guest) = driver.queue(index)?;
                for n in 0..32_u64 {
                    let at = DATA + (index as u64 * 32 + n) * 4096;
                    guest.write(at, &pattern(round << 32 | at, 4096));
                    let sector = (index as u64 * 32 + n) * 8;
                    heads.push((index, disk::add(queue, guest, Kind::Out, sector, &[(at, 4096)]).unwrap()));
                }
                queue.publish(guest)?;
            }
            for (index, _) in &heads {
                let (queue, guest) = driver.queue(*index)?;
                let (head, _) = queue.take_within(guest, disk::REQUEST_MAX)?;
                assert_eq!(disk::status(queue, guest, head), 0);
            }
            let on_disk = std::fs::read(&path)?;
            for n in 0..128_usize {
                let want = pattern(round << 32 | (DATA + n as u64 * 4096), 4096);
                assert!(on_disk.get(n * 4096..(n + 1) * 4096) == Some(&want[..]), "round {round}, block {n}");
            }
            // The first ends in order, the second hangs up with its rings running.
            if round == 0 {
                for index in 0..4 {
                    assert_eq!(driver.stop(index)?, 32);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn the_dirty_log_names_what_the_device_wrote_and_nothing_else() -> Result<()> {
    const PAGE: u64 = 4096;
    for folder in folders() {
        let path = image(folder.path(), 8 << 20)?;
        let mut blk = listen(folder.path(), &["--path", path.to_str().unwrap()])?;
        let mut driver = blk.driver(Options::default())?;
        let log = Guest::new(4096)?;
        let region = VhostUserDirtyLogRegion { mmap_size: 4096, mmap_offset: 0, mmap_handle: log.file().as_raw_fd() };
        driver.front()?.set_log_base(0, Some(region))?;
        // Not before the feature is chosen, which happens while the ring runs.
        assert_eq!(run(&mut driver, Kind::In, 0, &[(DATA, 512)])?.0, 0);
        assert_eq!(dirty(&log), Vec::<u64>::new());
        let features = driver.features();
        driver.set_features(features | LOG_ALL)?;
        assert_eq!(run(&mut driver, Kind::In, 0, &[(DATA + 100, 512), (DATA + 7 * PAGE, 3 * PAGE as u32)])?.0, 0);
        assert_eq!(run(&mut driver, Kind::Out, 0, &[(DATA + 20 * PAGE, PAGE as u32)])?.0, 0);
        let (queue, _) = driver.queue(0)?;
        let (used, small) = (queue.used / PAGE, queue.small / PAGE);
        let data = DATA / PAGE;
        let mut expected = vec![used, small, data, data + 7, data + 8, data + 9];
        expected.sort_unstable();
        assert_eq!(dirty(&log), expected);
        // And no longer once it is dropped again.
        driver.set_features(features)?;
        log.write(0, &[0; 4096]);
        assert_eq!(run(&mut driver, Kind::In, 0, &[(DATA, 512)])?.0, 0);
        assert_eq!(dirty(&log), Vec::<u64>::new());
    }
    Ok(())
}

fn dirty(log: &Guest) -> Vec<u64> {
    let mut bytes = [0; 4096];
    log.read(0, &mut bytes);
    (0..4096 * 8).filter(|page| bytes[*page as usize / 8] >> (page % 8) & 1 == 1).collect()
}

#[test]
fn memory_comes_and_goes_in_slots() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = image(folder.path(), 1 << 20)?;
    let mut blk = listen(folder.path(), &["--path", path.to_str().unwrap()])?;
    let mut driver = blk.driver(Options::default())?;
    let more = Guest::new(1 << 20)?;
    let high = 1 << 32;
    assert_eq!(run(&mut driver, Kind::In, 0, &[(high, 512)])?.0, 1, "no memory there yet");
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: high,
        memory_size: 1 << 20,
        userspace_addr: USER_OFFSET + high,
        mmap_offset: 0,
        mmap_handle: more.file().as_raw_fd(),
    };
    assert!(driver.front()?.get_max_mem_slots()? >= 8);
    driver.front()?.add_mem_region(&region)?;
    std::fs::write(&path, pattern(5, 1 << 20))?;
    assert_eq!(run(&mut driver, Kind::In, 0, &[(high, 512)])?.0, 0);
    let mut read = [0; 512];
    more.read(0, &mut read);
    assert!(read == pattern(5, 512)[..]);
    driver.front()?.remove_mem_region(&region)?;
    assert_eq!(run(&mut driver, Kind::In, 0, &[(high, 512)])?.0, 1, "gone again");
    Ok(())
}

#[test]
fn a_guest_that_cannot_flush_or_event_idx_is_served_as_well() -> Result<()> {
    const FLUSH: u64 = 1 << 9;
    const WCE: u64 = 1 << 11;
    for folder in folders() {
        let path = image(folder.path(), 1 << 20)?;
        let mut blk = listen(folder.path(), &["--path", path.to_str().unwrap()])?;
        let without = LOG_ALL | EVENT_IDX | FLUSH | WCE;
        let mut driver = blk.driver(Options { without, inflight: false, ..Options::default() })?;
        for n in 0..200 {
            assert_eq!(run(&mut driver, Kind::Out, n, &[(DATA, 512)])?, (0, 1));
        }
        assert_eq!(driver.stop(0)?, 200);
    }
    Ok(())
}

#[test]
fn a_disabled_ring_keeps_its_requests_and_a_reset_device_starts_anew() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = image(folder.path(), 1 << 20)?;
    let mut blk = listen(folder.path(), &["--path", path.to_str().unwrap()])?;
    let mut driver = blk.driver(Options::default())?;
    driver.front()?.set_vring_enable(0, false)?;
    let (queue, guest) = driver.queue(0)?;
    disk::add(queue, guest, Kind::In, 0, &[(DATA, 512)]).unwrap();
    queue.publish(guest)?;
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(queue.take(guest).is_none());
    driver.front()?.set_vring_enable(0, true)?;
    let (queue, guest) = driver.queue(0)?;
    queue.take_within(guest, disk::REQUEST_MAX)?;
    driver.front()?.reset_device()?;
    let features = driver.features();
    driver.set_features(features)?;
    driver.start(0)?;
    assert_eq!(run(&mut driver, Kind::In, 0, &[(DATA, 512)])?.0, 0);
    Ok(())
}

/// Reported of other backends: a front end that sets features again (it switches the dirty log on) finds its rings disabled, and
/// one that reads less of the configuration space than there is gets none of it.
#[test]
fn features_set_again_disable_no_ring_and_every_prefix_of_the_configuration_is_served() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = image(folder.path(), 1 << 20)?;
    let mut blk = listen(folder.path(), &["--path", path.to_str().unwrap()])?;
    let mut driver = blk.driver(Options::default())?;
    let features = driver.features();
    for again in [features, features | LOG_ALL, features] {
        driver.set_features(again)?;
        assert_eq!(run(&mut driver, Kind::In, 0, &[(DATA, 512)])?.0, 0, "{again:#x}");
    }
    let whole = driver.config(256)?;
    for len in 1..=256 {
        assert_eq!(driver.config(len)?, whole.get(..len as usize).unwrap(), "{len} bytes");
    }
    assert_eq!(run(&mut driver, Kind::In, 0, &[(DATA, 512)])?.0, 0);
    Ok(())
}
