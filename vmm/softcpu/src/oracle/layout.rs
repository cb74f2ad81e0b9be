//! Where cases live: the same linear addresses in the host process and in the guest, all below 2 GiB so that every
//! address form reaches them.

/// Two writable pages, then a read-only one, then nothing: operands.
pub(super) const DATA: u64 = 0x2000_0000;
/// Bytes that may be written from [`DATA`] on.
pub(super) const DATA_WRITABLE: u64 = 0x2000;
/// Bytes mapped from [`DATA`] on.
pub(super) const DATA_MAPPED: u64 = 0x3000;
/// One writable page with nothing on either side.
pub(super) const STACK: u64 = 0x2000_5000;
/// Length of [`STACK`].
pub(super) const STACK_LEN: u64 = 0x1000;
/// Instructions, one slot after the other.
pub(super) const CODE: u64 = 0x1000_0000;
/// Room for one case's instructions and its two ends.
pub(super) const SLOT: u64 = 128;
/// Slots in a batch.
pub(super) const SLOTS: u64 = 2048;
/// Where a taken branch goes, from the start of the slot.
pub(super) const TAKEN: u64 = 112;
/// Where the instructions must end.
pub(super) const SEQUENCE_MAX: u64 = 100;
/// Executions of each slot, with other register contents.
pub(super) const RUNS: u64 = 4;
/// Cases in a batch.
pub(super) const BATCH: u64 = SLOTS * RUNS;

/// Memory that cases may write, and the read-only page: a copy to start from, and what the two sides compare.
#[derive(Clone)]
pub(super) struct Memory {
    /// [`DATA_MAPPED`] bytes.
    pub(super) data: Vec<u8>,
    /// [`STACK_LEN`] bytes.
    pub(super) stack: Vec<u8>,
}

/// Sets eight bytes of writable memory (data, stack), if they lie wholly in it.
pub(super) fn patch([data, stack]: [&mut [u8]; 2], address: u64, value: u64) {
    for (base, memory) in [(DATA, data), (STACK, stack)] {
        let place = address.checked_sub(base).and_then(|offset| memory.get_mut(offset as usize..)?.get_mut(..8));
        if let Some(place) = place {
            place.copy_from_slice(&value.to_le_bytes());
        }
    }
}
