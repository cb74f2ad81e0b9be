//! A device process that has gone over to the guest. It tries everything that its jail forbids, each in a process of its own,
//! and prints what came of it: one line of tab-separated words for each attempt.
#![allow(unsafe_code, reason = "descriptors come as numbers")]

use std::ffi::CString;
use std::fs::File;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::PathBuf;

use anyhow::{Context, Result};
use atoll_integration::hostile::calls::{ATTEMPTS, CONTROL};
use atoll_integration::hostile::cell::{self, Wall};
use atoll_integration::hostile::{Outcome, Victim};
use atoll_kit::jail::{self, Profile};
use clap::Parser;

/// Tries everything that the jail of a device process forbids.
#[derive(Debug, Parser)]
#[command(name = "hostile-backend")]
struct Cli {
    /// Whose jail: blk, probe, net, net-tap, rng, console, vsock, gpu, input, display, uart or generic
    #[arg(long)]
    profile: String,
    /// A file that it must not reach
    #[arg(long)]
    file: PathBuf,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let profile = Profile::ALL.into_iter().find(|profile| profile.name == cli.profile).context("no such profile")?;
    // As device processes do, first of all.
    jail::begin(&[], false)?;
    let name = format!("atoll-victim-{}", std::process::id());
    let _listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name)?)?;
    let tcp = TcpListener::bind(("127.0.0.1", 0))?;
    let victim = victim(&cli, name, tcp.local_addr()?.port())?;
    print(profile, &victim)
}

fn victim(cli: &Cli, abstract_name: String, port: u16) -> Result<Victim> {
    let program = rustix::fs::memfd_create(c"program", rustix::fs::MemfdFlags::empty())?;
    rustix::io::write(&program, &std::fs::read("/bin/true")?)?;
    Ok(Victim {
        path: CString::new(cli.file.as_os_str().as_encoded_bytes())?,
        abstract_name,
        port,
        pid: i32::try_from(std::process::id())?,
        root: File::options().read(true).custom_flags(libc::O_DIRECTORY).open("/")?.into_raw_fd(),
        network: File::open("/proc/self/ns/net")?.into_raw_fd(),
        program: program.into_raw_fd(),
        event: rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK)?.into_raw_fd(),
    })
}

#[allow(clippy::print_stdout, reason = "its report")]
fn print(profile: &'static Profile, victim: &Victim) -> Result<()> {
    let tell = |wall: &str, name: &str, outcome: Outcome| {
        let verdict = if outcome.is_harmless() { "ok" } else { "BREACH" };
        println!("{verdict}\t{wall}\t{name}\t{outcome}");
    };
    println!("whole\t{}\t\t", cell::is_whole(profile)?);
    for attempt in ATTEMPTS.iter().filter(|attempt| CONTROL.contains(&attempt.name)) {
        let outcome = cell::call(profile, Wall::None, attempt, victim)?;
        let verdict = if outcome.is_harmless() { "DUD" } else { "ok" };
        println!("{verdict}\tno jail\t{}\t{outcome}", attempt.name);
    }
    for attempt in ATTEMPTS {
        tell("filter", attempt.name, cell::call(profile, Wall::Whole, attempt, victim)?);
        if attempt.walls {
            tell("walls", attempt.name, cell::call(profile, Wall::WithoutFilter, attempt, victim)?);
        }
    }
    for (name, outcome) in cell::ring(profile, Wall::WithoutFilter, victim)? {
        tell("ring", &name, outcome);
    }
    // With the filter, which a ring walks around: the same, for those that have one.
    if !["uart", "display", "probe"].contains(&profile.name) {
        for (name, outcome) in cell::ring(profile, Wall::Whole, victim)? {
            tell("ring+filter", &name, outcome);
        }
    }
    let alive = std::fs::metadata(std::path::Path::new(victim.path.to_str()?)).is_ok_and(|file| file.len() == 8);
    println!("{}\tvictim\tthe file that it must not reach\t{}", if alive { "ok" } else { "BREACH" }, tell_fd(victim));
    Ok(())
}

fn tell_fd(victim: &Victim) -> String {
    format!("process {} and descriptor {} live on", victim.pid, victim.event.as_raw_fd())
}
