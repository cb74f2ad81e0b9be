//! A GPU's pictures: its backend is given a socket to the display when either of the two is new.

use std::sync::Arc;

use super::Worker;
use crate::vhost::request::Request;
use crate::vhost::session;

impl Worker {
    /// Joins the backend that is there with the display, and hears from now on when there is another.
    pub(super) fn draw_for_the_display(&mut self) {
        let Some(joint) = &self.parts.joint else { return };
        let shared = Arc::downgrade(&self.shared);
        joint.drawn_by(move || {
            if let Some(shared) = shared.upgrade() {
                shared.send(Request::Draw);
            }
        });
        self.draw();
    }

    /// Gives the backend a socket to the display, where there is one.
    pub(super) fn draw(&mut self) {
        let (Some(joint), Some(session)) = (&self.parts.joint, &mut self.past.session) else { return };
        let told = match joint.draw() {
            Ok(None) => return,
            Ok(Some(socket)) => session.conversation.perform(move |wire| session::set_screen(wire, &socket)),
            Err(error) => return tracing::warn!(device = self.shared.name, %error, "no socket for the display"),
        };
        if let Err(error) = told {
            self.lose(&error);
        }
    }
}
