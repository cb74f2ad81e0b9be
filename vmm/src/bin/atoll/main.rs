//! The command line comes with the serial port.
fn main() {}
