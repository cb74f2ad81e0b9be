//! A person in front of a machine: a guest that paints ([`guest`]), a viewer that types (`xtask::viewer`), and the deaths of the
//! processes in between ([`campaign`]).

pub mod campaign;
pub mod guest;
