//! Why a request was not carried out.

use std::fmt;

use thiserror::Error;

/// What class of mistake it is; each has a status code of its own on the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// There is no machine, or no device of that name.
    NotFound,
    /// A device or machine of that name exists.
    Duplicate,
    /// The configuration or the request cannot be carried out by anybody.
    Bad,
    /// The request does not fit the state that the machine is in.
    WrongState,
    /// Not there, by name.
    Unsupported,
    /// It took too long; the step was undone.
    Late,
    /// Anything else went wrong on this side.
    Failed,
}

/// A request that was not carried out. The text is one sentence that names the thing and the remedy.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub struct VmError {
    /// What class.
    pub kind: ErrorKind,
    /// In words.
    pub text: String,
}

impl fmt::Display for VmError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.text)
    }
}

impl VmError {
    /// With the device's name, where its text does not have it.
    pub(super) fn of_device(self, id: &str) -> Self {
        if self.text.contains(id) { self } else { Self { text: format!("{id}: {}", self.text), ..self } }
    }

    /// An error of `kind`, in words.
    pub fn new(kind: ErrorKind, text: impl fmt::Display) -> Self {
        Self { kind, text: text.to_string() }
    }
}

impl From<crate::config::ConfigError> for VmError {
    fn from(error: crate::config::ConfigError) -> Self {
        let kind = match &error {
            crate::config::ConfigError::DuplicateId(_) => ErrorKind::Duplicate,
            _ => ErrorKind::Bad,
        };
        Self::new(kind, error)
    }
}
