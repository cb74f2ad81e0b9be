//! The client against servers that do everything right, and everything wrong.

mod device;
mod fake;
mod words;
