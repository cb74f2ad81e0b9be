//! Options of the form `key=value,key=value`, as Cloud Hypervisor has them, read strictly: an unknown key is an error that
//! names it and lists the valid ones. Commas within double quotes or square brackets do not separate.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use thiserror::Error;

use super::ConfigError;

/// What is wrong with an option, and which one it is.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{option} {text}: {source}")]
pub struct FlagError {
    /// The option.
    pub option: &'static str,
    /// All of its value.
    pub text: String,
    /// What is wrong.
    #[source]
    pub source: KeyError,
}

/// What is wrong with the value of an option.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum KeyError {
    /// A key that the option does not have.
    #[error("there is no key '{key}'; the keys are {valid}")]
    Unknown {
        /// The key.
        key: String,
        /// The valid ones.
        valid: String,
    },
    /// The same key twice.
    #[error("'{0}' is given twice; give it once")]
    Twice(String),
    /// No key at all.
    #[error("key=value pairs with commas between them are wanted and '{part}' is none; the keys are {valid}")]
    NoPair {
        /// What is there instead.
        part: String,
        /// The valid keys.
        valid: String,
    },
    /// A key that must be there.
    #[error("{0}= is needed")]
    Missing(&'static str),
    /// A key without a value.
    #[error("{0} needs a value, as in {0}=…")]
    Empty(&'static str),
    /// A value that cannot be read.
    #[error("{key}={value}: {expected} is expected")]
    Value {
        /// The key.
        key: &'static str,
        /// The value.
        value: String,
        /// What would be right.
        expected: &'static str,
    },
    /// None of the values that an option has.
    #[error("it can be {valid}")]
    Choice {
        /// The valid ones.
        valid: &'static str,
    },
    /// A key of Cloud Hypervisor's that asks for what is not there.
    #[error("{key}={value} is not supported: {remedy}")]
    NotServed {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What to do instead.
        remedy: &'static str,
    },
    /// A quote or bracket without its partner.
    #[error("a quote or bracket has no partner")]
    Unbalanced,
    /// The device contradicts itself.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// A value that options have.
pub(super) trait OptionValue: Sized {
    /// What a reader should have given.
    const EXPECTED: &'static str;
    /// Reads it.
    fn read(text: &str) -> Option<Self>;
}

impl OptionValue for bool {
    const EXPECTED: &'static str = "on or off";
    fn read(text: &str) -> Option<Self> {
        match text {
            "on" | "true" => Some(true),
            "off" | "false" => Some(false),
            _ => None,
        }
    }
}

impl OptionValue for u16 {
    const EXPECTED: &'static str = "a number from 0 to 65535";
    fn read(text: &str) -> Option<Self> {
        Self::from_str(text).ok()
    }
}

impl OptionValue for u32 {
    const EXPECTED: &'static str = "a number from 0 to 4294967295";
    fn read(text: &str) -> Option<Self> {
        Self::from_str(text).ok()
    }
}

impl OptionValue for u64 {
    const EXPECTED: &'static str = "a number";
    fn read(text: &str) -> Option<Self> {
        Self::from_str(text).ok()
    }
}

impl OptionValue for i32 {
    const EXPECTED: &'static str = "a number";
    fn read(text: &str) -> Option<Self> {
        Self::from_str(text).ok()
    }
}

impl OptionValue for PathBuf {
    const EXPECTED: &'static str = "a path";
    fn read(text: &str) -> Option<Self> {
        Some(text.into())
    }
}

impl OptionValue for String {
    const EXPECTED: &'static str = "a text";
    fn read(text: &str) -> Option<Self> {
        Some(text.into())
    }
}

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bytes(pub(super) u64);

/// The number of bytes that a text like `20G` means.
pub fn bytes_of(text: &str) -> Option<u64> {
    Bytes::read(text).map(|bytes| bytes.0)
}

impl OptionValue for Bytes {
    const EXPECTED: &'static str = "a number of bytes, with K, M, G, T or P after it,";
    fn read(text: &str) -> Option<Self> {
        let (digits, shift) = match text.char_indices().last()? {
            (at, 'K' | 'k') => (text.get(..at)?, 10),
            (at, 'M' | 'm') => (text.get(..at)?, 20),
            (at, 'G' | 'g') => (text.get(..at)?, 30),
            (at, 'T' | 't') => (text.get(..at)?, 40),
            (at, 'P' | 'p') => (text.get(..at)?, 50),
            _ => (text, 0),
        };
        u64::from_str(digits).ok()?.checked_mul(1 << shift).map(Self)
    }
}

/// A list in square brackets: `[256,256]`; one value may stand without them.
impl<T: OptionValue> OptionValue for Vec<T> {
    const EXPECTED: &'static str = "a list like [1,2]";
    fn read(text: &str) -> Option<Self> {
        let inner = match text.strip_prefix('[') {
            Some(rest) => rest.strip_suffix(']')?,
            None => text,
        };
        inner.split(',').map(|part| T::read(part.trim())).collect()
    }
}

/// Keys of Cloud Hypervisor's that are accepted where they ask for nothing that is not there.
pub(super) struct Tolerated {
    /// The key.
    pub(super) key: &'static str,
    /// The values that are as good as left out; none: any value.
    pub(super) values: &'static [&'static str],
    /// What to do instead of another value.
    pub(super) remedy: &'static str,
}

/// The pairs of one option.
#[derive(Debug)]
pub(super) struct Options {
    pairs: Vec<(String, String)>,
}

struct Keys<'a>(&'a [&'static str]);

impl fmt::Display for Keys<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0.join(", "))
    }
}

