//! Rounds interleaved over the three ways to run, so that a change of the machine's load meets all of them; medians,
//! spread, and the verdict against the thresholds.

use super::image::Image;
use super::loops::Loop;
use super::{native, qemu, soft};
use anyhow::ensure;
use serde::Serialize;
use std::fmt;

/// Results of one loop.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Name of the loop.
    #[serde(rename = "loop")]
    pub name: &'static str,
    /// Instructions of the loop, its frame included.
    pub instructions: u64,
    /// Checksum, the same on all three.
    pub checksum: String,
    /// Median speeds.
    pub native_mips: f64,
    /// As above.
    pub soft_mips: f64,
    /// As above.
    pub qemu_mips: f64,
    /// Software CPU to QEMU, by round: least, median, greatest.
    pub ratio_to_qemu: [f64; 3],
    /// Software CPU to native, median.
    pub ratio_to_native: f64,
    /// Least ratio to QEMU that counts as met.
    pub threshold: f64,
    /// Ratio to QEMU that is aimed at.
    pub aim: f64,
    /// Whether the median ratio meets the threshold.
    pub met: bool,
}

/// The whole report.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    bench: &'static str,
    qemu: String,
    rounds: usize,
    rows: Vec<Row>,
    met: bool,
}

impl Report {
    /// Measures `loops` in `rounds` rounds; `progress` hears what runs.
    pub fn measure(loops: &[Loop], rounds: usize, mut progress: impl FnMut(&str)) -> anyhow::Result<Self> {
        ensure!(rounds > 0, "a measurement takes at least one round");
        let version = qemu::version()?;
        let images: Vec<Image> = loops.iter().map(|&which| Image::new(which)).collect::<Result<_, _>>()?;
        let mut samples = vec![Samples::default(); loops.len()];
        for round in 0..rounds {
            for ((&which, image), samples) in loops.iter().zip(&images).zip(&mut samples) {
                progress(&format!("round {} of {rounds}: {}", round + 1, which.name()));
                let bare = native::run(which, image)?;
                let (software, instructions) = soft::run(image)?;
                let tcg = qemu::run(image)?;
                ensure!(
                    bare.checksum == software.checksum && bare.checksum == tcg.checksum,
                    "{} gives {:#x} natively, {:#x} on the software CPU, {:#x} under QEMU",
                    which.name(),
                    bare.checksum,
                    software.checksum,
                    tcg.checksum
                );
                samples.instructions = instructions;
                samples.checksum = bare.checksum;
                samples.native.push(bare.seconds);
                samples.soft.push(software.seconds);
                samples.qemu.push(tcg.seconds);
            }
        }
        let rows: Vec<Row> = loops.iter().zip(samples).map(|(&which, samples)| samples.row(which)).collect();
        let met = rows.iter().all(|row| row.met);
        Ok(Self { bench: "cpu", qemu: version, rounds, rows, met })
    }

    /// Whether every loop meets its threshold.
    pub fn met(&self) -> bool {
        self.met
    }
}

#[derive(Clone, Default)]
struct Samples {
    instructions: u64,
    checksum: u64,
    native: Vec<f64>,
    soft: Vec<f64>,
    qemu: Vec<f64>,
}

impl Samples {
    fn row(mut self, which: Loop) -> Row {
        let mut ratios: Vec<f64> = self.qemu.iter().zip(&self.soft).map(|(qemu, soft)| qemu / soft).collect();
        let mips = |seconds: f64| (self.instructions as f64 / seconds / 1e6).round();
        let ratio = median(&mut ratios);
        let [native, soft, qemu] = [&mut self.native, &mut self.soft, &mut self.qemu].map(|times| median(times));
        Row {
            name: which.name(),
            instructions: self.instructions,
            checksum: format!("{:016x}", self.checksum),
            native_mips: mips(native),
            soft_mips: mips(soft),
            qemu_mips: mips(qemu),
            ratio_to_qemu: [ratios[0], ratio, ratios[ratios.len() - 1]].map(three_digits),
            ratio_to_native: three_digits(native / soft),
            threshold: which.threshold(),
            aim: which.aim(),
            met: ratio >= which.threshold(),
        }
    }
}

fn three_digits(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// Sorts, and returns the middle value.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(out, "{} rounds beside {}", self.rounds, self.qemu)?;
        writeln!(
            out,
            "{:8} {:>12} {:>10} {:>10} {:>10}   {:>22} {:>6} {:>5}",
            "loop", "instructions", "native", "qemu tcg", "atoll", "atoll/qemu (spread)", "least", "aim"
        )?;
        for row in &self.rows {
            let [least, middle, greatest] = row.ratio_to_qemu;
            writeln!(
                out,
                "{:8} {:>12} {:>6.0} MIPS {:>5.0} MIPS {:>5.0} MIPS   {:>22} {:>6} {:>5} {}",
                row.name,
                row.instructions,
                row.native_mips,
                row.qemu_mips,
                row.soft_mips,
                format!("{middle:.2} ({least:.2} to {greatest:.2})"),
                row.threshold,
                row.aim,
                if row.met { "met" } else { "MISSED" }
            )?;
        }
        Ok(())
    }
}
