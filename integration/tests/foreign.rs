//! Peers of other projects: their front end on our backend, our front end on theirs.

use anyhow::Result;
use atoll_integration::peers;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use xtask::console::Console;
use xtask::demo::{BOOT_LIMIT, Demo, KernelForm};
use xtask::images;

const STEP: Duration = Duration::from_secs(90);

fn write_and_leave(mut console: Console, disk: &Path, folder: &Path) -> Result<()> {
    console.prompt(BOOT_LIMIT)?;
    console.run("grep ' / ext4 ' /proc/mounts", STEP)?;
    console.run("dd if=/dev/urandom of=/data bs=64k count=64 2>/dev/null && sync", STEP)?;
    let inside = console.run("md5sum /data", STEP)?;
    console.run("mount -o remount,ro /", STEP)?;
    console.send("poweroff -f\n")?;
    let (status, errors) = console.wait(STEP)?;
    assert!(status.success(), "{status}: {errors}");
    let outside = xtask::demo::md5_in_image(disk, "/data", folder)?;
    assert_eq!(inside.split_whitespace().next(), Some(outside.as_str()));
    xtask::demo::fsck(disk)
}

/// QEMU's vhost-user-blk-pci with `atoll-blk` behind it.
#[test]
fn qemu_boots_from_atoll_blk() -> Result<()> {
    let guest = images::guest("6.1")?;
    let folder = tempfile::tempdir()?;
    let disk = images::copy_of_disk(&guest, folder.path())?;
    let backend = peers::atoll_blk(&disk, folder.path())?;
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-M", "q35,memory-backend=ram", "-accel", "tcg", "-m", "512M", "-nodefaults", "-display", "none"])
        .args(["-object", "memory-backend-memfd,id=ram,size=512M,share=on", "-no-reboot", "-serial", "stdio"])
        .arg("-chardev")
        .arg(format!("socket,id=disk,path={}", backend.socket.display()))
        .args(["-device", "vhost-user-blk-pci,chardev=disk", "-append", "console=ttyS0"])
        .arg("-kernel")
        .arg(&guest.vmlinux)
        .arg("-initrd")
        .arg(&guest.initramfs);
    write_and_leave(Console::spawn(&mut command)?, &disk, folder.path())
}

/// Atoll with qemu-storage-daemon's vhost-user-blk export as its disk.
#[test]
fn atoll_boots_from_qemu_storage_daemon() -> Result<()> {
    let guest = images::guest("6.1")?;
    let folder = tempfile::tempdir()?;
    let disk = images::copy_of_disk(&guest, folder.path())?;
    let backend = peers::storage_daemon(&disk, folder.path())?;
    let demo = Demo { series: "6.1".to_owned(), form: KernelForm::Pvh, cpu: "soft".to_owned() };
    let mut command = demo.command(&guest)?;
    command.arg("--disk").arg(format!("vhost_user=true,socket={}", backend.socket.display()));
    write_and_leave(Console::spawn(&mut command)?, &disk, folder.path())
}
