//! What comes out of the lab, a line each: what a scenario says of itself, and once a second that the machine still runs.

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::time::Duration;

/// Says that the machine runs.
pub const PULSE: &str = "{\"pulse\":true}\n";

/// A line from the lab.
#[derive(Clone, Debug, PartialEq)]
pub enum Line {
    /// The machine runs.
    Pulse,
    /// A scenario has ended.
    Report(Report),
}

impl Line {
    /// Reads a line.
    ///
    /// # Errors
    /// When it is neither.
    pub fn read(line: &str) -> Result<Self> {
        if line.trim() == PULSE.trim() {
            return Ok(Self::Pulse);
        }
        let report = serde_json::from_str(line.trim()).with_context(|| format!("not a report: {line}"))?;
        Ok(Self::Report(report))
    }
}

/// What came of one scenario.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Its name.
    pub scenario: String,
    /// Whether all was as it must be.
    pub ok: bool,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What it measured.
    #[serde(flatten)]
    pub figures: Map<String, Value>,
}

impl Report {
    /// The report of a scenario that ended with `result`.
    pub fn of(scenario: &str, took: Duration, result: Result<Map<String, Value>>) -> Self {
        let (ok, error, figures) = match result {
            Ok(figures) => (true, None, figures),
            Err(error) => (false, Some(format!("{error:#}")), Map::new()),
        };
        let seconds = (took.as_secs_f64() * 10.0).round() / 10.0;
        Self { scenario: scenario.to_owned(), ok, seconds, error, figures }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_stand_beside_the_verdict() -> Result<()> {
        let figures = serde_json::json!({ "boot_ms": 4000 }).as_object().cloned().unwrap_or_default();
        let report = Report::of("boot", Duration::from_millis(4321), Ok(figures));
        let line = serde_json::to_string(&report)?;
        assert_eq!(line, r#"{"scenario":"boot","ok":true,"seconds":4.3,"boot_ms":4000}"#);
        assert_eq!(Line::read(&line)?, Line::Report(report));
        assert_eq!(Line::read(PULSE)?, Line::Pulse);
        assert!(Line::read("{\"pulse\":false}").is_err());
        let failed = Report::of("boot", Duration::ZERO, Err(anyhow::anyhow!("cause").context("what")));
        assert_eq!((failed.ok, failed.error.as_deref()), (false, Some("what: cause")));
        Ok(())
    }
}
