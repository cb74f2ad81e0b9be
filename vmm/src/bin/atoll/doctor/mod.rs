//! `doctor`: what this machine can do for virtual machines, and how to mend what it cannot.
//!
//! Each check tries the thing itself where that is possible: a file that opens, a call that the kernel answers, a guest
//! that runs.

mod host;
mod jail;
mod kernel;

use std::io::IsTerminal;

use serde::Serialize;

use crate::operate::{print, print_json};

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Verdict {
    /// All that there is can be used.
    Ok,
    /// Something will not work, or not as well.
    Warn,
    /// Without it there is no machine, or no device of an important kind.
    Fail,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Check {
    /// What was looked at.
    check: &'static str,
    verdict: Verdict,
    /// What was found.
    found: String,
    /// How to mend it.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
    /// A CPU that can run a guest.
    #[serde(skip)]
    runs_guests: bool,
}

impl Check {
    fn new(check: &'static str, verdict: Verdict, found: impl Into<String>, remedy: Option<String>) -> Self {
        Self { check, verdict, found: found.into(), remedy, runs_guests: false }
    }
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self::new(check, Verdict::Ok, found, None)
    }
    fn warn(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(check, Verdict::Warn, found, Some(remedy.into()))
    }
    fn fail(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(check, Verdict::Fail, found, Some(remedy.into()))
    }
    fn is_ok(&self) -> bool {
        self.verdict == Verdict::Ok
    }
    fn runs_guests(self) -> Self {
        Self { runs_guests: true, ..self }
    }
}

fn checks() -> Vec<Check> {
    let mut checks = kernel::cpus();
    checks.extend(host::memory());
    checks.extend(jail::checks());
    checks.extend(kernel::networks());
    checks.extend(host::limits());
    checks.extend(host::passthrough());
    checks.extend(host::programs());
    checks
}

/// The lines, with what to do below those that are not ok.
fn shown(checks: &[Check], colour: bool) -> String {
    let width = checks.iter().map(|check| check.check.len()).max().unwrap_or(0);
    let mut text = String::new();
    for check in checks {
        let (word, code) = match check.verdict {
            Verdict::Ok => ("ok  ", 32),
            Verdict::Warn => ("warn", 33),
            Verdict::Fail => ("FAIL", 31),
        };
        let word = if colour { format!("\x1b[{code}m{word}\x1b[0m") } else { word.into() };
        text.push_str(&format!("{word}  {:<width$}  {}\n", check.check, check.found));
        if let Some(remedy) = &check.remedy {
            text.push_str(&format!("      {:<width$}  -> {remedy}\n", ""));
        }
    }
    text
}

/// `doctor`; the exit status.
pub(crate) fn doctor(as_json: bool) -> anyhow::Result<u8> {
    let checks = checks();
    if as_json {
        print_json(&checks)?;
    } else {
        print(&shown(&checks, std::io::stdout().is_terminal()))?;
    }
    Ok(u8::from(!checks.iter().any(|check| check.runs_guests)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every check that is not ok says what to do; the machine that runs this test can run a guest on some CPU.
    #[test]
    fn what_is_wrong_comes_with_a_remedy() {
        let checks = checks();
        assert!(checks.iter().any(|check| check.runs_guests));
        for check in &checks {
            assert_eq!(check.remedy.is_none(), check.verdict == Verdict::Ok, "{check:?}");
            assert!(!check.found.is_empty() && !check.found.contains('\n'), "{check:?}");
        }
    }

    #[test]
    fn remedies_stand_below() {
        let checks = [Check::ok("cpu", "fine"), Check::warn("tap", "none", "modprobe tun")];
        assert_eq!(shown(&checks, false), "ok    cpu  fine\nwarn  tap  none\n           -> modprobe tun\n");
    }
}
