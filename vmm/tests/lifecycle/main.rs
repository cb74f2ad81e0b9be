//! A machine as its operator drives it, in this process, with guests of a few instructions.

mod bench;
#[path = "../command_line/kernel.rs"]
#[allow(dead_code, reason = "shared with the tests of the command line, which use all of it")]
mod kernel;
mod late;
mod leaks;
mod pauses;
mod resets;
mod silent;
mod states;
