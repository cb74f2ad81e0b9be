//! What a qcow2 image stands on: named by its header, which a jailed process reads, and opened here.
//!
//! Nothing in this process decodes an image. `atoll-blk --probe` gets a descriptor of it and answers with the names in
//! its header; they are hostile text, which is resolved as QEMU does, against the folder of the image that has it, and
//! only where the user has said `backing_files=on`. Every file is held by a handle and passed to each incarnation as a
//! descriptor of its own, so that the backend opens nothing.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use thiserror::Error;

use crate::backend::{AskError, ImageAccess, ImageError, ImageHandle, PassedFd, ask};

/// Most images that stand on each other, the disk's own among them: as many as `atoll-blk` opens.
const CHAIN_MAX: usize = 16;
/// How long a probe may take: it reads a few kilobytes.
const PROBE_MAX: Duration = Duration::from_secs(10);

/// Why an image cannot be had with all that it stands on.
#[derive(Debug, Error)]
pub enum ChainError {
    /// Its header is not served, or not to be read.
    #[error("{} cannot be served: {source}", .path.display())]
    Probe {
        /// Which.
        path: PathBuf,
        /// What the probe said.
        #[source]
        source: AskError,
    },
    /// The probe's answer is none.
    #[error("what atoll-blk says of {} cannot be read ({source}): is it of another version?", .path.display())]
    Answer {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// It stands on others, and that was not allowed.
    #[error(
        "{} wants the file {wants:?}: give the disk backing_files=on if that file may be used, or join them with \
         `qemu-img convert`", .path.display()
    )]
    NotAllowed {
        /// Which.
        path: PathBuf,
        /// The name in its header.
        wants: String,
    },
    /// Nobody says what the backing file is.
    #[error(
        "{} does not say what its backing file {wants:?} is ({}): write it into it with `qemu-img rebase -u -F raw|qcow2 \
         -b {wants} {}`", .path.display(), .says.as_deref().unwrap_or("no format"), .path.display()
    )]
    NoFormat {
        /// Which.
        path: PathBuf,
        /// The name in its header.
        wants: String,
        /// The format in its header.
        says: Option<String>,
    },
    /// A name that is no path.
    #[error("{} wants {wants:?}, which is no path of a file", .path.display())]
    NoPath {
        /// Which.
        path: PathBuf,
        /// The name in its header.
        wants: String,
    },
    /// It has its data elsewhere and does not say where.
    #[error("{} has its data in another file and does not name it: see `qemu-img amend -o data_file`", .0.display())]
    NameLess(PathBuf),
    /// A backing file with its data elsewhere.
    #[error("{} is a backing file with its data in another file, which is not served: convert it with `qemu-img convert`", .0.display())]
    DataBelow(PathBuf),
    /// A file stands on itself.
    #[error("{} stands on itself", .0.display())]
    Loop(PathBuf),
    /// More than are opened.
    #[error("more than {CHAIN_MAX} images stand on each other below {}: join them with `qemu-img rebase`", .0.display())]
    TooMany(PathBuf),
    /// A file that it names cannot be had.
    #[error("{} wants {wants:?}: {source}", .path.display())]
    Image {
        /// Which.
        path: PathBuf,
        /// The name in its header.
        wants: String,
        /// What is wrong with that file.
        #[source]
        source: ImageError,
    },
}

/// What a probe says of an image.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Told {
    #[serde(rename = "bytes")]
    _bytes: u64,
    backing: Option<String>,
    backing_format: Option<String>,
    #[serde(default, deserialize_with = "there")]
    data_file: Option<Option<String>>,
}

/// Tells null from nothing.
fn there<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<Option<String>>, D::Error> {
    Option::<String>::deserialize(from).map(Some)
}

/// A file besides the image, and the flag by which a backend gets it.
#[derive(Debug)]
pub(super) struct Link {
    flag: &'static str,
    image: ImageHandle,
}

impl Link {
    /// The file.
    pub(super) fn image(&self) -> &ImageHandle {
        &self.image
    }

    /// A description of its own for one incarnation.
    pub(super) fn pass(&self) -> Result<PassedFd, ImageError> {
        Ok(PassedFd { flag: self.flag.to_owned(), fd: self.image.reopen()? })
    }
}

/// The file that a header names: relative to the folder of the image that has it.
fn resolve(image: &Path, wants: &str) -> Result<PathBuf, ChainError> {
    // QEMU would take these for a protocol, as in nbd://host or json:{…}.
    let protocol = wants.split('/').next().is_some_and(|first| first.contains(':'));
    if wants.is_empty() || protocol || wants.contains('\0') {
        return Err(ChainError::NoPath { path: image.to_owned(), wants: wants.to_owned() });
    }
    Ok(image.parent().unwrap_or(Path::new("")).join(wants))
}

