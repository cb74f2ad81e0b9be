//! Frames: where a guest made one, and how one gets into a guest's buffers.

use atoll_kit::chain::Chain;
use atoll_kit::inlet::Buffers;
use atoll_kit::memory::{OutOfRange, Segments, copy};
use vm_memory::bitmap::MS;
use vm_memory::{GuestMemory, VolatileSlice};

use crate::face::Face;
use crate::filter::Mac;
use crate::header::{ETHERNET_BYTES, FRAME_MAX, Features, HEADER_BYTES, Header, Offloads};

/// Bytes of a header and of the start of a frame behind it.
const FIRST_BYTES: usize = HEADER_BYTES + ETHERNET_BYTES;

/// What a driver may send, by what it has agreed to.
#[derive(Debug, Clone, Copy)]
pub struct Sends {
    head: u64,
    offloads: Offloads,
}

impl Sends {
    /// By these features.
    pub fn by(features: Features) -> Self {
        Self { head: features.header_bytes(), offloads: Offloads::from_driver(features) }
    }
}

/// How a driver gets frames, by what it has agreed to.
#[derive(Debug, Clone, Copy)]
pub struct Takes {
    head: u64,
    chains_max: usize,
    /// What it takes besides whole frames.
    pub offloads: Offloads,
}

impl Takes {
    /// As a card's driver has agreed.
    pub fn of(face: &Face) -> Self {
        let features = face.features();
        let chains_max = if features.mergeable() { usize::from(u16::MAX) } else { 1 };
        Self { head: features.header_bytes(), chains_max, offloads: Offloads::to_driver(features) }
    }
}

/// A frame in the memory of the guest that sends it. Its header and its first bytes were read once; what is decided is
/// decided on those, whatever the guest does meanwhile.
#[derive(Debug)]
pub struct Frame<'a, M: GuestMemory> {
    /// The guest's memory.
    pub mem: &'a M,
    /// What it made available.
    pub chain: Segments<'a>,
    /// Header and frame, when they lie in one piece.
    whole: Option<VolatileSlice<'a, MS<'a, M::PhysicalMemory>>>,
    /// Where in the chain the frame begins, behind its header.
    pub at: u64,
    /// Bytes of the frame.
    pub len: u64,
    /// The checked header.
    pub header: Header,
    /// Addresses and type.
    pub start: [u8; ETHERNET_BYTES],
}

impl<'a, M: GuestMemory> Frame<'a, M> {
    /// Reads what a driver sends; none when it makes no sense.
    #[inline]
    pub fn read(sends: Sends, mem: &'a M, chain: &'a Chain) -> Option<Self> {
        let at = sends.head;
        let len = chain.readable_bytes().checked_sub(at)?;
        if !(ETHERNET_BYTES as u64..=FRAME_MAX as u64).contains(&len) {
            return None;
        }
        let chain = chain.readable();
        let whole = chain.piece(mem, 0, (at + len) as usize);
        let (header, start) = if at == HEADER_BYTES as u64
            && let Some(Ok(first)) = whole.as_ref().map(|whole| whole.subslice(0, FIRST_BYTES))
        {
            let mut raw = [0; FIRST_BYTES];
            first.copy_to(&mut raw);
            let (header, start) = raw.split_at(HEADER_BYTES);
            (Header::parse(header), *start.first_chunk()?)
        } else {
            let mut raw = [0; FIRST_BYTES];
            let raw = raw.get_mut(..at as usize + ETHERNET_BYTES)?;
            chain.read_at(mem, 0, raw).ok()?;
            let (header, start) = raw.split_at_checked(at as usize)?;
            (Header::parse(header), *start.first_chunk()?)
        };
        let header = header.check(sends.offloads, len).ok()?;
        Some(Self { mem, chain, whole, at, len, header, start })
    }

    /// Where it goes.
    #[inline]
    pub fn to(&self) -> Mac {
        let [a, b, c, d, e, f, ..] = self.start;
        [a, b, c, d, e, f]
    }

    /// Where it comes from.
    #[inline]
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
#[inline]
pub fn pass<M: GuestMemory, S: GuestMemory>(buffers: &mut Buffers<'_, M>, takes: Takes, frame: &Frame<'_, S>) -> bool {
    let head = takes.head;
    let whole = head + frame.len;
    let Some(chains) = gather(buffers, takes, whole) else { return false };
    let Some((mem, room)) = buffers.room(chains) else { return false };
    // Nearly all frames lie in one piece where they come from and where they go.
    let direct = || -> Option<()> {
        let target = (head == HEADER_BYTES as u64).then(|| room.piece(mem, 0, whole as usize))??;
        let source = frame.whole.as_ref()?.offset(frame.at as usize + ETHERNET_BYTES).ok()?;
        let (to_first, to_rest) =
            (target.subslice(0, FIRST_BYTES).ok()?, target.subslice(FIRST_BYTES, source.len()).ok()?);
        let mut first = [0; FIRST_BYTES];
        let (to_head, to_start) = first.split_at_mut(HEADER_BYTES);
        to_head.copy_from_slice(&frame.header.bytes(chains as u16));
        to_start.copy_from_slice(&frame.start);
        to_first.copy_from(&first);
        source.copy_to_volatile_slice(to_rest);
        Some(())
    };
    let written = direct().ok_or(OutOfRange).or_else(|_| {
        let start = frame.start.len() as u64;
        begin(mem, room, takes, &frame.header, chains, &frame.start)?;
        copy((frame.mem, frame.chain, frame.at + start), (mem, room, head + start), frame.len - start)
    });
    // Buffers outside its memory are the guest's mistake: it gets them back empty.
    buffers.finish(chains, if written.is_ok() { whole } else { 0 });
    true
}

/// Puts bytes into this guest's buffers as a frame. False when there are no buffers for it.
pub fn put<M: GuestMemory>(buffers: &mut Buffers<'_, M>, takes: Takes, header: &Header, bytes: &[u8]) -> bool {
    let whole = takes.head + bytes.len() as u64;
    let Some(chains) = gather(buffers, takes, whole) else { return false };
    let Some((mem, room)) = buffers.room(chains) else { return false };
    let written = begin(mem, room, takes, header, chains, &[]).and_then(|()| room.write_at(mem, takes.head, bytes));
    buffers.finish(chains, if written.is_ok() { whole } else { 0 });
    true
}

/// Takes buffers for a header and a frame; how many.
#[inline]
fn gather<M: GuestMemory>(buffers: &mut Buffers<'_, M>, takes: Takes, whole: u64) -> Option<usize> {
    buffers.gather(whole, takes.chains_max, takes.head).then(|| buffers.count(whole))
}

/// Writes a header and the start of a frame.
fn begin<M: GuestMemory>(
    mem: &M,
    room: Segments<'_>,
    takes: Takes,
    header: &Header,
    chains: usize,
    start: &[u8],
) -> Result<(), OutOfRange> {
    let raw = header.bytes(chains as u16);
    room.write_at(mem, 0, raw.get(..takes.head as usize).unwrap_or(&raw))?;
    room.write_at(mem, takes.head, start)
}
