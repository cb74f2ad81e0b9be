//! A host that freezes the VMM for a moment must not be able to break a boot: no guest calibrates against a timer.

use anyhow::Result;
use xtask::soak::stopped_boots;

/// A few here; the full count is `cargo xtask soak boots`.
#[test]
fn boots_survive_a_stopped_vmm() -> Result<()> {
    let survived = stopped_boots(4, 0x5eed)?;
    assert_eq!(survived, 4);
    Ok(())
}
