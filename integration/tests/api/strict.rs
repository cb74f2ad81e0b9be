//! A client that takes what ch-remote, libvirt and Kata take, and nothing else: one send, one receive.
//!
//! The status line has a number behind the version and nothing behind that; header names are compared with case; a reply
//! of less than 32 KiB is there as a whole in the first receive (libvirt reads once); bodies are ASCII.

use std::collections::BTreeMap;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::Value;

/// Under this much, a reply is one piece.
const PIECE: usize = 32 << 10;

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: String,
    /// From the last byte sent to the first received.
    pub(crate) took: Duration,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// The sentences of a refusal.
    pub(crate) fn why(&self) -> String {
        let sentences: Vec<String> =
            serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("no array of sentences, {error}: {self:?}"));
        assert!(!sentences.is_empty() && sentences.iter().all(|sentence| sentence.len() > 4), "{self:?}");
        sentences.join(": ")
    }
}

pub(crate) struct Strict {
    pub(crate) socket: UnixStream,
}

impl Strict {
    pub(crate) fn connect(path: &Path) -> Self {
        let socket = UnixStream::connect(path).expect("somebody listens");
        socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        socket.set_write_timeout(Some(Duration::from_secs(30))).unwrap();
        Self { socket }
    }

    pub(crate) fn get(&mut self, path: &str) -> Answer {
        self.exchange(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n").as_bytes())
    }

    /// A PUT without a body, as Kata sends it: length zero and no content type.
    pub(crate) fn act(&mut self, path: &str) -> Answer {
        self.exchange(format!("PUT {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n").as_bytes())
    }

    pub(crate) fn put(&mut self, path: &str, body: &str) -> Answer {
        self.put_with(path, body, &[])
    }

    /// Descriptors go with the head, the body follows in a segment of its own.
    pub(crate) fn put_with(&mut self, path: &str, body: &str, descriptors: &[BorrowedFd<'_>]) -> Answer {
        let head = format!(
            "PUT {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        if descriptors.is_empty() {
            return self.exchange(format!("{head}{body}").as_bytes());
        }
        self.send_with(head.as_bytes(), descriptors);
        self.exchange(body.as_bytes())
    }

    pub(crate) fn send_with(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(128))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(descriptors)));
        let sent = sendmsg(self.socket.as_fd(), &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL).unwrap();
        assert_eq!(sent, bytes.len());
    }

    pub(crate) fn exchange(&mut self, request: &[u8]) -> Answer {
        self.socket.write_all(request).expect("the request is taken");
        let sent = Instant::now();
        self.receive(sent)
    }

    pub(crate) fn receive(&mut self, sent: Instant) -> Answer {
        let mut bytes = vec![0; 1 << 20];
        let mut count = self.socket.read(&mut bytes).expect("an answer");
        let took = sent.elapsed();
        let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").expect("a whole head in the first receive") + 4;
        let head = std::str::from_utf8(bytes.get(..end).unwrap()).expect("a head in UTF-8").to_owned();
        let (status, headers) = parse_head(&head);
        let length = headers.get("Content-Length").map_or(0, |length| length.parse::<usize>().expect("a number"));
        assert_eq!(status == 204, !headers.contains_key("Content-Length"), "{head}");
        if end + length < PIECE {
            assert_eq!(count, end + length, "the reply came in more than one piece, or is longer than it says: {head}");
        }
        while count < end + length {
            bytes.resize((end + length).max(bytes.len()), 0);
            let more = self.socket.read(bytes.get_mut(count..).unwrap()).expect("the rest");
            assert!(more > 0, "the connection ended in the middle of a reply");
            count += more;
        }
        assert_eq!(count, end + length);
        let body = std::str::from_utf8(bytes.get(end..count).unwrap()).expect("a body in ASCII").to_owned();
        assert!(body.is_ascii(), "{body}");
        Answer { status, headers, body, took }
    }

    /// What comes next is the end.
    pub(crate) fn expect_end(&mut self) {
        assert_eq!(self.socket.read(&mut [0; 64]).expect("an orderly end"), 0);
    }
}

fn parse_head(head: &str) -> (u16, BTreeMap<String, String>) {
    let mut lines = head.trim_end_matches("\r\n").split("\r\n");
    let status = lines.next().and_then(|line| line.strip_prefix("HTTP/1.1 ")).expect("a status line");
    let status = status.strip_suffix(' ').expect("one blank and no reason phrase behind the status");
    assert_eq!(status.len(), 3);
    let mut headers = BTreeMap::new();
    for line in lines {
        let (name, value) = line.split_once(": ").expect("a header");
        for known in ["Content-Length", "Content-Type", "Connection", "Server"] {
            assert!(!name.eq_ignore_ascii_case(known) || name == known, "the case of {name}");
        }
        assert!(!name.eq_ignore_ascii_case("Transfer-Encoding"), "never in chunks");
        assert!(headers.insert(name.to_owned(), value.to_owned()).is_none(), "{name} twice");
    }
    (status.parse().expect("a number"), headers)
}
