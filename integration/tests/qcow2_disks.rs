//! A guest whose disks are qcow2 images, and images that are refused before there is a guest.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use atoll_integration::processes;
use rustix::process::Signal;
use xtask::console::Console;
use xtask::demo::{BOOT_LIMIT, Demo, KernelForm};
use xtask::images;

const STEP: Duration = Duration::from_secs(60);

fn demo() -> Demo {
    Demo { series: "6.1".to_owned(), form: KernelForm::Pvh, cpu: "soft".to_owned() }
}

fn qemu_img(folder: &Path, args: &[&str]) -> Result<String> {
    let out = Command::new("qemu-img").args(args).current_dir(folder).output();
    let out = out.context("qemu-img does not start: install the package qemu-utils")?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    // 3: nothing but leaks.
    ensure!(out.status.success() || args.first() == Some(&"check") && out.status.code() == Some(3), "{args:?}: {text}");
    Ok(text)
}

/// The root disk stands on a compressed image, which nobody writes; another is fresh. Twice the processes of both disks are
/// killed while the guest writes. What it wrote is there, both images are sound, and the base is as it was.
#[test]
fn a_guest_lives_on_qcow2_over_the_death_of_its_disks() -> Result<()> {
    let guest = images::guest("6.1")?;
    let folder = tempfile::tempdir()?;
    let disk = images::copy_of_disk(&guest, folder.path())?;
    let disk = disk.file_name().context("a name")?.to_string_lossy().into_owned();
    qemu_img(folder.path(), &["convert", "-c", "-f", "raw", "-O", "qcow2", &disk, "base.qcow2"])?;
    qemu_img(folder.path(), &["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "root.qcow2"])?;
    qemu_img(folder.path(), &["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "data.qcow2", "64M"])?;
    let base = std::fs::read(folder.path().join("base.qcow2"))?;
    let mut command = demo().command(&guest)?;
    for (name, more) in [("root.qcow2", ",backing_files=on"), ("data.qcow2", "")] {
        let path = folder.path().join(name);
        command.arg("--disk").arg(format!("path={},image_type=qcow2{more}", path.display()));
    }
    let mut console = Console::spawn(&mut command)?;
    console.prompt(BOOT_LIMIT)?;
    for round in 0..2 {
        console.send(&format!(
            "dd if=/dev/urandom of=/kill{round} bs=64k count=64 conv=fsync; md5sum /kill{round} > /sum{round}; sync; \
             dd if=/kill{round} of=/dev/vdb bs=64k seek=$((64*{round})) conv=fsync; echo wri\"\"tten{round}\n"
        ))?;
        std::thread::sleep(Duration::from_millis(150));
        for victim in processes::children_named(console.pid(), "atoll-blk") {
            processes::signal(victim, Signal::KILL)?;
        }
        console.expect(&format!("written{round}"), STEP)?;
        console.expect(images::PROMPT, STEP)?;
        console.run("echo 3 > /proc/sys/vm/drop_caches", STEP)?;
        console.run(&format!("md5sum -c /sum{round}"), STEP)?;
        console.run(&format!("dd if=/dev/vdb bs=64k skip=$((64*{round})) count=64 | cmp - /kill{round}"), STEP)?;
    }
    let log = console.run("dmesg", STEP)?;
    ensure!(!log.contains("I/O error"), "the guest noticed:\n{log}");
    console.run("mount -o remount,ro /", STEP)?;
    console.send("poweroff -f\n")?;
    let (status, errors) = console.wait(STEP)?;
    ensure!(status.success(), "{status}: {errors}");
    for name in ["root.qcow2", "data.qcow2"] {
        qemu_img(folder.path(), &["check", name])?;
    }
    ensure!(std::fs::read(folder.path().join("base.qcow2"))? == base, "the base was written");
    qemu_img(folder.path(), &["convert", "-O", "raw", "root.qcow2", "after.ext4"])?;
    xtask::demo::fsck(&folder.path().join("after.ext4"))
}

/// Images that name other files, or that nobody has said what they are: one line each, with what to do.
#[test]
fn what_an_image_wants_is_told_and_not_opened() -> Result<()> {
    let guest = images::guest("6.1")?;
    let folder = tempfile::tempdir()?;
    let create = |args: &[&str]| qemu_img(folder.path(), &[&["create", "-q", "-f", "qcow2"], args].concat());
    qemu_img(folder.path(), &["create", "-q", "-f", "raw", "base.raw", "1M"])?;
    create(&["-b", "base.raw", "-F", "raw", "over.qcow2"])?;
    create(&["-o", "data_file=apart.raw", "apart.qcow2", "1M"])?;
    create(&["alone.qcow2", "1M"])?;
    create(&["-b", "alone.qcow2", "-F", "qcow2", "one.qcow2"])?;
    create(&["-b", "one.qcow2", "-F", "qcow2", "loop.qcow2"])?;
    qemu_img(folder.path(), &["rebase", "-q", "-u", "-b", "loop.qcow2", "-F", "qcow2", "one.qcow2"])?;
    create(&["-u", "-b", "gone.raw", "-F", "raw", "gone.qcow2", "1M"])?;
    // The tool insists on a format; older ones did not. Make its place in the header one of an unknown extension.
    create(&["-b", "base.raw", "-F", "raw", "formless.qcow2"])?;
    let mut header = std::fs::read(folder.path().join("formless.qcow2"))?;
    let at = header.windows(4).position(|word| word == [0xe2, 0x79, 0x2a, 0xca]).context("a backing format")?;
    header[at..at + 4].copy_from_slice(b"????");
    std::fs::write(folder.path().join("formless.qcow2"), header)?;
    create(&["-u", "-b", "nbd://host/disk", "-F", "raw", "far.qcow2", "1M"])?;
    let cases = [
        ("over.qcow2,image_type=qcow2", "\"base.raw\": give the disk backing_files=on"),
        ("apart.qcow2,image_type=qcow2", "\"apart.raw\": give the disk backing_files=on"),
        ("alone.qcow2", "give it image_type=qcow2"),
        ("base.raw,image_type=qcow2", "no qcow2 header"),
        ("base.raw,backing_files=on", "needs image_type=qcow2"),
        ("loop.qcow2,image_type=qcow2,backing_files=on", "stands on itself"),
        ("gone.qcow2,image_type=qcow2,backing_files=on", "gone.raw: check the disk's path"),
        ("far.qcow2,image_type=qcow2,backing_files=on", "no path of a file"),
        ("formless.qcow2,image_type=qcow2,backing_files=on", "does not say what its backing file"),
    ];
    for (disk, says) in cases {
        let mut command = demo().command(&guest)?;
        command.arg("--disk").arg(format!("path={}/{disk}", folder.path().display()));
        let out = command.output()?;
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        ensure!(!out.status.success() && text.contains(says), "{disk}: {}: {text}", out.status);
    }
    Ok(())
}
