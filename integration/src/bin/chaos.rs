//! `cargo xtask chaos`: devices are killed under a load that is judged. The last line is JSON; the exit status is 1 when a
//! promise was broken.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use atoll_integration::chaos::campaign::Campaign;
use atoll_integration::chaos::page::Page;
use atoll_integration::chaos::sabotage::{Caught, commit, is_committed_by};
use atoll_integration::chaos::scene::{Class, Image, Plan};
use atoll_integration::chaos::upgrades::Builds;
use atoll_integration::chaos::{power, strata, tap};
use atoll_integration::screen::{self, campaign::Victim};
use atoll_kit::bad_build::Bad;
use atoll_kit::step::Sabotage;
use atoll_vmm::config::Isolation;
use clap::{Parser, ValueEnum};
use xtask::place;

/// What is killed.
#[derive(Clone, Copy)]
enum Device {
    /// Has rings that the campaign itself drives.
    Rings(Class),
    /// Stands between a guest and a person.
    Screen(Victim),
}

impl Device {
    fn read(name: &str) -> Result<Self, String> {
        let rings = Class::from_str(name, false).map(Self::Rings);
        rings.or_else(|_| Victim::from_str(name, false).map(Self::Screen)).map_err(|_| {
            let rings = Class::value_variants().iter().filter_map(ValueEnum::to_possible_value);
            let names = rings.chain(Victim::value_variants().iter().filter_map(ValueEnum::to_possible_value));
            let names: Vec<String> = names.map(|value| value.get_name().to_owned()).collect();
            format!("it is one of {}", names.join(", "))
        })
    }
}

/// Kills devices under load.
#[derive(Parser)]
struct Cli {
    /// Class of the device: blk, nvme, net, rng, console; gpu, display or input of a guest with a screen.
    #[arg(long, value_parser = Device::read, default_value = "blk")]
    device: Device,
    /// How many kills.
    #[arg(long, default_value_t = 200)]
    kills: u64,
    /// The load and what is aimed at follow from it.
    #[arg(long, default_value_t = 0x5eed)]
    seed: u64,
    /// A disk's image.
    #[arg(long, value_enum, default_value = "raw")]
    image: Image,
    /// A disk past the page cache (in a --folder that knows direct I/O).
    #[arg(long)]
    direct: bool,
    /// The backend sees copies of requests and nothing of the memory (isolation=copy); consoles have no such form.
    #[arg(long, conflicts_with_all = ["sabotage", "power_loss", "stall"])]
    copies: bool,
    /// Where images are; in memory by default.
    #[arg(long)]
    folder: Option<PathBuf>,
    /// The programs as they are shipped: kills come from outside only.
    #[arg(long, conflicts_with_all = ["sabotage", "power_loss"])]
    shipped: bool,
    /// Lets a fault loose that the campaign must find: its name, or all.
    #[arg(long, value_name = "NAME")]
    sabotage: Option<String>,
    /// The other claim: what a flush covered survives the loss of power. As many losses as --kills says.
    #[arg(long)]
    power_loss: bool,
    /// Measures how long a kill is felt, stratum by stratum, with --kills kills each; --folder knows direct I/O.
    #[arg(long)]
    stall: bool,
    /// Has a spare process wait beside the one that is killed, for --stall.
    #[arg(long, requires = "stall")]
    standby: bool,
    /// Puts one build in the place of another this often, and kills now and then.
    #[arg(long, value_name = "COUNT", conflicts_with_all = ["sabotage", "power_loss", "stall", "shipped"])]
    upgrades: Option<u64>,
    /// Tries every build that will not do, too.
    #[arg(long, requires = "upgrades")]
    bad_builds: bool,
}

