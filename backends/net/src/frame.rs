//! Frames: where a guest made one, and how one gets into a guest's buffers.

use atoll_kit::chain::Chain;
use atoll_kit::inlet::Buffers;
use atoll_kit::memory::{OutOfRange, Segments, copy};
use vm_memory::bitmap::{BitmapSlice, MS};
use vm_memory::{GuestMemory, VolatileMemory, VolatileSlice};

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

/// Addresses and type of a frame. As integers: bytes that are stored one by one and then read together make a processor
/// wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Start {
    /// The first eight bytes, little endian.
    low: u64,
    /// The next four.
    middle: u32,
    /// The last two.
    high: u16,
}

impl Start {
    fn of(bytes: [u8; ETHERNET_BYTES]) -> Self {
        let [b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11, b12, b13] = bytes;
        Self {
            low: u64::from_le_bytes([b0, b1, b2, b3, b4, b5, b6, b7]),
            middle: u32::from_le_bytes([b8, b9, b10, b11]),
            high: u16::from_le_bytes([b12, b13]),
        }
    }

    /// As it stands in the frame.
    pub fn bytes(self) -> [u8; ETHERNET_BYTES] {
        let [b0, b1, b2, b3, b4, b5, b6, b7] = self.low.to_le_bytes();
        let ([b8, b9, b10, b11], [b12, b13]) = (self.middle.to_le_bytes(), self.high.to_le_bytes());
        [b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11, b12, b13]
    }

    /// The address that it goes to, as a number.
    #[inline]
    pub fn to(self) -> u64 {
        self.low & 0xffff_ffff_ffff
    }

    /// The address that it comes from, as a number.
    #[inline]
    pub fn from(self) -> u64 {
        self.low >> 48 | u64::from(self.middle) << 16
    }
}

/// An address that stands as a number in a [`Start`].
#[inline]
pub fn mac(number: u64) -> Mac {
    let [a, b, c, d, e, f, _, _] = number.to_le_bytes();
    [a, b, c, d, e, f]
}

type Piece<'a, M> = VolatileSlice<'a, MS<'a, <M as GuestMemory>::PhysicalMemory>>;

/// Reads header and start of a frame, which need not be aligned.
#[inline]
fn first<B: BitmapSlice>(piece: &VolatileSlice<'_, B>) -> Option<(Header, Start)> {
    let header = Header::of(piece.get_ref(0).ok()?.load(), piece.get_ref(8).ok()?.load());
    let (low, middle, high) = (piece.get_ref::<u64>(12).ok()?, piece.get_ref::<u32>(20).ok()?, piece.get_ref(24).ok()?);
    let start =
        Start { low: u64::from_le(low.load()), middle: u32::from_le(middle.load()), high: u16::from_le(high.load()) };
    Some((header, start))
}

/// Writes header and start of a frame.
#[inline]
fn set_first<B: BitmapSlice>(piece: &VolatileSlice<'_, B>, header: Header, buffers: u16, start: Start) -> Option<()> {
    let (word, rest) = header.words(buffers);
    piece.get_ref(0).ok()?.store(word);
    piece.get_ref(8).ok()?.store(rest);
    piece.get_ref(12).ok()?.store(start.low.to_le());
    piece.get_ref(20).ok()?.store(start.middle.to_le());
    piece.get_ref(24).ok()?.store(start.high.to_le());
    Some(())
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
    whole: Option<Piece<'a, M>>,
    /// Where in the chain the frame begins, behind its header.
    pub at: u64,
    /// Bytes of the frame.
    pub len: u64,
    /// The checked header.
    pub header: Header,
    /// Addresses and type.
    pub start: Start,
}

impl<'a, M: GuestMemory> Frame<'a, M> {
    /// Reads what a driver sends; none when it makes no sense.
    #[inline(always)]
    pub fn read(sends: Sends, mem: &'a M, chain: &'a Chain) -> Option<Self> {
        let at = sends.head;
        let len = chain.readable_bytes().checked_sub(at)?;
        if !(ETHERNET_BYTES as u64..=FRAME_MAX as u64).contains(&len) {
            return None;
        }
        let chain = chain.readable();
        let whole = chain.piece(mem, 0, (at + len) as usize);
        let (header, start) = match &whole {
            Some(whole) if at == HEADER_BYTES as u64 => first(whole)?,
            _ => Self::read_first(mem, chain, at)?,
        };
        let header = header.check(sends.offloads, len).ok()?;
        Some(Self { mem, chain, whole, at, len, header, start })
    }

    #[cold]
    fn read_first(mem: &M, chain: Segments<'_>, at: u64) -> Option<(Header, Start)> {
        let mut raw = [0; FIRST_BYTES];
        let raw = raw.get_mut(..at as usize + ETHERNET_BYTES)?;
        chain.read_at(mem, 0, raw).ok()?;
        let (header, start) = raw.split_at_checked(at as usize)?;
        Some((Header::parse(header), Start::of(*start.first_chunk()?)))
    }

    /// Copies its first `len` bytes out.
    pub fn copy_out(&self, out: &mut Vec<u8>, len: u64) -> Result<(), OutOfRange> {
        out.resize(len.min(self.len) as usize, 0);
        self.chain.read_at(self.mem, self.at, out)?;
        // What was looked at is what is passed on.
        out.iter_mut().zip(self.start.bytes()).for_each(|(to, from)| *to = from);
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
        let rest = target.offset(FIRST_BYTES).ok()?;
        set_first(&target, frame.header, chains as u16, frame.start)?;
        source.copy_to_volatile_slice(rest);
        Some(())
    };
    let written = direct().ok_or(OutOfRange).or_else(|_| pass_parts(mem, room, takes, chains, frame));
    // Buffers outside its memory are the guest's mistake: it gets them back empty.
    buffers.finish(chains, if written.is_ok() { whole } else { 0 });
    true
}

#[cold]
fn pass_parts<M: GuestMemory, S: GuestMemory>(
    mem: &M,
    room: Segments<'_>,
    takes: Takes,
    chains: usize,
    frame: &Frame<'_, S>,
) -> Result<(), OutOfRange> {
    let (head, start) = (takes.head, ETHERNET_BYTES as u64);
    begin(mem, room, takes, &frame.header, chains, &frame.start.bytes())?;
    copy((frame.mem, frame.chain, frame.at + start), (mem, room, head + start), frame.len - start)
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
