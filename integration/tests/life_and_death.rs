//! Processes die, and what must follow does.

use anyhow::{Context, Result};
use atoll_integration::processes;
use rustix::process::Signal;
use std::time::{Duration, Instant};
use xtask::console::Console;
use xtask::demo::{BOOT_LIMIT, Demo, KernelForm};
use xtask::images;

const STEP: Duration = Duration::from_secs(60);

struct Running {
    console: Console,
    folder: tempfile::TempDir,
}

fn running() -> Result<Running> {
    running_on("")
}

/// The same with more keys for its disk.
fn running_on(keys: &str) -> Result<Running> {
    let guest = images::guest("6.1")?;
    let folder = tempfile::tempdir()?;
    let disk = images::copy_of_disk(&guest, folder.path())?;
    let demo = Demo { series: "6.1".to_owned(), form: KernelForm::Pvh, cpu: "soft".to_owned() };
    let mut command = demo.command(&guest)?;
    command.arg("--disk").arg(format!("path={}{keys}", disk.display()));
    let mut console = Console::spawn(&mut command)?;
    console.prompt(BOOT_LIMIT)?;
    Ok(Running { console, folder })
}

/// Three times over, the disk's process is killed while the guest writes; the guest's checksums still hold.
#[test]
fn a_killed_disk_process_comes_back() -> Result<()> {
    let Running { mut console, folder } = running()?;
    for round in 0..3 {
        let victim = processes::child_named(console.pid(), "atoll-blk", STEP)?;
        console.send(&format!(
            "dd if=/dev/urandom of=/kill{round} bs=64k count=64 conv=fsync; md5sum /kill{round} > /sum{round}; sync; echo wri\"\"tten{round}\n"
        ))?;
        std::thread::sleep(Duration::from_millis(120));
        processes::signal(victim, Signal::KILL)?;
        console.expect(&format!("written{round}"), STEP)?;
        console.expect(images::PROMPT, STEP)?;
        let successor = processes::child_named(console.pid(), "atoll-blk", STEP)?;
        assert_ne!(successor, victim);
        console.run("echo 3 > /proc/sys/vm/drop_caches", STEP)?;
        console.run(&format!("md5sum -c /sum{round}"), STEP)?;
    }
    let log = console.run("dmesg", STEP)?;
    assert!(!log.contains("I/O error"), "the guest noticed:\n{log}");
    console.run("mount -o remount,ro /", STEP)?;
    console.send("poweroff -f\n")?;
    let (status, errors) = console.wait(STEP)?;
    assert!(status.success(), "{status}: {errors}");
    xtask::demo::fsck(&folder.path().join("root.ext4"))
}

/// The disk's process is stopped while the guest writes: nothing ends and nothing hangs up, only a queue stands. It is replaced, and
/// the guest sees a write that took a while.
#[test]
fn a_stopped_disk_process_is_replaced() -> Result<()> {
    let Running { mut console, folder: _folder } = running_on(",stall_timeout=2")?;
    let victim = processes::child_named(console.pid(), "atoll-blk", STEP)?;
    processes::signal(victim, Signal::STOP)?;
    let began = Instant::now();
    console.send(
        "dd if=/dev/urandom of=/stopped bs=64k count=16 conv=fsync; md5sum /stopped > /sum; sync; echo wri\"\"tten\n",
    )?;
    console.expect("written", STEP)?;
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    console.expect(images::PROMPT, STEP)?;
    assert_ne!(processes::child_named(console.pid(), "atoll-blk", STEP)?, victim);
    console.run("echo 3 > /proc/sys/vm/drop_caches; md5sum -c /sum", STEP)?;
    let log = console.run("dmesg", STEP)?;
    assert!(!log.contains("I/O error"), "the guest noticed:\n{log}");
    console.send("poweroff -f\n")?;
    let (status, errors) = console.wait(STEP)?;
    assert!(status.success(), "{status}: {errors}");
    Ok(())
}

/// SIGKILL leaves the VMM no time to tidy up; its device processes go by themselves.
#[test]
fn a_killed_vmm_leaves_no_process() -> Result<()> {
    let Running { console, folder: _folder } = running()?;
    let vmm = console.pid();
    let children = processes::children(vmm);
    assert!(!children.is_empty(), "the disk is a process of its own");
    processes::signal(vmm, Signal::KILL)?;
    for child in children {
        processes::wait_gone(child, Duration::from_secs(5))?;
    }
    Ok(())
}

/// SIGTERM is an operator's request: everything ends, in order, within seconds.
#[test]
fn a_terminated_vmm_ends_its_processes() -> Result<()> {
    let Running { console, folder: _folder } = running()?;
    let vmm = console.pid();
    let children = processes::children(vmm);
    processes::signal(vmm, Signal::TERM)?;
    console.wait(Duration::from_secs(10)).context("SIGTERM did not end the VMM")?;
    for child in children {
        processes::wait_gone(child, Duration::from_secs(5))?;
    }
    Ok(())
}

/// Clients find the vCPU threads by name in the spawned process's task list and pin them.
#[test]
fn vcpu_threads_are_named() -> Result<()> {
    let Running { console, folder: _folder } = running()?;
    let names: Vec<String> = std::fs::read_dir(format!("/proc/{}/task", console.pid()))?
        .flatten()
        .filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok())
        .collect();
    assert!(names.iter().any(|name| name.trim_end() == "vcpu0"), "{names:?}");
    Ok(())
}
