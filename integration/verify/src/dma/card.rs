//! A network card (virtio 1.2, 5.1) that asks who has an address (ARP) and hears the answer, one frame at a time.
//!
//! What is asked for is another address each time, so that an answer tells which question it belongs to.

use std::io;
use std::time::{Duration, Instant};

use super::ring::{Ring, VirtioFunction, WAIT};
use super::vfio::{Device, PAGE, Pages};

/// Bytes of the header before each frame (5.1.6.1, num_buffers included).
const HEADER: usize = 12;
/// The shortest frame.
const FRAME: usize = 60;
/// Bytes of a question.
pub const QUESTION: u32 = (HEADER + FRAME) as u32;
const OWN: [u8; 6] = [2, 0, 0, 0xda, 0xda, 1];
const ETHERTYPE_ARP: [u8; 2] = [8, 6];

/// The card while it is driven.
pub struct RingCard<'a> {
    function: VirtioFunction<'a>,
    receive: Ring<'a>,
    transmit: Ring<'a>,
}

/// The question who has `target`, with the header of the device before it.
pub fn question(own: [u8; 4], target: [u8; 4]) -> Vec<u8> {
    let mut bytes = vec![0; HEADER];
    bytes.extend([0xff; 6]);
    bytes.extend(OWN);
    bytes.extend(ETHERTYPE_ARP);
    // Ethernet, IPv4, their lengths, a request.
    bytes.extend([0, 1, 8, 0, 6, 4, 0, 1]);
    bytes.extend(OWN);
    bytes.extend(own);
    bytes.extend([0; 6]);
    bytes.extend(target);
    bytes.resize(QUESTION as usize, 0);
    bytes
}

/// Whether these bytes, header first, are the answer for `target`.
pub fn is_answer(bytes: &[u8], target: [u8; 4]) -> bool {
    let frame = bytes.get(HEADER..).unwrap_or_default();
    let part = |at: usize, len: usize| frame.get(at..at + len).unwrap_or_default();
    part(12, 2) == ETHERTYPE_ARP && part(20, 2) == [0, 2] && part(28, 4) == target
}

impl<'a> RingCard<'a> {
    /// Takes the device over, with its rings in two pages, which it sees one behind the other from `iova` on.
    ///
    /// # Errors
    /// When it is no such device, or wants no driver like this.
    pub fn start(device: &'a Device, receive: &'a Pages, transmit: &'a Pages, iova: u64) -> io::Result<Self> {
        let function = VirtioFunction::begin(device)?;
        let receive = function.ring(0, receive, iova)?;
        let transmit = function.ring(1, transmit, iova + PAGE as u64)?;
        function.go()?;
        Ok(Self { function, receive, transmit })
    }

    /// Gives it a page for the next frame.
    ///
    /// # Errors
    /// The kernel's.
    pub fn offer(&mut self, data: u64) -> io::Result<()> {
        self.receive.ask(&[(data, PAGE as u32, true)])
    }

    /// Has it send what is at `data`, and waits until it has let go of that.
    ///
    /// # Errors
    /// When it does not.
    pub fn send(&mut self, data: u64, len: u32) -> io::Result<()> {
        self.transmit.ask(&[(data, len, false)])?;
        let silent = || io::Error::other(format!("what is sent from {data:#x} is not given back"));
        self.transmit.answered(WAIT).map(drop).ok_or_else(silent)
    }

    /// Whether a page that was offered comes back within `within`; how many bytes are in it.
    pub fn received(&mut self, within: Duration) -> Option<u32> {
        self.receive.answered(within)
    }

    /// Asks who has `target`, and waits for the answer, which comes to `page`, seen at `data`. Frames of others in between
    /// are passed over.
    ///
    /// # Errors
    /// The kernel's.
    pub fn hears(&mut self, (page, data): (&Pages, u64), target: [u8; 4], within: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + within;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if self.received(left).is_none() {
                return Ok(false);
            }
            if is_answer(&page.bytes(), target) {
                return Ok(true);
            }
            self.offer(data)?;
        }
    }

    /// Resets it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn stop(self) -> io::Result<()> {
        self.function.stop()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_told_from_a_question() {
        let mut bytes = question([10, 0, 0, 9], [10, 0, 0, 1]);
        assert_eq!(bytes.len(), 72);
        assert!(!is_answer(&bytes, [10, 0, 0, 1]));
        bytes[HEADER + 21] = 2;
        bytes[HEADER + 28..HEADER + 32].copy_from_slice(&[10, 0, 0, 1]);
        assert!(is_answer(&bytes, [10, 0, 0, 1]));
        assert!(!is_answer(&bytes, [10, 0, 0, 2]) && !is_answer(&bytes[..20], [10, 0, 0, 1]));
    }
}
