//! A guest that does nothing, for tests that play the guest themselves.

use super::AssembleError;
use super::prologue::kernel;

/// Halts with interrupts off, for ever.
pub fn halt() -> Result<Vec<u8>, AssembleError> {
    kernel(|code| {
        let mut again = code.create_label();
        code.set_label(&mut again)?;
        code.hlt()?;
        code.jmp(again)?;
        Ok(())
    })
}
