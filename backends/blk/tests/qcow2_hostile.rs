//! Images that lie: whatever is changed in the tables of an image, opening and using it ends in an error or in success,
//! soon, in bounded memory, and without a panic.

mod process;

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use atoll_blk::qcow2::file::Align;
use atoll_blk::qcow2::image::{Chain, Clear, Format, Image, Layer, Place};
use imago::StorageExt;
use process::pattern;
use process::qemu_img::qemu_img;
use proptest::prelude::{ProptestConfig, any};
use proptest::test_runner::TestRunner;

/// How long one image may take. It has a few hundred clusters.
const IMAGE_MAX: Duration = Duration::from_secs(5);
/// Most memory of this process, which holds one image at a time.
const MEMORY_KIB_MAX: u64 = 300 << 10;

fn images(folder: &Path) -> Result<Vec<Vec<u8>>> {
    std::fs::write(folder.join("source"), [pattern(5, 200 << 10), vec![7; 300 << 10]].concat())?;
    let made: &[&[&str]] = &[
        &["convert", "-O", "qcow2", "-o", "cluster_size=4k", "source", "disk"],
        &["convert", "-c", "-O", "qcow2", "-o", "cluster_size=512", "source", "disk"],
        &["convert", "-O", "qcow2", "-o", "compat=0.10,cluster_size=1k", "source", "disk"],
        &["create", "-f", "qcow2", "-o", "refcount_bits=1,cluster_size=512", "disk", "1M"],
    ];
    let image = |args: &&[&str]| -> Result<Vec<u8>> {
        qemu_img(folder, args)?;
        Ok(std::fs::read(folder.join("disk"))?)
    };
    made.iter().map(image).collect()
}

/// Where the tables are: changes elsewhere change nothing.
fn table_bytes(image: &[u8]) -> Vec<usize> {
    let word = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap()) as usize;
    let cluster = 1 << image[23];
    let (l1, counts) = (word(40), word(48));
    let blocks = word(counts);
    let l2 = (word(l1) & 0x00ff_ffff_ffff_fe00).min(image.len());
    let starts = [(0, 120), (l1, 64), (counts, 64), (blocks, cluster), (l2, cluster)];
    starts.into_iter().flat_map(|(at, len)| at..(at + len).min(image.len())).collect()
}

fn use_it(image: &Image) {
    let data = vec![0xc5; 96 << 10];
    for offset in (0..image.bytes().min(1 << 20)).step_by(77 * 512) {
        let len = (data.len() as u64).min(image.bytes() - offset);
        let _ = image.read(&mut vec![0; len as usize], offset);
        if let Ok((Place::File { writable: true, .. } | Place::Zero | Place::Compressed, found)) =
            image.place(offset, len, true)
        {
            assert!(found > 0 && found <= len, "{found} of {len}");
        }
        let written = image.allocate(offset, len, |file, host, len| file.write(&data[..len as usize], host));
        let cleared = image.clear(offset, len / 2, Clear::Unmap);
        let last = written.map(|(_, change)| change).into_iter().chain(cleared.map(|(change, _)| change)).max();
        if let Some(change) = last {
            let _ = image.settle(change);
        }
    }
    let _ = image.sync();
}

fn memory_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|text| text.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
}

#[test]
fn lies_in_tables_end_in_errors() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let images = images(folder.path())?;
    let path = folder.path().join("lie");
    let changes = proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>(), any::<bool>()), 1..8);
    let opened = std::cell::Cell::new(0_u32);
    let mut runner =
        TestRunner::new(ProptestConfig { cases: 160, failure_persistence: None, ..ProptestConfig::default() });
    let done = runner.run(&(0..images.len(), any::<bool>(), changes), |(number, read_only, changes)| {
        let mut bytes = images[number].clone();
        let places = table_bytes(&bytes);
        for (index, byte, flip) in changes {
            let at = places[index.index(places.len())];
            // One bit, or all of them.
            bytes[at] = if flip { bytes[at] ^ 1 << (byte % 8) } else { byte };
        }
        std::fs::write(&path, &bytes).unwrap();
        let file = Arc::new(File::options().read(true).write(true).open(&path).unwrap());
        let top = Layer { file, name: "lie".to_owned(), format: Format::Qcow2 };
        let begun = Instant::now();
        let chain = Chain { top, data: None, backing: Vec::new(), read_only, align: Align::NONE };
        if let Ok(image) = Image::open(&chain) {
            opened.set(opened.get() + 1);
            use_it(&image);
        }
        assert!(begun.elapsed() < IMAGE_MAX, "it took {:?}", begun.elapsed());
        Ok(())
    });
    ensure!(done.is_ok(), "{done:?}");
    ensure!(opened.get() > 15, "only {} images were opened: this test shows little", opened.get());
    ensure!(memory_kib() < MEMORY_KIB_MAX, "{} KiB", memory_kib());
    Ok(())
}

/// Tables that lie on each other are found when the image is opened.
#[test]
fn tables_that_overlap_are_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let image = images(folder.path())?.swap_remove(0);
    let word = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
    let (l1, counts) = (word(40), word(48));
    let copied = 1_u64 << 63;
    let cases = [
        ("the first-level table names the header", l1, copied | 4096),
        ("it names itself", l1, copied | l1),
        ("it names the refcount table", l1, copied | counts),
        ("it names a refcount block", l1, copied | word(counts as usize)),
        ("it names a place far away", l1, copied | 1 << 50),
        ("the refcount table names itself", counts, counts),
        ("it names the first-level table", counts, l1),
        ("the tables lie on each other", 48, l1),
    ];
    for (name, at, value) in cases {
        let mut bytes = image.clone();
        // The header's own cluster cannot be named: zero means nothing. A cluster of a fixed table can.
        let value = if name.contains("header") { copied | l1 } else { value };
        bytes[at as usize..at as usize + 8].copy_from_slice(&value.to_be_bytes());
        let path = folder.path().join("lie");
        std::fs::write(&path, &bytes)?;
        let file = Arc::new(File::options().read(true).write(true).open(&path)?);
        let top = Layer { file, name: "lie".to_owned(), format: Format::Qcow2 };
        let chain = Chain { top, data: None, backing: Vec::new(), read_only: false, align: Align::NONE };
        let error = Image::open(&chain).err().map(|e| e.to_string()).unwrap_or_default();
        ensure!(error.contains("damaged"), "{name}: {error}");
        ensure!(std::fs::read(&path)? == bytes, "{name}: it was changed");
    }
    Ok(())
}
