//! The verifier: loads that describe themselves, and judges that need nothing but the history.
//!
//! A load is a pure function of its seed. What a program does with a disk or a network is written down as it happens, at a
//! place that survives whatever the campaign kills, and judged afterwards by pure code. There are two drivers of each
//! load: a program in the guest (`atoll-verify`, this crate's binary, linked statically) and one on the host that plays
//! guest and VMM itself (the integration room's `verify`). Begin with [`blk`], then [`net`]; [`dma`] drives a
//! disk from user space, to have it reach what it may not.

pub mod blk;
pub mod dice;
pub mod dma;
pub mod net;
