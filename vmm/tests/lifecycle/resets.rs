//! Starting again: from the guest and from outside.

use atoll_vmm::lifecycle::{VmControl, VmState};
use atoll_vmm::machine::MachineEnd;
use iced_x86::code_asm::{dword_ptr, eax};

use super::bench::{Bench, COUNTER, count};
use super::kernel::{power_off, print, reset};

/// RAM is as the guest left it, on a real board as here; registers are not. The guest counts its lives in RAM.
#[test]
fn ram_outlives_a_reset() {
    let bench = Bench::new();
    let config = bench.config(|code| {
        print(code, "x");
        let mut last = code.create_label();
        code.inc(dword_ptr(COUNTER)).unwrap();
        code.mov(eax, dword_ptr(COUNTER)).unwrap();
        code.cmp(eax, 5).unwrap();
        code.jae(last).unwrap();
        reset(code);
        code.set_label(&mut last).unwrap();
        print(code, "!");
        power_off(code);
    });
    bench.boot(config);
    for _ in 0..4 {
        assert_eq!([bench.event(), bench.event()], ["vm rebooting", "vm rebooted"]);
    }
    assert_eq!(bench.printed(6), "xxxxx!");
    assert_eq!(bench.end().end, MachineEnd::PowerOff);
}

/// An operator's reset, again and again, in whatever the guest is.
#[test]
fn operator_resets() {
    let bench = Bench::new();
    let config = bench.config(|code| {
        print(code, "x");
        count(code);
    });
    bench.boot(config);
    for lives in 1..=20 {
        assert_eq!(bench.printed(lives).len(), lives);
        // One that stands starts again like any other, and runs.
        if lives % 2 == 0 {
            bench.control.pause().unwrap();
        }
        bench.control.reset().unwrap();
        assert_eq!(bench.control.info().unwrap().state, VmState::Running);
    }
    let end = bench.finish();
    assert!(end.figures.instructions > 0);
}

/// Somebody removed the kernel's file while its guest ran, as a package's upgrade does, and `reset` ended the machine. What a
/// guest was booted from is held: it starts again from that. When it cannot, because somebody has written into the very
/// file, that is a refusal, and the guest runs on.
#[test]
fn a_kernel_that_is_gone_starts_again() {
    let bench = Bench::new();
    let config = bench.config(|code| {
        print(code, "x");
        count(code);
    });
    let kernel = config.payload.kernel.clone().unwrap();
    bench.boot(config);
    bench.printed(1);
    let aside = kernel.with_extension("aside");
    std::fs::rename(&kernel, &aside).unwrap();
    bench.control.reset().unwrap();
    assert_eq!(bench.printed(2), "xx");
    std::fs::write(&kernel, "another, which no machine can boot").unwrap();
    bench.control.reset().unwrap();
    assert_eq!(bench.printed(3), "xxx");
    std::fs::write(&aside, "the same file, cut short").unwrap();
    let refused = bench.control.reset().unwrap_err().to_string();
    assert!(refused.contains("was written to since the machine was booted"), "{refused}");
    assert_eq!(bench.control.info().unwrap().state, VmState::Running);
    bench.control.pause().unwrap();
    bench.control.resume().unwrap();
    bench.finish();
}
