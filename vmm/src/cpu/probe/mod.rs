//! Whether KVM on this host can run a stock guest: `/dev/kvm` and CPU flags prove nothing, so a tiny guest is run once.
//!
//! Some hosts have a KVM that interprets guest code, a million instructions a second, and gives up at instructions that
//! every kernel uses. The answer holds until the host boots again and is remembered under its boot id.

mod guest;
mod memo;

use std::fmt;
use std::fs::OpenOptions;
use std::time::Duration;

pub use memo::Memo;

/// How long the tiny guest may take; real hardware needs a hundredth of it.
const GUEST_TIME_MAX: Duration = Duration::from_millis(500);

/// Whether KVM can run a stock guest, and how that is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether it can.
    pub usable: bool,
    /// Why, as the end of a sentence.
    pub reason: String,
}

impl fmt::Display for Verdict {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let taken = if self.usable { "KVM" } else { "the software CPU" };
        write!(formatter, "{taken}, because {}", self.reason)
    }
}

/// Asks this host, or the memo of an earlier question.
pub fn probe(memo: Option<&Memo>) -> Verdict {
    // Permissions may change at any time and cost nothing to ask: they are not remembered.
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return Verdict { usable: false, reason: format!("/dev/kvm cannot be opened ({error})") };
    }
    if let Some(known) = memo.and_then(Memo::recall) {
        return known;
    }
    let verdict = match guest::run(GUEST_TIME_MAX) {
        Ok(()) => Verdict { usable: true, reason: "a test guest ran on it at full speed".into() },
        Err(obstacle) => Verdict { usable: false, reason: obstacle.to_string() },
    };
    if let Some(memo) = memo {
        memo.note(&verdict);
    }
    verdict
}
