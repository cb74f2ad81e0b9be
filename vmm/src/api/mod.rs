//! The operator's socket: REST over a UNIX socket, in the paths, bodies and bytes of Cloud Hypervisor, so that its clients
//! drive Atoll unmodified; beside them Atoll's own resources.
//!
//! The server is a small one of our own, on `httparse`. A general HTTP stack keeps some of what those clients rely on and
//! not all of it: descriptors (`SCM_RIGHTS`) belong to the request with whose bytes they came, so whoever reads must not
//! read ahead; an idle connection lives as long as the client likes while half a request does not, and the deadlines of
//! such stacks cover both alike; and every request is a blocking call of [`VmControl`](crate::lifecycle::VmControl).
//!
//! - [`ListenAt`] and [`EventMonitorAt`] are what the command line says; [`ApiServer`] and [`EventMonitor`] serve it, each
//!   on threads of their own. Nothing here can hold up the machine: events wait in a bounded queue, requests on the thread
//!   of their connection, connections are bounded.
//! - `request`, `reply` and `wire` know HTTP and no machine; `routes` is the one table of resources, which the dispatcher
//!   and the OpenAPI document are both made of; the files beside it carry the requests out.
//! - [`Client`] is the other end, for the command line.

mod body;
mod client;
mod connection;
mod listen;
mod machine;
mod monitor;
mod openapi;
mod own;
mod plug;
mod reply;
pub mod request;
mod routes;
mod screen;
mod server;
mod wire;

pub use client::{Client, ClientError, Events, Response};
pub use listen::{ListenAt, ListenError, Listener, own as own_inherited};
pub use monitor::{EVENT_MAX, EventMonitor, EventMonitorAt, MonitorError};
pub use openapi::document as openapi_document;
pub use request::Method;
pub use routes::{Route, routes};
pub use server::{Api, ApiServer, MetricsSource};
pub use wire::DESCRIPTORS_MAX;

/// The release of Cloud Hypervisor whose interface is spoken: what `vmm.ping` tells clients that look for features by it.
pub const SPOKEN_VERSION: &str = "51.0.0";
