//! What a user says about a disk: `path=F[,readonly=on][,direct=on][,serial=ID][,num_queues=N]`, or
//! `vhost_user=on,socket=S[,num_queues=N]`, in Cloud Hypervisor's form.

use std::path::PathBuf;
use std::str::FromStr;

use thiserror::Error;

/// Most request queues of a disk.
const QUEUES_MAX: u16 = 64;
/// Most bytes of a serial (virtio 1.2, 5.2.6: GET_ID).
const SERIAL_MAX: usize = 20;

/// Where a disk's bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// In an image, served by a process of ours.
    Image(PathBuf),
    /// Behind the socket of a vhost-user backend that somebody else runs.
    Socket(PathBuf),
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// Where its bytes are.
    pub backing: Backing,
    /// The guest cannot write it.
    pub readonly: bool,
    /// The host's page cache is bypassed.
    pub direct: bool,
    /// What the guest reads as its serial number.
    pub serial: Option<String>,
    /// Request queues.
    pub num_queues: u16,
    /// The backend's binary, if it is not the one beside the VMM's.
    pub binary: Option<PathBuf>,
}

impl DiskConfig {
    /// A writable disk with one queue.
    pub fn new(backing: Backing) -> Self {
        Self { backing, readonly: false, direct: false, serial: None, num_queues: 1, binary: None }
    }
}

/// What is wrong with a disk's description.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DiskConfigError {
    /// Neither image nor socket.
    #[error("the disk has no image: give path=FILE, or vhost_user=on,socket=PATH")]
    NoBacking,
    /// Both, or one that does not go with the other keys.
    #[error("{0} does not go with vhost_user=on: what serves the socket decides that")]
    NotForSocket(&'static str),
    /// A socket without saying so.
    #[error("socket= needs vhost_user=on")]
    SocketAlone,
    /// Unknown key.
    #[error("a disk has no {0}; it has path, readonly, direct, serial, num_queues, vhost_user and socket")]
    UnknownKey(String),
    /// A key twice.
    #[error("{0} is given twice")]
    Twice(String),
    /// A key without a value.
    #[error("{0} needs a value, as in {0}=…")]
    NoValue(String),
    /// Not on or off.
    #[error("{key}={value} is neither on nor off")]
    NotASwitch {
        /// The key.
        key: String,
        /// Its value.
        value: String,
    },
    /// Queue count out of range.
    #[error("num_queues={0} is not a number from 1 to {QUEUES_MAX}")]
    Queues(String),
    /// Serial too long.
    #[error("serial={0} is longer than {SERIAL_MAX} bytes")]
    Serial(String),
}

fn switch(key: &str, value: &str) -> Result<bool, DiskConfigError> {
    match value {
        "on" | "true" => Ok(true),
        "off" | "false" => Ok(false),
        _ => Err(DiskConfigError::NotASwitch { key: key.into(), value: value.into() }),
    }
}

impl FromStr for DiskConfig {
    type Err = DiskConfigError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut seen: Vec<(&str, &str)> = Vec::new();
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let (key, value) = part.split_once('=').ok_or_else(|| DiskConfigError::NoValue(part.into()))?;
            if seen.iter().any(|(known, _)| *known == key) {
                return Err(DiskConfigError::Twice(key.into()));
            }
            if value.is_empty() {
                return Err(DiskConfigError::NoValue(key.into()));
            }
            seen.push((key, value));
        }
        let (mut path, mut socket, mut vhost_user) = (None, None, false);
        let mut disk = Self::new(Backing::Image(PathBuf::new()));
        for (key, value) in seen.iter().copied() {
            match key {
                "path" => path = Some(PathBuf::from(value)),
                "socket" => socket = Some(PathBuf::from(value)),
                "vhost_user" => vhost_user = switch(key, value)?,
                "readonly" => disk.readonly = switch(key, value)?,
                "direct" => disk.direct = switch(key, value)?,
                "serial" if value.len() > SERIAL_MAX => return Err(DiskConfigError::Serial(value.into())),
                "serial" => disk.serial = Some(value.into()),
                "num_queues" => {
                    let queues = value.parse().ok().filter(|queues| (1..=QUEUES_MAX).contains(queues));
                    disk.num_queues = queues.ok_or_else(|| DiskConfigError::Queues(value.into()))?;
                }
                _ => return Err(DiskConfigError::UnknownKey(key.into())),
            }
        }
        disk.backing = match (path, socket, vhost_user) {
            (Some(path), None, false) => Backing::Image(path),
            (None, Some(socket), true) => Backing::Socket(socket),
            (Some(_), _, true) => return Err(DiskConfigError::NotForSocket("path")),
            (_, Some(_), false) => return Err(DiskConfigError::SocketAlone),
            (None, None, _) => return Err(DiskConfigError::NoBacking),
        };
        if matches!(disk.backing, Backing::Socket(_)) {
            let refused = [(disk.readonly, "readonly"), (disk.direct, "direct"), (disk.serial.is_some(), "serial")];
            if let Some((_, key)) = refused.into_iter().find(|(given, _)| *given) {
                return Err(DiskConfigError::NotForSocket(key));
            }
        }
        Ok(disk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_described() {
        let disk: DiskConfig = "path=/tmp/a,readonly=on,direct=true,serial=S1,num_queues=4".parse().unwrap();
        let mut expected = DiskConfig::new(Backing::Image("/tmp/a".into()));
        (expected.readonly, expected.direct, expected.num_queues) = (true, true, 4);
        expected.serial = Some("S1".into());
        assert_eq!(disk, expected);
        let disk: DiskConfig = "vhost_user=true,socket=/run/s".parse().unwrap();
        assert_eq!(disk, DiskConfig::new(Backing::Socket("/run/s".into())));
    }

    #[test]
    fn mistakes_are_named() {
        let cases = [
            ("", "give path=FILE"),
            ("vhost_user=on", "give path=FILE"),
            ("path=a,socket=b", "needs vhost_user=on"),
            ("path=a,vhost_user=on", "path does not go with"),
            ("vhost_user=on,socket=s,direct=on", "direct does not go with"),
            ("path=a,colour=red", "a disk has no colour"),
            ("path=a,path=b", "path is given twice"),
            ("path", "path needs a value"),
            ("path=a,serial=", "serial needs a value"),
            ("path=a,readonly=maybe", "neither on nor off"),
            ("path=a,num_queues=0", "from 1 to 64"),
            ("path=a,num_queues=65", "from 1 to 64"),
            ("path=a,serial=123456789012345678901", "longer than 20"),
        ];
        for (text, expected) in cases {
            let error = text.parse::<DiskConfig>().unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
