//! A machine in a TOML file: the words of [`VmConfig`], and those of `atoll run` that are not about the machine itself.
//!
//! Over the API unknown keys are ignored, as Cloud Hypervisor's clients expect; in a file that somebody wrote by hand they
//! are mistakes, told with their line.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_ignored::Path as KeyPath;
use thiserror::Error;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::VmConfig;

/// A file that cannot be read.
#[derive(Debug, Error)]
pub enum FileError {
    /// Not at all.
    #[error("cannot read --config {}: {source}; name a TOML file", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The kernel's error.
        #[source]
        source: std::io::Error,
    },
    /// No TOML, or a value that does not fit.
    #[error("--config {}, line {line}: {what}", .path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// Where.
        line: usize,
        /// What is the matter.
        what: String,
    },
    /// A key that means nothing.
    #[error("--config {}, line {line}: there is no key '{key}'", .path.display())]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// Where.
        line: usize,
        /// With those around it: `disks.0.colour`.
        key: String,
    },
}

/// What a file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MachineFile {
    /// The machine.
    pub vm: VmConfig,
    /// What is not about the machine itself.
    pub run: RunWords,
}

/// Keys of a file that are not about the machine itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct RunWords {
    /// The machine's name.
    pub name: Option<String>,
    /// As `--api-socket`.
    pub api_socket: Option<String>,
    /// As `--event-monitor`.
    pub event_monitor: Option<String>,
}

/// Keys of [`RunWords`].
const RUN_WORDS: [&str; 3] = ["name", "api_socket", "event_monitor"];

fn line_of(text: &str, at: usize) -> usize {
    1 + text.bytes().take(at).filter(|byte| *byte == b'\n').count()
}

fn reader<'a>(table: &Spanned<DeTable<'a>>) -> toml::de::Deserializer<'a> {
    toml::de::Deserializer::from(table.clone())
}

/// The keys and indices that lead to what was ignored; `Option`s on the way are none.
fn segments(path: &KeyPath<'_>, into: &mut Vec<String>) {
    let (parent, own) = match path {
        KeyPath::Root => return,
        KeyPath::Seq { parent, index } => (parent, Some(index.to_string())),
        KeyPath::Map { parent, key } => (parent, Some(key.clone())),
        KeyPath::Some { parent } | KeyPath::NewtypeStruct { parent } | KeyPath::NewtypeVariant { parent } => {
            (parent, None)
        }
    };
    segments(parent, into);
    into.extend(own);
}

/// Where in the text the key at the end of `path` is.
fn place(table: &DeTable<'_>, path: &[String]) -> Option<usize> {
    let (first, rest) = path.split_first()?;
    let (key, value) = table.iter().find(|(key, _)| key.get_ref() == first)?;
    if rest.is_empty() { Some(key.span().start) } else { place_in(value, rest) }
}

fn place_in(value: &Spanned<DeValue<'_>>, path: &[String]) -> Option<usize> {
    match value.get_ref() {
        DeValue::Table(table) => place(table, path),
        DeValue::Array(items) => {
            let (index, rest) = path.split_first()?;
            place_in(items.get(index.parse::<usize>().ok()?)?, rest)
        }
        _ => None,
    }
}

impl MachineFile {
    /// Reads a file. Relative paths in it are those of the current folder, as on the command line.
    ///
    /// # Errors
    /// All of [`FileError`].
    pub fn read(path: &Path) -> Result<Self, FileError> {
        let text = std::fs::read_to_string(path).map_err(|source| FileError::Read { path: path.into(), source })?;
        Self::parse(&text, path)
    }

