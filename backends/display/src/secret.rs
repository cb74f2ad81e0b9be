//! The secret that viewers have to know: a password for those that speak RFB, a token for the page.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;

use thiserror::Error;

use crate::rfb::auth::{self, CHALLENGE};
use crate::rfb::hello::Security;

/// Most bytes of a secret.
const LEN_MAX: u64 = 256;

/// Why a secret is none.
#[derive(Debug, Error)]
pub enum SecretError {
    /// It cannot be read.
    #[error("--secret-fd cannot be read: {0}; pass a file or a pipe with the secret in it")]
    Read(#[from] std::io::Error),
    /// Nothing is in it, or too much.
    #[error("the secret has {0} bytes; give it 1 to {LEN_MAX}, one line")]
    Length(usize),
    /// A page's address cannot carry it.
    #[error("the secret has characters that an address cannot carry: use letters, digits, - and _")]
    Characters,
}

/// A secret.
#[derive(Clone)]
pub struct Secret(Vec<u8>);

/// It is not shown.
impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

impl Secret {
    /// Reads it, up to its end; a line feed behind it does not belong to it.
    ///
    /// # Errors
    /// [`SecretError`].
    pub fn read(fd: OwnedFd) -> Result<Self, SecretError> {
        let mut bytes = Vec::new();
        File::from(fd).take(LEN_MAX + 2).read_to_end(&mut bytes)?;
        Self::new(bytes.strip_suffix(b"\n").unwrap_or(&bytes))
    }

    /// These bytes.
    ///
    /// # Errors
    /// [`SecretError`].
    pub fn new(bytes: &[u8]) -> Result<Self, SecretError> {
        if bytes.is_empty() || bytes.len() as u64 > LEN_MAX {
            return Err(SecretError::Length(bytes.len()));
        }
        if !bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_')) {
            return Err(SecretError::Characters);
        }
        Ok(Self(bytes.to_vec()))
    }

    /// Whether somebody knows it.
    #[must_use]
    pub fn is(&self, said: &[u8]) -> bool {
        auth::is_same(&self.0, said)
    }

    /// It, for the one who has said it.
    #[must_use]
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

/// What a viewer is asked for where this secret is wanted, or none is.
///
/// # Errors
/// The kernel has no random bytes.
pub fn security(secret: Option<&Secret>) -> std::io::Result<Security> {
    let Some(secret) = secret else { return Ok(Security::Open) };
    let mut challenge = [0; CHALLENGE];
    let mut filled = 0;
    while let Some(room) = challenge.get_mut(filled..).filter(|room| !room.is_empty()) {
        filled += rustix::rand::getrandom(room, rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(Security::Password { password: secret.0.clone(), challenge })
}
