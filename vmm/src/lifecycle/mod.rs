//! A virtual machine as its operator sees it: create, boot, pause, resume, reset, power button, shutdown, delete, plug and
//! unplug.
//!
//! [`VmControl`] is what the API, the command line and tests hold; each call returns when it is done, or by its deadline
//! with an error that names the step that was late. [`Controller`] is the real one. [`Story`] tells what happened, as it happens.

mod booting;
mod control;
mod controller;
mod error;
mod inspect;
mod keeper;
mod mailbox;
mod plan;
mod plugging;
mod preparing;
mod report;
mod roster;
mod starting_again;
mod story;

pub use control::{DeviceId, Plugged, VmControl};
pub use controller::{Controller, Ended, Home, Settings, VmmEnd};
pub use error::{ErrorKind, VmError};
pub use report::{DeviceReport, DeviceState, QueueReport, RecoveryClass, Standby, Upgraded, VmInfo, VmState};
pub use story::{Heard, Story, StoryEvent, Subscription};
