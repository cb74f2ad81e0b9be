//! The page: the guest's picture and its serial console in a browser, over HTTP and WebSockets.
//!
//! [`request`] decides what somebody gets, without sockets; [`serve`] moves it; [`novnc`] holds the viewer that the page
//! loads, [`socket`] is a WebSocket.

pub mod novnc;
pub mod request;
pub mod serve;
pub mod socket;
