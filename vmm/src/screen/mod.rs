//! What a person sees of the machine and does to it: where the process that draws, the one that shows and those that type meet.
//!
//! None of them knows another. Whoever draws gets one end of a new pair of sockets (GPU_SET_SOCKET) whenever it or the display
//! is new, and the display gets the other: nothing that was half said to one that is dead is heard by its successor. What is
//! typed goes over pairs of SOCK_SEQPACKET that are made once and outlive everybody, because there a message is whole or
//! nothing.

mod builder;
mod error;
mod joint;
mod line;
mod place;

pub use builder::DisplayBuilder;
pub use error::DisplayError;
pub use joint::Joint;
pub use line::{DisplayLine, WhereToLook};
