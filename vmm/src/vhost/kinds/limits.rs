//! Rate limits, as the command lines of our own backends take them.

use std::ffi::OsString;

use crate::config::{RateLimiterConfig, TokenBucketConfig};

/// `--rate-bytes SIZE,REFILL_MS[,BURST]` and `--rate-ops` of the same form.
pub(super) fn rate_arguments(limits: &RateLimiterConfig) -> Vec<OsString> {
    let bucket = |flag: &str, bucket: TokenBucketConfig| {
        let TokenBucketConfig { size, one_time_burst, refill_time } = bucket;
        let burst = one_time_burst.map(|burst| format!(",{burst}")).unwrap_or_default();
        [OsString::from(flag), format!("{size},{refill_time}{burst}").into()]
    };
    // A bucket without size or without time is no limit, as clients of Cloud Hypervisor know it.
    let real = |limit: Option<TokenBucketConfig>| limit.filter(|limit| limit.size > 0 && limit.refill_time > 0);
    let bytes = real(limits.bandwidth).into_iter().flat_map(|limit| bucket("--rate-bytes", limit));
    let ops = real(limits.ops).into_iter().flat_map(|limit| bucket("--rate-ops", limit));
    bytes.chain(ops).collect()
}
