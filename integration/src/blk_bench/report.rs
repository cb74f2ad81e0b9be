//! The table, the verdict and the line for programs.
//!
//! A figure is met when the scheduler's placement keeps to the limit, or when both fixed placements do: then only the
//! mixture of placements made it look dearer, see [`placement`](super::placement). The rows of the fixed placements say
//! whether they keep to the limit and decide nothing else.

use serde_json::{Value, json};

use super::backend::Medium;
use super::load::Sample;
use super::placement::Placement;

/// What was measured for one medium and load: (atoll, qemu) of each round.
#[derive(Debug)]
pub struct Case {
    /// Medium.
    pub medium: Medium,
    /// Load.
    pub load: &'static str,
    /// Where both sides ran.
    pub placement: Placement,
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
    load: (Medium, &'static str),
    figure: &'static str,
    atoll: f64,
    qemu: f64,
    ratio: f64,
    low: f64,
    high: f64,
    limit: Option<f64>,
    within: bool,
    /// Only the scheduler's placement has a verdict.
    met: Option<bool>,
}

impl Line {
    fn verdict(&self) -> &'static str {
        match (self.met, self.within) {
            (Some(true), true) => "ok",
            (Some(true), false) => "ok in each placement",
            (Some(false), _) => "MISSED",
            (None, true) => "within",
            (None, false) => "over",
        }
    }
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
                let within = limit.is_none_or(|l| if figure.larger_is_better { ratio >= l } else { ratio <= l });
                lines.push(Line {
                    case: format!("{} {} {}", case.medium, case.load, case.placement),
                    load: (case.medium, case.load),
                    figure: figure.name,
                    atoll,
                    qemu,
                    ratio,
                    low: ratios.first().copied().unwrap_or(f64::NAN),
                    high: ratios.last().copied().unwrap_or(f64::NAN),
                    limit,
                    within,
                    met: (case.placement == Placement::Free).then_some(within),
                });
            }
        }
        let fixed = |of: &Line| {
            let rows = lines.iter().filter(|l| l.met.is_none() && l.load == of.load && l.figure == of.figure);
            rows.clone().count() == Placement::ALL.len() - 1 && rows.clone().all(|l| l.within)
        };
        let met: Vec<Option<bool>> = lines.iter().map(|l| l.met.map(|met| met || fixed(l))).collect();
        for (line, met) in lines.iter_mut().zip(met) {
            line.met = met;
        }
        lines
    }

    /// True when every threshold is met.
    pub fn met(&self) -> bool {
        self.lines().iter().all(|line| line.met != Some(false))
            && self.idle.iter().all(|(_, atoll, _)| *atoll <= IDLE_PERCENT_MAX)
            && self.memory.iter().all(|(_, atoll, _)| *atoll <= MEMORY_KIB_MAX)
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut out = format!(
            "{:<22}{:<11}{:>9}{:>9}{:>8}{:>16}{:>8}  verdict\n",
            "case", "figure", "atoll", "qemu", "ratio", "spread", "limit"
        );
        for line in self.lines() {
            let limit = line.limit.map_or_else(|| "-".to_owned(), |l| format!("{l:.2}"));
            out += &format!(
                "{:<22}{:<11}{:>9.2}{:>9.2}{:>8.2}{:>16}{:>8}  {}\n",
                line.case,
                line.figure,
                line.atoll,
                line.qemu,
                line.ratio,
                format!("{:.2} .. {:.2}", line.low, line.high),
                limit,
                line.verdict(),
            );
        }
        for (medium, atoll, qemu) in &self.idle {
            let verdict = if *atoll <= IDLE_PERCENT_MAX { "ok" } else { "MISSED" };
            out += &format!(
                "{:<22}{:<11}{atoll:>9.3}{qemu:>9.3}{:>32.2}  {verdict}\n",
                format!("{medium} idle"),
                "cpu %",
                IDLE_PERCENT_MAX
            );
        }
        for (medium, atoll, qemu) in &self.memory {
            let verdict = if *atoll <= MEMORY_KIB_MAX { "ok" } else { "MISSED" };
            out += &format!(
                "{:<22}{:<11}{atoll:>9}{qemu:>9}{MEMORY_KIB_MAX:>32}  {verdict}\n",
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
                    "low": l.low, "high": l.high, "limit": l.limit, "within": l.within, "ok": l.met,
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

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(cpu_us: f64) -> Sample {
        Sample { p50_us: 1.0, iops: 1.0, cpu_us, bytes_per_second: 1.0 }
    }

    /// QD1 on nothing, with the peer's CPU per I/O as 1 and ours in each placement.
    fn report(ours: [f64; 3]) -> Report {
        let cases = Placement::ALL.into_iter().zip(ours).map(|(placement, cpu)| {
            let pairs = vec![(sample(cpu), sample(1.0)); 3];
            Case { medium: Medium::Null, load: "qd1", placement, pairs }
        });
        Report { cases: cases.collect(), ..Report::default() }
    }

    #[test]
    fn a_figure_is_met_as_the_scheduler_places_or_in_both_fixed_placements() {
        assert!(report([0.9, 2.0, 0.5]).met());
        assert!(report([2.0, 0.9, 0.5]).met(), "only the mixture is dearer");
        assert!(!report([2.0, 1.1, 0.5]).met());
        assert!(!report([2.0, 0.5, 1.1]).met());
        let mut alone = report([2.0, 0.5, 0.5]);
        alone.cases.truncate(2);
        assert!(!alone.met(), "one fixed placement says too little");
    }
}
