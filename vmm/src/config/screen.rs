//! What a person in front of the machine has: a GPU, a display that shows its pictures, and what is typed and pointed with.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::care::{OnFailure, is_false};
use super::check::{Wrong, check_socket};

/// Most screens of a GPU (virtio 1.2, 5.7.4: num_scanouts).
const SCANOUTS_MAX: u16 = 16;
/// Sides of a mode, in pixels.
const MODE_SIDES: std::ops::RangeInclusive<u32> = 64..=8192;
/// Memory for pictures, in bytes, at least and at most.
const MEMORY: std::ops::RangeInclusive<u64> = 16 << 20..=4 << 30;
const MEMORY_USUAL: u64 = 256 << 20;

/// Columns and rows of a screen: `1280x800`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Mode {
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
}

impl FromStr for Mode {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let sides = text.split_once('x').and_then(|(width, height)| Some((width.parse().ok()?, height.parse().ok()?)));
        match sides {
            Some((width, height)) if MODE_SIDES.contains(&width) && MODE_SIDES.contains(&height) => {
                Ok(Self { width, height })
            }
            _ => {
                let (least, most) = (MODE_SIDES.start(), MODE_SIDES.end());
                Err(format!("a mode is WIDTHxHEIGHT, each from {least} to {most}, as in 1280x800"))
            }
        }
    }
}

impl TryFrom<String> for Mode {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Mode> for String {
    fn from(mode: Mode) -> Self {
        mode.to_string()
    }
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}", self.width, self.height)
    }
}

/// A GPU: 2D, or 3D as well, in a process of ours, or whatever somebody else's vhost-user backend is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GpuConfig {
    /// Its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Where somebody else's backend listens; a process of ours serves it when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Screens that can be connected; 1 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scanouts: Option<u16>,
    /// What the first screens are before anybody resizes them; 1280x800 when left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub modes: Vec<Mode>,
    /// Bytes for the guest's pictures; 256 MiB when left out. With 3D its resources may take as much again, at most 2 GiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
    /// 3D, too, drawn on the host's processors by libvirglrenderer and Mesa, which have to be installed there.
    #[serde(default, skip_serializing_if = "is_false")]
    pub virgl: bool,
    /// What becomes of it when its backend cannot be had again.
    #[serde(default, skip_serializing_if = "OnFailure::is_default")]
    pub on_failure: OnFailure,
    /// Seconds for which a queue may stand with work in it before its backend is replaced; 0: for ever. 30 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stall_timeout: Option<u32>,
    /// Starts of a process of ours in a row that may fail before the device is given up; 0: any number. 20 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_attempts: Option<u32>,
    /// It is behind the machine's virtual IOMMU.
    #[serde(default, skip_serializing_if = "is_false")]
    pub iommu: bool,
}

impl GpuConfig {
    /// Screens that can be connected.
    pub fn scanouts(&self) -> u16 {
        self.scanouts.unwrap_or(1)
    }

    /// Bytes for pictures.
    pub fn memory(&self) -> u64 {
        self.memory.unwrap_or(MEMORY_USUAL)
    }

    pub(super) fn check_kind(&self) -> Wrong {
        if let Some(socket) = &self.socket {
            if self.memory.is_some() || !self.modes.is_empty() || self.virgl {
                return Err("memory, modes and virgl are those of the backend at the socket: give them there".into());
            }
            check_socket(socket)?;
        }
        if !(1..=SCANOUTS_MAX).contains(&self.scanouts()) {
            return Err(format!("scanouts is a number from 1 to {SCANOUTS_MAX}"));
        }
        if self.modes.len() > usize::from(self.scanouts()) {
            return Err(format!("{} modes for {} screens: give scanouts", self.modes.len(), self.scanouts()));
        }
        if self.virgl && self.iommu {
            return Err("virgl=on and iommu=on do not go together: memory behind an IOMMU comes and goes, and cannot be lent to \
                        the renderer; leave one out"
                .into());
        }
        if !MEMORY.contains(&self.memory()) {
            return Err("memory is from 16M to 4G".into());
        }
        Ok(())
    }
}

/// What a person has a hand on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum InputKind {
    /// Keys.
    #[default]
    Keyboard,
    /// A pointer that says where it is.
    Tablet,
    /// A pointer that says how far it went.
    Mouse,
}

impl InputKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Keyboard, Self::Tablet, Self::Mouse];

    /// In lower case.
    pub fn name(self) -> &'static str {
        match self {
            Self::Keyboard => "keyboard",
            Self::Tablet => "tablet",
            Self::Mouse => "mouse",
        }
    }
}

/// A keyboard, a tablet or a mouse, fed by the display.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct InputConfig {
    /// Its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// What it is; a machine has one of each at most.
    pub kind: InputKind,
    /// What becomes of it when its process cannot be had again.
    #[serde(default, skip_serializing_if = "OnFailure::is_default")]
    pub on_failure: OnFailure,
    /// Starts in a row that may fail before the device is given up; 0: any number. 20 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_attempts: Option<u32>,
    /// It is behind the machine's virtual IOMMU.
    #[serde(default, skip_serializing_if = "is_false")]
    pub iommu: bool,
}

/// Where viewers come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ViewersAt {
    /// At a UNIX socket, which whoever may open it may use.
    Path(PathBuf),
    /// At a TCP port of this host.
    Tcp(SocketAddr),
}

impl FromStr for ViewersAt {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            check_socket(path.as_ref())?;
            return Ok(Self::Path(path.into()));
        }
        let address: SocketAddr =
            text.parse().map_err(|_| format!("'{text}' is no place for viewers: 127.0.0.1:5900 or unix:PATH"))?;
        if !address.ip().is_loopback() {
            return Err(format!(
                "{address} can be reached from other hosts, and nothing there is encrypted: listen at 127.0.0.1 and come in by ssh -L"
            ));
        }
        Ok(Self::Tcp(address))
    }
}

/// What shows the GPU's pictures: a process of ours, the only one that people connect to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DisplayConfig {
    /// Where VNC viewers come to: `127.0.0.1:5900` (port 0: any) or `unix:PATH`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vnc: Option<String>,
    /// Where browsers come to: `127.0.0.1:8006` (port 0: any).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub web: Option<String>,
    /// A file with the password or token; where viewers come over TCP and there is none, one is made up and told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,
    /// The folder of noVNC, for browsers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub novnc: Option<PathBuf>,
}

impl DisplayConfig {
    pub(super) fn check(&self) -> Wrong {
        if let Some(vnc) = &self.vnc {
            vnc.parse::<ViewersAt>()?;
        }
        if let Some(web) = &self.web {
            web.parse::<SocketAddr>()
                .map_err(|_| format!("web is a TCP address of this host, as in 127.0.0.1:8006, and not '{web}'"))?;
            web.parse::<ViewersAt>()?;
        }
        Ok(())
    }
}
