//! A million random cases against the host processor. `cargo xtask soak cpu` runs more.

use atoll_softcpu::oracle::{Family, soak};

fn run(family: Family, cases: u64) {
    if let Err(error) = soak(1, family, 0..cases, |_| true) {
        panic!("{error}");
    }
}

#[test]
fn integer_instructions_agree_with_the_host() {
    run(Family::Integer, 1_500_000);
}

#[test]
fn vector_thunks_agree_with_the_host() {
    run(Family::Vector, 300_000);
}

#[test]
fn x87_thunks_agree_with_the_host() {
    run(Family::X87, 100_000);
}
