//! Standing and going on.

use std::time::Duration;

use atoll_vmm::lifecycle::VmControl;
use atoll_vmm::machine::MachineEnd;

use super::bench::{Bench, chatter, labour};

/// A paused guest executes nothing; a resumed one goes on where it stood.
#[test]
fn a_paused_guest_stands() {
    let bench = Bench::new();
    bench.boot(bench.config(chatter));
    let control = &bench.control;
    for _ in 0..5 {
        let before = bench.printed(1).len();
        bench.printed(before + 1);
        control.pause().unwrap();
        let instructions = || control.inspect("vcpus/vcpu0/instructions").unwrap().as_u64().unwrap();
        let stood = instructions();
        // What the port held was still on its way.
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!((instructions(), control.inspect("vcpus/vcpu0/phase").unwrap()), (stood, "standing".into()));
        let printed = bench.printed(1).len();
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(bench.printed(1).len(), printed);
        control.resume().unwrap();
        bench.printed(printed + 1);
    }
    bench.finish();
}

/// In deterministic mode nobody inside can tell that, or when, somebody outside has paused.
#[test]
fn pauses_leave_no_trace_in_deterministic_mode() {
    let run = |pauses: u32| {
        let bench = Bench::new();
        let mut config = bench.config(|code| labour(code, 20_000));
        config.platform.deterministic = true;
        bench.boot(config);
        let mut paused = 0;
        for _ in 0..pauses {
            std::thread::sleep(Duration::from_micros(300));
            // It may be over.
            if bench.control.pause().is_err() {
                break;
            }
            paused += 1;
            bench.control.resume().unwrap();
        }
        let end = bench.end();
        assert_eq!(end.end, MachineEnd::PowerOff);
        (end.figures.trace_hash.unwrap(), end.figures.instructions, paused)
    };
    let (hash, instructions, _) = run(0);
    let (again, same, paused) = run(40);
    assert!(paused > 3, "{paused}");
    assert_eq!((again, same), (hash, instructions));
}
