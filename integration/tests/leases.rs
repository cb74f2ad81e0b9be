//! An address by DHCP where the network card's two halves are of different projects.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use atoll_integration::{peers, processes};
use rustix::process::Signal;
use xtask::console::Console;
use xtask::demo::{BOOT_LIMIT, Demo, KernelForm};
use xtask::{images, passt};

const STEP: Duration = Duration::from_secs(60);
const LEASE: &str = "ip link set eth0 up && udhcpc -i eth0 -n -q -t 10 >/dev/null 2>&1 && ip -4 -o addr show dev eth0";

/// A server on the host's loopback that answers each caller with one line.
fn serve() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let _ = stream.set_read_timeout(Some(STEP));
            if matches!(stream.read(&mut [0; 1024]), Ok(1..)) {
                let _ = stream.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 13\r\n\r\ngood morning\n");
            }
        }
    });
    Ok(port)
}

fn leave(mut guest: Console) -> Result<()> {
    let log =
        guest.run("dmesg | grep -E 'virtio_net|eth0|BUG:|WARNING:' | grep -iE 'fail|error|BUG|WARNING'; true", STEP)?;
    ensure!(log.is_empty(), "{log}");
    guest.send("poweroff -f\n")?;
    let (status, errors) = guest.wait(STEP)?;
    ensure!(status.success(), "{status}: {errors}");
    Ok(())
}

/// QEMU's vhost-user card on `atoll-net`, which has passt on its stream socket: the guest gets its address and reaches the
/// host's loopback by way of both. Without MSI-X: QEMU 7.2 falls over its own vectors of a vhost-user card under TCG.
#[test]
fn qemu_gets_a_lease_through_atoll_net() -> Result<()> {
    let guest = images::guest("6.1")?;
    let folder = tempfile::tempdir()?;
    let passt = peers::passt(folder.path())?;
    let net = peers::atoll_net(&passt, folder.path())?;
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-M", "q35,memory-backend=ram", "-accel", "tcg", "-m", "256M", "-nodefaults", "-display", "none"])
        .args(["-object", "memory-backend-memfd,id=ram,size=256M,share=on", "-no-reboot", "-serial", "stdio"])
        .arg("-chardev")
        .arg(format!("socket,id=net,path={}", net.socket.display()))
        .args(["-netdev", "vhost-user,id=card,chardev=net", "-device", "virtio-net-pci,netdev=card,vectors=0"])
        .args(["-append", "console=ttyS0 cryptomgr.notests atoll.load=net", "-kernel"])
        .arg(&guest.vmlinux)
        .arg("-initrd")
        .arg(&guest.initramfs);
    let mut guest = Console::spawn(&mut command)?;
    guest.prompt(BOOT_LIMIT)?;
    let address = guest.run(LEASE, STEP)?;
    ensure!(address.contains("inet 10.0.2.15/"), "{address}");
    let got = guest.run(&format!("wget -q -O - http://10.0.2.2:{}/", serve()?), STEP)?;
    ensure!(got == "good morning", "{got}");
    leave(guest)
}

/// Atoll's front end on a passt that is the backend itself: it has the lease, reaches the host's loopback, and has a card
/// that lives on when passt is killed.
#[test]
fn atoll_gets_a_lease_from_passts_own_vhost_user_socket() -> Result<()> {
    let guest = images::guest("6.1")?;
    let modern = passt::with_vhost_user()?;
    let usual = std::env::var_os("PATH").unwrap_or_default();
    let path: OsString = std::env::join_paths(std::iter::once(modern).chain(std::env::split_paths(&usual)))?;
    let demo = Demo { series: "6.1".to_owned(), form: KernelForm::Pvh, cpu: "soft".to_owned() };
    let mut command = demo.command(&guest)?;
    command.env("PATH", path).args(["--net", "user=on"]);
    command.args(["--cmdline", "console=ttyS0 cryptomgr.notests atoll.load=net"]);
    let mut guest = Console::spawn(&mut command)?;
    guest.prompt(BOOT_LIMIT)?;
    ensure!(processes::children_named(guest.pid(), "atoll-net").is_empty(), "passt serves the card by itself");
    let port = serve()?;
    for round in 0..2 {
        let address = guest.run(LEASE, STEP)?;
        ensure!(address.contains("inet "), "round {round}: {address}");
        let route = guest.run("ip -4 route show default", STEP)?;
        let gateway = route.split_whitespace().nth(2).context("DHCP gave no router")?.to_owned();
        let got = guest.run(&format!("wget -q -O - http://{gateway}:{port}/"), STEP)?;
        ensure!(got == "good morning", "round {round}: {got}");
        if round == 0 {
            let children = processes::children(guest.pid());
            let [passt] = children[..] else { anyhow::bail!("the VMM has the processes {children:?}") };
            let line = std::fs::read_to_string(format!("/proc/{passt}/cmdline"))?;
            ensure!(line.contains("--vhost-user"), "{line}");
            processes::signal(passt, Signal::KILL)?;
            processes::wait_gone(passt, STEP)?;
        }
    }
    leave(guest)
}
