//! Memory in which a screen finds the pixels of a large update, if it takes them that way: one memfd for all screens that come, made
//! before the process is locked in.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use atoll_protocol::display::{HEADER_LEN, Header, PIXELS_MAX, Rect, Request, UPDATE_HEAD, WireError, code};
use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

/// An update of fewer bytes is told in a message: that is one piece, and nobody has to answer it.
const FRAME_MIN: usize = 64 << 10;

/// The memory.
#[derive(Debug)]
pub struct FrameMemory {
    file: File,
    map: MmapRegion<()>,
}

impl FrameMemory {
    /// Memory for the largest update; the kernel gives it as it is written.
    ///
    /// # Errors
    /// Without memory or descriptors.
    pub fn new() -> io::Result<Self> {
        let memfd = rustix::fs::memfd_create("atoll-gpu-frames", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&memfd, PIXELS_MAX as u64)?;
        rustix::fs::fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let file = File::from(memfd);
        let offset = FileOffset::new(file.try_clone()?, 0);
        let map = MmapRegion::from_file(offset, PIXELS_MAX).map_err(io::Error::other)?;
        Ok(Self { file, map })
    }

    /// What a screen is told of it, and what goes beside that.
    pub fn offer(&self) -> (Request<'static>, BorrowedFd<'_>) {
        (Request::FrameMemory { len: PIXELS_MAX as u64 }, self.file.as_fd())
    }

    /// Takes the pixels of a large update out of these messages and into the memory: what is to be sent instead, if there is one.
    ///
    /// # Errors
    /// What is in `messages` is no whole messages.
    pub fn take(&self, messages: &[u8]) -> Result<Option<Vec<u8>>, WireError> {
        let mut at = 0;
        while let Some(head) = messages.get(at..).and_then(|rest| rest.first_chunk::<HEADER_LEN>()) {
            let header = Header::decode(head, u32::MAX)?;
            let (from, end) = (at + HEADER_LEN, at + HEADER_LEN + header.payload as usize);
            if header.code == code::UPDATE && header.payload as usize >= FRAME_MIN {
                let payload = messages.get(from..end).unwrap_or_default();
                let Request::Update { scanout, rect, pixels } = Request::decode(header.code, payload)? else {
                    return Ok(None);
                };
                return Ok(self.put(pixels).then(|| Self::instead(messages, at, end, scanout, rect)));
            }
            at = end;
        }
        Ok(None)
    }

    fn put(&self, pixels: &[u8]) -> bool {
        self.map.as_volatile_slice().write_slice(pixels, 0).is_ok()
    }

    fn instead(messages: &[u8], at: usize, end: usize, scanout: u32, rect: Rect) -> Vec<u8> {
        let mut said = messages.get(..at).unwrap_or_default().to_vec();
        Request::Frame { scanout, rect }.put(&mut said);
        said.extend(messages.get(end..).unwrap_or_default());
        said
    }
}

const _: () = assert!(FRAME_MIN > UPDATE_HEAD);

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    /// A large update goes by memory, in its place among the other messages; a small one, and everything else, stays as it is.
    #[test]
    fn large_updates_go_by_memory() {
        let memory = FrameMemory::new().unwrap();
        let pixels: Vec<u8> = (0..256 * 128 * 4).map(|at| (at % 251) as u8).collect();
        let whole = Rect { x: 0, y: 0, width: 256, height: 128 };
        let corner = Rect { x: 1, y: 2, width: 2, height: 2 };
        let (mut said, mut wanted) = (Vec::new(), Vec::new());
        let others = [
            Request::Scanout { scanout: 1, width: 256, height: 128 },
            Request::Update { scanout: 1, rect: corner, pixels: &pixels[..16] },
        ];
        others.iter().for_each(|request| request.put(&mut said));
        assert_eq!(memory.take(&said), Ok(None));
        wanted.extend(&said);
        Request::Update { scanout: 1, rect: whole, pixels: &pixels }.put(&mut said);
        Request::Frame { scanout: 1, rect: whole }.put(&mut wanted);
        Request::GetDisplayInfo.put(&mut said);
        Request::GetDisplayInfo.put(&mut wanted);
        assert_eq!(memory.take(&said), Ok(Some(wanted)));
        let mut there = vec![0; pixels.len()];
        memory.file.read_exact_at(&mut there, 0).unwrap();
        assert_eq!(there, pixels);
    }
}
