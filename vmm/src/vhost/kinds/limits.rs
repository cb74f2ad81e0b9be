//! Rate limits, as the command lines of our own backends take them.

use std::ffi::OsString;

use crate::config::{RateLimiterConfig, TokenBucketConfig};

/// `--rate-bytes SIZE,REFILL_MS[,BURST]` and `--rate-ops` of the same form.
pub(super) fn rate_arguments(limits: &RateLimiterConfig) -> Vec<OsString> {
    let bucket = |flag: &str, bucket: &TokenBucketConfig| {
        let TokenBucketConfig { size, one_time_burst, refill_time } = bucket;
        let burst = one_time_burst.map(|burst| format!(",{burst}")).unwrap_or_default();
        [OsString::from(flag), format!("{size},{refill_time}{burst}").into()]
    };
    let bytes = limits.bandwidth.iter().flat_map(|limit| bucket("--rate-bytes", limit));
    let ops = limits.ops.iter().flat_map(|limit| bucket("--rate-ops", limit));
    bytes.chain(ops).collect()
}
