//! What a driver can do with `atoll-blk`, on a tmpfs (inline I/O) and on the build folder's file system (io_uring).

mod common;

use anyhow::Result;
use atoll_kit::driver::Options;
use atoll_kit::driver::disk::Kind;
use common::{Blk, DATA, image, pattern, run};

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
        let mut blk = Blk::listen(folder.path(), &["--path", path.to_str().unwrap(), "--serial", "atoll-42"])?;
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