/// Splits at commas that are not within double quotes or square brackets, and takes the quotes away.
fn split(text: &str) -> Result<Vec<String>, KeyError> {
    let mut parts = vec![String::new()];
    let mut quoted = false;
    let mut depth = 0_u32;
    for character in text.chars() {
        match character {
            '"' => {
                quoted = !quoted;
                continue;
            }
            ',' if !quoted && depth == 0 => {
                parts.push(String::new());
                continue;
            }
            '[' if !quoted => depth += 1,
            ']' if !quoted => depth = depth.checked_sub(1).ok_or(KeyError::Unbalanced)?,
            _ => {}
        }
        parts.last_mut().into_iter().for_each(|part| part.push(character));
    }
    if quoted || depth > 0 { Err(KeyError::Unbalanced) } else { Ok(parts) }
}

impl Options {
    /// Reads `text`, whose keys are among `keys` or are `tolerated`.
    pub(super) fn parse(text: &str, keys: &[&'static str], tolerated: &[Tolerated]) -> Result<Self, KeyError> {
        let mut pairs: Vec<(String, String)> = Vec::new();
        for part in split(text)? {
            let Some((key, value)) = part.split_once('=') else {
                return Err(KeyError::NoPair { part, valid: Keys(keys).to_string() });
            };
            let known = keys.iter().find(|known| **known == key);
            let bent = tolerated.iter().find(|bent| bent.key == key);
            match (known, bent) {
                (Some(key), _) if value.is_empty() => return Err(KeyError::Empty(key)),
                (None, Some(bent)) if !bent.values.is_empty() && !bent.values.contains(&value) => {
                    let (key, value, remedy) = (bent.key, value.into(), bent.remedy);
                    return Err(KeyError::NotServed { key, value, remedy });
                }
                (None, None) => return Err(KeyError::Unknown { key: key.into(), valid: Keys(keys).to_string() }),
                _ => {}
            }
            if pairs.iter().any(|(known, _)| known == key) {
                return Err(KeyError::Twice(key.into()));
            }
            pairs.push((key.into(), value.into()));
        }
        Ok(Self { pairs })
    }

    /// Whether `key` is there.
    pub(super) fn has(&self, key: &str) -> bool {
        self.pairs.iter().any(|(known, _)| known == key)
    }

    /// The value of `key`, if it is there.
    pub(super) fn get<T: OptionValue>(&self, key: &'static str) -> Result<Option<T>, KeyError> {
        let Some((_, value)) = self.pairs.iter().find(|(known, _)| known == key) else { return Ok(None) };
        match T::read(value) {
            Some(read) => Ok(Some(read)),
            None => Err(KeyError::Value { key, value: value.clone(), expected: T::EXPECTED }),
        }
    }

    /// The switch `key`; off when it is not there.
    pub(super) fn on(&self, key: &'static str) -> Result<bool, KeyError> {
        Ok(self.get(key)?.unwrap_or(false))
    }

    /// The value of `key`, which must be there.
    pub(super) fn need<T: OptionValue>(&self, key: &'static str) -> Result<T, KeyError> {
        self.get(key)?.ok_or(KeyError::Missing(key))
    }
}

/// Where a socket or a file is: `path=PATH`, or the descriptor `fd=N` that was inherited.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathOrFd {
    /// A path.
    Path(PathBuf),
    /// A descriptor.
    Fd(i32),
}

