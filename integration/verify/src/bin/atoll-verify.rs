//! The verifier's program in the guest: plays a load and tells its history, for a judge outside.
//!
//! `atoll-verify blk device=/dev/vdb seed=1 seconds=10 out=/dev/ttyS0` tells the history of a load on a disk;
//! `atoll-verify net interface=eth0 seed=1 seconds=10` talks with another end and prints what it heard;
//! `atoll-verify dma device=0000:00:04.0` drives a disk behind the IOMMU from user space,
//! `atoll-verify edu device=0000:00:04.0` QEMU's teaching device. Numbers are decimal.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for a shell")]

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use atoll_verify::blk::guest::{Plan, run};
use atoll_verify::blk::workload::{Mix, Workload};
use atoll_verify::dma;
use atoll_verify::net::{Promise, packet};

const USAGE: &str = "usage: atoll-verify blk device=PATH [seed=N] [seconds=N] [first=LBA] [sectors=N] [max=SECTORS] \
                     [writers=N] [mix=plain|full] [epoch=N] [deadline=SECONDS] [stop=FILE] [out=PATH]\n   \
                     or: atoll-verify net interface=NAME [seed=N] [seconds=N] [me=0|1] [window=N] [deaths=N] \
                     [grace=SECONDS] [stop=FILE]\n   or: atoll-verify dma|card|edu device=PLACE";

struct Words(HashMap<String, String>);

impl Words {
    fn number(&mut self, name: &str, usual: u64) -> Result<u64, String> {
        match self.0.remove(name) {
            Some(text) => text.parse().map_err(|_| format!("{name}={text} is no number")),
            None => Ok(usual),
        }
    }

    fn out(&mut self) -> Result<Box<dyn Write + Send>, String> {
        match self.0.remove("out") {
            Some(path) => {
                let file = File::options().append(true).create(true).open(&path);
                Ok(Box::new(file.map_err(|e| format!("cannot write to {path}: {e}"))?))
            }
            None => Ok(Box::new(std::io::stdout())),
        }
    }

    fn ended(&self) -> Result<(), String> {
        self.0.keys().next().map_or(Ok(()), |name| Err(format!("{name}= is unknown\n{USAGE}")))
    }
}

fn blk(words: &mut Words) -> Result<(), String> {
    let load = Workload {
        seed: words.number("seed", 0x5eed)?,
        first_lba: words.number("first", 0)?,
        sectors: words.number("sectors", 2048)?,
        sectors_max: words.number("max", 32)?.clamp(1, 2048) as u32,
        writers: words.number("writers", 4)?.clamp(1, 64) as u16,
        mix: match words.0.remove("mix").as_deref() {
            None | Some("plain") => Mix::PLAIN,
            Some("full") => Mix::FULL,
            Some(other) => return Err(format!("mix={other}: plain or full")),
        },
    };
    let plan = Plan {
        device: words.0.remove("device").ok_or(USAGE)?.into(),
        load,
        epoch: words.number("epoch", 0)? as u32,
        length: Duration::from_secs(words.number("seconds", 10)?),
        stop: words.0.remove("stop").map(Into::into),
        threads: load.writers,
        deadline: Duration::from_secs(words.number("deadline", 30)?),
    };
    let out = words.out()?;
    words.ended()?;
    run(&plan, out).map_err(|e| format!("{}: {e}", plan.device.display()))
}

fn dma(words: &mut Words, drive: fn(&str) -> std::io::Result<dma::DmaVerdict>) -> Result<(), String> {
    let place = words.0.remove("device").ok_or(USAGE)?;
    words.ended()?;
    let verdict = drive(&place).map_err(|e| format!("{place}: {e}"))?;
    println!("{}", verdict.json());
    Ok(())
}

fn net(words: &mut Words) -> Result<(), String> {
    let window = words.number("window", 32)?;
    let plan = packet::Plan {
        interface: words.0.remove("interface").ok_or(USAGE)?,
        seed: words.number("seed", 0x5eed)?,
        me: words.number("me", 0)? as u8,
        window,
        length: Duration::from_secs(words.number("seconds", 10)?),
        stop: words.0.remove("stop").map(Into::into),
        grace: Duration::from_secs(words.number("grace", 20)?),
        promise: Promise::with_deaths(words.number("deaths", 0)?, window),
    };
    words.ended()?;
    let verdict = packet::run(&plan).map_err(|e| format!("{}: {e}", plan.interface))?;
    println!("{}", verdict.json());
    Ok(())
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let what = arguments.next().unwrap_or_default();
    let mut words =
        Words(arguments.filter_map(|word| word.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned()))).collect());
    let outcome = match what.as_str() {
        "blk" => blk(&mut words),
        "net" => net(&mut words),
        "dma" => dma(&mut words, dma::run),
        "card" => dma(&mut words, dma::on_a_card),
        "edu" => dma(&mut words, dma::edu::run),
        _ => Err(USAGE.to_owned()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            eprintln!("atoll-verify: {text}");
            ExitCode::FAILURE
        }
    }
}
