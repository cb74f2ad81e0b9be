//! End-to-end tests, peers and benchmark programs: the room that depends on every other.
//!
//! Tests live in `tests/`, one story a file; guests are driven over their serial port by `xtask::console`.

pub mod blk_bench;
pub mod bus_bench;
pub mod canary;
pub mod chaos;
pub mod cpu_bench;
pub mod cpu_clock;
pub mod cpu_emulator;
pub mod guests;
pub mod hostile;
pub mod net_bench;
pub mod peers;
pub mod plugs;
pub mod restarts;
pub mod screen;
pub mod track_bench;
pub mod verify;
pub use xtask::processes;
