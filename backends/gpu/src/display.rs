//! The thread that speaks with the screen: greets it, asks what it wants, and tells it what has changed.
//!
//! It has no part in what the guest waits for. A screen that does not read, does not answer or answers what cannot be right
//! is hung up on; the guest goes on, and the next screen that is handed over is shown everything.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use atoll_kit::back_channel::BackChannel;
use atoll_protocol::display::{Channel, ChannelError, Features, REPLY_MAX, Reply, Request, WireError, code};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use thiserror::Error;

use crate::frame_memory::Telling;
use crate::head::Turn;
use crate::shared::{Handover, Link, Shared};

/// How long an answer may take.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// How long a frame may take to be read.
const READ_MAX: Duration = Duration::from_secs(10);
/// Messages of a screen, and tellings, of one turn.
const TURN_MAX: usize = 32;
/// What is kept of the room for a frame.
const ROOM_KEPT: usize = 16 << 20;

/// Why a conversation ends.
#[derive(Debug, Error)]
enum End {
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("it did not answer message {0} within {ANSWER_MAX:?}")]
    Silent(u32),
    #[error("it answered message {0}, which it was not asked")]
    Unasked(u32),
}

impl End {
    /// Says it: a screen that goes is no fault of anybody's, and a guest that is started again is shown on another.
    fn tell(&self) {
        match self {
            Self::Channel(error) if error.is_hang_up() => tracing::info!("the screen is gone"),
            end => tracing::warn!(%end, "the screen is given up; nothing is shown until there is another"),
        }
    }
}

impl From<WireError> for End {
    fn from(error: WireError) -> Self {
        Self::Channel(error.into())
    }
}

/// What was asked and not answered.
#[derive(Clone, Copy, Debug)]
struct Question {
    code: u32,
    number: u64,
    until: Instant,
}

/// One conversation.
struct Talk {
    channel: Channel,
    questions: VecDeque<Question>,
    /// It says by itself when it wants something else.
    tells: bool,
    /// It has said what it wants.
    greeted: bool,
    /// It takes large updates by memory.
    maps: bool,
    /// One is there, which it has until then to read.
    untaken: Option<Instant>,
    room: Vec<u8>,
}

/// Starts the thread.
///
/// # Errors
/// Without threads.
pub fn start(shared: Arc<Shared>, channel: BackChannel) -> std::io::Result<()> {
    let run = move || run(&shared, &channel);
    std::thread::Builder::new().name("display".to_owned()).stack_size(256 << 10).spawn(run).map(drop)
}

fn run(shared: &Shared, channel: &BackChannel) {
    let mut talk: Option<Talk> = None;
    loop {
        if let Some(Handover(socket)) = shared.take_handover() {
            talk = socket.map(Talk::new);
        }
        let alarm = match talk.as_mut().map(|talk| talk.turn(shared, channel)) {
            None => None,
            Some(Ok(alarm)) => alarm,
            Some(Err(end)) => {
                end.tell();
                if let Some(talk) = talk.take() {
                    talk.channel.hang_up();
                }
                shared.lost();
                continue;
            }
        };
        let timeout = alarm.map(|alarm| alarm.saturating_duration_since(Instant::now()));
        let timeout = timeout.and_then(|left| Timespec::try_from(left).ok());
        let waker = PollFd::from_borrowed_fd(shared.waker(), PollFlags::IN);
        // What fails here is looked at in the next turn.
        let _ = match &talk {
            Some(talk) => {
                let socket = PollFd::from_borrowed_fd(talk.channel.as_fd(), PollFlags::IN);
                poll(&mut [waker, socket], timeout.as_ref())
            }
            None => poll(&mut [waker], timeout.as_ref()),
        };
    }
}

impl Talk {
    fn new(socket: OwnedFd) -> Self {
        let (channel, questions, room) = (Channel::new(socket, REPLY_MAX), VecDeque::new(), Vec::new());
        Self { channel, questions, tells: false, greeted: false, maps: false, untaken: None, room }
    }

