//! A card on an interface that is given by name: the host's end outlives the processes that serve the card.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use atoll_integration::processes;
use rustix::process::Signal;
use serde_json::{Value, json};
use xtask::demo::{BOOT_LIMIT, Demo, KernelForm};
use xtask::images;
use xtask::operated::Operated;

const STEP: Duration = Duration::from_secs(60);

fn card(vm: &Operated) -> Result<Value> {
    let all = vm.get("devices")?;
    let card = all.as_array().and_then(|all| all.iter().find(|device| device["id"] == "t"));
    card.cloned().with_context(|| format!("no card among {all}"))
}

/// Waits until a process of this generation or a later one serves the card.
fn await_generation(vm: &Operated, least: u64) -> Result<u64> {
    let deadline = Instant::now() + STEP;
    loop {
        let card = card(vm)?;
        if card["state"] == "running"
            && let Some(generation) = card["generation"].as_u64().filter(|generation| *generation >= least)
        {
            return Ok(generation);
        }
        ensure!(Instant::now() < deadline, "it stays {card}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What makes an interface the one that it is.
fn identity(interface: &Path) -> Result<(String, String)> {
    let read = |file: &str| std::fs::read_to_string(interface.join(file)).with_context(|| format!("{file} of it"));
    Ok((read("address")?, read("ifindex")?))
}

/// The operator plugs the cable out: the guest has no carrier, also when the process was killed meanwhile, and what the host
/// sends then does not come later.
fn cable(vm: &mut Operated) -> Result<()> {
    let carrier = |vm: &mut Operated, wanted: &str| {
        let look = format!("until [ $(cat /sys/class/net/eth0/carrier) = {wanted} ]; do sleep 0.05; done");
        vm.console.run(&look, STEP)
    };
    let received = |vm: &mut Operated| -> Result<u64> {
        let said = vm.console.run("cat /sys/class/net/eth0/statistics/rx_packets", STEP)?;
        said.split_whitespace().last().context("a number")?.parse().with_context(|| format!("{said:?}"))
    };
    vm.put("vm.set-link", Some(&json!({ "id": "t", "link": "down" })))?;
    carrier(vm, "0")?;
    let before = received(vm)?;
    let flood = || -> Result<()> {
        let socket = std::net::UdpSocket::bind("198.18.79.1:0")?;
        for _ in 0..50 {
            let _ = socket.send_to(b"nobody hears this", "198.18.79.2:9")?;
        }
        Ok(())
    };
    flood()?;
    let card = card(vm)?;
    let generation = card["generation"].as_u64().context("it has a generation")?;
    processes::signal(u32::try_from(card["pid"].as_u64().context("it has a process")?)?, Signal::KILL)?;
    await_generation(vm, generation + 1)?;
    flood()?;
    carrier(vm, "0")?;
    vm.put("vm.set-link", Some(&json!({ "id": "t", "link": "up" })))?;
    carrier(vm, "1")?;
    vm.console.run("ping -c 1 -w 30 198.18.79.1", STEP)?;
    let came = received(vm)? - before;
    ensure!(came < 20, "{came} frames, of which a hundred were sent while the cable was out");
    Ok(())
}

/// The interface went with the process that served the card, and came back with another Ethernet address: the guest went on
/// sending to the old one. Now it stays, with its address and its place in routes and bridges, over deaths and an upgrade;
/// only one that somebody deletes comes back as another.
#[test]
fn the_interface_outlives_the_process() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let name = format!("an{}", std::process::id() % 1_000_000);
    let interface = PathBuf::from("/sys/class/net").join(&name);
    let guest = images::guest("6.1")?;
    let demo = Demo { series: "6.1".to_owned(), form: KernelForm::Pvh, cpu: "soft".to_owned() };
    let mut command = demo.command(&guest)?;
    command.args(["--cmdline", "console=ttyS0 cryptomgr.notests atoll.load=net", "--net"]);
    command.arg(format!("tap={name},ip=198.18.79.1,mask=255.255.255.0,id=t"));
    let mut vm = Operated::spawn(&mut command, folder.path())?;
    vm.console.prompt(BOOT_LIMIT)?;
    vm.console.run("ip addr add 198.18.79.2/24 dev eth0 && ip link set eth0 up", STEP)?;
    let ping = |vm: &mut Operated| vm.console.run("ping -c 1 -w 30 198.18.79.1", STEP);
    ping(&mut vm)?;
    let first = identity(&interface)?;
    for _ in 0..3 {
        let before = card(&vm)?;
        let pid = before["pid"].as_u64().context("it has a process")?;
        processes::signal(u32::try_from(pid)?, Signal::KILL)?;
        await_generation(&vm, before["generation"].as_u64().context("it has a generation")? + 1)?;
        ping(&mut vm)?;
        ensure!(identity(&interface)? == first, "another interface: {first:?}");
    }
    // Two processes can have it at a time, so a build can be made ready beside the one that serves.
    let before = card(&vm)?["generation"].as_u64().context("it has a generation")?;
    let exe = xtask::place::program("atoll-net")?;
    vm.put("vm.upgrade-device", Some(&json!({ "id": "t", "exe": exe })))?;
    await_generation(&vm, before + 1)?;
    ping(&mut vm)?;
    ensure!(identity(&interface)? == first, "another interface: {first:?}");

    cable(&mut vm)?;
    let deleted = std::process::Command::new("ip").args(["link", "delete", &name]).output()?;
    ensure!(deleted.status.success(), "{}", String::from_utf8_lossy(&deleted.stderr));
    let before = card(&vm)?;
    let pid = before["pid"].as_u64().context("it has a process")?;
    processes::signal(u32::try_from(pid)?, Signal::KILL)?;
    await_generation(&vm, before["generation"].as_u64().context("it has a generation")? + 1)?;
    ensure!(identity(&interface)?.1 != first.1, "made anew");
    // The guest still knows the old one's address.
    vm.console.run("ip link set eth0 down && ip link set eth0 up", STEP)?;
    ping(&mut vm)?;
    vm.console.send("poweroff -f\n")?;
    let (status, errors) = vm.console.wait(STEP)?;
    ensure!(status.success(), "atoll ended with {status}: {errors}");
    ensure!(!interface.exists(), "the interface goes with the machine");
    Ok(())
}
