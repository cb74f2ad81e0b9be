//! Runs scenarios inside the lab; the lab's initramfs starts it with their names.

use std::process::ExitCode;

use anyhow::Result;

fn main() -> Result<ExitCode> {
    let names: Vec<String> = std::env::args().skip(1).collect();
    atoll_lab::inside::run(&names)?;
    // A scenario that failed has said so in its report; whoever reads them judges.
    Ok(ExitCode::SUCCESS)
}
