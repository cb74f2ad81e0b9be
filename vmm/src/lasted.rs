//! How long something lasted, as people say it.

use std::fmt;
use std::time::Duration;

/// Shows a duration with as many digits as matter: `870 us`, `42 ms`, `5 s`, `2.5 s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lasted(pub(crate) Duration);

impl fmt::Display for Lasted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Rounded: what is left of a deadline a moment after it was set is called by its name.
        let [us, ms, tenths] = [1_000, 1_000_000, 100_000_000].map(|unit| (self.0.as_nanos() + unit / 2) / unit);
        match (us, ms, tenths % 10) {
            (0..1_000, ..) => write!(f, "{us} us"),
            (_, 0..1_000, _) => write!(f, "{ms} ms"),
            (_, _, 0) => write!(f, "{} s", tenths / 10),
            (_, _, rest) => write!(f, "{}.{rest} s", tenths / 10),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_digits_than_matter() {
        let shown = |nanos| Lasted(Duration::from_nanos(nanos)).to_string();
        let all = [870_400, 42_999_999, 5_000_111_118, 2_540_000_000, 999_999_999, 61_000_000_000].map(shown);
        assert_eq!(all, ["870 us", "43 ms", "5 s", "2.5 s", "1 s", "61 s"]);
    }
}
