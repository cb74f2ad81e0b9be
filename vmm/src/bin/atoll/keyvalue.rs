//! Options of the form `key=value,key=value`, as Cloud Hypervisor has them, read strictly: an unknown key is an error that
//! names it and lists the valid ones.

use std::fmt;
use std::str::FromStr;

use atoll_vmm::vhost::DiskConfigError;
use thiserror::Error;

/// What is wrong with an option.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum OptionError {
    /// A key that the option does not have.
    #[error("{option} has no key '{key}'; it has {valid}")]
    UnknownKey {
        /// The option.
        option: &'static str,
        /// The key.
        key: String,
        /// The valid ones.
        valid: String,
    },
    /// The same key twice.
    #[error("{option} has '{key}' twice; give it once")]
    Twice {
        /// The option.
        option: &'static str,
        /// The key.
        key: String,
    },
    /// No key at all.
    #[error("{option} wants key=value pairs with commas between them and '{part}' is none; keys are {valid}")]
    NoPair {
        /// The option.
        option: &'static str,
        /// What is there instead.
        part: String,
        /// The valid keys.
        valid: String,
    },
    /// A key that must be there.
    #[error("{option} needs {key}=")]
    Missing {
        /// The option.
        option: &'static str,
        /// The key.
        key: &'static str,
    },
    /// A value that cannot be read.
    #[error("{option} {key}={value}: {expected} is expected")]
    Value {
        /// The option.
        option: &'static str,
        /// The key.
        key: &'static str,
        /// The value.
        value: String,
        /// What would be right.
        expected: &'static str,
    },
    /// None of the values that an option has.
    #[error("{option} cannot be '{value}'; it can be {valid}")]
    Choice {
        /// The option.
        option: &'static str,
        /// Its value.
        value: String,
        /// The valid ones.
        valid: &'static str,
    },
    /// A disk that cannot be read.
    #[error("--disk {text}: {source}")]
    Disk {
        /// All of it.
        text: String,
        /// What is wrong.
        #[source]
        source: DiskConfigError,
    },
    /// A quote without its partner.
    #[error("{option} has a \" without its partner in '{text}'")]
    Quote {
        /// The option.
        option: &'static str,
        /// All of it.
        text: String,
    },
}

/// A value that options have.
pub(crate) trait OptionValue: Sized {
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

impl OptionValue for String {
    const EXPECTED: &'static str = "a text";
    fn read(text: &str) -> Option<Self> {
        Some(text.into())
    }
}

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bytes(pub(crate) u64);

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

/// The pairs of one option.
#[derive(Debug)]
pub(crate) struct Options {
    option: &'static str,
    pairs: Vec<(String, String)>,
}

struct Keys<'a>(&'a [&'static str]);

impl fmt::Display for Keys<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0.join(", "))
    }
}

/// Splits at commas that are not within double quotes, and takes the quotes away.
fn split(option: &'static str, text: &str) -> Result<Vec<String>, OptionError> {
    let mut parts = vec![String::new()];
    let mut quoted = false;
    for character in text.chars() {
        match character {
            '"' => quoted = !quoted,
            ',' if !quoted => parts.push(String::new()),
            _ => parts.last_mut().into_iter().for_each(|part| part.push(character)),
        }
    }
    if quoted { Err(OptionError::Quote { option, text: text.into() }) } else { Ok(parts) }
}

impl Options {
    /// Reads `text`, whose keys are among `keys`.
    pub(crate) fn parse(option: &'static str, text: &str, keys: &[&'static str]) -> Result<Self, OptionError> {
        let mut pairs: Vec<(String, String)> = Vec::new();
        for part in split(option, text)? {
            let Some((key, value)) = part.split_once('=') else {
                return Err(OptionError::NoPair { option, part, valid: Keys(keys).to_string() });
            };
            if !keys.contains(&key) {
                return Err(OptionError::UnknownKey { option, key: key.into(), valid: Keys(keys).to_string() });
            }
            if pairs.iter().any(|(known, _)| known == key) {
                return Err(OptionError::Twice { option, key: key.into() });
            }
            pairs.push((key.into(), value.into()));
        }
        Ok(Self { option, pairs })
    }

    /// The value of `key`, if it is there.
    pub(crate) fn get<T: OptionValue>(&self, key: &'static str) -> Result<Option<T>, OptionError> {
        let Some((_, value)) = self.pairs.iter().find(|(known, _)| known == key) else { return Ok(None) };
        match T::read(value) {
            Some(read) => Ok(Some(read)),
            None => {
                let (option, value) = (self.option, value.clone());
                Err(OptionError::Value { option, key, value, expected: T::EXPECTED })
            }
        }
    }

    /// The value of `key`, which must be there.
    pub(crate) fn need<T: OptionValue>(&self, key: &'static str) -> Result<T, OptionError> {
        self.get(key)?.ok_or(OptionError::Missing { option: self.option, key })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: &[&str] = &["path", "size", "readonly"];

    fn message(text: &str) -> String {
        Options::parse("--disk", text, KEYS).map(|_| String::new()).unwrap_or_else(|error| error.to_string())
    }

    #[test]
    fn pairs_are_read() {
        let options = Options::parse("--disk", r#"path="/a,b/c=d",readonly=on"#, KEYS).unwrap();
        assert_eq!(options.need::<String>("path"), Ok("/a,b/c=d".into()));
        assert_eq!(options.get::<bool>("readonly"), Ok(Some(true)));
        assert_eq!(options.get::<Bytes>("size"), Ok(None));
    }

    /// Each mistake names the thing and what would be right, in one line.
    #[test]
    fn mistakes_are_named() {
        assert_eq!(message("pth=x"), "--disk has no key 'pth'; it has path, size, readonly");
        assert_eq!(message("path=x,path=y"), "--disk has 'path' twice; give it once");
        assert!(message("/dev/null").contains("'/dev/null' is none; keys are path"));
        assert!(message("path=x,").contains("'' is none"));
        assert!(message("path=\"x").contains("without its partner"));
        let options = Options::parse("--disk", "readonly=maybe,size=12Q", KEYS).unwrap();
        let error = options.get::<bool>("readonly").unwrap_err().to_string();
        assert_eq!(error, "--disk readonly=maybe: on or off is expected");
        assert!(options.get::<Bytes>("size").is_err());
        assert_eq!(options.need::<String>("path").unwrap_err().to_string(), "--disk needs path=");
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
