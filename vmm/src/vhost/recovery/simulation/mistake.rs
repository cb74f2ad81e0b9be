//! Mistakes made on purpose.

/// A mistake that the machine's surroundings make on purpose, or a decision of the machine that is not carried out: each
/// must be noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mistake {
    /// No ring is called after a recovery.
    SkipCall,
    /// No ring is kicked after a recovery.
    SkipKick,
    /// A successor begins behind everything that is available.
    ReplayFromAvailable,
    /// A successor begins at the used index, and forgets what was under way.
    ReplayWithoutRecord,
    /// A successor goes on from the used index and does what is marked once more.
    ReplayTwice,
    /// Nobody waits for what the dead have under way.
    SkipFence,
    /// A process that was killed and has not ended counts as ended.
    SkipReap,
    /// A successor that lacks what the guest was shown is taken.
    SkipCompare,
    /// A reset leaves the record as it is.
    KeepRecord,
    /// The machine does not hear of a pause.
    SkipPause,
    /// Nobody tells the driver that its device is there.
    SkipActivation,
    /// A stand-in goes on after a successor has come.
    KeepStandIn,
    /// A queue that stands is not looked at.
    SkipLooks,
    /// What a device knows is not moved to a new build, and that it was is said.
    SkipTransfer,
    /// A backend that was asked for the rings because of an upgrade says that it has given them back, and has not.
    KeepRings,
    /// After an upgrade the old build is started.
    KeepBuild,
    /// After an upgrade that failed the new build is started.
    SkipRevert,
    /// One that is not wanted any more is not ended.
    KeepBeside,
    /// A spare takes the rings when it is ready.
    HastySpare,
    /// Nobody tells the operator what became of an upgrade.
    SkipAnswer,
}

impl Mistake {
    pub(super) const ALL: [Self; 20] = [
        Self::SkipCall,
        Self::SkipKick,
        Self::ReplayFromAvailable,
        Self::ReplayWithoutRecord,
        Self::ReplayTwice,
        Self::SkipFence,
        Self::SkipReap,
        Self::SkipCompare,
        Self::KeepRecord,
        Self::SkipPause,
        Self::SkipActivation,
        Self::KeepStandIn,
        Self::SkipLooks,
        Self::SkipTransfer,
        Self::KeepRings,
        Self::KeepBuild,
        Self::SkipRevert,
        Self::KeepBeside,
        Self::HastySpare,
        Self::SkipAnswer,
    ];
}
