//! The table, the verdict and the line for programs.

use serde_json::{Value, json};

use super::backend::Medium;
use super::load::Sample;

/// What was measured for one medium and load: (atoll, qemu) of each round.
#[derive(Debug)]
pub struct Case {
    /// Medium.
    pub medium: Medium,
    /// Load.
    pub load: &'static str,
    /// One pair per round.
    pub pairs: Vec<(Sample, Sample)>,
}

/// Everything that was measured.
#[derive(Debug, Default)]
pub struct Report {
    /// Loads.
    pub cases: Vec<Case>,
    /// KiB of (atoll, qemu) without guest memory.
    pub memory: Vec<(Medium, u64, u64)>,
    /// Percent of a processor of (atoll, qemu) when idle.
    pub idle: Vec<(Medium, f64, f64)>,
}

/// A figure that is compared: smaller is better for times, larger for rates.
#[derive(Debug, Clone, Copy)]
struct Figure {
    name: &'static str,
    of: fn(&Sample) -> f64,
    larger_is_better: bool,
}

const P50: Figure = Figure { name: "p50 us", of: |s| s.p50_us, larger_is_better: false };
const CPU: Figure = Figure { name: "cpu us/io", of: |s| s.cpu_us, larger_is_better: false };
const IOPS: Figure = Figure { name: "kiops", of: |s| s.iops / 1e3, larger_is_better: true };
const RATE: Figure = Figure { name: "GB/s", of: |s| s.bytes_per_second / 1e9, larger_is_better: true };

/// What is judged of a load; the sequential rate is only shown.
fn figures(load: &str) -> &'static [(Figure, bool)] {
    match load {
        "qd1" => &[(P50, true), (CPU, true)],
        "qd32" => &[(IOPS, true), (CPU, true)],
        _ => &[(RATE, false)],
    }
}

/// Atoll's share of qemu's figure that is allowed at most (times) or at least (rates).
fn limit(medium: Medium, load: &str, figure: &Figure) -> f64 {
    match (medium, load, figure.name) {
        (Medium::Tmpfs, "qd1", "p50 us") => 0.5,
        (Medium::Tmpfs, "qd32", "cpu us/io") => 0.8,
        _ => 1.0,
    }
}

/// Most percent of a processor when idle.
pub const IDLE_PERCENT_MAX: f64 = 0.1;
/// Most KiB without guest memory.
pub const MEMORY_KIB_MAX: u64 = 6 << 10;

struct Line {
    case: String,
    figure: &'static str,
    atoll: f64,
    qemu: f64,
    ratio: f64,
    low: f64,
    high: f64,
    limit: Option<f64>,
    met: bool,
}

impl Report {
    fn lines(&self) -> Vec<Line> {
        let mut lines = Vec::new();
        for case in &self.cases {
            for (figure, judged) in figures(case.load) {
                let atoll = median(case.pairs.iter().map(|(a, _)| (figure.of)(a)));
                let qemu = median(case.pairs.iter().map(|(_, q)| (figure.of)(q)));
                let mut ratios: Vec<f64> = case.pairs.iter().map(|(a, q)| (figure.of)(a) / (figure.of)(q)).collect();
                ratios.sort_by(f64::total_cmp);
                let ratio = median(ratios.iter().copied());
                let limit = judged.then(|| limit(case.medium, case.load, figure));
                let met = limit.is_none_or(|l| if figure.larger_is_better { ratio >= l } else { ratio <= l });
                lines.push(Line {
                    case: format!("{} {}", case.medium, case.load),
                    figure: figure.name,
                    atoll,
                    qemu,
                    ratio,
                    low: ratios.first().copied().unwrap_or(f64::NAN),
                    high: ratios.last().copied().unwrap_or(f64::NAN),
                    limit,
                    met,
                });
            }
        }
        lines
    }

    /// True when every threshold is met.
    pub fn met(&self) -> bool {
        self.lines().iter().all(|line| line.met)
            && self.idle.iter().all(|(_, atoll, _)| *atoll <= IDLE_PERCENT_MAX)
            && self.memory.iter().all(|(_, atoll, _)| *atoll <= MEMORY_KIB_MAX)
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut out = format!(
            "{:<16}{:<11}{:>9}{:>9}{:>8}{:>16}{:>8}  verdict\n",
            "case", "figure", "atoll", "qemu", "ratio", "spread", "limit"
        );
        for line in self.lines() {
            let limit = line.limit.map_or_else(|| "-".to_owned(), |l| format!("{l:.2}"));
            out += &format!(
                "{:<16}{:<11}{:>9.2}{:>9.2}{:>8.2}{:>16}{:>8}  {}\n",
                line.case,
                line.figure,
                line.atoll,
                line.qemu,
                line.ratio,
                format!("{:.2} .. {:.2}", line.low, line.high),
                limit,
                if line.met { "ok" } else { "MISSED" },
            );
        }
        for (medium, atoll, qemu) in &self.idle {
            let verdict = if *atoll <= IDLE_PERCENT_MAX { "ok" } else { "MISSED" };
            out += &format!(
                "{:<16}{:<11}{atoll:>9.3}{qemu:>9.3}{:>32.2}  {verdict}\n",
                format!("{medium} idle"),
                "cpu %",
                IDLE_PERCENT_MAX
            );
        }
        for (medium, atoll, qemu) in &self.memory {
            let verdict = if *atoll <= MEMORY_KIB_MAX { "ok" } else { "MISSED" };
            out += &format!(
                "{:<16}{:<11}{atoll:>9}{qemu:>9}{MEMORY_KIB_MAX:>32}  {verdict}\n",
                format!("{medium} memory"),
                "PSS KiB"
            );
        }
        out
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let lines: Vec<Value> = self
            .lines()
            .iter()
            .map(|l| {
                json!({
                    "case": l.case, "figure": l.figure, "atoll": l.atoll, "qemu": l.qemu, "ratio": l.ratio,
                    "low": l.low, "high": l.high, "limit": l.limit, "ok": l.met,
                })
            })
            .collect();
        let rows = |rows: Vec<(Medium, f64, f64)>| -> Vec<Value> {
            rows.iter().map(|(m, a, q)| json!({"medium": m.to_string(), "atoll": a, "qemu": q})).collect()
        };
        json!({
            "ok": self.met(),
            "figures": lines,
            "idle_cpu_percent": rows(self.idle.clone()),
            "pss_kib": rows(self.memory.iter().map(|(m, a, q)| (*m, *a as f64, *q as f64)).collect()),
        })
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
