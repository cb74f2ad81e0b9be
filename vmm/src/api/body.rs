//! JSON bodies of requests. Keys that are not known are ignored, as clients of several ages send them, and a null says what
//! leaving its key out says; a value of the wrong type is refused with the name of its key.

use std::path::PathBuf;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::reply::{Reply, Status};
use crate::machine::LinkState;
use crate::vhost::Fault;

/// Reads a body.
pub(super) fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, Reply> {
    let refused = |why: String| Reply::refused(Status::BadRequest, &[why]);
    if body.trim_ascii().is_empty() {
        return Err(refused("the request needs a JSON body, and has none".into()));
    }
    // serde takes a list for the fields in their order, which nobody means.
    if body.trim_ascii().first() == Some(&b'[') {
        return Err(refused("the body: a list, where an object is expected".into()));
    }
    let mut json = serde_json::Deserializer::from_slice(body);
    match serde_path_to_error::deserialize(&mut json) {
        Ok(value) => {
            json.end().map_err(|error| refused(format!("the body: {error}")))?;
            Ok(value)
        }
        Err(error) => {
            // A null in a place where there can be none may be all that is wrong with it.
            let bare = serde_json::from_slice(body).ok().map(without_nulls);
            bare.map_or(Err(error), serde_path_to_error::deserialize).map_err(|error| {
                // What ended or was no key has no name.
                let path = error.path().to_string();
                let path = path.trim_end_matches(['.', '?']);
                let place = if path.is_empty() { "the body" } else { path };
                refused(format!("{place}: {}", error.inner()))
            })
        }
    }
}

/// The same without keys that say nothing.
fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            let said = fields.into_iter().filter(|(_, value)| !value.is_null());
            Value::Object(said.map(|(key, value)| (key, without_nulls(value))).collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(without_nulls).collect()),
        other => other,
    }
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

/// Whether the cable of a network card is plugged in.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
pub(super) struct SetLink {
    /// Its name.
    pub(super) id: String,
    /// `up` or `down`.
    pub(super) link: LinkState,
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
        assert!(deep.contains("an object is expected"), "{deep}");
        assert!(why::<RemoveDevice>(r#"["a"]"#).contains("an object is expected"));
        assert_eq!(decode::<RemoveDevice>(br#"{"id":"a","later":[1]}"#).unwrap().id, "a");
    }

    /// As Cloud Hypervisor's own types are written where nothing was chosen.
    #[test]
    fn a_null_says_nothing() {
        let body = r#"{"platform":null,"net":null,"disks":[{"path":"a","id":null,"readonly":null,"image_type":"Unknown"},
            {"path":"b","image_type":"Qcow2"}],"memory":{"size":1048576,"zones":null}}"#;
        let config = decode::<VmConfig>(body.as_bytes()).unwrap();
        let disks = config.disks.unwrap();
        assert_eq!((disks[0].id.as_deref(), disks[0].image_type, config.memory.size), (None, None, 1 << 20));
        assert_eq!(disks[1].image_type, Some(crate::config::ImageType::Qcow2));
        assert!(serde_json::to_string(&disks[1]).unwrap().contains("Qcow2"), "in its own words");
        assert!(
            why::<VmConfig>(r#"{"net":null,"disks":[{"readonly":7}]}"#).contains("disks[0].readonly: invalid type")
        );
        assert!(why::<RemoveDevice>(r#"{"id":null}"#).contains("the body: missing field `id`"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged(noise in prop::collection::vec(any::<u8>(), 0..300), text in "[{}\\[\\]\":,a-z0-9]{0,200}") {
            let _ = decode::<VmConfig>(&noise);
            let _ = decode::<VmConfig>(text.as_bytes());
        }
    }
}
