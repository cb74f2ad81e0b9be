//! One HTTP/1.1 request out of the bytes of a connection. Nothing here waits or opens anything, so that a test or a fuzzer
//! can drive it with any bytes.
//!
//! An [`Assembler`] says how many bytes it has [room](Assembler::room) for, which is never more than the request at hand
//! needs once its head is known: bytes of a next request are only taken when they came with the head of this one, and
//! then they stay for [the next step](Assembler::step).

use std::borrow::Cow;

use thiserror::Error;

/// Bytes of a head at most, request line and headers.
pub const HEAD_MAX: usize = 16 << 10;
/// Bytes of a body at most.
pub const BODY_MAX: usize = 4 << 20;
/// Header lines at most.
const HEADERS_MAX: usize = 64;

/// What is asked of a resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// To be read.
    Get,
    /// To be done.
    Put,
    /// Anything else, which no resource knows.
    Other,
}

impl Method {
    /// As it is written in a request.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Put => "PUT",
            Self::Other => "another method",
        }
    }
}

/// A request that cannot be read. The connection is of no more use: where the next one begins is not known.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Malformed {
    /// Not HTTP.
    #[error("this is not an HTTP/1.1 request: {0}")]
    Syntax(httparse::Error),
    /// Head beyond the ceiling.
    #[error("the head of the request is longer than {HEAD_MAX} bytes")]
    LongHead,
    /// Body beyond the ceiling.
    #[error("the body of the request is longer than {} MiB", BODY_MAX >> 20)]
    LongBody,
    /// No number, or two.
    #[error("Content-Length is not one number")]
    Length,
    /// A body without a length.
    #[error("Transfer-Encoding is not supported: send the body with Content-Length")]
    Chunked,
    /// Something is expected that nobody can fulfil.
    #[error("the only expectation that can be met is 100-continue")]
    Expectation,
    /// Not a path.
    #[error("the request's target is not a path")]
    Target,
}

/// What came before the body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// What is asked.
    pub method: Method,
    /// Of which resource: decoded, without a query.
    pub path: String,
    /// Bytes of the body.
    pub length: usize,
    /// The connection goes on after the answer.
    pub keep_alive: bool,
    /// The client sends the body when it is told to.
    pub waits: bool,
}

impl Head {
    /// Reads a head off the front of `bytes`; gives it with its length, or `None` when there is more to come.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, Malformed> {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut request = httparse::Request::new(&mut headers);
        let httparse::Status::Complete(end) = request.parse(bytes).map_err(Malformed::Syntax)? else {
            return if bytes.len() >= HEAD_MAX { Err(Malformed::LongHead) } else { Ok(None) };
        };
        if end > HEAD_MAX {
            return Err(Malformed::LongHead);
        }
        let method = match request.method {
            Some("GET") => Method::Get,
            Some("PUT") => Method::Put,
            _ => Method::Other,
        };
        let path = decode_target(request.path.unwrap_or_default()).ok_or(Malformed::Target)?;
        let mut head = Self { method, path, length: 0, keep_alive: request.version == Some(1), waits: false };
        let mut length = None;
        for header in request.headers.iter() {
            head.take_header(header, &mut length)?;
        }
        head.length = length.unwrap_or_default();
        // Whoever asks for a head alone does not expect the body that refuses it, and would take it for the next answer.
        head.keep_alive &= request.method != Some("HEAD");
        Ok(Some((head, end)))
    }

    fn take_header(&mut self, header: &httparse::Header<'_>, length: &mut Option<usize>) -> Result<(), Malformed> {
        let is = |name: &str| header.name.eq_ignore_ascii_case(name);
        let value = header.value.trim_ascii();
        if is("content-length") {
            let found = decimal(value).ok_or(Malformed::Length)?;
            if length.is_some_and(|before| before != found) {
                return Err(Malformed::Length);
            }
            *length = Some(if found <= BODY_MAX { found } else { return Err(Malformed::LongBody) });
        } else if is("transfer-encoding") {
            return Err(Malformed::Chunked);
        } else if is("connection") {
            for word in value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
                if word.eq_ignore_ascii_case(b"close") {
                    self.keep_alive = false;
                } else if word.eq_ignore_ascii_case(b"keep-alive") {
                    self.keep_alive = true;
                }
            }
        } else if is("expect") {
            if !value.eq_ignore_ascii_case(b"100-continue") {
                return Err(Malformed::Expectation);
            }
            self.waits = true;
        }
        Ok(())
    }
}