/// Finds and opens all files that `image` needs besides itself, nearest first.
pub(super) fn links(
    name: &str,
    exe: &PathBuf,
    image: &Arc<ImageHandle>,
    allowed: bool,
) -> Result<Vec<Link>, ChainError> {
    let mut links: Vec<Link> = Vec::new();
    let mut path = image.path().to_owned();
    let mut seen = vec![image.identity()];
    loop {
        let held = links.last().map_or(image.as_ref(), |link| &link.image);
        let told = probe(name, exe, held)?;
        if let Some(data) = told.data_file {
            if seen.len() > 1 {
                return Err(ChainError::DataBelow(path));
            }
            let wants = data.ok_or_else(|| ChainError::NameLess(path.clone()))?;
            let access = image.access();
            let data = open(&path, wants, access, allowed)?;
            if data.identity() == image.identity() {
                return Err(ChainError::Loop(path));
            }
            // Before all others, so that the last of them is still the one to be looked at.
            links.insert(0, Link { flag: "--data-fd", image: data });
        }
        let Some(wants) = told.backing else { return Ok(links) };
        let flag = match told.backing_format.as_deref() {
            Some("raw") => "--backing-raw",
            Some("qcow2") => "--backing-qcow2",
            _ if !allowed => return Err(ChainError::NotAllowed { path, wants }),
            _ => return Err(ChainError::NoFormat { path, wants, says: told.backing_format }),
        };
        let below = open(&path, wants, ImageAccess::Read, allowed)?;
        if seen.contains(&below.identity()) {
            return Err(ChainError::Loop(below.path().to_owned()));
        }
        if seen.len() >= CHAIN_MAX {
            return Err(ChainError::TooMany(path));
        }
        seen.push(below.identity());
        path = below.path().to_owned();
        links.push(Link { flag, image: below });
        if flag == "--backing-raw" {
            return Ok(links);
        }
    }
}

fn open(image: &Path, wants: String, access: ImageAccess, allowed: bool) -> Result<ImageHandle, ChainError> {
    if !allowed {
        return Err(ChainError::NotAllowed { path: image.to_owned(), wants });
    }
    let path = resolve(image, &wants)?;
    ImageHandle::open(&path, access).map_err(|source| ChainError::Image { path: image.to_owned(), wants, source })
}

fn probe(name: &str, exe: &PathBuf, image: &ImageHandle) -> Result<Told, ChainError> {
    let path = || image.path().to_owned();
    let failed = |source: AskError| ChainError::Probe { path: path(), source };
    let fd =
        image.reopen_to_read().map_err(|source| ChainError::Image { path: path(), wants: String::new(), source })?;
    let args: [OsString; 1] = ["--probe".into()];
    let line = ask(name, exe, &args, PassedFd { flag: "--fd".into(), fd }, PROBE_MAX).map_err(failed)?;
    serde_json::from_str(&line).map_err(|source| ChainError::Answer { path: path(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_resolved_against_the_folder_of_the_image() {
        for (wants, is) in
            [("base.img", "/images/base.img"), ("../b/c", "/images/../b/c"), ("/x", "/x"), ("./a:b", "/images/./a:b")]
        {
            assert_eq!(resolve(Path::new("/images/top"), wants).unwrap(), PathBuf::from(is));
        }
        for wants in ["", "nbd://host/disk", "json:{\"driver\":\"file\"}", "fat:/etc", "a\0b"] {
            assert!(matches!(resolve(Path::new("/images/top"), wants), Err(ChainError::NoPath { .. })), "{wants}");
        }
    }

    #[test]
    fn an_answer_is_read_with_all_that_may_be_in_it() {
        let told: Told = serde_json::from_str(r#"{"bytes":512,"data_file":null}"#).unwrap();
        assert_eq!((told.backing, told.data_file), (None, Some(None)));
        let told: Told = serde_json::from_str(r#"{"bytes":512,"backing":"b","backing_format":"raw"}"#).unwrap();
        assert_eq!((told.backing.as_deref(), told.data_file), (Some("b"), None));
        for wrong in ["", "{}", r#"{"bytes":512,"more":1}"#, r#"{"bytes":-1}"#] {
            assert!(serde_json::from_str::<Told>(wrong).is_err(), "{wrong}");
        }
    }
}
