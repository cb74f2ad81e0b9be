//! The table, the verdict and the line for programs.

use serde_json::{Value, json};

use super::load::Sample;

/// Atoll's frames per second over the yardstick's must be at least this.
pub const RATIO_MIN: f64 = 0.7;

/// What was measured for one length: (atoll, yardstick) of each round.
#[derive(Debug)]
pub struct Case {
    /// Bytes of a frame.
    pub bytes: u32,
    /// One pair per round.
    pub pairs: Vec<(Sample, Sample)>,
}

/// Everything that was measured.
#[derive(Debug)]
pub struct Report {
    /// What Atoll was set beside.
    pub yardstick: &'static str,
    /// One for each length.
    pub cases: Vec<Case>,
    /// Percent of a processor that an idle switch takes.
    pub idle_percent: f64,
}

struct Line {
    bytes: u32,
    atoll: f64,
    yardstick: f64,
    ratio: f64,
    low: f64,
    high: f64,
    cpu: (f64, f64),
    driver: (f64, f64),
    lost: (f64, f64),
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Report {
    fn lines(&self) -> Vec<Line> {
        let line = |case: &Case| {
            let mut ratios: Vec<f64> =
                case.pairs.iter().map(|(a, y)| a.frames_per_second / y.frames_per_second).collect();
            ratios.sort_by(f64::total_cmp);
            let both = |of: fn(&Sample) -> f64| {
                (median(case.pairs.iter().map(|(a, _)| of(a))), median(case.pairs.iter().map(|(_, y)| of(y))))
            };
            let (atoll, yardstick) = both(|s| s.frames_per_second);
            Line {
                bytes: case.bytes,
                atoll,
                yardstick,
                ratio: median(ratios.iter().copied()),
                low: ratios.first().copied().unwrap_or(f64::NAN),
                high: ratios.last().copied().unwrap_or(f64::NAN),
                cpu: both(|s| s.cpu_ns),
                driver: both(|s| s.driver_ns),
                lost: both(|s| s.lost),
            }
        };
        self.cases.iter().map(line).collect()
    }

    /// True when every limit is met.
    pub fn met(&self) -> bool {
        self.lines().iter().all(|line| line.ratio >= RATIO_MIN)
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut out = format!(
            "{:<12}{:>12}{:>12}{:>8}{:>16}{:>8}{:>18}{:>16}{:>16}  verdict\n",
            "frames",
            "atoll k/s",
            format!("{} k/s", self.yardstick),
            "ratio",
            "spread",
            "limit",
            "cpu ns/frame",
            "driver ns",
            "lost %"
        );
        for line in self.lines() {
            out += &format!(
                "{:<12}{:>12.0}{:>12.0}{:>8.2}{:>16}{:>8.2}{:>18}{:>16}{:>16}  {}\n",
                format!("{} bytes", line.bytes),
                line.atoll / 1e3,
                line.yardstick / 1e3,
                line.ratio,
                format!("{:.2} .. {:.2}", line.low, line.high),
                RATIO_MIN,
                format!("{:.0} / {:.0}", line.cpu.0, line.cpu.1),
                format!("{:.0} / {:.0}", line.driver.0, line.driver.1),
                format!("{:.1} / {:.1}", line.lost.0 * 100.0, line.lost.1 * 100.0),
                if line.ratio >= RATIO_MIN { "ok" } else { "MISSED" },
            );
        }
        out += &format!("idle, atoll: {:.3} % of a processor\n", self.idle_percent);
        out
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let lines: Vec<Value> = self
            .lines()
            .iter()
            .map(|l| {
                json!({
                    "bytes": l.bytes, "atoll_fps": l.atoll, "yardstick_fps": l.yardstick, "ratio": l.ratio,
                    "low": l.low, "high": l.high, "limit": RATIO_MIN, "ok": l.ratio >= RATIO_MIN,
                    "atoll_cpu_ns": l.cpu.0, "yardstick_cpu_ns": l.cpu.1,
                    "atoll_driver_ns": l.driver.0, "yardstick_driver_ns": l.driver.1, "atoll_lost": l.lost.0, "yardstick_lost": l.lost.1,
                })
            })
            .collect();
        json!({
            "ok": self.met(), "yardstick": self.yardstick, "figures": lines, "idle_cpu_percent": self.idle_percent,
        })
    }
}
