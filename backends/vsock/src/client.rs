//! A client of the host's that has not said yet which port of the guest it wants: `CONNECT port` and a line feed.

use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;

/// The longest line: the word, a blank, ten digits and the line feed.
const LINE_MAX: usize = 19;

/// What it wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wish {
    /// The line has no end yet.
    Unfinished,
    /// A port of the guest's.
    Port(u32),
    /// Nothing that can be served; or it is gone.
    Nonsense,
}

#[derive(Debug)]
pub(crate) struct Client {
    stream: UnixStream,
    line: Vec<u8>,
}

impl Client {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self { stream, line: Vec::new() }
    }

    pub(crate) fn into_stream(self) -> UnixStream {
        self.stream
    }

    /// Reads to the end of the line and no further: what comes then is for the guest.
    pub(crate) fn hear(&mut self) -> Wish {
        let mut byte = [0];
        while self.line.len() < LINE_MAX {
            match self.stream.read(&mut byte) {
                Ok(1) if byte == *b"\n" => return understand(&self.line),
                Ok(1) => self.line.extend(byte),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Wish::Unfinished,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => return Wish::Nonsense,
            }
        }
        Wish::Nonsense
    }
}

fn understand(line: &[u8]) -> Wish {
    let text = std::str::from_utf8(line).ok().map(|line| line.strip_suffix('\r').unwrap_or(line));
    let port = text.and_then(|line| {
        let (word, port) = line.split_once(' ')?;
        let digits = !port.is_empty() && port.bytes().all(|digit| digit.is_ascii_digit());
        (word.eq_ignore_ascii_case("connect") && digits).then(|| port.parse().ok())?
    });
    port.map_or(Wish::Nonsense, Wish::Port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_strictly() {
        for (line, wish) in [
            ("CONNECT 1234", Wish::Port(1234)),
            ("connect 0\r", Wish::Port(0)),
            ("CONNECT 4294967295", Wish::Port(u32::MAX)),
            ("CONNECT 4294967296", Wish::Nonsense),
            ("CONNECT +1", Wish::Nonsense),
            ("CONNECT ", Wish::Nonsense),
            ("CONNECT", Wish::Nonsense),
            ("GET / HTTP/1.1", Wish::Nonsense),
            ("", Wish::Nonsense),
        ] {
            assert_eq!(understand(line.as_bytes()), wish, "{line}");
        }
        assert_eq!(understand(&[0xff, 0xfe]), Wish::Nonsense);
    }
}
