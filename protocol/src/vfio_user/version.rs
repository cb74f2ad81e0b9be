//! The first words of both ends.

use serde::{Deserialize, Serialize};

use super::{Command, Fields, Put, WireError};

/// What an end can take. What it does not say has a value of the protocol's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Capabilities {
    /// Most descriptors beside one message; 1 if it is not said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_msg_fds: Option<u32>,
    /// Largest piece of data in one message, in bytes; 1 MiB if it is not said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_data_xfer_size: Option<u32>,
    /// Page sizes of mappings, each a bit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pgsizes: Option<u64>,
    /// Most mappings at a time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_dma_maps: Option<u32>,
}

impl Capabilities {
    /// Most descriptors beside one message.
    #[must_use]
    pub fn descriptors(&self) -> usize {
        self.max_msg_fds.unwrap_or(1) as usize
    }
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct Said {
    capabilities: Capabilities,
}

/// VERSION, question and answer alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    /// Major number: another one is another protocol.
    pub major: u16,
    /// Minor number: an end that offers a higher one is content with a lower.
    pub minor: u16,
    /// What it can take.
    pub capabilities: Capabilities,
}

impl Version {
    /// What both ends here speak.
    pub const MAJOR: u16 = 0;
    /// The same.
    pub const MINOR: u16 = 1;

    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.p16(self.major);
        bytes.p16(self.minor);
        // Numbers under fixed names always are JSON.
        bytes.extend(serde_json::to_vec(&Said { capabilities: self.capabilities }).unwrap_or_default());
        bytes.push(0);
        bytes
    }

    /// From bytes. Capabilities may be left out; those that nobody knows are passed over.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(Command::Version, payload);
        let (major, minor) = (fields.u16()?, fields.u16()?);
        let said = match fields.rest {
            [] | [0] => Said::default(),
            [text @ .., 0] => serde_json::from_slice(text).map_err(|_| WireError::Capabilities)?,
            _ => return Err(WireError::Capabilities),
        };
        Ok(Self { major, minor, capabilities: said.capabilities })
    }
}
