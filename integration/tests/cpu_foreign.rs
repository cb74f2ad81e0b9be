//! What native thunks compute, judged by an emulator: the host cannot be its own oracle.

use atoll_integration::cpu_emulator::{Emulator, PROGRAM};
use atoll_softcpu::oracle::Family;
use std::path::Path;

fn compare(family: Family, cases: u64) {
    let emulator = Emulator { program: Path::new(PROGRAM), runner: Path::new(env!("CARGO_BIN_EXE_cpu-oracle")) };
    let mut mismatches = Vec::new();
    let compared = emulator
        .compare(1, family, 0..cases, |mismatch| {
            mismatches.push(mismatch.to_string());
            false
        })
        .unwrap_or_else(|error| panic!("{error:#}"));
    assert!(mismatches.is_empty(), "{}", mismatches[0]);
    assert!(compared > cases / 3, "only {compared} of {cases} cases could be compared");
}

#[test]
fn vector_instructions_agree_with_qemu() {
    compare(Family::Vector, 49_152);
}

#[test]
fn x87_instructions_agree_with_qemu() {
    compare(Family::X87, 49_152);
}
