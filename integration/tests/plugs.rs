//! A disk and a network card come and go under I/O, and nothing of them is left.

use anyhow::Result;
use atoll_integration::plugs::{Plan, run};

fn comes_and_goes(series: &str) -> Result<()> {
    let outcome = run(&Plan { series: series.to_owned(), count: 6, seed: 0x5eed }, |_| ())?;
    assert!(outcome.ok, "{outcome:#?}");
    let (stayed, plugged) = (outcome.stayed.counts, outcome.plugged.counts);
    assert!(stayed.reads > 50 && plugged.reads > 50 && plugged.resets == 5, "{outcome:#?}");
    Ok(())
}

#[test]
fn under_debian_6_1() -> Result<()> {
    comes_and_goes("6.1")
}

#[test]
fn under_debian_6_12() -> Result<()> {
    comes_and_goes("6.12")
}
