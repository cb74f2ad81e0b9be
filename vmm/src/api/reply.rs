//! What a client gets back, to the byte as Cloud Hypervisor's clients read it.
//!
//! They take everything after the version in the status line for a number, so there is no reason phrase; they look for
//! `Content-Length` in exactly this case; they decode the body piece by piece, so JSON is written in ASCII; some read
//! once, so head and body are one buffer that is written in one system call.

use std::io;

use serde::Serialize;
use serde_json::ser::{CharEscape, CompactFormatter, Formatter};

use crate::lifecycle::{ErrorKind, VmError};

/// The statuses that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Status {
    /// With a body.
    Ok,
    /// Without one.
    NoContent,
    /// The request or the configuration cannot be carried out by anybody.
    BadRequest,
    /// No such machine, device or resource.
    NotFound,
    /// There is one of that name.
    Conflict,
    /// Too much at once; later, perhaps.
    TooMany,
    /// It went wrong on this side, or does not fit the machine's state.
    Failed,
}

impl Status {
    /// Its number.
    #[must_use]
    pub(super) fn code(self) -> u16 {
        match self {
            Self::Ok => 200,
            Self::NoContent => 204,
            Self::BadRequest => 400,
            Self::NotFound => 404,
            Self::Conflict => 409,
            Self::TooMany => 429,
            Self::Failed => 500,
        }
    }
}

impl From<ErrorKind> for Status {
    fn from(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::NotFound => Self::NotFound,
            ErrorKind::Duplicate => Self::Conflict,
            ErrorKind::Bad | ErrorKind::Unsupported => Self::BadRequest,
            ErrorKind::WrongState | ErrorKind::Late | ErrorKind::Failed => Self::Failed,
        }
    }
}

/// What stands in a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// JSON in ASCII.
    Json,
    /// Prometheus' text format, which is UTF-8 and knows no other escape.
    Metrics,
    /// A PNG.
    Picture,
}

impl Content {
    /// Its media type.
    #[must_use]
    pub(super) fn media_type(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::Metrics => "text/plain; version=0.0.4",
            Self::Picture => "image/png",
        }
    }
}

/// A whole reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reply {
    status: Status,
    content: Content,
    body: Vec<u8>,
}

impl Reply {
    /// Nothing needs to be said.
    #[must_use]
    pub(super) fn done() -> Self {
        Self { status: Status::NoContent, content: Content::Json, body: Vec::new() }
    }

    /// This.
    #[must_use]
    pub(super) fn json(value: &impl Serialize) -> Self {
        match ascii_json(value) {
            Ok(body) => Self { status: Status::Ok, content: Content::Json, body },
            Err(error) => Self::refused(Status::Failed, &[format!("the answer cannot be written as JSON: {error}")]),
        }
    }

    /// Counters and histograms.
    #[must_use]
    pub(super) fn metrics(text: String) -> Self {
        Self { status: Status::Ok, content: Content::Metrics, body: text.into_bytes() }
    }

    /// A PNG.
    #[must_use]
    pub(super) fn picture(body: Vec<u8>) -> Self {
        Self { status: Status::Ok, content: Content::Picture, body }
    }

    /// Why not: an array of sentences.
    #[must_use]
    pub(super) fn refused(status: Status, errors: &[String]) -> Self {
        let body = ascii_json(&errors).unwrap_or_else(|_| b"[]".to_vec());
        Self { status, content: Content::Json, body }
    }

    /// Its status.
    #[must_use]
    pub(super) fn status(&self) -> Status {
        self.status
    }

    /// The bytes for the wire.
    #[must_use]
    pub(super) fn encode(&self, keep_alive: bool) -> Vec<u8> {
        let mut bytes = head(self.status, keep_alive);
        if self.status != Status::NoContent {
            let content = self.content.media_type();
            bytes.extend(format!("Content-Type: {content}\r\nContent-Length: {}\r\n", self.body.len()).into_bytes());
        }
        bytes.extend(b"\r\n");
        if self.status != Status::NoContent {
            bytes.extend(&self.body);
        }
        bytes
    }

    /// The head of a reply that goes on until one of both ends closes the connection.
    #[must_use]
    pub(super) fn stream_head() -> Vec<u8> {
        let mut bytes = head(Status::Ok, false);
        bytes.extend(b"Content-Type: application/x-ndjson\r\n\r\n");
        bytes
    }

    /// Invites a client that waits to send the body.
    #[must_use]
    pub(super) fn invitation() -> &'static [u8] {
        b"HTTP/1.1 100 \r\n\r\n"
    }
}

fn head(status: Status, keep_alive: bool) -> Vec<u8> {
    let connection = if keep_alive { "keep-alive" } else { "close" };
    format!("HTTP/1.1 {} \r\nServer: Atoll API\r\nConnection: {connection}\r\n", status.code()).into_bytes()
}

impl From<VmError> for Reply {
    fn from(error: VmError) -> Self {
        Self::refused(error.kind.into(), &[error.text])
    }
}

/// JSON with everything beyond ASCII as `\uXXXX`.
pub(super) fn ascii_json(value: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    write_json(value, Ascii { braces: true })
}

/// [`ascii_json`] whose strings hold no brace either, for readers that count braces to find the end of an object.
pub(super) fn braceless_json(value: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    write_json(value, Ascii { braces: false })
}

fn write_json(value: &impl Serialize, formatter: Ascii) -> serde_json::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, formatter))?;
    Ok(bytes)
}

struct Ascii {
    /// Braces may stand in strings.
    braces: bool,
}

impl Formatter for Ascii {
    fn write_string_fragment<W: io::Write + ?Sized>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        let plain = |c: char| c.is_ascii() && c != '\x7f' && (self.braces || !matches!(c, '{' | '}'));
        let mut rest = fragment;
        while let Some(at) = rest.find(|c| !plain(c)) {
            let (before, after) = rest.split_at(at);
            writer.write_all(before.as_bytes())?;
            let mut after = after.chars();
            for unit in after.next().unwrap_or_default().encode_utf16(&mut [0; 2]) {
                write!(writer, "\\u{unit:04x}")?;
            }
            rest = after.as_str();
        }
        writer.write_all(rest.as_bytes())
    }

    fn write_char_escape<W: io::Write + ?Sized>(&mut self, writer: &mut W, escape: CharEscape) -> io::Result<()> {
        CompactFormatter.write_char_escape(writer, escape)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_reply_is_what_old_clients_read() {
        assert_eq!(Reply::done().encode(true), b"HTTP/1.1 204 \r\nServer: Atoll API\r\nConnection: keep-alive\r\n\r\n");
        let reply = Reply::refused(Status::Conflict, &["zwei \u{e4} \u{1f600}".to_owned()]);
        assert_eq!(
            String::from_utf8(reply.encode(false)).unwrap(),
            "HTTP/1.1 409 \r\nServer: Atoll API\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: 28\r\n\r\n[\"zwei \\u00e4 \\ud83d\\ude00\"]"
        );
    }

    proptest! {
        /// Whatever is in a text, it goes over the wire in printable ASCII and is the same at the other end.
        #[test]
        fn every_text_survives_as_ascii(text in any::<String>()) {
            for bytes in [ascii_json(&text).unwrap(), braceless_json(&text).unwrap()] {
                prop_assert!(bytes.iter().all(|byte| (0x20..0x7f).contains(byte)));
                prop_assert_eq!(serde_json::from_slice::<String>(&bytes).unwrap(), &*text);
            }
            let braces = braceless_json(&text).unwrap().iter().filter(|byte| matches!(byte, b'{' | b'}')).count();
            prop_assert_eq!(braces, 0);
        }
    }
}
