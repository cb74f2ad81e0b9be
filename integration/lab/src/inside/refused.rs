//! What users get wrong with devices of the host, and a user who has no more rights than it takes.

use std::os::fd::AsRawFd as _;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use rustix::io::FdFlags;
use rustix::process::{Resource, Rlimit, setrlimit};
use serde_json::{Map, Value, json};
use xtask::images::Guest;
use xtask::operated::Operated;
use xtask::place;

use super::boot::{BOOT_LIMIT, STEP_LIMIT, figures, milliseconds};
use super::function::{Function, output, shell, sum_of};
use super::passed::{
    BLOCKS, GUESTS, Setting, await_disk, calm, command, end, gone, guest_sum, guest_writes, lab_writes,
};
use crate::freight::guest_inside;
use crate::hardware::{CROWDED_DRIVE, PLAIN_DRIVE};

/// A user without rights.
const USER: u32 = 1000;

/// Has the command be run by that user, whose machines are found in `folder`.
fn as_user(command: &mut Command, folder: &Path) -> Result<()> {
    chown(folder, Some(USER), Some(USER))?;
    command.uid(USER).gid(USER).env("XDG_RUNTIME_DIR", folder).env("HOME", folder);
    Ok(())
}

/// The guest's files where that user may read them.
fn readable(mut guest: Guest, folder: &Path) -> Result<Guest> {
    for file in [&mut guest.vmlinux, &mut guest.initramfs] {
        let own = folder.join(file.file_name().context("a file has a name")?);
        std::fs::copy(&*file, &own)?;
        chown(&own, Some(USER), Some(USER))?;
        *file = own;
    }
    Ok(guest)
}

/// How much memory a process of the user's may lock, from now on.
fn may_lock(bytes: Option<u64>) -> Result<()> {
    Ok(setrlimit(Resource::Memlock, Rlimit { current: bytes, maximum: None })?)
}

/// The command ends by itself, with one line that says what helps.
fn refused(mut command: Command, what: &str, words: &[&str]) -> Result<()> {
    let begin = Instant::now();
    let output = command.stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success(), "{what} was taken");
    ensure!(words.iter().all(|word| said.contains(word)), "{what}: no {words:?} in: {said}");
    ensure!(!said.contains("panicked"), "{what}: {said}");
    ensure!(begin.elapsed() < STEP_LIMIT, "{what}: it took {:?}", begin.elapsed());
    Ok(())
}

/// What users get wrong: each is one line that says what helps, and nothing hangs.
pub(super) fn mistakes() -> Result<Map<String, Value>> {
    let folder = tempfile::tempdir()?;
    let function = Function::drive(PLAIN_DRIVE)?;
    let missing = Function { bdf: "0000:7f:00.0".into() };
    let bridge = Function { bdf: "0000:00:1f.0".into() };
    let guest = guest_inside(Setting::PLAIN.series);
    let with = |function: &Function| command(Setting::PLAIN, &guest, function);
    refused(with(&function)?, "a device of another driver", &["nvme", "atoll vfio bind"])?;
    refused(with(&missing)?, "a device that is not there", &["no PCI function", "atoll vfio check"])?;
    refused(with(&bridge)?, "a bridge", &["atoll vfio bind"])?;
    let mut iommufd = with(&function)?;
    iommufd.args(["--device", "path=/dev/vfio/devices/vfio0"]);
    refused(iommufd, "a file of iommufd", &["iommufd", "not supported", "fd="])?;
    // Its neighbour in the slot is the lab's.
    let crowded = Function::drive(CROWDED_DRIVE)?;
    crowded.bind()?;
    refused(with(&crowded)?, "one device of a group", &["group", "atoll vfio"])?;
    crowded.unbind()?;
    function.bind()?;
    by_a_user(&function, &guest)?;
    // Twice at a time.
    let mut machine = Operated::spawn(&mut with(&function)?, folder.path())?;
    machine.console.prompt(BOOT_LIMIT)?;
    refused(with(&function)?, "a device that is in use", &["in use"])?;
    // The host wants it back while a guest has it: the guest is asked, and lets it go.
    await_disk(&mut machine)?;
    let begin = Instant::now();
    shell(&format!("echo {} > /sys/bus/pci/drivers/vfio-pci/unbind", function.bdf))?;
    let took = begin.elapsed();
    gone(&machine)?;
    end(machine)?;
    shell(&format!("echo {} > /sys/bus/pci/drivers/vfio-pci/bind", function.bdf))?;
    function.unbind()?;
    function.disk()?;
    Ok(figures(json!({ "wanted_back_ms": milliseconds(took) })))
}