/// Digits only: no sign, no blank, nothing that does not fit.
fn decimal(text: &[u8]) -> Option<usize> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    // A number too great for us is a body beyond the ceiling rather than no number.
    Some(std::str::from_utf8(text).ok()?.parse().unwrap_or(usize::MAX))
}

/// The path of `/path?query` or `http://host/path`, with `%XX` decoded.
fn decode_target(target: &str) -> Option<String> {
    let path = match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').map_or("/", |slash| rest.get(slash..).unwrap_or("/")),
        None => target,
    };
    let path = path.split(['?', '#']).next().unwrap_or_default();
    if !path.starts_with('/') {
        return None;
    }
    let path = if path.contains('%') { decode_percent(path)? } else { Cow::Borrowed(path) };
    (!path.contains(char::is_control)).then(|| path.into_owned())
}

fn decode_percent(path: &str) -> Option<Cow<'_, str>> {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digit = |byte: u8| char::from(byte).to_digit(16);
                let (high, low) = (digit(rest.next()?)?, digit(rest.next()?)?);
                u8::try_from(high * 16 + low).ok()?
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok().map(Cow::Owned)
}

/// Where an assembler stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// It needs more bytes.
    More,
    /// It needs more bytes, and the client will send them only when it is told to. Said once a request.
    Invite,
    /// A whole request.
    Whole(Head, Vec<u8>),
}

/// Puts requests together.
#[derive(Debug, Default)]
pub struct Assembler {
    bytes: Vec<u8>,
    head: Option<Head>,
    /// How much of `bytes` was looked at in vain.
    seen: usize,
    invited: bool,
}

