//! A hostile qcow2 image under a hostile guest: a small image with bytes changed in its tables, opened and used. Every
//! answer is an error or success, within a second; nothing panics and nothing beyond the image's file is touched.
#![no_main]

use std::fs::File;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use atoll_blk::qcow2::file::Align;
use atoll_blk::qcow2::image::{Chain, Clear, Format, Image, Layer, Place};
use libfuzzer_sys::fuzz_target;

const CLUSTER: u64 = 512;
const CLUSTERS: u64 = 10;
/// Most bytes that a request moves.
const DATA: u64 = 8 << 10;

/// 512-byte clusters: header, refcount table, refcount block, first-level table, second-level table, a compressed
/// cluster's bytes, data.
fn image() -> Vec<u8> {
    let mut out = vec![0; (CLUSTERS * CLUSTER) as usize];
    let mut put = |at: u64, bytes: &[u8]| {
        let at = at as usize;
        out[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(0, b"QFI\xfb\0\0\0\x03");
    put(20, &9_u32.to_be_bytes());
    put(24, &(128_u64 << 10).to_be_bytes());
    put(36, &4_u32.to_be_bytes());
    put(40, &(3 * CLUSTER).to_be_bytes());
    put(48, &CLUSTER.to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    put(96, &4_u32.to_be_bytes());
    put(100, &104_u32.to_be_bytes());
    put(CLUSTER, &(2 * CLUSTER).to_be_bytes());
    for cluster in 0..CLUSTERS {
        put(2 * CLUSTER + 2 * cluster, &1_u16.to_be_bytes());
    }
    put(3 * CLUSTER, &(1 << 63 | 4 * CLUSTER).to_be_bytes());
    put(4 * CLUSTER, &(1 << 63 | 6 * CLUSTER).to_be_bytes());
    put(4 * CLUSTER + 8, &(1 << 63 | 7 * CLUSTER).to_be_bytes());
    put(4 * CLUSTER + 16, &(1_u64 << 63 | 8 * CLUSTER | 1).to_be_bytes());
    put(4 * CLUSTER + 24, &(1_u64 << 62 | 5 * CLUSTER).to_be_bytes());
    // Deflate: a stored block would not be smaller; a run of one byte is.
    put(5 * CLUSTER, &[0x63, 0x60, 0x18, 0x05, 0xa3, 0x60, 0x14, 0x0c, 0x00]);
    out
}

fn memory_file(bytes: &[u8]) -> Option<File> {
    // SAFETY: the name is a constant; the descriptor is new and owned by the file.
    let file = unsafe {
        let fd = libc::memfd_create(c"image".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return None;
        }
        File::from_raw_fd(fd)
    };
    file.write_all_at(bytes, 0).ok()?;
    Some(file)
}

fuzz_target!(|data: &[u8]| {
    let Some((count, rest)) = data.split_first() else { return };
    let (changes, requests) = rest.split_at((usize::from(*count % 32) * 3).min(rest.len()));
    let mut bytes = image();
    for change in changes.chunks_exact(3) {
        let at = usize::from(u16::from_le_bytes([change[0], change[1]])) % bytes.len();
        bytes[at] = change[2];
    }
    let Some(file) = memory_file(&bytes) else { return };
    let top = Layer { file: Arc::new(file), name: "fuzz".to_owned(), format: Format::Qcow2 };
    let read_only = count & 0x80 != 0;
    let begun = Instant::now();
    let Ok(image) = Image::open(&Chain { top, data: None, backing: Vec::new(), read_only, align: Align::NONE }) else {
        return;
    };
    for request in requests.chunks_exact(4).take(24) {
        let (offset, len) = (u64::from(u16::from_le_bytes([request[1], request[2]])) * 512, u64::from(request[3]) * 64);
        if offset + len > image.bytes() || len == 0 {
            continue;
        }
        let _ = match request[0] % 5 {
            0 => image.read(&mut vec![0; len as usize], offset).map(|()| None),
            1 => image.place(offset, len, true).map(|(place, found)| {
                assert!(found > 0);
                if let Place::File { file, offset, writable: true } = place {
                    let _ = file.write_all_at(&vec![request[3]; found.min(DATA) as usize], offset);
                }
                None
            }),
            2 if !read_only => image
                .allocate(offset, len, |file, host, len| file.file().write_all_at(&vec![1; len as usize], host))
                .map(|(_, change)| Some(change)),
            3 if !read_only => image.clear(offset, len, Clear::Unmap).map(|(change, _)| Some(change)),
            4 if !read_only => image.write_zeroes(offset..offset + len).map(Some),
            _ => continue,
        }
        .and_then(|change| change.map_or(Ok(()), |change| image.settle(change)));
    }
    let _ = image.sync();
    assert!(begun.elapsed() < Duration::from_secs(1), "it took {:?}", begun.elapsed());
});
