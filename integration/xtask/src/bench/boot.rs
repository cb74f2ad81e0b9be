//! `cargo xtask bench boot`: the same kernel and initramfs on Atoll's software CPU and on QEMU's, in turn.

use super::spread::Spread;
use crate::demo::{Demo, KernelForm, timed_boot};
use crate::{images, packages, place, yardstick};
use anyhow::Result;
use serde::Serialize;

/// Slowest allowed ratio of Atoll to QEMU.
const RATIO_MAX: f64 = 4.0;
/// Slowest allowed boot from exec to prompt, in milliseconds.
const BOOT_MS_MAX: f64 = 20_000.0;

#[derive(Serialize)]
struct Line {
    bench: &'static str,
    kernel: &'static str,
    cmdline: &'static str,
    rounds: usize,
    atoll_first_line_to_prompt_ms: Spread,
    qemu_first_line_to_prompt_ms: Spread,
    ratio: Spread,
    boot_ms: Spread,
    ok: bool,
}

/// Runs `rounds` pairs for each command line; `false` if a figure is missed.
pub fn run(series: &str, rounds: usize) -> Result<bool> {
    packages::ensure_peers(&["qemu-system-x86_64", "mkfs.ext4"])?;
    let guest = images::guest(series)?;
    place::build_programs()?;
    let mut all_ok = true;
    for (name, cmdline) in [("stock", "console=ttyS0"), ("notests", "console=ttyS0 cryptomgr.notests")] {
        let (mut ours, mut theirs, mut ratios, mut boots) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for round in 1..=rounds {
            let demo = Demo { series: series.to_owned(), form: KernelForm::Pvh, cpu: "soft".to_owned() };
            let mut command = demo.command(&guest)?;
            command.args(["--cmdline", cmdline]);
            let (boot, from_first_line) = timed_boot(&mut command)?;
            let (_, qemu) = timed_boot(&mut yardstick::qemu(&guest.vmlinux, &guest, cmdline))?;
            let ms = |duration: std::time::Duration| duration.as_secs_f64() * 1e3;
            eprintln!(
                "{name} round {round}/{rounds}: atoll {:.0} ms, QEMU {:.0} ms, ratio {:.2}",
                ms(from_first_line),
                ms(qemu),
                ms(from_first_line) / ms(qemu)
            );
            ours.push(ms(from_first_line));
            theirs.push(ms(qemu));
            ratios.push(ms(from_first_line) / ms(qemu));
            boots.push(ms(boot));
        }
        let ratio = Spread::of(ratios);
        let boot_ms = Spread::of(boots);
        let ok = ratio.median <= RATIO_MAX && boot_ms.median <= BOOT_MS_MAX;
        all_ok &= ok;
        let line = Line {
            bench: "boot",
            kernel: guest.series,
            cmdline: name,
            rounds,
            atoll_first_line_to_prompt_ms: Spread::of(ours),
            qemu_first_line_to_prompt_ms: Spread::of(theirs),
            ratio,
            boot_ms,
            ok,
        };
        println!("{}", serde_json::to_string(&line)?);
    }
    Ok(all_ok)
}
