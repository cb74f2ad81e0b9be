//! A backend that is written by hand, message by message: for what the `vhost` crate's server cannot say, and for features
//! that it insists on.

use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::hostile::Lie;
use crate::vhost::patience::Patience;
use crate::vhost::source::{BackendSource, Incarnation, SourceError};

/// Protocol features.
pub(super) const MQ: u64 = 1;
pub(super) const REPLY_ACK: u64 = 1 << 3;
pub(super) const BACKEND_REQ: u64 = 1 << 5;
pub(super) const CONFIG: u64 = 1 << 9;

/// Requests.
pub(super) const SET_FEATURES: u32 = 2;
pub(super) const SET_VRING_NUM: u32 = 8;
pub(super) const SET_VRING_BASE: u32 = 10;
pub(super) const GET_VRING_BASE: u32 = 11;

/// What it is like.
#[derive(Clone)]
pub(super) struct Hand {
    pub(super) features: u64,
    pub(super) protocol: u64,
    pub(super) queues: u64,
    pub(super) config: Arc<Mutex<Vec<u8>>>,
    /// What it answers to GET_VRING_BASE.
    pub(super) base: u32,
    /// How it answers this request instead.
    pub(super) lie: Option<(u32, Lie)>,
}

impl Default for Hand {
    fn default() -> Self {
        let protocol = MQ | REPLY_ACK | BACKEND_REQ | CONFIG;
        Self { features: (1 << 32) | (1 << 30), protocol, queues: 2, config: Arc::default(), base: 0, lie: None }
    }
}

/// Requests with their bodies, in order.
type Seen = Vec<(u32, Vec<u8>)>;

/// What the test holds of one incarnation.
pub(super) struct Held {
    seen: Arc<Mutex<Seen>>,
    /// The channel for its own requests.
    pub(super) requests: Receiver<UnixStream>,
    /// While somebody holds this, GET_VRING_BASE is not answered.
    pub(super) slow: Arc<Mutex<()>>,
    socket: UnixStream,
}

impl Held {
    /// Bodies of the requests of this number.
    pub(super) fn bodies(&self, request: u32) -> Vec<Vec<u8>> {
        self.seen.lock().unwrap().iter().filter(|(seen, _)| *seen == request).map(|(_, body)| body.clone()).collect()
    }
    pub(super) fn count(&self, request: u32) -> usize {
        self.bodies(request).len()
    }
    pub(super) fn await_count(&self, request: u32, count: usize) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.count(request) < count {
            assert!(Instant::now() < deadline, "request {request} came {} times", self.count(request));
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    pub(super) fn die(&self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }
}

impl Hand {
    /// Starts one; gives its front end's socket.
    pub(super) fn start(&self) -> (UnixStream, Held) {
        let (front, back) = UnixStream::pair().unwrap();
        let seen = Arc::new(Mutex::new(Seen::new()));
        let slow = Arc::new(Mutex::new(()));
        let (channel_found, requests) = channel();
        let held =
            Held { seen: Arc::clone(&seen), requests, slow: Arc::clone(&slow), socket: back.try_clone().unwrap() };
        let hand = self.clone();
        std::thread::spawn(move || hand.serve(&back, &seen, &slow, &channel_found));
        (front, held)
    }

    fn serve(&self, socket: &UnixStream, seen: &Mutex<Seen>, slow: &Mutex<()>, channel_found: &Sender<UnixStream>) {
        while let Some((header, fds)) = header(socket) {
            let [request, flags, size] = [0, 4, 8].map(|at| u32::from_le_bytes(header[at..at + 4].try_into().unwrap()));
            let mut body = vec![0; size as usize];
            let mut stream = socket;
            if stream.read_exact(&mut body).is_err() {
                return;
            }
            seen.lock().unwrap().push((request, body.clone()));
            let answer: Option<Vec<u8>> = match request {
                1 => Some(self.features.to_le_bytes().into()),
                15 => Some(self.protocol.to_le_bytes().into()),
                17 => Some(self.queues.to_le_bytes().into()),
                21 => {
                    let _ = channel_found.send(fds.into_iter().next().unwrap().into());
                    None
                }
                24 => {
                    let config = self.config.lock().unwrap();
                    let len = u32::from_le_bytes(body[4..8].try_into().unwrap()) as usize;
                    if config.len() < len {
                        body[4..8].copy_from_slice(&[0; 4]);
                        body.truncate(12);
                    } else {
                        body[12..].copy_from_slice(&config[..len]);
                    }
                    Some(body)
                }
                GET_VRING_BASE => {
                    drop(slow.lock());
                    body[4..8].copy_from_slice(&self.base.to_le_bytes());
                    Some(body)
                }
                _ if flags & 8 != 0 => Some(vec![0; 8]),
                _ => None,
            };
            // Where both are wanted, the acknowledgement is the answer.
            let answer = if request == 21 && flags & 8 != 0 { Some(vec![0; 8]) } else { answer };
            if let Some(body) = answer {
                let words = [request, 5, body.len() as u32];
                let message: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).chain(body).collect();
                if let Some((_, lie)) = self.lie.filter(|(at, _)| *at == request) {
                    lie.tell(socket, message);
                    continue;
                }
                if stream.write_all(&message).is_err() {
                    return;
                }
            }
        }
    }
}

/// The header of the next message and what came along with it.
fn header(socket: &UnixStream) -> Option<([u8; 12], Vec<OwnedFd>)> {
    let mut header = [0; 12];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::WAITALL | RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut header)], &mut ancillary, flags).ok()?;
    let fds = ancillary.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
        _ => Vec::new(),
    });
    let fds = fds.collect();
    (received.bytes == 12).then_some((header, fds))
}

/// Gives a device one such backend after the other; the last one stays.
pub(super) struct Hands {
    hands: Vec<Hand>,
    born: Sender<Held>,
}

impl Hands {
    pub(super) fn new(hand: Hand) -> (Self, Receiver<Held>) {
        Self::of(vec![hand])
    }
    pub(super) fn of(hands: Vec<Hand>) -> (Self, Receiver<Held>) {
        let (born, held) = channel();
        (Self { hands, born }, held)
    }
}

impl BackendSource for Hands {
    fn connect(&mut self, _generation: u64, _patience: &mut Patience) -> Result<Incarnation, SourceError> {
        let hand = if self.hands.len() > 1 { self.hands.remove(0) } else { self.hands[0].clone() };
        let (socket, held) = hand.start();
        let _ = self.born.send(held);
        Ok(Incarnation { socket, process: None })
    }
    fn describe(&self) -> String {
        "a backend by hand".into()
    }
}
