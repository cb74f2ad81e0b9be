//! How a device's backend is treated: what it is trusted with, who keeps account of its work, what becomes of the device without it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::keyvalue::{KeyError, OptionValue, Options};

/// What becomes of a device when its backend cannot be had again: it is quarantined, until the guest resets it, the
/// machine is reset or an operator revives it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnFailure {
    /// A stand-in answers for it: a disk's requests fail, what a card or a console sends is dropped. The device says that
    /// it needs a reset.
    #[default]
    Error,
    /// It is tried again for ever, at the longest delay between two restarts. Requests wait meanwhile.
    Wait,
    /// As `error`, and the guest is asked to let it go.
    Unplug,
}

impl OnFailure {
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Who keeps account of the requests that a backend has taken and not completed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Track {
    /// The backend, where it can; else nobody does.
    #[default]
    Auto,
    /// The VMM, which hands the backend rings of its own and copies between them and the guest's: any backend's death is
    /// survived in full, at the price of two signals more for each batch of requests.
    Shadow,
}

impl Track {
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// What a device's backend has of the guest's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Isolation {
    /// All of it, mapped: nothing is copied.
    #[default]
    Shared,
    /// None of it: the VMM copies each request into a memory that the two of them share, and back.
    Copy,
}

impl Isolation {
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// A queue that stands for this long with work in it does not come back by itself.
pub(super) const STALL_TIMEOUT_SECONDS: u32 = 30;

pub(super) fn is_false(value: &bool) -> bool {
    !value
}

impl OptionValue for OnFailure {
    const EXPECTED: &'static str = "error, wait or unplug";
    fn read(text: &str) -> Option<Self> {
        match text {
            "error" => Some(Self::Error),
            "wait" => Some(Self::Wait),
            "unplug" => Some(Self::Unplug),
            _ => None,
        }
    }
}

impl OptionValue for Track {
    const EXPECTED: &'static str = "auto or shadow";
    fn read(text: &str) -> Option<Self> {
        match text {
            "auto" => Some(Self::Auto),
            "shadow" => Some(Self::Shadow),
            _ => None,
        }
    }
}

impl OptionValue for Isolation {
    const EXPECTED: &'static str = "shared or copy";
    fn read(text: &str) -> Option<Self> {
        match text {
            "shared" => Some(Self::Shared),
            "copy" => Some(Self::Copy),
            _ => None,
        }
    }
}

pub(super) fn isolation(options: &Options) -> Result<Isolation, KeyError> {
    options.get("isolation").map(Option::unwrap_or_default)
}

pub(super) fn on_failure(options: &Options) -> Result<OnFailure, KeyError> {
    options.get("on_failure").map(Option::unwrap_or_default)
}

pub(super) fn track(options: &Options) -> Result<Track, KeyError> {
    options.get("track").map(Option::unwrap_or_default)
}
