//! Limits of a device's data path.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::keyvalue::{Bytes, KeyError, Options};

/// A token bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TokenBucketConfig {
    /// Tokens (bytes or operations) that it holds.
    pub size: u64,
    /// Tokens beyond that, spent once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    /// Milliseconds in which an empty bucket fills up.
    pub refill_time: u64,
}

/// Limits of a device's data path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct RateLimiterConfig {
    /// Bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucketConfig>,
    /// Operations or packets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucketConfig>,
}

/// Keys of the rate limits.
const LIMITS: [&str; 6] =
    ["bw_size", "bw_one_time_burst", "bw_refill_time", "ops_size", "ops_one_time_burst", "ops_refill_time"];

/// `keys` and those of the rate limits.
pub(super) fn with_keys(keys: &[&'static str]) -> Vec<&'static str> {
    keys.iter().chain(&LIMITS).copied().collect()
}

fn bucket(options: &Options, [size, burst, refill]: [&'static str; 3]) -> Result<Option<TokenBucketConfig>, KeyError> {
    let given: Option<Bytes> = options.get(size)?;
    let one_time_burst = options.get::<Bytes>(burst)?.map(|bytes| bytes.0);
    let refill_time = options.get::<u64>(refill)?;
    match (given, refill_time) {
        (Some(Bytes(size)), Some(refill_time)) => Ok(Some(TokenBucketConfig { size, one_time_burst, refill_time })),
        (None, None) if one_time_burst.is_none() => Ok(None),
        (None, _) => Err(KeyError::Missing(size)),
        (_, None) => Err(KeyError::Missing(refill)),
    }
}

/// What they say.
pub(super) fn read(options: &Options) -> Result<Option<RateLimiterConfig>, KeyError> {
    let [bw_size, bw_burst, bw_refill, ops_size, ops_burst, ops_refill] = LIMITS;
    let bandwidth = bucket(options, [bw_size, bw_burst, bw_refill])?;
    let ops = bucket(options, [ops_size, ops_burst, ops_refill])?;
    Ok((bandwidth.is_some() || ops.is_some()).then_some(RateLimiterConfig { bandwidth, ops }))
}
