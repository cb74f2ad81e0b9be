//! What can go wrong in a conversation, told apart by what to do next.

use std::fmt;
use std::io;
use std::time::Duration;

use thiserror::Error;

use crate::lasted::Lasted;

/// One step of a conversation; ring steps carry the ring's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(
    missing_docs,
    reason = "each is the message of that name in the vhost-user specification, or a word of the sidecar"
)]
pub enum Step {
    Connect,
    Idle,
    SetOwner,
    GetFeatures,
    GetProtocolFeatures,
    SetProtocolFeatures,
    GetQueueNum,
    SetBackendReqFd,
    GpuSetSocket,
    GetConfig,
    SetConfig,
    SetFeatures,
    SetMemTable,
    GetInflightFd,
    SetInflightFd,
    SetVringNum(u16),
    SetVringBase(u16),
    SetVringAddr(u16),
    SetVringCall(u16),
    SetVringErr(u16),
    SetVringKick(u16),
    SetVringEnable(u16),
    GetVringBase(u16),
    SetDeviceStateFd,
    CheckDeviceState,
    Measure,
    BackendRequest,
    IotlbMsg,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, ring) = match *self {
            Self::Connect => ("connect", None),
            Self::Idle => ("(nothing asked)", None),
            Self::BackendRequest => ("requests of its own", None),
            Self::IotlbMsg => ("IOTLB_MSG", None),
            Self::SetOwner => ("SET_OWNER", None),
            Self::GetFeatures => ("GET_FEATURES", None),
            Self::GetProtocolFeatures => ("GET_PROTOCOL_FEATURES", None),
            Self::SetProtocolFeatures => ("SET_PROTOCOL_FEATURES", None),
            Self::GetQueueNum => ("GET_QUEUE_NUM", None),
            Self::SetBackendReqFd => ("SET_BACKEND_REQ_FD", None),
            Self::GpuSetSocket => ("GPU_SET_SOCKET", None),
            Self::GetConfig => ("GET_CONFIG", None),
            Self::SetConfig => ("SET_CONFIG", None),
            Self::SetFeatures => ("SET_FEATURES", None),
            Self::SetMemTable => ("SET_MEM_TABLE", None),
            Self::GetInflightFd => ("GET_INFLIGHT_FD", None),
            Self::SetInflightFd => ("SET_INFLIGHT_FD", None),
            Self::SetVringNum(ring) => ("SET_VRING_NUM", Some(ring)),
            Self::SetVringBase(ring) => ("SET_VRING_BASE", Some(ring)),
            Self::SetVringAddr(ring) => ("SET_VRING_ADDR", Some(ring)),
            Self::SetVringCall(ring) => ("SET_VRING_CALL", Some(ring)),
            Self::SetVringErr(ring) => ("SET_VRING_ERR", Some(ring)),
            Self::SetVringKick(ring) => ("SET_VRING_KICK", Some(ring)),
            Self::SetVringEnable(ring) => ("SET_VRING_ENABLE", Some(ring)),
            Self::GetVringBase(ring) => ("GET_VRING_BASE", Some(ring)),
            Self::SetDeviceStateFd => ("SET_DEVICE_STATE_FD", None),
            Self::CheckDeviceState => ("CHECK_DEVICE_STATE", None),
            Self::Measure => ("the measuring of its image", None),
        };
        match ring {
            Some(ring) => write!(f, "{name} of ring {ring}"),
            None => f.write_str(name),
        }
    }
}

/// Why a conversation, or one unit of it, failed.
#[derive(Debug, Error)]
pub enum ConversationError {
    /// The backend hung up or was never there. A new one may do better.
    #[error("the backend is gone (at {step}: {reason})")]
    Gone {
        /// Where it was noticed.
        step: Step,
        /// What the socket said.
        reason: String,
    },
    /// The backend is there and silent. The connection has been cut; a new one may do better.
    #[error(
        "the backend did not answer {step} within {}: look whether it is stopped or serves another front end",
        Lasted(*.waited)
    )]
    Silent {
        /// What it was asked.
        step: Step,
        /// How long it had.
        waited: Duration,
    },
    /// The backend understood and said no. Asking again would not help.
    #[error("the backend refused {step}")]
    Refused {
        /// What it was asked.
        step: Step,
    },
    /// The backend cannot do what is needed.
    #[error("the backend lacks {what}; use one that has it")]
    Lacks {
        /// Names of features.
        what: String,
    },
    /// The backend's answer cannot be right.
    #[error("the backend's answer to {step} cannot be right: {what}")]
    Absurd {
        /// What it was asked.
        step: Step,
        /// What is wrong with the answer.
        what: String,
    },
    /// This process could not do its part.
    #[error("cannot do {step}: {source}")]
    Local {
        /// What was about to be done.
        step: Step,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl ConversationError {
    /// Whether another incarnation of the same backend may do better: it is gone or silent, rather than of another mind.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Gone { .. } | Self::Silent { .. })
    }

    /// Sorts an error of the `vhost` crate.
    pub(super) fn from_crate(step: Step, error: vhost::Error) -> Self {
        use vhost::vhost_user::Error as Wire;
        let vhost::Error::VhostUserProtocol(error) = error else {
            return Self::Absurd { step, what: error.to_string() };
        };
        match error {
            Wire::SocketBroken(_)
            | Wire::SocketError(_)
            | Wire::SocketConnect(_)
            | Wire::Disconnected
            | Wire::PartialMessage => Self::Gone { step, reason: error.to_string() },
            Wire::BackendInternalError => Self::Refused { step },
            Wire::InactiveFeature(bits) => Self::Lacks { what: format!("feature bits {:#x}", bits.bits()) },
            Wire::InactiveOperation(bits) => Self::Lacks { what: super::features::protocol_feature_names(bits.bits()) },
            other => Self::Absurd { step, what: other.to_string() },
        }
    }
}