/// Each fault in turn; whether all were found.
#[allow(clippy::print_stdout, reason = "a table for people and a line for programs")]
fn sabotage(name: &str, device: Class, image: Image, kills: u64, seed: u64) -> Result<bool> {
    let wanted: Vec<Sabotage> = Sabotage::ALL
        .into_iter()
        .filter(|sabotage| name == "all" || name == sabotage.name())
        .filter(|sabotage| is_committed_by(*sabotage, device))
        .collect();
    if wanted.is_empty() {
        let able = Sabotage::ALL.iter().filter(|sabotage| is_committed_by(**sabotage, device));
        let names: Vec<_> = able.map(|sabotage| sabotage.name()).collect();
        bail!("--sabotage {name}: name one of {}, or all", names.join(", "));
    }
    let mut all = Vec::new();
    println!("| sabotage | device | caught | kills | strikes | found |\n|---|---|---|---|---|---|");
    for fault in wanted {
        let Caught { sabotage, device, caught, kills, strikes, found } =
            &commit(fault, &place::steps(), device, image, kills, seed).with_context(|| fault.name())?;
        let found = found.first().map(String::as_str).unwrap_or_default();
        println!("| {sabotage} | {device} | {caught} | {kills} | {strikes} | {found} |");
        all.push(serde_json::json!({"sabotage": sabotage, "caught": caught, "kills": kills, "strikes": strikes}));
    }
    let ok = all.iter().all(|one| one["caught"] == true);
    println!(
        "{}",
        serde_json::json!({ "chaos": "sabotage", "ok": ok, "image": image.name(), "seed": seed, "faults": all })
    );
    Ok(ok)
}

#[allow(clippy::print_stdout, clippy::print_stderr, reason = "a table for people and a line for programs")]
fn main() -> Result<ExitCode> {
    let Cli {
        device,
        kills,
        seed,
        image,
        direct,
        copies,
        folder,
        shipped,
        sabotage: fault,
        power_loss,
        stall,
        standby,
        upgrades,
        bad_builds,
    } = Cli::parse();
    let device = match device {
        Device::Rings(class) => class,
        Device::Screen(victim) => {
            ensure!(
                fault.is_none()
                    && !(power_loss || stall || copies || direct || upgrades.is_some())
                    && image == Image::Raw,
                "a screen's processes are killed as they are shipped: give --kills and --seed only"
            );
            let outcome = screen::campaign::run(victim, kills, seed)?;
            println!("{}", serde_json::to_string(&outcome)?);
            return Ok(if outcome.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
    };
    if device == Class::Nvme && (power_loss || stall || upgrades.is_some() || image != Image::Raw || direct) {
        bail!(
            "--device nvme has raw images and kills: no --power-loss, --stall, --upgrades, --image qcow2 or --direct"
        );
    }
    if let Some(name) = fault {
        return Ok(if sabotage(&name, device, image, kills, seed)? { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    if power_loss {
        let losses = power::campaign(&power::page(&place::steps(), image)?, image, kills, seed)?;
        println!("{}", serde_json::to_string(&losses)?);
        return Ok(if losses.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    if stall {
        let folder = folder.context("--stall needs --folder, on a file system that knows direct I/O")?;
        let strata = strata::measure(&place::steps(), &folder, kills, seed, standby)?;
        print!("{}", strata.table());
        println!("{}", serde_json::to_string(&strata)?);
        return Ok(if strata.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    if device == Class::Net {
        tap::leave_network()?;
    }
    ensure!(!copies || device != Class::Console, "--copies: a console has no such form; leave it out");
    let isolation = if copies { Isolation::Copy } else { Isolation::Shared };
    let plan = Plan { class: device, kills, seed, image, direct, isolation, folder, sabotage: None };
    if let Some(count) = upgrades {
        let mut builds = Builds::open(&plan, &place::steps())?;
        builds.run(count)?;
        if bad_builds {
            Bad::ALL.into_iter().try_for_each(|bad| builds.refuse(bad))?;
        }
        let outcome = builds.finish()?;
        println!("{}", serde_json::to_string(&outcome)?);
        return Ok(if outcome.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let page = if shipped { None } else { Some(Page::new(&place::steps(), None)?) };
    let outcome = Campaign::new(&plan, page.as_ref(), &place::release())?.run()?;
    eprint!("{}", outcome.table());
    println!("{}", serde_json::to_string(&outcome)?);
    Ok(if outcome.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
