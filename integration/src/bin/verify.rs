//! `cargo xtask verify`: loads with their judges on `atoll-blk` and `atoll-net`, without a guest. Prints the verdict as one
//! line of JSON; exits with 1 when a promise was broken.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use atoll_integration::verify::device_process::DeviceProcess;
use atoll_integration::verify::player::{Player, Style};
use atoll_integration::verify::talk::talk;
use atoll_verify::blk::workload::Mix;
use atoll_verify::blk::{Verdict, Workload};
use atoll_verify::dice::{Dice, mix};
use clap::{Parser, Subcommand, ValueEnum};
use xtask::place;

/// Loads that describe themselves, judged.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// A disk process, killed and started again under load.
    Blk {
        /// How long.
        #[arg(long, default_value_t = 10)]
        seconds: u64,
        /// Everything follows from it.
        #[arg(long, default_value_t = 0x5eed)]
        seed: u64,
        /// Milliseconds between two kills, on average; 0 for none.
        #[arg(long, default_value_t = 100)]
        kill_every_ms: u64,
        /// Sectors in use.
        #[arg(long, default_value_t = 2048)]
        sectors: u64,
        /// Folder of the image; a temporary one by default.
        #[arg(long)]
        folder: Option<PathBuf>,
        /// Past the page cache.
        #[arg(long)]
        direct: bool,
        /// What the image is. A qcow2 image is checked by qemu-img after each kill and at the end.
        #[arg(long, value_enum, default_value = "raw")]
        image: Image,
        /// Write the history there.
        #[arg(long)]
        history: Option<PathBuf>,
    },
    /// Two ports of a switch, killed and started again while two streams pass it.
    Net {
        /// How long.
        #[arg(long, default_value_t = 10)]
        seconds: u64,
        /// Everything follows from it.
        #[arg(long, default_value_t = 0x5eed)]
        seed: u64,
        /// Milliseconds between two kills, on average; 0 for none.
        #[arg(long, default_value_t = 500)]
        kill_every_ms: u64,
    },
}

/// What a disk's image is.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Image {
    Raw,
    Qcow2,
}

/// A load on a disk.
struct Disk {
    seconds: u64,
    seed: u64,
    kill_every_ms: u64,
    sectors: u64,
    folder: Option<PathBuf>,
    direct: bool,
    image: Image,
    history: Option<PathBuf>,
}

#[allow(clippy::print_stdout, reason = "the verdict")]
fn main() -> Result<ExitCode> {
    let (ok, json) = match Cli::parse().what {
        What::Blk { seconds, seed, kill_every_ms, sectors, folder, direct, image, history } => {
            let disk = Disk { seconds, seed, kill_every_ms, sectors, folder, direct, image, history };
            let verdict = disk.verify()?;
            (verdict.ok, verdict.json())
        }
        What::Net { seconds, seed, kill_every_ms } => {
            let folder = tempfile::tempdir()?;
            let arguments = ["--switch", "--ports", "2"];
            let mut switch = DeviceProcess::start(&place::program("atoll-net")?, folder.path(), &arguments)?;
            let talk = talk(&mut switch, seed, Duration::from_secs(seconds), kill_every_ms)?;
            (talk.ok, serde_json::to_string(&talk)?)
        }
    };
    println!("{json}");
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Disk {
    fn verify(self) -> Result<Verdict> {
        let Self { seconds, seed, kill_every_ms, sectors, folder, direct, image: kind, history } = self;
        let folder = match folder {
            Some(parent) => tempfile::tempdir_in(parent)?,
            None => tempfile::tempdir()?,
        };
        let image = folder.path().join("disk.img");
        match kind {
            Image::Raw => std::fs::File::create(&image)?.set_len(sectors * 512)?,
            Image::Qcow2 => {
                qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k"], &image, Some(sectors * 512))?;
            }
        }
        let load = Workload { sectors, mix: Mix::FULL, ..Workload::new(seed) };
        let image = image.to_str().context("a folder with a UTF-8 name")?;
        let format = if kind == Image::Qcow2 { "qcow2" } else { "raw" };
        let mut arguments = vec!["--path", image, "--image-type", format, "--num-queues", "2"];
        let sound = || match kind {
            Image::Raw => Ok(()),
            Image::Qcow2 => qemu_img(&["check", "-q", "-U"], Path::new(image), None),
        };
        if direct {
            arguments.push("--direct");
        }
        let mut disk = DeviceProcess::start(&place::program("atoll-blk")?, folder.path(), &arguments)?;
        let mut player = Player::new(load, Style::default())?;
        if let Some(path) = history {
            player.log_to(Box::new(std::io::BufWriter::new(std::fs::File::create(path)?)));
        }
        player.connect(disk.connect()?)?;
        let mut dice = Dice::new(mix(seed, 0x6b69_6c6c));
        let end = Instant::now() + Duration::from_secs(seconds);
        while Instant::now() < end && !player.is_stuck() {
            let next = match kill_every_ms {
                0 => end,
                every => end.min(Instant::now() + Duration::from_micros(dice.below(2000 * every))),
            };
            player.play(|_| Instant::now() >= next)?;
            if Instant::now() < end && !player.is_stuck() {
                disk.kill()?;
                player.died()?;
                sound()?;
                disk.restart()?;
                player.connect(disk.connect()?)?;
            }
        }
        let verdict = player.finish()?;
        disk.kill()?;
        sound()?;
        Ok(verdict)
    }
}

/// Runs qemu-img; leaked clusters, which a kill may leave, are no error of an image.
fn qemu_img(arguments: &[&str], image: &Path, bytes: Option<u64>) -> Result<()> {
    let mut command = Command::new("qemu-img");
    command.args(arguments).arg(image).args(bytes.map(|bytes| bytes.to_string()));
    let out = command.output().context("qemu-img does not start: install the package qemu-utils")?;
    let leaks_only = arguments.first() == Some(&"check") && out.status.code() == Some(3);
    let text = || format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    ensure!(out.status.success() || leaks_only, "qemu-img {arguments:?}: {}", text());
    Ok(())
}