    /// Reads the text of the file at `path`.
    ///
    /// # Errors
    /// [`FileError::Content`] and [`FileError::UnknownKey`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, FileError> {
        let content = |error: &toml::de::Error| FileError::Content {
            path: path.into(),
            line: line_of(text, error.span().map_or(0, |span| span.start)),
            what: error.message().lines().collect::<Vec<_>>().join(" "),
        };
        let table = DeTable::parse(text).map_err(|error| content(&error))?;
        let run = RunWords::deserialize(reader(&table)).map_err(|error| content(&error))?;
        let mut unknown: Option<Vec<String>> = None;
        let vm = serde_ignored::deserialize(reader(&table), |key| {
            let mut path = Vec::new();
            segments(&key, &mut path);
            let known = path.len() == 1 && path.first().is_some_and(|key| RUN_WORDS.contains(&key.as_str()));
            if !known {
                unknown.get_or_insert(path);
            }
        })
        .map_err(|error| content(&error))?;
        match unknown {
            Some(key) => {
                let line = line_of(text, place(table.get_ref(), &key).unwrap_or(0));
                Err(FileError::UnknownKey { path: path.into(), line, key: key.join(".") })
            }
            None => Ok(Self { vm, run }),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::{ConsoleMode, CpuChoice};

    const WHOLE: &str = r#"
        name = "web"
        cpus = { boot = 2 }
        memory.size = "1G"
        serial = { mode = "pty" }

        [payload]
        kernel = "vmlinuz"
        cmdline = "console=ttyS0 root=/dev/vda"

        [[disks]]
        path = "root.img"

        [[net]]
        user = true
        forward = ["2222:22"]

        [platform]
        cpu = "soft"
    "#;

    fn read(text: &str) -> Result<MachineFile, FileError> {
        MachineFile::parse(text, Path::new("vm.toml"))
    }

    #[test]
    fn a_file_says_what_the_flags_say() {
        let file = read(WHOLE).unwrap();
        assert_eq!(file.run.name.as_deref(), Some("web"));
        let vm = file.vm;
        assert_eq!((vm.cpus.boot_vcpus, vm.cpus.max_vcpus, vm.memory.size), (2, 2, 1 << 30));
        assert_eq!(vm.serial.unwrap().mode, ConsoleMode::Pty);
        assert_eq!(vm.platform.cpu, CpuChoice::Soft);
        assert_eq!(vm.net.unwrap()[0].forward, ["2222:22"]);
        assert_eq!(vm.disks.unwrap()[0].path, Some("root.img".into()));
    }

    proptest! {
        /// A file that was cut, or in which something was overwritten, is read or refused with a line that it has.
        #[test]
        fn a_damaged_file_is_no_panic(cut in 0..WHOLE.len(), at in 0..WHOLE.len(), byte in 32_u8..127) {
            let mut bytes = WHOLE.as_bytes().get(..cut).unwrap_or_default().to_vec();
            if let Some(place) = bytes.get_mut(at) {
                *place = byte;
            }
            let text = String::from_utf8(bytes).unwrap();
            if let Err(FileError::Content { line, .. } | FileError::UnknownKey { line, .. }) = read(&text) {
                prop_assert!((1..=text.lines().count() + 1).contains(&line));
            }
        }
    }

    /// Each mistake in one line, with the line of the file.
    #[test]
    fn mistakes_have_a_line() {
        let cases = [
            ("a = 1\n[payload\n", "line 2"),
            ("\n[[disks]]\npath = \"a\"\ncolour = \"red\"\n", "line 4: there is no key 'disks.0.colour'"),
            ("[payload]\nkernel = 7\n", "line 2"),
            ("disk = []\n", "line 1: there is no key 'disk'"),
            ("\nmemory.size = \"1Q\"\n", "line 2: invalid value: string \"1Q\", expected a number of bytes"),
            ("memory.size = -1", "line 1"),
            ("[[fs]]\ntag = \"t\"\n", "line 1: missing field `socket`"),
            ("name = 3\n", "line 1"),
        ];
        for (text, expected) in cases {
            let error = read(text).unwrap_err().to_string();
            assert!(error.starts_with("--config vm.toml, ") && !error.contains('\n'), "{error}");
            assert!(error.contains(expected), "{text}: {error}");
        }
        let missing = MachineFile::read(Path::new("/missing.toml")).unwrap_err().to_string();
        assert!(missing.contains("/missing.toml") && missing.contains("TOML"), "{missing}");
    }
}