impl PathOrFd {
    /// Reads it; `None` where it begins with neither key.
    ///
    /// # Errors
    /// When there is another key, or a value is none.
    pub fn read(text: &str) -> Result<Option<Self>, KeyError> {
        if text.starts_with("fd=") {
            let options = Options::parse(text, &["fd"], &[])?;
            let fd = i32::try_from(options.need::<u32>("fd")?).ok();
            let wrong = || KeyError::Value { key: "fd", value: text.into(), expected: "the number of a descriptor" };
            return fd.map(Self::Fd).map(Some).ok_or_else(wrong);
        }
        if text.starts_with("path=") {
            return Options::parse(text, &["path"], &[])?.need("path").map(Self::Path).map(Some);
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: &[&str] = &["path", "size", "readonly", "list"];
    const BENT: &[Tolerated] = &[
        Tolerated { key: "iommu", values: &["off"], remedy: "leave it out" },
        Tolerated { key: "hint", values: &[], remedy: "" },
    ];

    fn message(text: &str) -> String {
        Options::parse(text, KEYS, BENT).map(|_| String::new()).unwrap_or_else(|error| error.to_string())
    }

    #[test]
    fn pairs_are_read() {
        let options =
            Options::parse(r#"path="/a,b/c=d",readonly=on,list=[1, 2],iommu=off,hint=x"#, KEYS, BENT).unwrap();
        assert_eq!(options.need::<String>("path"), Ok("/a,b/c=d".into()));
        assert_eq!(options.on("readonly"), Ok(true));
        assert_eq!(options.get::<Bytes>("size"), Ok(None));
        assert_eq!(options.need::<Vec<u16>>("list"), Ok(vec![1, 2]));
    }

    /// Each mistake names the thing and what would be right, in one line.
    #[test]
    fn mistakes_are_named() {
        assert_eq!(message("pth=x"), "there is no key 'pth'; the keys are path, size, readonly, list");
        assert_eq!(message("path=x,path=y"), "'path' is given twice; give it once");
        assert!(message("/dev/null").contains("'/dev/null' is none; the keys are path"));
        assert!(message("path=x,").contains("'' is none"));
        assert!(message("path=").contains("path needs a value"));
        for text in ["path=\"x", "list=[1", "list=1]"] {
            assert!(message(text).contains("no partner"), "{text}");
        }
        assert_eq!(message("iommu=on"), "iommu=on is not supported: leave it out");
        let options = Options::parse("readonly=maybe,size=12Q,list=[1,x]", KEYS, BENT).unwrap();
        let error = options.get::<bool>("readonly").unwrap_err().to_string();
        assert_eq!(error, "readonly=maybe: on or off is expected");
        assert!(options.get::<Bytes>("size").is_err() && options.get::<Vec<u16>>("list").is_err());
        assert_eq!(options.need::<String>("path").unwrap_err().to_string(), "path= is needed");
    }

    #[test]
    fn sizes() {
        let size = |text| Bytes::read(text).map(|bytes| bytes.0);
        assert_eq!(size("512M"), Some(512 << 20));
        assert_eq!(size("1P"), Some(1 << 50));
        assert_eq!(size("4096"), Some(4096));
        assert_eq!(size("99999999999P"), None);
        assert_eq!((size(""), size("M"), size("-1"), size("é")), (None, None, None, None));
    }
}
