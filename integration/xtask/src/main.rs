//! `cargo xtask`: set-up, demo, tests, benchmarks, long runs. Everything is a command that anyone can run.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "xtask talks to a person at a terminal")]

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::process::ExitCode;
use xtask::demo::{Demo, KernelForm};
use xtask::{bench, chaos, fuzz, interop, lab, screen_demo, soak, suite, tidy, tour, verify};

/// Atoll's chores. On a fresh Debian machine with Rust, `demo` and `test` set up all they need.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Fetch packages, make guest images, install peers; afterwards everything runs offline.
    Setup,
    /// Boot Debian's kernel with its root disk in another process, and hand over the shell.
    Demo {
        /// Unattended: boot, write, sync, drop caches, read back, compare, power off; then the tour of networks, folders and
        /// hotplug; JSON on the last line.
        #[arg(long)]
        check: bool,
        /// A guest with a screen: prints the address of the page that shows it. With --check, ends when it shows something.
        #[arg(long, conflicts_with_all = ["kernel", "form", "cpu", "plugs"])]
        gpu: bool,
        /// With --gpu --check: what a browser shows of the page is written here, as a PNG.
        #[arg(long, requires_all = ["gpu", "check"], value_name = "FILE")]
        picture: Option<PathBuf>,
        /// With --check: how often a disk and a card are plugged in and out under I/O.
        #[arg(long, default_value_t = 100)]
        plugs: u32,
        /// Kernel series: 6.1 or 6.12.
        #[arg(long, default_value = "6.1")]
        kernel: String,
        /// How the kernel is entered.
        #[arg(long, value_enum, default_value = "pvh")]
        form: KernelForm,
        /// CPU: auto, kvm or soft.
        #[arg(long, default_value = "auto")]
        cpu: String,
    },
    /// Set up everything and run every test.
    Test {
        /// Passed on to `cargo test`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Check the house rules.
    Tidy,
    /// Measure Atoll beside a peer, in one run.
    Bench {
        #[command(subcommand)]
        what: Bench,
    },
    /// Long, resumable runs.
    Soak {
        #[command(subcommand)]
        what: Soak,
    },
    /// Kill devices under a load that is judged; the last line is JSON. `cargo xtask chaos --help` has the options.
    #[command(disable_help_flag = true)]
    Chaos {
        /// Passed on: `--device`, `--kills`, `--seed`, `--image`, `--sabotage`, `--power-loss`, `--shipped`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Play a load that describes itself, and judge what came of it; the verdict is one line of JSON.
    Verify {
        #[command(subcommand)]
        what: Verify,
    },
    /// Stock guests on real KVM, in an emulated machine that has it; one line of JSON for each scenario.
    Lab {
        /// Which scenarios: kvm, vfio, all, or test: those of `cargo xtask test`.
        #[arg(default_value = "all")]
        what: String,
        /// Passed on: `--all`, `--only NAME,…`, `--list`, `--console`, `--machines N`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Our device processes behind the newest QEMU, which is fetched for it; one line of JSON.
    Interop {
        /// The device.
        #[arg(value_enum, default_value = "nvme")]
        what: Interop,
    },
    /// Run fuzz targets; prints a table and one line of JSON.
    Fuzz {
        /// One target; all of them in turn by default.
        target: Option<String>,
        /// Seconds for each.
        #[arg(long, default_value_t = 60)]
        seconds: u32,
    },
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Interop {
    /// `atoll-nvme` behind QEMU's `vfio-user-pci`.
    Nvme,
    /// `atoll-gpu` behind QEMU's `vhost-user-gpu-pci`, beside QEMU's own device.
    Gpu,
    /// `modetest`'s colour bars: our front end and QEMU's, each with its own device and with QEMU's `vhost-user-gpu`.
    Smpte,
}

#[derive(Subcommand)]
enum Bench {
    /// Kernel's first line to prompt, beside QEMU q35 with TCG.
    Boot {
        /// Kernel series.
        #[arg(long, default_value = "6.1")]
        kernel: String,
        /// Pairs of boots for each command line.
        #[arg(long, default_value = "3")]
        rounds: NonZeroUsize,
    },
    /// Five loops: software CPU, QEMU TCG, native.
    Cpu {
        /// Passed on.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// A screen of 1280 by 800 that scrolls, beside QEMU's virtio-gpu and VNC server: how soon a viewer sees it, and what it costs.
    Gpu {
        /// Pairs of guests.
        #[arg(long, default_value = "3")]
        rounds: NonZeroUsize,
    },
    /// Memory of a running VM besides its RAM, as PSS.
    Memory,
    /// TCP and round trips between a guest and the host over a TAP, beside QEMU TCG (needs root).
    Wire {
        /// Pairs of guests.
        #[arg(long, default_value = "3")]
        rounds: NonZeroUsize,
    },
    /// An exit to a device and back: answered now, later (an actor) and elsewhere (a process).
    Bus {
        /// Passed on.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// The switch of `atoll-net` beside DPDK's testpmd.
    Net {
        /// Passed on.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// How long a kill of a disk's process is felt, beside the start of an empty one, and by guests beside QEMU's.
    Stall {
        /// Kills of each stratum; 0 for guests alone.
        #[arg(long, default_value_t = 100)]
        kills: u32,
        /// Kills of each guest's disk, on Atoll and on QEMU with its fastest reconnect setting; 0 for no guests.
        #[arg(long, default_value_t = 20)]
        guest_kills: u32,
        /// Which guests; all of them by default.
        #[arg(long, value_enum)]
        guest: Vec<bench::reconnect::Stand>,
        /// What the load does follows from it.
        #[arg(long, default_value_t = 9)]
        seed: u64,
        /// Has a spare process wait beside the one that is killed; no guests then.
        #[arg(long)]
        standby: bool,
        /// A short run, of less than three minutes once everything is built.
        #[arg(long)]
        quick: bool,
    },
    /// What it costs for each batch of requests when the VMM keeps account of them (`track=shadow`).
    Track {
        /// Passed on.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// What it costs for each batch of requests when the VMM copies them (`isolation=copy`).
    Isolation {
        /// Passed on.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// `atoll-blk` beside qemu-storage-daemon.
    Blk {
        /// Passed on.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

#[derive(Subcommand)]
enum Soak {
    /// Boots during which the VMM is stopped and continued at random moments.
    Boots {
        /// How many.
        #[arg(long, default_value = "50")]
        count: NonZeroU32,
        /// Says when each stop happens.
        #[arg(long, default_value_t = 0x5eed)]
        seed: u64,
    },
    /// Kills of devices under a load that is judged, many of them, in parts.
    Chaos {
        /// How many.
        #[arg(long, default_value_t = 10_000)]
        kills: u32,
        /// Everything follows from it.
        #[arg(long, default_value_t = 0x5eed)]
        seed: u64,
        /// Where to keep what is done, so that a run that was broken off goes on; in the cache by default.
        #[arg(long)]
        state: Option<PathBuf>,
        /// Passed on: `--device`, `--image`, `--direct`, `--folder`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// A guest under load is paused and let go.
    Pauses {
        /// How many times.
        #[arg(long, default_value = "1000")]
        count: NonZeroU32,
        /// Says when.
        #[arg(long, default_value_t = 0x5eed)]
        seed: u64,
        /// Where to keep what is done, so that a run that was broken off goes on; in the cache by default.
        #[arg(long)]
        state: Option<PathBuf>,
    },
    /// A guest under load is started again, by itself and from outside in turn.
    Reboots {
        /// How many times.
        #[arg(long, default_value = "100")]
        count: NonZeroU32,
        /// Says when.
        #[arg(long, default_value_t = 0x5eed)]
        seed: u64,
        /// Where to keep what is done, so that a run that was broken off goes on; in the cache by default.
        #[arg(long)]
        state: Option<PathBuf>,
    },
    /// A disk and a network card in and out of a running guest, under I/O: what is left of them?
    Plugs {
        /// How often.
        #[arg(long, default_value = "100")]
        count: NonZeroU32,
        /// What the loads do follows from it.
        #[arg(long, default_value_t = 0x5eed)]
        seed: u64,
        /// Kernel series: 6.1 or 6.12.
        #[arg(long, default_value = "6.1")]
        kernel: String,
        /// Where to keep what is done, so that a run that was broken off goes on; in the cache by default.
        #[arg(long)]
        state: Option<PathBuf>,
    },
    /// The process of an idle disk is killed: what is left of it?
    Restarts {
        /// How often.
        #[arg(long, default_value = "10000")]
        count: NonZeroU32,
        /// Where to keep what is done, so that a run that was broken off goes on; in the cache by default.
        #[arg(long)]
        state: Option<PathBuf>,
    },
    /// Two builds of a disk's and of a card's process take turns under load, each verified; prints one JSON line.
    Upgrades {
        /// How often.
        #[arg(long, default_value = "500")]
        count: NonZeroU32,
        /// What the loads do follows from it.
        #[arg(long, default_value_t = 0x5eed)]
        seed: u64,
        /// Where to keep what is done, so that a run that was broken off goes on; in the cache by default.
        #[arg(long)]
        state: Option<PathBuf>,
    },
    /// Differential cases of the software CPU.
    Cpu {
        /// Passed on.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

#[derive(Subcommand)]
enum Verify {
    /// A disk.
    Blk {
        /// How long.
        #[arg(long, default_value_t = 10)]
        seconds: u64,
        /// Everything follows from it.
        #[arg(long, default_value_t = 0x5eed)]
        seed: u64,
        /// Milliseconds between two kills of a device process, on average; 0 for none.
        #[arg(long, default_value_t = 500)]
        kill_every_ms: u64,
        /// In a guest, whose history comes over its serial port; else rings are driven on the host.
        #[arg(long)]
        guest: bool,
        /// With --guest: the disk under load is an NVMe one.
        #[arg(long, requires = "guest")]
        nvme: bool,
        /// Passed on, without --guest.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// A network.
    Net {
        /// How long.
        #[arg(long, default_value_t = 10)]
        seconds: u64,
        /// Everything follows from it.
        #[arg(long, default_value_t = 0x5eed)]
        seed: u64,
        /// Milliseconds between two kills of the switch, on average; 0 for none.
        #[arg(long, default_value_t = 500)]
        kill_every_ms: u64,
        /// Two guests on the ports of a switch; else the host drives the rings of both ports. No kills.
        #[arg(long)]
        guest: bool,
    },
}

fn main() -> Result<ExitCode> {
    match Arguments::parse().task {
        Task::Setup => suite::set_up()?,
        Task::Demo { check, gpu: true, picture, .. } => screen_demo::run(check, picture.as_deref())?,
        Task::Demo { check, gpu: false, kernel, form, cpu, plugs, .. } => {
            let demo = Demo { series: kernel, form, cpu };
            if !check {
                demo.interactive()?;
                return Ok(ExitCode::SUCCESS);
            }
            let outcome = demo.check()?;
            println!("{}", serde_json::to_string(&outcome)?);
            let tour = tour::run(&demo.series, plugs)?;
            let ok = outcome.ok && tour.ok;
            println!("{}", serde_json::json!({ "ok": ok, "boot": outcome, "tour": tour }));
            if !ok {
                return Ok(ExitCode::FAILURE);
            }
        }
        Task::Test { arguments } => suite::run(&arguments)?,
        Task::Tidy => tidy::run()?,
        Task::Bench { what } => match what {
            Bench::Boot { kernel, rounds } => {
                if !bench::boot::run(&kernel, rounds.get())? {
                    return Ok(ExitCode::FAILURE);
                }
            }
            Bench::Memory => {
                if !bench::memory::run()? {
                    return Ok(ExitCode::FAILURE);
                }
            }
            Bench::Gpu { rounds } => {
                if !bench::gpu::run(rounds.get())? {
                    return Ok(ExitCode::FAILURE);
                }
            }
            Bench::Wire { rounds } => {
                if !bench::wire::run(rounds.get())? {
                    return Ok(ExitCode::FAILURE);
                }
            }
            Bench::Cpu { arguments } => bench::cpu(&arguments)?,
            Bench::Net { arguments } => bench::net(&arguments)?,
            Bench::Blk { arguments } => bench::blk(&arguments)?,
            Bench::Bus { arguments } => bench::bus(&arguments)?,
            Bench::Stall { kills, guest_kills, guest, seed, standby, quick } => {
                let (kills, guest_kills) = if quick { (20, guest_kills.min(3)) } else { (kills, guest_kills) };
                let strata = chaos::stall(kills, seed, standby);
                if guest_kills > 0 && !standby {
                    let stands = if guest.is_empty() { &bench::reconnect::Stand::ALL[..] } else { &guest };
                    bench::reconnect::run(stands, guest_kills, seed)?;
                }
                // A limit that was missed is told last.
                strata?;
            }
            Bench::Track { arguments } => bench::track(&arguments)?,
            Bench::Isolation { arguments } => bench::isolation(&arguments)?,
        },
        Task::Soak { what } => match what {
            Soak::Boots { count, seed } => soak::boots(count.get(), seed)?,
            Soak::Pauses { count, seed, state } => soak::pauses(count.get(), seed, state.as_deref())?,
            Soak::Reboots { count, seed, state } => soak::reboots(count.get(), seed, state.as_deref())?,
            Soak::Plugs { count, seed, kernel, state } => soak::plugs(count.get(), seed, &kernel, state.as_deref())?,
            Soak::Restarts { count, state } => soak::restarts(count.get(), state.as_deref())?,
            Soak::Cpu { arguments } => soak::cpu(&arguments)?,
            Soak::Upgrades { count, seed, state } => chaos::upgrades(count.get(), seed, state.as_deref())?,
            Soak::Chaos { kills, seed, state, arguments } => chaos::soak(kills, seed, &arguments, state.as_deref())?,
        },
        Task::Verify { what } => return verify(what),
        Task::Chaos { arguments } => chaos::run(&arguments)?,
        Task::Lab { what, arguments } => lab::run(&what, &arguments)?,
        Task::Interop { what: Interop::Nvme } => interop::nvme::run()?,
        Task::Interop { what: Interop::Gpu } => interop::gpu::run()?,
        Task::Interop { what: Interop::Smpte } => interop::smpte::run()?,
        Task::Fuzz { target, seconds } => {
            if !fuzz::run(target.as_deref(), seconds)? {
                return Ok(ExitCode::FAILURE);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn verify(what: Verify) -> Result<ExitCode> {
    let numbers = |seconds: u64, seed: u64, kills: u64| {
        [("--seconds", seconds), ("--seed", seed), ("--kill-every-ms", kills)]
            .into_iter()
            .flat_map(|(name, value)| [name.to_owned(), value.to_string()])
    };
    let (ok, json) = match what {
        Verify::Blk { seconds, seed, kill_every_ms, guest: false, nvme: _, arguments } => {
            let all = std::iter::once("blk".to_owned()).chain(numbers(seconds, seed, kill_every_ms)).chain(arguments);
            verify::on_host(&all.collect::<Vec<_>>())?;
            return Ok(ExitCode::SUCCESS);
        }
        Verify::Net { seconds, seed, kill_every_ms, guest: false } => {
            let all = std::iter::once("net".to_owned()).chain(numbers(seconds, seed, kill_every_ms));
            verify::on_host(&all.collect::<Vec<_>>())?;
            return Ok(ExitCode::SUCCESS);
        }
        Verify::Blk { seconds, seed, kill_every_ms, nvme, .. } => {
            let guests = if nvme { verify::Guests::on_nvme() } else { verify::Guests::default() };
            let verdict = verify::in_guest(&guests, seed, seconds, kill_every_ms)?;
            (verdict.ok, verdict.json())
        }
        Verify::Net { seconds, seed, .. } => {
            let verdicts = verify::between_guests(&verify::Guests::default(), seed, seconds)?;
            (verdicts.iter().all(|verdict| verdict.ok), serde_json::to_string(&verdicts)?)
        }
    };
    println!("{json}");
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
