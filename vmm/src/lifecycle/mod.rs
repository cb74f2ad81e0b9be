//! A virtual machine as its operator sees it: create, boot, pause, resume, reset, power button, shutdown, delete, plug and
//! unplug.
//!
//! [`VmControl`] is what the API, the command line and tests hold; each call returns when it is done, or by its deadline
//! with an error that names the step that was late. [`Story`] tells what happened, as it happens.

mod control;
mod error;
mod report;
mod story;

pub use control::{DeviceId, Plugged, VmControl};
pub use error::{ErrorKind, VmError};
pub use report::{DeviceReport, DeviceState, QueueReport, RecoveryClass, VmInfo, VmState};
pub use story::{Heard, Story, StoryEvent, Subscription};
