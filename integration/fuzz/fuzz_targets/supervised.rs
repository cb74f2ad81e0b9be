//! A device process that says what it likes on its sidecar, at any time, in any order: the watch over it never panics,
//! keeps a bounded account of queues, and once it has decided on the process' end it starts nothing more.
#![no_main]

use std::time::Duration;

use atoll_protocol::frame::decode_body;
use atoll_protocol::sidecar::{DeviceClass, SidecarReport};
use atoll_protocol::{Generation, Kind};
use atoll_vmm::actor::Moment;
use atoll_vmm::backend::{ExitCause, JailPolicy, Watch, WatchAction, WatchLimits};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((first, mut rest)) = bytes.split_first() else { return };
    let policy = [JailPolicy::Strict, JailPolicy::Default, JailPolicy::Off][usize::from(first % 3)];
    let mut now = Moment::from_start(Duration::ZERO);
    let mut watch = Watch::new(DeviceClass::Block, Generation(1), WatchLimits::default(), now).jailed(policy);
    // A byte of time, a byte of length, the body of one word.
    while let Some(([wait, length], after)) = rest.split_first_chunk::<2>() {
        let (body, after) = after.split_at(after.len().min(usize::from(*length)));
        rest = after;
        now = now.after(Duration::from_millis(u64::from(*wait) * 100));
        let mut actions = watch.check(now);
        if let Ok(report) = decode_body::<SidecarReport>(Kind::SidecarReport, body) {
            actions.extend(watch.hear(report, now));
        }
        let _ = watch.next_deadline();
        for action in actions {
            if let WatchAction::Kill(cause) = action {
                assert!(!matches!(cause, ExitCause::Unjailed(_)) || policy == JailPolicy::Strict);
                watch.leaving();
                assert!(watch.check(now).is_empty() && watch.next_deadline().is_none());
                return;
            }
        }
    }
});
