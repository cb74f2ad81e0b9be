//! Frames: where a guest made one, and how one gets into a guest's buffers.

use atoll_kit::inlet::Buffers;
use atoll_kit::memory::{OutOfRange, Segments, copy};
use vm_memory::GuestMemory;

use crate::face::Face;
use crate::filter::Mac;
use crate::header::{ETHERNET_BYTES, HEADER_BYTES, Header};

/// Longest frame that is copied by way of memory of ours: for less than that, one more look at guest memory costs more.
pub const SHORT_MAX: usize = 256;

/// A frame in the memory of the guest that sends it. Its header and its first bytes were read once; what is decided is
/// decided on those, whatever the guest does meanwhile.
#[derive(Debug)]
pub struct Frame<'a, M> {
    /// The guest's memory.
    pub mem: &'a M,
    /// What it made available.
    pub chain: Segments<'a>,
    /// Where in the chain the frame begins, behind its header.
    pub at: u64,
    /// Bytes of the frame.
    pub len: u64,
    /// The checked header.
    pub header: Header,
    /// Addresses and type.
    pub start: [u8; ETHERNET_BYTES],
    /// All of a short frame, read at once.
    pub short: Option<&'a [u8]>,
}

impl<M: GuestMemory> Frame<'_, M> {
    /// Where it goes.
    pub fn to(&self) -> Mac {
        let [a, b, c, d, e, f, ..] = self.start;
        [a, b, c, d, e, f]
    }

    /// Where it comes from.
    pub fn from(&self) -> Mac {
        let [_, _, _, _, _, _, a, b, c, d, e, f, ..] = self.start;
        [a, b, c, d, e, f]
    }

    /// Copies its first `len` bytes out.
    pub fn copy_out(&self, out: &mut Vec<u8>, len: u64) -> Result<(), OutOfRange> {
        out.resize(len.min(self.len) as usize, 0);
        self.chain.read_at(self.mem, self.at, out)?;
        // What was looked at is what is passed on.
        let start = self.start.len().min(out.len());
        if let (Some(to), Some(from)) = (out.get_mut(..start), self.start.get(..start)) {
            to.copy_from_slice(from);
        }
        Ok(())
    }
}

/// Puts a frame of another guest into this guest's buffers, with one copy. False when there are no buffers for it.
pub fn pass<M: GuestMemory, S: GuestMemory>(buffers: &mut Buffers<'_, M>, face: &Face, frame: &Frame<'_, S>) -> bool {
    if let Some(bytes) = frame.short {
        return put(buffers, face, &frame.header, bytes);
    }
    let start = frame.start.len() as u64;
    place(buffers, face, (&frame.header, &frame.start[..]), frame.len, |mem, room, at| {
        copy((frame.mem, frame.chain, frame.at + start), (mem, room, at), frame.len - start)
    })
}

/// Puts bytes into this guest's buffers as a frame. False when there are no buffers for it, or it is none.
pub fn put<M: GuestMemory>(buffers: &mut Buffers<'_, M>, face: &Face, header: &Header, bytes: &[u8]) -> bool {
    if bytes.len() <= SHORT_MAX {
        return place(buffers, face, (header, bytes), bytes.len() as u64, |_, _, _| Ok(()));
    }
    let Some((start, rest)) = bytes.split_at_checked(ETHERNET_BYTES) else { return false };
    place(buffers, face, (header, start), bytes.len() as u64, |mem, room, at| room.write_at(mem, at, rest))
}

/// Writes header and start of a frame of `len` bytes and lets `fill` write the rest.
fn place<M: GuestMemory>(
    buffers: &mut Buffers<'_, M>,
    face: &Face,
    (header, start): (&Header, &[u8]),
    len: u64,
    fill: impl FnOnce(&M, Segments<'_>, u64) -> Result<(), OutOfRange>,
) -> bool {
    let features = face.features();
    let head = features.header_bytes();
    let chains_max = if features.mergeable() { usize::from(u16::MAX) } else { 1 };
    if !buffers.gather(head + len, chains_max, head) {
        return false;
    }
    let chains = buffers.count(head + len);
    let Some((mem, room)) = buffers.room(chains) else { return false };
    let mut first = [0; HEADER_BYTES + SHORT_MAX];
    let both = first.get_mut(..head as usize + start.len()).unwrap_or_default();
    let raw = header.bytes(chains as u16);
    if let (Some((to_head, to_start)), Some(raw)) = (both.split_at_mut_checked(head as usize), raw.get(..head as usize))
    {
        to_head.copy_from_slice(raw);
        to_start.copy_from_slice(start);
    }
    let written = room.write_at(mem, 0, both).and_then(|()| fill(mem, room, both.len() as u64));
    // Buffers outside its memory are the guest's mistake: it gets them back empty.
    buffers.finish(chains, if written.is_ok() { head + len } else { 0 });
    true
}
