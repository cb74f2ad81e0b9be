//! QEMU as the yardstick: the command lines that Atoll is measured against.

use crate::images::Guest;
use std::path::Path;
use std::process::Command;

/// QEMU's software emulation on q35, with only what the guest needs.
pub fn qemu(kernel: &Path, guest: &Guest, cmdline: &str) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args([
            "-M",
            "q35",
            "-accel",
            "tcg",
            "-m",
            "512M",
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
            "-serial",
            "stdio",
        ])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(&guest.initramfs)
        .args(["-append", cmdline]);
    command
}
