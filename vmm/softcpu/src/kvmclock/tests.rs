//! The structures that the guest reads.

use crate::state::Exception;
use crate::test_machine::{RAM_BYTES, TestMachine};

const SYSTEM_TIME: u32 = 0x4b56_4d01;
const WALL_CLOCK: u32 = 0x4b56_4d00;
const TSC: u32 = 0x10;

/// What a guest computes (Linux `__pvclock_read_cycles`).
fn guest_time(machine: &mut TestMachine, at: u64, tsc: u64) -> u64 {
    let stamp = machine.read64(at + 8);
    let base = machine.read64(at + 16);
    let multiplier = u128::from(machine.read32(at + 24));
    let [shift, flags] = machine.read16(at + 28).to_le_bytes();
    assert_eq!(flags, 1, "stable across vCPUs");
    base + ((u128::from((tsc - stamp) << shift) * multiplier) >> 32) as u64
}

#[test]
fn a_guest_reads_nanoseconds_from_the_tsc() {
    let mut m = TestMachine::new();
    let at = 0x5ff0;
    m.world.now_ns = 1_000_000;
    m.cpu.write_msr(&mut m.world, SYSTEM_TIME, at | 1).expect("enabled");
    assert_eq!(m.read32(at), 2, "the version is even, and has changed");
    m.world.now_ns = 123_456_789_123;
    let tsc = m.cpu.read_msr(&mut m.world, TSC).expect("TSC");
    assert_eq!(guest_time(&mut m, at, tsc), 123_456_789_123);

    // A new TSC changes the structure, and not the time.
    m.cpu.write_msr(&mut m.world, TSC, 42).expect("TSC");
    assert_eq!(m.read32(at), 4);
    m.world.now_ns += 1000;
    let tsc = m.cpu.read_msr(&mut m.world, TSC).expect("TSC");
    assert_eq!(tsc, 1042);
    assert_eq!(guest_time(&mut m, at, tsc), 123_456_790_123);

    // A guest that left an odd version behind gets an even one all the same.
    m.write(at, &[7, 0, 0, 0]);
    m.cpu.refresh_clock(&mut m.world);
    assert_eq!(m.read32(at), 10);

    m.cpu.write_msr(&mut m.world, SYSTEM_TIME, at).expect("disabled");
    m.cpu.refresh_clock(&mut m.world);
    assert_eq!(m.read32(at), 10);
}

/// The lockup watchdogs of a guest bark after twenty seconds without a tick, unless it is told that it stood.
#[test]
fn a_guest_that_stood_is_told_once() {
    let mut m = TestMachine::new();
    let at = 0x5000;
    m.cpu.tell_stopped(&mut m.world);
    assert_eq!(m.read32(at), 0, "no structure, no word");
    m.cpu.write_msr(&mut m.world, SYSTEM_TIME, at | 1).expect("enabled");
    m.world.now_ns = 60_000_000_000;
    m.cpu.tell_stopped(&mut m.world);
    assert_eq!(m.read16(at + 28).to_le_bytes()[1], 3);
    assert_eq!((m.read32(at), m.read64(at + 16)), (4, 60_000_000_000));
    m.cpu.refresh_clock(&mut m.world);
    assert_eq!(m.read16(at + 28).to_le_bytes()[1], 1);
}

#[test]
fn wall_clock_is_utc_at_time_zero() {
    let mut m = TestMachine::new();
    m.world.wall_ns = 1_700_000_000_987_654_321;
    m.cpu.write_msr(&mut m.world, WALL_CLOCK, 0x6000).expect("wall clock");
    assert_eq!([0, 4, 8].map(|word| m.read32(0x6000 + word)), [2, 1_700_000_000, 987_654_321]);
}

#[test]
fn structures_outside_ram_are_left_out() {
    let mut m = TestMachine::new();
    for at in [RAM_BYTES, 0xfee0_0000, !1, RAM_BYTES - 4] {
        m.cpu.write_msr(&mut m.world, SYSTEM_TIME, at | 1).expect("taken");
        m.cpu.write_msr(&mut m.world, WALL_CLOCK, at).expect("taken");
    }
    assert!(m.world.writes.is_empty());
    assert_eq!(m.cpu.read_msr(&mut m.world, 0x4b56_4d03), Err(Exception::gp(0)), "steal time is not offered");
}
