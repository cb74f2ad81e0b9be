//! JSON bodies of requests. Keys that are not known are ignored, as clients of several ages send them; a value of the wrong
//! type is refused with the name of its key.

use std::path::PathBuf;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::reply::{Reply, Status};
use crate::vhost::Fault;

/// Reads a body.
pub(super) fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, Reply> {
    let refused = |why: String| Reply::refused(Status::BadRequest, &[why]);
    if body.trim_ascii().is_empty() {
        return Err(refused("the request needs a JSON body, and has none".into()));
    }
    let mut json = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        // What ended or was no key has no name.
        let path = error.path().to_string();
        let path = path.trim_end_matches(['.', '?']);
        let place = if path.is_empty() { "the body" } else { path };
        refused(format!("{place}: {}", error.inner()))
    })?;
    json.end().map_err(|error| refused(format!("the body: {error}")))?;
    Ok(value)
}

/// Which device goes.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
pub(super) struct RemoveDevice {
    /// Its name.
    pub(super) id: String,
}

/// How big the machine shall be. Only what it has already can be carried out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
#[serde(default)]
pub(super) struct Resize {
    /// vCPUs.
    pub(super) desired_vcpus: Option<u32>,
    /// RAM in bytes.
    pub(super) desired_ram: Option<u64>,
    /// Bytes of RAM given back by a balloon.
    pub(super) desired_balloon: Option<u64>,
}

/// A device that is to have another chance.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
pub(super) struct ReviveDevice {
    /// Its name.
    pub(super) id: String,
}

/// What shall happen to a device.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
pub(super) struct FaultDevice {
    /// Its name.
    pub(super) id: String,
    /// What happens to it.
    pub(super) fault: Fault,
    /// How long and how often follows from it.
    #[serde(default)]
    pub(super) seed: u64,
}

/// Which program shall serve a device.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
pub(super) struct UpgradeDevice {
    /// Its name.
    pub(super) id: String,
    /// The program: its absolute path on this host.
    pub(super) exe: PathBuf,
    /// Milliseconds that it may take for each word while the guest waits; 40 when left out.
    #[serde(default)]
    pub(super) step_ms: Option<u32>,
}

/// How big a disk shall be.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
pub(super) struct ResizeDisk {
    /// Its name.
    pub(super) id: String,
    /// In bytes.
    pub(super) desired_size: u64,
    /// It may be less than now: what lies behind is gone then.
    #[serde(default)]
    pub(super) allow_shrink: bool,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::VmConfig;

    fn why<T: DeserializeOwned + std::fmt::Debug>(body: &str) -> String {
        String::from_utf8(decode::<T>(body.as_bytes()).unwrap_err().encode(true)).unwrap()
    }

    #[test]
    fn the_wrong_field_is_named() {
        assert!(
            why::<VmConfig>(r#"{"disks":[{"path":"a"},{"readonly":"yes"}]}"#)
                .contains("disks[1].readonly: invalid type")
        );
        assert!(why::<VmConfig>(r#"{"cpus":{"boot_vcpus":-1}}"#).contains("cpus.boot_vcpus: invalid value"));
        assert!(why::<ResizeDisk>(r#"{"id":"a"}"#).contains("the body: missing field `desired_size`"));
        assert!(why::<VmConfig>("{").contains("the body: EOF"));
        assert!(why::<VmConfig>("{} {}").contains("trailing characters"));
        assert!(why::<VmConfig>(" ").contains("needs a JSON body"));
        let deep = why::<VmConfig>(&"[".repeat(100_000));
        assert!(deep.contains("invalid type: sequence"), "{deep}");
        assert_eq!(decode::<RemoveDevice>(br#"{"id":"a","later":[1]}"#).unwrap().id, "a");
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged(noise in prop::collection::vec(any::<u8>(), 0..300), text in "[{}\\[\\]\":,a-z0-9]{0,200}") {
            let _ = decode::<VmConfig>(&noise);
            let _ = decode::<VmConfig>(text.as_bytes());
        }
    }
}
