//! Where the data of a command is: PRP entries and lists (4.3), read as hostile input.

use crate::spec::{PAGE, Status, TRANSFER_MAX};

/// The driver's memory, as far as a controller reaches it without moving data.
pub trait Dma {
    /// Reads; false when it is not all there.
    #[must_use]
    fn read(&self, address: u64, out: &mut [u8]) -> bool;
    /// Writes; false when it is not all there.
    #[must_use]
    fn write(&self, address: u64, data: &[u8]) -> bool;
    /// Writes a word after everything that was written before; false when it is not there.
    #[must_use]
    fn publish(&self, address: u64, word: u32) -> bool;
    /// Whether all of it is there.
    #[must_use]
    fn covers(&self, address: u64, len: u64) -> bool;
}

/// A piece of memory: address and bytes.
pub type Piece = (u64, u64);

/// The pieces of `len` bytes that two entries describe; adjacent pages are one piece.
///
/// # Errors
/// The status of a command whose entries are wrong: unaligned, outside of memory, too long.
pub fn pieces(dma: &dyn Dma, prp1: u64, prp2: u64, len: u64) -> Result<Vec<Piece>, Status> {
    if len == 0 || len > TRANSFER_MAX {
        return Err(Status::FIELD);
    }
    let mut pieces: Vec<Piece> = Vec::new();
    let mut push = |address: u64, len: u64| -> Result<(), Status> {
        if !dma.covers(address, len) {
            return Err(Status::TRANSFER);
        }
        match pieces.last_mut() {
            Some((start, bytes)) if start.checked_add(*bytes) == Some(address) => *bytes += len,
            _ => pieces.push((address, len)),
        }
        Ok(())
    };
    // Entries are of doublewords: the low two bits are none of the address.
    if prp1 & 3 != 0 {
        return Err(Status::PRP_OFFSET);
    }
    let first = len.min(PAGE - prp1 % PAGE);
    push(prp1, first)?;
    let mut left = len - first;
    if left == 0 {
        return Ok(pieces);
    }
    if left <= PAGE {
        if !prp2.is_multiple_of(PAGE) {
            return Err(Status::PRP_OFFSET);
        }
        push(prp2, left)?;
        return Ok(pieces);
    }
    if prp2 & 7 != 0 {
        return Err(Status::PRP_OFFSET);
    }
    let mut list = prp2;
    // Each list but the last is followed by a pointer, so each has at least one entry and the loop ends with the data.
    while left > 0 {
        let room = (PAGE - list % PAGE) / 8;
        let needed = left.div_ceil(PAGE);
        let chained = needed > room;
        let entries = if chained { room - 1 } else { needed };
        if chained && entries == 0 {
            return Err(Status::PRP_OFFSET);
        }
        let mut bytes = vec![0; ((entries + u64::from(chained)) * 8) as usize];
        if !dma.read(list, &mut bytes) {
            return Err(Status::TRANSFER);
        }
        let mut words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()));
        for entry in words.by_ref().take(entries as usize) {
            if !entry.is_multiple_of(PAGE) {
                return Err(Status::PRP_OFFSET);
            }
            let piece = left.min(PAGE);
            push(entry, piece)?;
            left -= piece;
        }
        if let Some(next) = words.next() {
            if !next.is_multiple_of(PAGE) {
                return Err(Status::PRP_OFFSET);
            }
            list = next;
        }
    }
    Ok(pieces)
}

/// Fills them with `data` as far as it goes.
///
/// # Errors
/// [`Status::TRANSFER`] when they are not there any more.
pub fn scatter(dma: &dyn Dma, pieces: &[Piece], data: &[u8]) -> Result<(), Status> {
    let mut rest = data;
    for (address, len) in pieces {
        let (now, later) = rest.split_at(rest.len().min(*len as usize));
        if !dma.write(*address, now) {
            return Err(Status::TRANSFER);
        }
        rest = later;
    }
    Ok(())
}

/// Takes what is in them.
///
/// # Errors
/// [`Status::TRANSFER`] when they are not there any more.
pub fn gather(dma: &dyn Dma, pieces: &[Piece]) -> Result<Vec<u8>, Status> {
    let mut data = Vec::new();
    for (address, len) in pieces {
        let at = data.len();
        data.resize(at + *len as usize, 0);
        if !dma.read(*address, data.get_mut(at..).unwrap_or_default()) {
            return Err(Status::TRANSFER);
        }
    }
    Ok(data)
}
