//! `cargo xtask verify blk`: a load with its judge on `atoll-blk`, without a guest. Prints the verdict as one line of JSON;
//! exits with 1 when a promise was broken.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use atoll_integration::verify::disk_process::DiskProcess;
use atoll_integration::verify::player::{Player, Style};
use atoll_verify::blk::Workload;
use atoll_verify::blk::workload::Mix;
use atoll_verify::dice::{Dice, mix};
use clap::{Parser, Subcommand};
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
        /// Write the history there.
        #[arg(long)]
        history: Option<PathBuf>,
    },
}

#[allow(clippy::print_stdout, reason = "the verdict")]
fn main() -> Result<ExitCode> {
    let Cli { what: What::Blk { seconds, seed, kill_every_ms, sectors, folder, direct, history } } = Cli::parse();
    let folder = match folder {
        Some(parent) => tempfile::tempdir_in(parent)?,
        None => tempfile::tempdir()?,
    };
    let image = folder.path().join("disk.img");
    std::fs::File::create(&image)?.set_len(sectors * 512)?;
    let load = Workload { sectors, mix: Mix::FULL, ..Workload::new(seed) };
    let image = image.to_str().context("a folder with a UTF-8 name")?;
    let mut arguments = vec!["--path", image, "--num-queues", "2"];
    if direct {
        arguments.push("--direct");
    }
    let mut disk = DiskProcess::start(&place::program("atoll-blk")?, folder.path(), &arguments)?;
    let mut player = Player::new(load, Style::default())?;
    if let Some(path) = history {
        player.log_to(Box::new(std::io::BufWriter::new(std::fs::File::create(path)?)));
    }
    player.connect(disk.connect()?)?;
    let mut dice = Dice::new(mix(seed, 0x6b69_6c6c));
    let end = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < end && !player.is_stuck() {
        let pause = if kill_every_ms == 0 { u64::MAX >> 20 } else { dice.below(2_000 * kill_every_ms) };
        let next = Instant::now() + Duration::from_micros(pause);
        player.play(|_| Instant::now() >= next.min(end))?;
        if Instant::now() < end && !player.is_stuck() {
            disk.kill()?;
            player.died()?;
            disk.restart()?;
            player.connect(disk.connect()?)?;
        }
    }
    let verdict = player.finish()?;
    println!("{}", verdict.json());
    Ok(if verdict.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
