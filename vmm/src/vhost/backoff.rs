//! How long to wait before a backend is started again.

use std::time::Duration;

const FIRST: Duration = Duration::from_millis(10);
const CAP: Duration = Duration::from_secs(2);

/// The first restart comes at once, later ones ever later up to a cap, until a request has been completed. There is no
/// limit on restarts over a lifetime.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Backoff {
    next: Option<Duration>,
}

impl Backoff {
    /// The wait before the next attempt.
    pub(super) fn next(&mut self) -> Duration {
        let now = self.next.unwrap_or(Duration::ZERO);
        self.next = Some((now * 2).clamp(FIRST, CAP));
        now
    }
    /// The backend has completed something.
    pub(super) fn progress(&mut self) {
        self.next = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_restart_is_immediate_and_waits_are_capped() {
        let mut backoff = Backoff::default();
        let waits: Vec<u128> = (0..12).map(|_| backoff.next().as_millis()).collect();
        assert_eq!(waits[..5], [0, 10, 20, 40, 80]);
        assert_eq!(waits[11], 2000);
        backoff.progress();
        assert_eq!(backoff.next(), Duration::ZERO);
    }
}
