//! Steps in the life of a VM and of its devices' processes, as values that can be traced and recorded.

use crate::access::ExitRecord;
use crate::id::{CauseId, DeviceId, Generation, QueueIndex, VmId};
use crate::message::{Idempotence, Kind, Message, message_of_words, words};

words! {
    /// Something that happened; the supervisor's and the operator's view of it.
    pub enum LifecycleEvent {
        /// The vCPUs run for the first time.
        Started {
            /// Which VM.
            vm: VmId,
        } => Idempotent,
        /// No vCPU runs, no exit is half done, nothing is in flight.
        Paused {
            /// Which VM.
            vm: VmId,
        } => Idempotent,
        /// The vCPUs run again.
        Resumed {
            /// Which VM.
            vm: VmId,
        } => Idempotent,
        /// The guest or the operator reset the machine.
        Reset {
            /// Which VM.
            vm: VmId,
        } => Once,
        /// The guest or the operator ended it.
        PoweredOff {
            /// Which VM.
            vm: VmId,
        } => Idempotent,
        /// A device's process serves it.
        DeviceReady {
            /// Which device.
            device: DeviceId,
            /// Which incarnation of its process.
            generation: Generation,
        } => Idempotent,
        /// An access was not answered by its deadline.
        DeviceStalled {
            /// Which device.
            device: DeviceId,
            /// Which incarnation of its process.
            generation: Generation,
            /// The access's cause.
            cause: CauseId,
        } => Once,
        /// A queue with requests in flight completed none by its deadline.
        QueueStalled {
            /// Which device.
            device: DeviceId,
            /// Which incarnation of its process.
            generation: Generation,
            /// Which queue.
            queue: QueueIndex,
        } => Once,
        /// A device's process is gone.
        DeviceDied {
            /// Which device.
            device: DeviceId,
            /// Which incarnation of its process.
            generation: Generation,
        } => Idempotent,
        /// Its successor is being started.
        DeviceRecovering {
            /// Which device.
            device: DeviceId,
            /// The successor's generation.
            generation: Generation,
        } => Idempotent,
        /// It crashed too often without progress; a stand-in serves the guest.
        DeviceQuarantined {
            /// Which device.
            device: DeviceId,
        } => Idempotent,
    }
}
message_of_words!(LifecycleEvent, Lifecycle);

impl Message for ExitRecord {
    const KIND: Kind = Kind::Exit;
    const VARIANTS: &'static [(&'static str, Idempotence)] = &[("ExitRecord", Idempotence::Once)];

    fn variant(&self) -> usize {
        0
    }
}
