//! Memory in which a screen finds the pixels of a large update, if it takes them that way: one memfd for all screens that come, made
//! before the process is locked in.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use atoll_protocol::display::{PIXELS_MAX, Rect, Request, begin_update, pixel_bytes};
use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

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

    /// Room for the pixels of an update, if it is large enough to go this way.
    fn room(&self, rect: Rect) -> Option<VolatileSlice<'_>> {
        let len = Some(pixel_bytes(rect)).filter(|len| *len >= FRAME_MIN)?;
        self.map.get_slice(0, len).ok()
    }
}

/// What a screen is told at once: messages, and the pixels of one large update in memory, if it takes them that way.
#[derive(Debug)]
pub struct Telling<'a> {
    /// The messages.
    pub messages: &'a mut Vec<u8>,
    /// Where the pixels go; none where they are part of the message.
    pub memory: Option<&'a FrameMemory>,
    /// They have gone there, and are to be read before there is room for others.
    pub is_full: bool,
}

impl<'a> Telling<'a> {
    /// Nothing is told yet.
    pub fn new(messages: &'a mut Vec<u8>, memory: Option<&'a FrameMemory>) -> Self {
        Self { messages, memory, is_full: false }
    }

    /// Tells the pixels of a part: `by_memory` writes them there, if it can, else `by_message` appends them to the messages.
    pub fn update(
        &mut self,
        scanout: u32,
        rect: Rect,
        by_memory: impl FnOnce(&VolatileSlice<'_>) -> bool,
        by_message: impl FnOnce(&mut Vec<u8>),
    ) {
        let room = self.memory.filter(|_| !self.is_full).and_then(|memory| memory.room(rect));
        if room.is_some_and(|room| by_memory(&room)) {
            self.is_full = true;
            Request::Frame { scanout, rect }.put(self.messages);
        } else {
            begin_update(self.messages, scanout, rect);
            by_message(self.messages);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::Bytes;

    use super::*;

    /// A large update goes by memory, once; a small one, one that finds no room, and one that whoever draws cannot write there are
    /// messages with their pixels.
    #[test]
    fn large_updates_go_by_memory() {
        let memory = FrameMemory::new().unwrap();
        let pixels: Vec<u8> = (0..256 * 128 * 4).map(|at| (at % 251) as u8).collect();
        let whole = Rect { x: 0, y: 0, width: 256, height: 128 };
        let corner = Rect { x: 1, y: 2, width: 2, height: 2 };
        let (mut said, mut wanted) = (Vec::new(), Vec::new());
        let mut telling = Telling::new(&mut said, Some(&memory));
        let mut tell = |rect: Rect, can: bool| {
            let by_memory = |room: &VolatileSlice<'_>| can && room.write_slice(&pixels[..room.len()], 0).is_ok();
            telling.update(1, rect, by_memory, |out| out.extend(&pixels[..pixel_bytes(rect)]));
            telling.is_full
        };
        assert_eq!(
            [(corner, true), (whole, false), (whole, true), (whole, true)].map(|(r, can)| tell(r, can)),
            [false, false, true, true]
        );
        Request::Update { scanout: 1, rect: corner, pixels: &pixels[..16] }.put(&mut wanted);
        Request::Update { scanout: 1, rect: whole, pixels: &pixels }.put(&mut wanted);
        Request::Frame { scanout: 1, rect: whole }.put(&mut wanted);
        Request::Update { scanout: 1, rect: whole, pixels: &pixels }.put(&mut wanted);
        assert_eq!(said, wanted);
        let mut there = vec![0; pixels.len()];
        memory.file.read_exact_at(&mut there, 0).unwrap();
        assert_eq!(there, pixels);
    }
}
