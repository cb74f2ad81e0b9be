//! The operator's socket as its clients find it: the unmodified crate `cloud-hypervisor-client`, curl, a strict reader of
//! our own that takes nothing but what the oldest clients take, and Atoll's own client.
//!
//! A machine of the tests' own stands behind it, which keeps the states and refusals of a real one in a page of code; what
//! it is told can be looked at from the other side.

mod clients;
mod curl;
mod document;
mod fake;
mod real;
mod rough;
mod rules;
mod strict;
