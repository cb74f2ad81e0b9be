//! Networks: two numbered streams, one each way, whose frames are checked to the last bit.
//!
//! A [`talker::Talker`] is one end, as pure code: it says what to send, is told what came, and judges the stream towards
//! it ([`stream`]). Frames ([`frame`]) also carry how far the other stream has been heard, so that an end sends no more
//! than a window ahead and a network without deaths has no reason to lose anything. [`packet`] is the end in a guest; the
//! integration room has one that drives a card's rings.

pub mod frame;
pub mod packet;
pub mod stream;
pub mod talker;

pub use stream::{Heard, Promise};
pub use talker::{TalkVerdict, Talker};
