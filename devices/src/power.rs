//! How the guest asks for the whole machine: off, or again from the start.

/// What a guest's write to a power or reset register asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerEvent {
    /// ACPI S5: the machine ends.
    PowerOff,
    /// Reset register 0xcf9, ACPI reset or the keyboard controller's reset line.
    Reset,
}

/// Who hears of it. Called in the middle of the guest's write; it notes the event and returns.
pub trait PowerSink: Send + Sync {
    /// The guest asked for `event`.
    fn power_event(&self, event: PowerEvent);
}