impl Assembler {
    /// Nothing of a next request has come.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.head.is_none() && self.bytes.is_empty()
    }

    /// Bytes that may come next; at least one after [`Step::More`] and [`Step::Invite`].
    #[must_use]
    pub fn room(&self) -> usize {
        let all = self.head.as_ref().map_or(HEAD_MAX, |head| head.length);
        all.saturating_sub(self.bytes.len())
    }

    /// Where bytes that come are appended, at most [`Self::room`] of them.
    pub fn bytes(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// Looks at what has come.
    ///
    /// # Errors
    /// [`Malformed`]; after that nothing more can be made of this connection.
    pub fn step(&mut self) -> Result<Step, Malformed> {
        let head = match self.head.take() {
            Some(head) => head,
            None => match self.find_head()? {
                Some(head) => head,
                None => return Ok(Step::More),
            },
        };
        if self.bytes.len() >= head.length {
            let rest = self.bytes.split_off(head.length);
            let body = std::mem::replace(&mut self.bytes, rest);
            self.seen = 0;
            self.invited = false;
            return Ok(Step::Whole(head, body));
        }
        let invite = head.waits && self.bytes.is_empty() && !self.invited;
        self.invited |= invite;
        self.head = Some(head);
        Ok(if invite { Step::Invite } else { Step::More })
    }

    fn find_head(&mut self) -> Result<Option<Head>, Malformed> {
        // A head ends with a line: as long as no line ended, there is nothing new to be found, except that it is too long.
        let news = self.bytes.get(self.seen..).unwrap_or_default();
        if !news.contains(&b'\n') && self.bytes.len() < HEAD_MAX {
            self.seen = self.bytes.len();
            return Ok(None);
        }
        self.seen = self.bytes.len();
        let Some((head, end)) = Head::parse(&self.bytes)? else { return Ok(None) };
        self.bytes.drain(..end);
        Ok(Some(head))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn whole(text: &str) -> Result<(Head, usize), Malformed> {
        Head::parse(text.as_bytes()).map(|found| found.expect("a whole head"))
    }

    #[test]
    fn what_clients_send_is_understood() {
        let text = "PUT /api/v1/vm.boot?x=1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n";
        let (head, end) = whole(text).unwrap();
        assert_eq!(
            (head.method, head.path.as_str(), head.length, end),
            (Method::Put, "/api/v1/vm.boot", 0, text.len())
        );
        assert!(head.keep_alive && !head.waits);
        let (head, _) = whole("GET http://h/a%2Fb%20c HTTP/1.0\r\nexpect: 100-Continue\r\n\r\n").unwrap();
        assert_eq!(head.path, "/a/b c");
        assert!(!head.keep_alive && head.waits);
        let (head, _) = whole("DELETE / HTTP/1.1\r\nConnection: foo, Close\r\ncontent-LENGTH: 7\r\n\r\n").unwrap();
        assert_eq!((head.method, head.keep_alive, head.length), (Method::Other, false, 7));
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_refused() {
        let refused = |headers: &str| whole(&format!("PUT / HTTP/1.1\r\n{headers}\r\n\r\n")).unwrap_err();
        for length in ["-1", "+1", "0x10", "1 2", "", "1,1"] {
            assert_eq!(refused(&format!("Content-Length: {length}")), Malformed::Length, "{length}");
        }
        assert_eq!(refused("Content-Length: 1\r\nContent-Length: 2"), Malformed::Length);
        assert_eq!(refused("Content-Length: 4194305"), Malformed::LongBody);
        assert_eq!(refused("Content-Length: 99999999999999999999999999"), Malformed::LongBody);
        assert_eq!(refused("Content-Length: 3\r\nTransfer-Encoding: chunked"), Malformed::Chunked);
        assert_eq!(refused("Expect: a miracle"), Malformed::Expectation);
        assert!(matches!(refused("Content-Length : 1"), Malformed::Syntax(_)));
        for target in ["*", "vm.info", "/%zz", "/%f", "/%ff", "/%00", "https://h/"] {
            assert_eq!(whole(&format!("GET {target} HTTP/1.1\r\n\r\n")).unwrap_err(), Malformed::Target, "{target}");
        }
    }

    #[test]
    fn a_head_without_end_is_cut_off() {
        let mut assembler = Assembler::default();
        assembler.bytes().extend(b"GET /");
        loop {
            match assembler.step() {
                Ok(step) => assert_eq!(step, Step::More),
                Err(error) => break assert_eq!(error, Malformed::LongHead),
            }
            assert!(assembler.room() > 0);
            let piece = assembler.room().min(100);
            assembler.bytes().extend(std::iter::repeat_n(b'a', piece));
        }
    }

    /// Feeds `text` in pieces of the sizes given, over and over, and gives the requests found.
    fn feed(text: &[u8], sizes: &[usize]) -> Result<Vec<(Head, Vec<u8>)>, Malformed> {
        let (mut assembler, mut rest, mut found) = (Assembler::default(), text, Vec::new());
        for size in sizes.iter().cycle() {
            while let Step::Whole(head, body) = assembler.step()? {
                found.push((head, body));
            }
            if rest.is_empty() {
                break;
            }
            assert!(assembler.room() > 0);
            let (piece, after) = rest.split_at((*size).min(rest.len()).min(assembler.room()));
            assembler.bytes().extend(piece);
            rest = after;
        }
        Ok(found)
    }

    proptest! {
        /// However a stream is cut into pieces, the same requests come out of it, in order.
        #[test]
        fn pieces_make_no_difference(
            bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 1..4),
            sizes in prop::collection::vec(1usize..200, 1..8),
        ) {
            let mut text = Vec::new();
            for body in &bodies {
                text.extend(format!("PUT /x HTTP/1.1\r\nContent-Length: {}\r\n\r\n", body.len()).into_bytes());
                text.extend(body);
            }
            let found = feed(&text, &sizes).unwrap();
            prop_assert_eq!(found.into_iter().map(|(_, body)| body).collect::<Vec<_>>(), bodies);
        }

        /// Any bytes are either requests or refused: no panic, no endless loop, and never more memory than is allowed.
        #[test]
        fn any_bytes_are_judged(noise in prop::collection::vec(any::<u8>(), 0..2000), sizes in prop::collection::vec(1usize..200, 1..4)) {
            let _ = feed(&noise, &sizes);
            let mut nearly = b"PUT /a%20b HTTP/1.1\r\nContent-Length: 3\r\n".to_vec();
            nearly.extend(noise);
            let _ = feed(&nearly, &sizes);
        }
    }
}
