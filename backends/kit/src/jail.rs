//! The jail.

use thiserror::Error;

/// Why the jail could not be closed.
#[derive(Debug, Error)]
#[error("{0}")]
pub struct JailError(String);

/// What a device may still do once it serves.
#[derive(Debug, Default)]
pub struct Jail {}

impl Jail {
    /// Closes the jail around the whole process.
    pub fn close(self) -> Result<(), JailError> {
        Ok(())
    }
}