/// A user who may not open the group, and one who may, but not lock a guest's memory.
fn by_a_user(function: &Function, guest: &Guest) -> Result<()> {
    shell("chmod 666 /dev/kvm")?;
    let group = function.group()?;
    let own = tempfile::tempdir()?;
    let guest = &readable(guest.clone(), own.path())?;
    let with = || {
        let mut command = command(Setting::PLAIN, guest, function)?;
        as_user(&mut command, own.path())?;
        Ok::<_, anyhow::Error>(command)
    };
    refused(with()?, "a group of root's", &["no permission", &group.display().to_string(), "chown"])?;
    chown(&group, Some(USER), None)?;
    may_lock(Some(64 << 10))?;
    let locked = refused(with()?, "a user without memory to lock", &["ulimit -l", "LimitMEMLOCK"]);
    may_lock(None)?;
    chown(&group, Some(0), None)?;
    locked
}

/// A user without rights is given the group, open: at the start, and again while the machine runs.
pub(super) fn descriptor() -> Result<Map<String, Value>> {
    let folder = tempfile::tempdir()?;
    let function = Function::drive(PLAIN_DRIVE)?;
    let of_lab = lab_writes(&function.disk()?)?;
    function.bind()?;
    shell("chmod 666 /dev/kvm")?;
    may_lock(None)?;
    let group = std::fs::File::options().read(true).write(true).open(function.group()?)?;
    rustix::io::fcntl_setfd(&group, FdFlags::empty())?;
    let number = group.as_raw_fd();
    let guest = readable(guest_inside(Setting::PLAIN.series), folder.path())?;
    let keys = format!("path={},id=passed,fd={number}", function.folder().display());
    let mut command = super::passed::command_with(Setting::PLAIN, &guest, &keys)?;
    as_user(&mut command, folder.path())?;
    let mut machine = Operated::spawn(&mut command, folder.path())?;
    machine.console.prompt(BOOT_LIMIT)?;
    await_disk(&mut machine)?;
    let seen = guest_sum(&mut machine, 0)?;
    ensure!(seen == of_lab, "the guest reads {seen}, the lab wrote {of_lab}");
    let of_guest = guest_writes(&mut machine, GUESTS)?;
    machine.put("vm.remove-device", Some(&json!({ "id": "passed" })))?;
    gone(&machine)?;
    let mut add = Command::new(place::program("atoll")?);
    add.arg("add-device").arg(folder.path().join("api.sock")).arg(&keys);
    output(&mut add)?;
    await_disk(&mut machine)?;
    let again = guest_sum(&mut machine, GUESTS)?;
    ensure!(again == of_guest, "plugged in again, the guest reads {again}, it wrote {of_guest}");
    machine.console.send("reboot -f\n")?;
    machine.console.prompt(BOOT_LIMIT)?;
    await_disk(&mut machine)?;
    calm(&mut machine)?;
    end(machine)?;
    drop(group);
    function.unbind()?;
    let outside = sum_of(&function.disk()?, GUESTS, BLOCKS)?;
    ensure!(outside == of_guest, "the lab reads {outside}, the guest wrote {of_guest}");
    Ok(figures(json!({ "user": USER })))
}
