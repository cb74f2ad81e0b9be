//! The last lines that a process wrote, of whatever it writes.

use std::collections::VecDeque;
use std::io::{ErrorKind, PipeReader, Read};

use crate::actor::RateLimit;

/// A ring of lines, bounded in number and length; what is not text is replaced.
#[derive(Debug, Default)]
pub(super) struct LastLines {
    lines: VecDeque<String>,
    partial: Vec<u8>,
    /// The rest of a line that was too long is skipped.
    skipping: bool,
}

/// Reads what `name` has written, into the log and `lines`. At most what a pipe holds, so that a child that writes
/// without end does not keep the thread.
pub(super) fn read_lines(output: &mut Option<PipeReader>, lines: &mut LastLines, limit: &mut RateLimit, name: &str) {
    let mut chunk = [0; 4096];
    for _ in 0..16 {
        let Some(pipe) = output else { return };
        match pipe.read(&mut chunk) {
            Ok(0) => *output = None,
            Ok(read) => lines.take(chunk.get(..read).unwrap_or_default(), |line| {
                if let Some(suppressed) = limit.admit() {
                    tracing::info!(name, suppressed, "output: {line}");
                }
            }),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Err(_) => *output = None,
        }
    }
}

const LINES_MAX: usize = 32;
const LINE_BYTES_MAX: usize = 512;

impl LastLines {
    /// Takes bytes; hands each line that they end to `each`.
    pub(super) fn take(&mut self, bytes: &[u8], mut each: impl FnMut(&str)) {
        for byte in bytes {
            if *byte == b'\n' {
                self.end_line(&mut each);
            } else if self.partial.len() < LINE_BYTES_MAX {
                self.partial.push(*byte);
            } else {
                self.skipping = true;
            }
        }
    }

    /// Ends the stream: what is left is a line too.
    pub(super) fn finish(&mut self, mut each: impl FnMut(&str)) -> Vec<String> {
        if !self.partial.is_empty() {
            self.end_line(&mut each);
        }
        self.lines.drain(..).collect()
    }

    fn end_line(&mut self, each: &mut impl FnMut(&str)) {
        let mut line: String = String::from_utf8_lossy(&self.partial)
            .chars()
            // A child must not write to the operator's terminal by way of the log.
            .map(|character| if character.is_control() && character != '\t' { '\u{fffd}' } else { character })
            .collect();
        if std::mem::take(&mut self.skipping) {
            line.push('…');
        }
        self.partial.clear();
        each(&line);
        if self.lines.len() == LINES_MAX {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process that writes a gigabyte without a line feed, escape sequences, and half a character, costs no more than
    /// the ring.
    #[test]
    fn bounded_and_clean() {
        let mut last = LastLines::default();
        let mut seen = 0;
        last.take(&[b'x'; 5000], |_| seen += 1);
        last.take(b"\n\x1b[2Jred\n\xc3", |_| seen += 1);
        assert_eq!(seen, 2);
        let lines = last.finish(|_| seen += 1);
        assert_eq!(seen, 3);
        assert_eq!(lines[0].chars().count(), LINE_BYTES_MAX + 1);
        assert_eq!(lines[1..], ["\u{fffd}[2Jred", "\u{fffd}"]);
        for n in 0..100 {
            last.take(format!("line {n}\n").as_bytes(), |_| {});
        }
        let lines = last.finish(|_| {});
        assert_eq!((lines.len(), lines[0].as_str(), lines[31].as_str()), (32, "line 68", "line 99"));
    }
}
