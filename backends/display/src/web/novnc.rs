//! noVNC, which is somebody else's and not part of this program: its files are read when the process starts, because the
//! jail shows no folder later.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use thiserror::Error;

/// Folders of noVNC that the page needs.
const FOLDERS: [&str; 2] = ["core", "vendor"];
/// What is taken at most.
const FILES_MAX: usize = 1000;
const BYTES_MAX: usize = 16 << 20;
const DEPTH_MAX: usize = 8;

/// Why it is not there.
#[derive(Debug, Error)]
pub enum NovncError {
    /// The folder is something else.
    #[error("{0} has no core/rfb.js: install the package novnc, or name noVNC's folder (novnc=FOLDER)")]
    Missing(String),
    /// It is larger than noVNC.
    #[error("{0} has more than {FILES_MAX} files or {BYTES_MAX} bytes in core and vendor: name noVNC's folder")]
    Large(String),
    /// The kernel's error.
    #[error("{0}: {1}; name a folder that can be read")]
    Io(String, #[source] io::Error),
}

/// Its files by their names, as in `core/rfb.js`.
#[derive(Debug, Default)]
pub struct Novnc(BTreeMap<String, Vec<u8>>);

impl Novnc {
    /// Reads a folder.
    ///
    /// # Errors
    /// [`NovncError`].
    pub fn read(folder: &Path) -> Result<Self, NovncError> {
        let name = folder.display().to_string();
        let mut novnc = Self::default();
        let mut bytes = 0;
        let mut folders: Vec<(String, usize)> = FOLDERS.map(|name| (name.to_owned(), 0)).to_vec();
        while let Some((within, depth)) = folders.pop() {
            let path = folder.join(&within);
            let failed = |error| NovncError::Io(path.display().to_string(), error);
            let entries = match fs::read_dir(&path) {
                Err(error) if depth == 0 && error.kind() == io::ErrorKind::NotFound => continue,
                entries => entries.map_err(failed)?,
            };
            for entry in entries {
                let entry = entry.map_err(failed)?;
                let Ok(last) = entry.file_name().into_string() else { continue };
                let within = format!("{within}/{last}");
                let kind = fs::metadata(entry.path()).map_err(failed)?;
                if kind.is_dir() && depth < DEPTH_MAX {
                    folders.push((within, depth + 1));
                } else if kind.is_file() {
                    bytes += usize::try_from(kind.len()).unwrap_or(usize::MAX).min(BYTES_MAX + 1);
                    if novnc.0.len() == FILES_MAX || bytes > BYTES_MAX {
                        return Err(NovncError::Large(name));
                    }
                    novnc.0.insert(within, fs::read(entry.path()).map_err(failed)?);
                }
            }
        }
        if novnc.0.contains_key("core/rfb.js") { Ok(novnc) } else { Err(NovncError::Missing(name)) }
    }

    /// A file.
    #[must_use]
    pub fn file(&self, name: &str) -> Option<&[u8]> {
        self.0.get(name).map(Vec::as_slice)
    }
}

/// What a browser is told that a file is.
#[must_use]
pub fn media_type(name: &str) -> &'static str {
    match name.rsplit_once('.').map(|(_, ending)| ending) {
        Some("js" | "mjs") => "text/javascript; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("json") => "application/json",
        Some("svg") => "image/svg+xml",
        Some("png") => "image/png",
        _ => "application/octet-stream",
    }
}
