//! vfio-user, the client: a PCI device that another process serves.
//!
//! [`builder`] puts one on the board ([`bare`] does without): from [`greeting`] it knows what the server is, and shows the guest a [`function`] with
//! that identity and those BARs. The table of MSI-X vectors is here, as for every function; everything else of a BAR is asked of
//! the server, one [`conversation`] with a time limit on every word. Doorbells go past it ([`doorbells`]): a value in memory
//! that both share, and a signal.
//!
//! A server may die at any moment. The device's thread ([`worker`]) hears of it and goes by the same machine as the
//! vhost-user devices do (`vhost::recovery`): kill, reap, fence, successor, hand over. What is handed over here is
//! guest memory and vectors instead of rings. What a successor of a process of ours has to know is in the *record*, a memfd
//! of this process ([`record`]) which each incarnation is started with; a guest's register access waits for the
//! successor meanwhile, its doorbells are put into the record.

mod bare;
mod builder;
mod conversation;
mod device;
mod doorbells;
mod estranged;
mod function;
mod greeting;
mod hands;
mod next;
mod record;
mod source;
#[cfg(test)]
mod tests;
mod worker;

pub use bare::{Bare, StatusWatch};
pub use builder::{Described, Served, UserBuilder};
pub use conversation::TalkError;
pub use greeting::{Shape, ShapeError};
