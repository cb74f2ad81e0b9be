//! What a qcow2 image needs besides itself, told by a process that can do nothing else.
//!
//! Names of backing and data files are in an image's header, which its author, or a guest, made. Whoever opens those files
//! must not be the one who reads that header: so this process reads it, in the jail, and prints one line of JSON with
//! strings of checked form. Whether and where the named files are opened is not its business.

use std::fs::File;
use std::io::Write;
use std::os::fd::RawFd;

use atoll_kit::jail::{Jail, JailError, Mode, Profile};
use atoll_kit::serve::{self, ServeError};
use thiserror::Error;

use crate::qcow2::file::Align;
use crate::qcow2::header::{Header, HeaderError};

/// Why nothing can be said.
#[derive(Debug, Error)]
pub enum ProbeError {
    /// No such descriptor.
    #[error(transparent)]
    Descriptor(#[from] ServeError),
    /// No jail.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// It cannot be read, or nobody listens.
    #[error("cannot read the image: {0}")]
    Read(#[from] std::io::Error),
    /// It is not served.
    #[error("{0}")]
    Header(#[from] HeaderError),
}

/// Reads the header of the image on `fd` and prints what it names.
pub fn run(fd: RawFd, mode: Mode) -> Result<(), ProbeError> {
    let file = File::from(serve::inherited("--fd", fd)?);
    let jail = Jail { mode, profile: &Profile::PROBE, supervised: false, writes_files: false };
    jail.confine(None)?.lock(0)?;
    let bytes = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).map_err(std::io::Error::from)?;
    let header = Header::read(&file, Align::NONE, bytes)??;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", describe(&header))?;
    Ok(out.flush()?)
}

/// One line of JSON: `backing` and `data_file` only where there are any.
fn describe(header: &Header) -> String {
    let mut parts = vec![format!("\"bytes\":{}", header.bytes)];
    if let Some(backing) = &header.backing {
        parts.push(format!("\"backing\":{}", quoted(&backing.name)));
        parts.extend(backing.format.as_ref().map(|format| format!("\"backing_format\":{}", quoted(format))));
    }
    if let Some(data) = &header.data_file {
        parts.push(format!("\"data_file\":{}", data.as_ref().map_or("null".to_owned(), |name| quoted(name))));
    }
    format!("{{{}}}", parts.join(","))
}

/// A JSON string. Names have no control characters: the header's decoder refuses them.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_quoted() {
        assert_eq!(quoted(r#"a "b" \c"#), r#""a \"b\" \\c""#);
    }
}