    /// Hears and tells what there is; until when nothing more is to be done by itself.
    fn turn(&mut self, shared: &Shared, back: &BackChannel) -> Result<Option<Instant>, End> {
        if !self.greeted && self.questions.is_empty() {
            self.question(Request::GetFeatures, 0)?;
        }
        let mut heard = 0;
        while heard < TURN_MAX
            && let Some(message) = self.channel.try_receive()?
        {
            heard += 1;
            self.hear(Reply::decode(&message.header, &message.payload)?, shared, back)?;
        }
        let now = Instant::now();
        if let Some(question) = self.questions.front().filter(|question| question.until <= now) {
            return Err(End::Silent(question.code));
        }
        if self.untaken.is_some_and(|until| until <= now) {
            return Err(End::Silent(code::FRAME));
        }
        if self.greeted && self.questions.is_empty() {
            let (asked, answered) = {
                let desk = shared.lock();
                (desk.asked, desk.answered)
            };
            if asked > answered {
                self.question(Request::GetDisplayInfo, asked)?;
            }
        }
        let next = if self.greeted && self.untaken.is_none() { self.tell(shared)? } else { None };
        let answer = self.questions.front().map(|question| question.until);
        let again = (heard == TURN_MAX).then_some(now);
        Ok([next, answer, again, self.untaken].into_iter().flatten().min())
    }

    fn question(&mut self, request: Request<'_>, number: u64) -> Result<(), End> {
        self.say(request)?;
        self.questions.push_back(Question { code: request.code(), number, until: Instant::now() + ANSWER_MAX });
        Ok(())
    }

    fn say(&mut self, request: Request<'_>) -> Result<(), End> {
        let mut bytes = Vec::new();
        request.put(&mut bytes);
        Ok(self.channel.send(&bytes, READ_MAX)?)
    }

    fn hear(&mut self, reply: Reply, shared: &Shared, back: &BackChannel) -> Result<(), End> {
        let code = reply.code();
        if let Reply::Changed = reply {
            if !self.tells {
                return Err(End::Unasked(code));
            }
            shared.lock().asked += 1;
            return Ok(());
        }
        if let Reply::Taken = reply {
            return self.untaken.take().map(drop).ok_or(End::Unasked(code));
        }
        let question = self.questions.pop_front().filter(|question| question.code == code);
        let question = question.ok_or(End::Unasked(code))?;
        match reply {
            Reply::Features(offered) => {
                let agreed = offered.and(Features::CHANGES | Features::FRAMES);
                self.tells = agreed.contains(Features::CHANGES);
                self.maps = agreed.contains(Features::FRAMES);
                self.say(Request::SetFeatures(agreed))?;
                if self.maps {
                    let (offer, memory) = shared.frames.offer();
                    let mut bytes = Vec::new();
                    offer.put(&mut bytes);
                    self.channel.send_beside(&bytes, memory, READ_MAX)?;
                }
                let number = {
                    let mut desk = shared.lock();
                    desk.asked += 1;
                    desk.asked
                };
                self.question(Request::GetDisplayInfo, number)?;
            }
            Reply::DisplayInfo(info) => {
                let mut desk = shared.lock();
                if desk.is_replaced() {
                    return Ok(());
                }
                let changed = desk.gpu.want(&info, self.tells);
                if !std::mem::replace(&mut self.greeted, true) {
                    desk.gpu.greet();
                }
                desk.link = if self.tells { Link::Tells } else { Link::Asked };
                shared.answered(&mut desk, question.number);
                drop(desk);
                if changed && self.tells {
                    back.config_changed();
                }
            }
            // Never asked: the guest gets one of ours.
            Reply::Edid(_) | Reply::Changed | Reply::Taken => return Err(End::Unasked(code)),
        }
        Ok(())
    }

    /// Tells what is due; when there will be more.
    fn tell(&mut self, shared: &Shared) -> Result<Option<Instant>, End> {
        for _ in 0..TURN_MAX {
            self.room.clear();
            let mut telling = Telling::new(&mut self.room, self.maps.then_some(&shared.frames));
            let next = {
                let mut desk = shared.lock();
                desk.alarm = None;
                match desk.gpu.tell(Instant::now(), &mut telling) {
                    Turn::Told => None,
                    Turn::At(at) => {
                        desk.alarm = Some(at);
                        Some(Some(at))
                    }
                    Turn::Nothing => Some(None),
                }
            };
            match next {
                None => {
                    let is_full = telling.is_full;
                    self.channel.send(&self.room, READ_MAX)?;
                    if is_full {
                        // There is room for one: the next is told when this one is read.
                        self.untaken = Some(Instant::now() + READ_MAX);
                        return Ok(None);
                    }
                }
                Some(next) => {
                    self.room.shrink_to(ROOM_KEPT);
                    return Ok(next);
                }
            }
        }
        Ok(Some(Instant::now()))
    }
}
