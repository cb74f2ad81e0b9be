//! The table, the verdict and the line for programs.

use serde_json::{Value, json};
use xtask::bench::spread::Spread;

use super::Sample;
use crate::blk_bench::placement::Placement;

/// Most of the floor's time.
const TIME_MAX: f64 = 1.5;
/// Most of the floor's processor time.
const CPU_MAX: f64 = 2.0;
/// Which floor a way is set beside.
const BESIDE: [(&str, &str); 3] =
    [("now", "floor: two threads"), ("later", "floor: two threads"), ("elsewhere", "floor: two processes")];

/// Everything that was measured: by placement, the samples of each round by way.
#[derive(Debug, Default)]
pub struct Report {
    rounds: Vec<(Placement, Vec<(&'static str, Sample)>)>,
}

struct Line {
    placement: Placement,
    way: &'static str,
    p50_us: f64,
    floor_us: f64,
    time: Spread,
    cpu: Spread,
}

impl Line {
    fn met(&self) -> bool {
        self.time.median <= TIME_MAX && self.cpu.median <= CPU_MAX
    }
}

fn find(samples: &[(&'static str, Sample)], way: &str) -> Option<Sample> {
    samples.iter().find(|(name, _)| *name == way).map(|(_, sample)| *sample)
}

impl Report {
    /// One more round.
    pub fn add(&mut self, placement: Placement, samples: Vec<(&'static str, Sample)>) {
        self.rounds.push((placement, samples));
    }

    fn lines(&self) -> Vec<Line> {
        let mut lines = Vec::new();
        for placement in Placement::ALL {
            for (way, floor) in BESIDE {
                let pairs: Vec<(Sample, Sample)> = self
                    .rounds
                    .iter()
                    .filter(|(at, _)| *at == placement)
                    .filter_map(|(_, samples)| Some((find(samples, way)?, find(samples, floor)?)))
                    .collect();
                let spread = |of: fn(&(Sample, Sample)) -> f64| Spread::of(pairs.iter().map(of).collect());
                lines.push(Line {
                    placement,
                    way,
                    p50_us: spread(|pair| pair.0.p50_us).median,
                    floor_us: spread(|pair| pair.1.p50_us).median,
                    time: spread(|pair| pair.0.p50_us / pair.1.p50_us),
                    cpu: spread(|pair| pair.0.cpu_us / pair.1.cpu_us),
                });
            }
        }
        lines
    }

    /// Every way keeps to the limits in both fixed placements. Where the scheduler puts the two sides is a mixture of
    /// these two, whose prices differ by twenty, and seldom the same mixture for a way and for its floor: it is shown and
    /// does not count.
    pub fn met(&self) -> bool {
        self.lines().iter().filter(|line| line.placement != Placement::Free).all(Line::met)
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{:10} {:10} {:>8} {:>8}  time / floor (limit {TIME_MAX})  cpu / floor (limit {CPU_MAX})\n",
            "placement", "answer", "p50 us", "floor"
        );
        for line in self.lines() {
            let verdict = match line.placement {
                Placement::Free => "  (does not count)",
                _ if line.met() => "",
                _ => "  over",
            };
            text += &format!(
                "{:10} {:10} {:8.2} {:8.2}  {:24}  {}{verdict}\n",
                line.placement.to_string(),
                line.way,
                line.p50_us,
                line.floor_us,
                line.time.to_string(),
                line.cpu
            );
        }
        text
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let lines: Vec<Value> = self
            .lines()
            .iter()
            .map(|line| {
                json!({
                    "placement": line.placement.to_string(), "answer": line.way, "p50_us": line.p50_us,
                    "floor_us": line.floor_us, "time": line.time, "cpu": line.cpu, "met": line.met(),
                })
            })
            .collect();
        json!({ "bench": "bus", "lines": lines, "ok": self.met() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(later: f64) -> Report {
        let mut report = Report::default();
        let sample = |p50_us| Sample { p50_us, cpu_us: p50_us };
        for placement in Placement::ALL {
            let samples = vec![
                ("floor: two threads", sample(10.0)),
                ("floor: two processes", sample(20.0)),
                ("now", sample(0.1)),
                ("later", sample(later)),
                ("elsewhere", sample(25.0)),
            ];
            report.add(placement, samples);
        }
        report
    }

    #[test]
    fn a_way_that_takes_too_long_is_told() {
        assert!(report(14.9).met());
        assert!(!report(15.1).met());
        assert!(report(15.1).table().contains("over"));
        assert_eq!(report(1.0).json()["ok"], true);
    }
}
