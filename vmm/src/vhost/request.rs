//! What a device's thread is asked: by its driver, its machine and its operator.

use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::Instant;

use atoll_devices::Completion;
use atoll_devices::iommu::Change;
use atoll_devices::virtio::Intent;

use super::device::{PauseError, SwitchError};
use super::parts::Parts;
use super::upgrade::{UpgradeError, UpgradeOrder};
use super::worker::{LinkError, Past, ResizeError};
use crate::doorbell::Interposer;
use crate::machine::{LinkState, NewSize};

/// What the device's thread is asked.
pub(super) enum Request {
    Intent(Intent, Completion),
    SwitchCall {
        index: u16,
        interposer: Option<Arc<dyn Interposer>>,
        answer: SyncSender<Result<(), SwitchError>>,
    },
    CountCalls {
        index: u16,
        answer: SyncSender<Option<u64>>,
    },
    Resize {
        size: NewSize,
        answer: SyncSender<Result<(), ResizeError>>,
    },
    /// The operator plugs a card's cable in or out.
    SetLink {
        link: LinkState,
        answer: SyncSender<Result<(), LinkError>>,
    },
    /// The gate has been closed: bring the rings back.
    Pause,
    /// The gate is open again.
    Resume {
        answer: SyncSender<Result<(), PauseError>>,
    },
    /// The IOMMU has changed what the device may reach.
    Translate {
        change: Change,
        answer: SyncSender<()>,
    },
    /// There is a display that has no socket of this GPU yet.
    Draw,
    /// The operator wants a device back that was given up.
    Revive,
    /// The operator has a new program for it.
    Upgrade {
        order: UpgradeOrder,
        answer: SyncSender<Result<u64, UpgradeError>>,
    },
    /// A fault was asked for: the connection breaks, or the backend says what follows from a seed.
    Break {
        nonsense: Option<u64>,
    },
    /// Give everything but the board's part to whoever comes next.
    Leave {
        deadline: Instant,
        answer: SyncSender<(Parts, Past)>,
    },
    Stop {
        deadline: Instant,
    },
}

impl Request {
    /// Whether it must be heard whatever the guest does.
    pub(super) fn is_urgent(&self) -> bool {
        matches!(
            self,
            Self::Resize { .. }
                | Self::SetLink { .. }
                | Self::Pause
                | Self::Resume { .. }
                | Self::Translate { .. }
                | Self::Revive
                | Self::Draw
                | Self::Upgrade { .. }
                | Self::Leave { .. }
                | Self::Stop { .. }
        )
    }
}
