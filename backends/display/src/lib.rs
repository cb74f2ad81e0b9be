//! A screen in a process of its own: it is told by a guest's GPU what there is to see, and shows it to viewers. See README.md.
//!
//! [`stage`] is what there is to see, [`gpu`] who tells it, [`viewer`] and [`web`] who looks, [`seat`] what those type. What
//! viewers say is decoded without sockets, in [`rfb`] and [`web::request`].

pub mod asked;
pub mod control;
pub mod damage;
pub mod gpu;
pub mod keys;
pub mod listen;
pub mod picture;
pub mod ready;
pub mod record;
pub mod rfb;
pub mod seat;
pub mod secret;
pub mod serial;
pub mod shot;
pub mod stage;
pub mod viewer;
pub mod visits;
pub mod web;
