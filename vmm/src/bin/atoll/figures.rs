//! A machine's figures, read from Prometheus' text: what happened between two readings.

use std::collections::BTreeMap;

/// One line: its labels and its value.
#[derive(Clone, Debug, PartialEq)]
struct Sample {
    labels: Vec<(String, String)>,
    value: f64,
}

impl Sample {
    fn label(&self, name: &str) -> Option<&str> {
        self.labels.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

/// All figures at one moment, by family.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Figures(BTreeMap<String, Vec<Sample>>);

/// `device="a",queue="0"`, with \\, \" and \n in values. `None` where it cannot be read.
fn labels(mut text: &str) -> Option<(Vec<(String, String)>, &str)> {
    let mut labels = Vec::new();
    loop {
        text = text.trim_start_matches(',');
        if let Some(rest) = text.strip_prefix('}') {
            return Some((labels, rest));
        }
        let (name, rest) = text.split_once("=\"")?;
        let mut value = String::new();
        let mut letters = rest.char_indices();
        let end = loop {
            match letters.next()? {
                (at, '"') => break at,
                (_, '\\') => value.push(match letters.next()?.1 {
                    'n' => '\n',
                    letter => letter,
                }),
                (_, letter) => value.push(letter),
            }
        };
        labels.push((name.to_owned(), value));
        text = rest.get(end + 1..)?;
    }
}

fn sample(line: &str) -> Option<(String, Sample)> {
    let (name, rest) = line.split_at_checked(line.find(['{', ' '])?)?;
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(rest) => labels(rest)?,
        None => (Vec::new(), rest),
    };
    let value = rest.split_whitespace().next()?.parse().ok()?;
    Some((name.to_owned(), Sample { labels, value }))
}

impl Figures {
    /// Reads the text; lines that cannot be read are left out.
    pub(crate) fn read(text: &str) -> Self {
        let mut families: BTreeMap<String, Vec<Sample>> = BTreeMap::new();
        for (name, sample) in text.lines().filter(|line| !line.starts_with('#')).filter_map(sample) {
            families.entry(name).or_default().push(sample);
        }
        Self(families)
    }

    /// The sum of a family's samples that have all these labels; `None` when there is no such sample.
    pub(crate) fn sum(&self, family: &str, wanted: &[(&str, &str)]) -> Option<f64> {
        let fits = |sample: &&Sample| wanted.iter().all(|(name, value)| sample.label(name) == Some(*value));
        let mut fitting = self.0.get(family)?.iter().filter(fits).peekable();
        fitting.peek()?;
        Some(fitting.map(|sample| sample.value).sum())
    }

    /// The latencies of a device: how many requests took at most so many seconds.
    fn latencies(&self, device: &str) -> BTreeMap<u64, f64> {
        let mut buckets: BTreeMap<u64, f64> = BTreeMap::new();
        let samples = self.0.get("atoll_device_latency_seconds_bucket").into_iter().flatten();
        for sample in samples.filter(|sample| sample.label("device") == Some(device)) {
            let Some(end) = sample.label("le").and_then(|end| end.parse::<f64>().ok()) else { continue };
            // Times as whole picoseconds have an order.
            let key = if end.is_finite() { (end * 1e12) as u64 } else { u64::MAX };
            *buckets.entry(key).or_default() += sample.value;
        }
        buckets
    }

    /// The time, in microseconds, that `share` of the device's requests since `earlier` did not exceed; `None` when there
    /// was none.
    pub(crate) fn latency_us(&self, earlier: &Self, device: &str, share: f64) -> Option<f64> {
        let before = earlier.latencies(device);
        // Empty buckets at the ends may be left out of the text: there were as many as up to the next lower one.
        let then = |end: u64| before.range(..=end).next_back().map_or(0.0, |(_, count)| *count);
        let since: Vec<(u64, f64)> =
            self.latencies(device).into_iter().map(|(end, count)| (end, count - then(end))).collect();
        let total = since.last().map(|(_, count)| *count).filter(|count| *count > 0.0)?;
        let wanted = total * share;
        let (mut low, mut below) = (0.0, 0.0);
        for (end, count) in since {
            let high = if end == u64::MAX { low } else { end as f64 / 1e6 };
            if count >= wanted {
                let within = if count > below { (wanted - below) / (count - below) } else { 1.0 };
                return Some(low + (high - low) * within);
            }
            (low, below) = (high, count);
        }
        Some(low)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = "# HELP x y\n# TYPE x counter\n\
        x_total{device=\"a\",queue=\"0\"} 3\nx_total{device=\"a\",queue=\"1\"} 4\nx_total{device=\"b\\\"\\n\",queue=\"0\"} 5\n\
        plain 2.5\nbroken{device=\"a\n\
        atoll_device_latency_seconds_bucket{device=\"a\",queue=\"0\",le=\"0.000001\"} 10\n\
        atoll_device_latency_seconds_bucket{device=\"a\",queue=\"0\",le=\"+Inf\"} 10\n";
    const AFTER: &str = "atoll_device_latency_seconds_bucket{device=\"a\",queue=\"0\",le=\"0.000001\"} 10\n\
        atoll_device_latency_seconds_bucket{device=\"a\",queue=\"0\",le=\"0.000002\"} 60\n\
        atoll_device_latency_seconds_bucket{device=\"a\",queue=\"0\",le=\"0.000004\"} 110\n\
        atoll_device_latency_seconds_bucket{device=\"a\",queue=\"0\",le=\"+Inf\"} 110\n";

    #[test]
    fn sums_go_over_queues() {
        let figures = Figures::read(BEFORE);
        assert_eq!(figures.sum("x_total", &[("device", "a")]), Some(7.0));
        assert_eq!(figures.sum("x_total", &[("device", "b\"\n")]), Some(5.0));
        assert_eq!(figures.sum("x_total", &[("device", "c")]), None);
        assert_eq!(figures.sum("plain", &[]), Some(2.5));
        assert_eq!(figures.sum("broken", &[]), None);
    }

    /// Latencies are those between two readings, not those since the machine started.
    #[test]
    fn latencies_are_of_the_interval() {
        let (before, after) = (Figures::read(BEFORE), Figures::read(AFTER));
        assert_eq!(after.latency_us(&before, "a", 0.5), Some(2.0));
        assert_eq!(after.latency_us(&before, "a", 0.75), Some(3.0));
        assert_eq!(after.latency_us(&after, "a", 0.5), None);
        assert_eq!(after.latency_us(&before, "b", 0.5), None);
    }
}
