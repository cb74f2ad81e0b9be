//! One connection: requests one after the other, each answered before the next is looked at.
//!
//! A client may be silent between requests for as long as its place is not needed, and must finish what it has begun. A request that has
//! come as a whole is carried out to its end, also when the client is gone by then; one that has not is not begun.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use super::reply::{Reply, Status, ascii_json};
use super::request::{Assembler, Head, Step};
use super::routes::{self, Answer, Asked};
use super::server::{Seat, Shared};
use super::wire::{self, WireError};
use crate::lifecycle::{Heard, StoryEvent, Subscription};

/// From the first byte of a request to its last.
const REQUEST_PATIENCE: Duration = Duration::from_secs(10);
/// For a client to take an answer.
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);
/// For a client that was refused to stop sending, and how much it may send until then.
const LINGER_PATIENCE: Duration = Duration::from_secs(1);
const LINGER_MAX: usize = 8 << 20;
/// For a listener to take an event. It has a thousand of them in its queue and the socket's buffer before this counts.
const EVENT_PATIENCE: Duration = Duration::from_secs(30);
/// How often a silent stream looks whether anybody is still there.
const EVENT_PAUSE: Duration = Duration::from_millis(200);

/// Serves one connection until its end.
pub(super) fn converse(socket: &UnixStream, seat: &Seat) {
    match (Connection { socket, seat, shared: &seat.shared, assembler: Assembler::default(), descriptors: Vec::new() })
        .serve()
    {
        Ok(()) => {}
        Err(WireError::Late) => tracing::debug!("a client of the operator's socket did not finish in time"),
        Err(error) => tracing::debug!(%error, "a connection to the operator's socket failed"),
    }
}

struct Connection<'a> {
    socket: &'a UnixStream,
    seat: &'a Seat,
    shared: &'a Shared,
    assembler: Assembler,
    /// What came beside the request at hand.
    descriptors: Vec<OwnedFd>,
}

impl Connection<'_> {
    fn serve(mut self) -> Result<(), WireError> {
        let mut deadline = None;
        loop {
            if deadline.is_none() && !self.assembler.is_idle() {
                deadline = Some(Instant::now() + REQUEST_PATIENCE);
            }
            match self.assembler.step() {
                Ok(Step::Whole(head, body)) => {
                    if !self.answer(&head, &body)? || !head.keep_alive {
                        return Ok(());
                    }
                    deadline = None;
                    if self.assembler.is_idle() {
                        self.seat.rests();
                    }
                }
                Ok(Step::Invite) => self.send(Reply::invitation(), ANSWER_PATIENCE)?,
                Ok(Step::More) => match self.receive(deadline) {
                    Ok(0) => return Ok(()),
                    Ok(_) => {}
                    Err(error @ WireError::TooManyDescriptors) => return self.hang_up(error.to_string()),
                    Err(WireError::Late) => {
                        let seconds = REQUEST_PATIENCE.as_secs();
                        return self.hang_up(format!("the request was not whole after {seconds} s"));
                    }
                    Err(error) => return Err(error),
                },
                Err(malformed) => return self.hang_up(malformed.to_string()),
            }
        }
    }

    fn receive(&mut self, deadline: Option<Instant>) -> Result<usize, WireError> {
        if deadline.is_none() {
            // At rest until something comes, and at work before it is read: whoever looks finds one or the other.
            while !wire::has_more(self.socket.as_fd()) {
                wire::wait(self.socket.as_fd(), PollFlags::IN, None)?;
            }
            self.seat.works();
        }
        let room = self.assembler.room();
        wire::receive(self.socket.as_fd(), self.assembler.bytes(), room, &mut self.descriptors, deadline)
    }

    fn send(&self, bytes: &[u8], patience: Duration) -> Result<(), WireError> {
        wire::send(self.socket.as_fd(), bytes, &[], Instant::now() + patience)
    }

    /// Carries a request out and answers it; gives whether the connection goes on.
    fn answer(&mut self, head: &Head, body: &[u8]) -> Result<bool, WireError> {
        let descriptors = std::mem::take(&mut self.descriptors);
        if !descriptors.is_empty() && !self.assembler.is_idle() {
            self.hang_up("descriptors came with bytes of two requests: send one request at a time".into())?;
            return Ok(false);
        }
        let mut asked = Asked { body, descriptors };
        let called =
            catch_unwind(AssertUnwindSafe(|| routes::serve(&self.shared.api, head.method, &head.path, &mut asked)));
        let answer = called.unwrap_or_else(|_| {
            let why = "this request met a mistake in Atoll; its log has the details".into();
            Answer::Reply(Reply::refused(Status::Failed, &[why]))
        });
        match answer {
            Answer::Reply(reply) => self.reply(head, &reply)?,
            Answer::Last(reply, then) => {
                let sent = self.reply(head, &reply);
                then(&self.shared.api);
                sent?;
            }
            Answer::Events(subscription) => {
                let Some(_place) = self.shared.listener_place() else {
                    let why = "too many listen to events already: end one of them, then try again".into();
                    return self.reply(head, &Reply::refused(Status::TooMany, &[why])).map(|()| true);
                };
                self.send(&Reply::stream_head(), ANSWER_PATIENCE)?;
                self.stream(&subscription)?;
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn reply(&self, head: &Head, reply: &Reply) -> Result<(), WireError> {
        tracing::debug!(method = head.method.name(), path = head.path, status = reply.status().code(), "API request");
        self.send(&reply.encode(head.keep_alive), ANSWER_PATIENCE)
    }

    fn stream(&self, subscription: &Subscription) -> Result<(), WireError> {
        loop {
            let gone = wire::is_gone(self.socket.as_fd());
            // At the end, when nothing is read any more, it is told all that was said, the end among it, and no more is
            // waited for.
            let stopping = self.shared.is_stopping();
            if gone && !stopping {
                return Ok(());
            }
            let event = match subscription.next(if stopping { Duration::ZERO } else { EVENT_PAUSE }) {
                Heard::Event(event) => event,
                Heard::Lost(count) => lost(self.shared.api.story.elapsed(), count),
                Heard::Nothing if stopping => return Ok(()),
                Heard::Nothing => continue,
                Heard::Closed => return Ok(()),
            };
            let Ok(mut line) = ascii_json(&event) else { continue };
            line.push(b'\n');
            self.send(&line, EVENT_PATIENCE)?;
        }
    }

    /// Refuses what cannot be read and ends the connection, in a way that lets the client read why: were bytes of it
    /// still unread, the kernel would tell it of a reset.
    fn hang_up(&mut self, why: String) -> Result<(), WireError> {
        self.seat.rests();
        self.send(&Reply::refused(Status::BadRequest, &[why]).encode(false), ANSWER_PATIENCE)?;
        self.socket.shutdown(std::net::Shutdown::Write).map_err(|_| WireError::Late)?;
        let deadline = Some(Instant::now() + LINGER_PATIENCE);
        let mut thrown_away = 0;
        while thrown_away < LINGER_MAX {
            let mut bytes = Vec::new();
            let mut descriptors = Vec::new();
            match wire::receive(self.socket.as_fd(), &mut bytes, LINGER_MAX, &mut descriptors, deadline) {
                Ok(0) | Err(WireError::Late) => return Ok(()),
                Ok(count) => thrown_away += count,
                Err(WireError::TooManyDescriptors) => thrown_away += 1,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Tells a reader how many events it has missed.
pub(super) fn lost(timestamp: Duration, count: u64) -> StoryEvent {
    let properties = [("count".to_owned(), count.to_string())].into();
    StoryEvent { timestamp, source: "vmm".into(), event: "lost".into(), properties }
}
