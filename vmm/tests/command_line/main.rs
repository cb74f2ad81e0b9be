//! `atoll` as its users meet it: exit statuses, one-line errors, the terminal given back, nothing left behind.

mod ends;
mod kernel;
mod mistakes;
mod operate;
mod process;
mod terminal;
