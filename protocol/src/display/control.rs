//! What a VMM asks of a display process beside its sidecar: pictures, recordings, and sockets of processes that were started
//! anew. One answer for each order, in their order.
//!
//! Descriptors travel beside the frame: with [`DisplayOrder::Record`] the file, with [`DisplayOrder::NewDisplay`] and
//! [`DisplayOrder::NewInput`] the socket, with [`DisplayReport::Screenshot`] a sealed memfd with the picture.

use serde::{Deserialize, Serialize};

use super::SCANOUTS_MAX;
use crate::bounded;
use crate::input::InputKind;
use crate::message::{message_of_words, words};

/// One head as a display process knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeadInfo {
    /// Which.
    pub head: u32,
    /// Columns of its picture; 0 when there is none.
    pub width: u32,
    /// Rows of it.
    pub height: u32,
    /// Columns that viewers want.
    pub wanted_width: u32,
    /// Rows that they want.
    pub wanted_height: u32,
    /// Viewers that look at it.
    pub viewers: u32,
    /// It is being recorded.
    pub recorded: bool,
}

words! {
    /// What a VMM asks of a display process.
    pub enum DisplayOrder {
        /// A picture of a head, as a PNG.
        Screenshot {
            /// Which.
            head: u32,
        } => Idempotent,
        /// Records a head to the file beside this frame, an animated PNG, until it is told to stop.
        Record {
            /// Which.
            head: u32,
        } => Once,
        /// Ends a recording.
        StopRecord {
            /// Of which head.
            head: u32,
        } => Idempotent,
        /// The socket beside this frame is the GPU's from now on. What is shown stays until it says something else.
        NewDisplay => Idempotent,
        /// The socket beside this frame is an input device's from now on.
        NewInput {
            /// Which device.
            kind: InputKind,
        } => Idempotent,
        /// A head is to have this size: the guest is told.
        Resize {
            /// Which.
            head: u32,
            /// Columns.
            width: u32,
            /// Rows.
            height: u32,
        } => Idempotent,
        /// What there is to see.
        Info => Idempotent,
    }
}
message_of_words!(DisplayOrder, DisplayOrder);

words! {
    /// What a display process answers.
    pub enum DisplayReport {
        /// To [`DisplayOrder::Screenshot`]: the picture is beside this frame.
        Screenshot {
            /// Of which head.
            head: u32,
            /// Columns.
            width: u32,
            /// Rows.
            height: u32,
        } => Idempotent,
        /// To [`DisplayOrder::StopRecord`]: the file is whole.
        Recorded {
            /// Which head.
            head: u32,
            /// Pictures in it.
            frames: u32,
        } => Idempotent,
        /// To all other orders that were carried out.
        Done => Idempotent,
        /// To [`DisplayOrder::Info`].
        Info {
            /// Heads that show something or are looked at.
            #[serde(deserialize_with = "bounded::list::<_, _, SCANOUTS_MAX>")]
            heads: Vec<HeadInfo>,
            /// A GPU's process is connected.
            connected: bool,
        } => Idempotent,
        /// It cannot be done; why, and what to do.
        Refused {
            /// In words.
            reason: String,
        } => Idempotent,
    }
}
message_of_words!(DisplayReport, DisplayReport);
