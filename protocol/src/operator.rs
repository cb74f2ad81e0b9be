//! What an operator asks of a running VM.

use serde::{Deserialize, Serialize};

use crate::bounded;
use crate::id::{DeviceId, Generation, QueueIndex, VmId};
use crate::message::{message_of_words, words};

/// The most devices that one reply lists.
pub const DEVICES_MAX: usize = 512;

/// Where a doorbell or a call goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Route {
    /// Straight from one process to the other; the VMM's code does not run.
    Direct,
    /// Through the VMM, where it can be counted, traced, delayed and dropped.
    Interposed,
}

/// Which half of a queue's signals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Signal {
    /// Guest to backend.
    Doorbell,
    /// Backend to guest.
    Call,
}

words! {
    /// An operator's request.
    pub enum OperatorRequest {
        /// Which VM is this, and in what state? Answered by [`OperatorReply::Info`].
        Info => Idempotent,
        /// Its devices. Answered by [`OperatorReply::Devices`].
        Devices => Idempotent,
        /// Stop all vCPUs between instructions.
        Pause => Idempotent,
        /// Let them run.
        Resume => Idempotent,
        /// Press the reset button.
        Reset => Once,
        /// Press the power button (ACPI); the guest decides.
        PowerButton => Once,
        /// End the VM now.
        PowerOff => Idempotent,
        /// Switch a queue's signals while it runs.
        SetRoute {
            /// Which device.
            device: DeviceId,
            /// Which queue.
            queue: QueueIndex,
            /// Which half.
            signal: Signal,
            /// Where to.
            route: Route,
        } => Idempotent,
        /// End a device's process and start the next generation. Refused when `generation` is no longer the present one.
        RestartDevice {
            /// Which device.
            device: DeviceId,
            /// The generation that the operator saw.
            generation: Generation,
        } => Idempotent,
    }
}
message_of_words!(OperatorRequest, OperatorRequest);

/// State of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum VmState {
    /// Built, not yet run.
    Created,
    /// vCPUs run.
    Running,
    /// vCPUs stand.
    Paused,
    /// Over.
    Ended,
}

/// State of a device's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum DeviceState {
    /// Not yet ready.
    Starting,
    /// Serving.
    Running,
    /// Between two incarnations.
    Recovering,
    /// Given up until a reset or an operator.
    Quarantined,
}

/// One device as an operator sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// Id.
    pub device: DeviceId,
    /// Name from the configuration.
    pub name: String,
    /// Present incarnation.
    pub generation: Generation,
    /// State of its process.
    pub state: DeviceState,
}

words! {
    /// A VMM's reply. Replies are never repeated by themselves; their question is.
    pub enum OperatorReply {
        /// Done.
        Done => Idempotent,
        /// To [`OperatorRequest::Info`].
        Info {
            /// Which VM.
            vm: VmId,
            /// Its state.
            state: VmState,
        } => Idempotent,
        /// To [`OperatorRequest::Devices`].
        Devices {
            /// All devices, by id.
            #[serde(deserialize_with = "bounded::list::<_, _, DEVICES_MAX>")]
            devices: Vec<DeviceInfo>,
        } => Idempotent,
        /// Not done; the text names the thing and the remedy.
        Failed {
            /// One sentence.
            reason: String,
        } => Idempotent,
        /// The device's process died while a request that cannot be repeated was on its way.
        PeerDied {
            /// Which device.
            device: DeviceId,
            /// The generation to ask now.
            successor: Generation,
        } => Idempotent,
    }
}
message_of_words!(OperatorReply, OperatorReply);
