//! The device without queues and sockets: commands in, answers out, and what a screen is to be told.

use std::time::Instant;

use atoll_kit::memory::Segments;
use atoll_protocol::display::{CURSOR_BYTES, CURSOR_SIDE, CursorPosition, DisplayInfo, Rect, SCANOUTS_MAX, Screen};
use vm_memory::GuestMemory;

use crate::command::{Answer, COMMAND_LEN_MAX, Command, CursorCommand, Header, Refusal, Status};
use crate::edid::{self, MODE_MAX, MODE_MIN};
use crate::geometry;
use crate::head::{Head, Turn, View};
use crate::record::Record;
use crate::resource::Resources;

/// VIRTIO_GPU_EVENT_DISPLAY: what the screens want has changed.
const EVENT_DISPLAY: u32 = 1;

/// The modes that screens want before one has said so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wishes {
    /// Columns and rows of each scanout's screen, side by side.
    pub modes: Vec<(u32, u32)>,
    /// How many of them are on without a screen that says so.
    pub enabled: usize,
}

/// The device.
pub struct Gpu {
    record: Record,
    loaded: bool,
    resources: Resources,
    heads: Vec<Head>,
    events: u32,
    /// The record is a predecessor's, and the control queue has not started since it was read.
    takes_over: bool,
}

/// What a command came to.
#[derive(Debug)]
pub struct Done {
    /// What it said before itself.
    pub header: Header,
    /// Its answer.
    pub answer: Answer,
    /// Bytes of the guest's memory that were read for a picture.
    pub read: u64,
}

impl Gpu {
    /// A device whose state is in `record`; what stands there is not looked at before [`Gpu::load`].
    pub fn new(record: Record, wishes: &Wishes) -> Self {
        let mut x = 0;
        let heads = wishes.modes.iter().take(SCANOUTS_MAX).enumerate().map(|(number, (width, height))| {
            let rect = Rect { x, y: 0, width: *width, height: *height };
            x = x.saturating_add(*width);
            Head::new(number, Screen { rect, enabled: number < wishes.enabled, flags: 0 })
        });
        let heads = heads.collect();
        let resources = Resources::new(record.arena());
        Self { record, loaded: false, resources, heads, events: 0, takes_over: false }
    }

    /// Goes on from what a predecessor has written down, once. Whether there is anything.
    pub fn load(&mut self) -> bool {
        if std::mem::replace(&mut self.loaded, true) {
            return false;
        }
        if self.record.is_fresh() {
            self.record.clear();
            return false;
        }
        self.resources = Resources::load(&self.record);
        for head in &mut self.heads {
            head.load(&self.record, &self.resources);
        }
        self.events = self.record.events();
        self.takes_over = true;
        tracing::info!(resources = self.resources.len(), "goes on from its predecessor's record");
        true
    }

    /// Whether the control queue goes on where a predecessor's stood: true once.
    pub fn takes_over(&mut self) -> bool {
        std::mem::take(&mut self.takes_over)
    }

    /// As no driver has touched it. What screens want stays.
    pub fn reset(&mut self) {
        (self.loaded, self.takes_over) = (true, false);
        self.record.clear();
        self.resources = Resources::new(self.record.arena());
        self.events = 0;
        for head in &mut self.heads {
            head.reset();
            let wanted = head.wanted;
            head.want(&self.record, wanted);
        }
    }

    /// What the state is written into.
    pub fn record(&self) -> &Record {
        &self.record
    }
    /// How many scanouts there are.
    pub fn scanouts(&self) -> usize {
        self.heads.len()
    }
    /// Events that the guest has not taken note of.
    pub fn events(&self) -> u32 {
        self.events
    }
    /// The guest takes note of events.
    pub fn clear_events(&mut self, events: u32) {
        self.events &= !events;
        self.record.set_events(self.events);
    }

    /// What screens want from now on. Whether that is news; if the guest is to be `told` of news, it finds an event.
    pub fn want(&mut self, info: &DisplayInfo, told: bool) -> bool {
        let mut changed = false;
        for (head, screen) in self.heads.iter_mut().zip(&info.screens) {
            let Rect { x, y, width, height } = screen.rect;
            let size = |len: u32| len.clamp(MODE_MIN, MODE_MAX);
            // One that is off says nothing of its size.
            let (width, height) = if width == 0 || height == 0 {
                (head.wanted.rect.width, head.wanted.rect.height)
            } else {
                (size(width), size(height))
            };
            let wanted = Screen { rect: Rect { x, y, width, height }, enabled: screen.enabled, flags: 0 };
            changed |= head.want(&self.record, wanted);
        }
        if changed && told {
            self.events |= EVENT_DISPLAY;
            self.record.set_events(self.events);
        }
        changed
    }

    /// Another screen is there, which knows nothing.
    pub fn greet(&mut self) {
        self.heads.iter_mut().for_each(Head::greet);
    }
    /// When there is something to tell a screen: now, or later.
    pub fn due(&self, now: Instant) -> Option<Instant> {
        self.heads.iter().filter_map(|head| head.due(now)).min()
    }
    /// Appends what is to be told to `out`: of one scanout at a time.
    pub fn tell(&mut self, now: Instant, out: &mut Vec<u8>) -> Turn {
        let mut next: Option<Instant> = None;
        for head in &mut self.heads {
            match head.tell(now, &self.record, &self.resources, out) {
                Turn::Told => return Turn::Told,
                Turn::At(at) => next = Some(next.map_or(at, |next| next.min(at))),
                Turn::Nothing => {}
            }
        }
        next.map_or(Turn::Nothing, Turn::At)
    }

    /// Executes what stands in `said`, a request of the control queue. Said `again`, it is one that a predecessor may have
    /// executed already, as the last thing that it did.
    pub fn control<M: GuestMemory>(&mut self, mem: &M, said: Segments<'_>, again: bool) -> Done {
        let mut header = Header::default();
        let mut read = 0;
        let answer = self.try_control((mem, said), again, &mut header, &mut read).unwrap_or_else(|refusal| {
            // The guest decides how often: it is told of it, nobody else needs to be.
            tracing::debug!(kind = header.kind, %refusal, "a command is refused");
            Answer::Status(refusal.status())
        });
        Done { header, answer, read }
    }

    fn try_control<M: GuestMemory>(
        &mut self,
        (mem, said): (&M, Segments<'_>),
        again: bool,
        header: &mut Header,
        read: &mut u64,
    ) -> Result<Answer, Refusal> {
        let mut room = [0; COMMAND_LEN_MAX];
        let bytes = take(mem, said, &mut room)?;
        let (said_header, body) = Header::read(bytes)?;
        *header = said_header;
        let Self { record, resources, heads, .. } = self;
        let command = Command::read(header, body)?;
        tracing::trace!(?command);
        match command {
            Command::GetDisplayInfo => {
                let mut info = DisplayInfo::default();
                info.screens.iter_mut().zip(heads).for_each(|(screen, head)| *screen = head.wanted);
                return Ok(Answer::DisplayInfo(Box::new(info)));
            }
            Command::GetEdid { scanout } => {
                let Rect { width, height, .. } = head(heads, scanout)?.wanted.rect;
                return Ok(Answer::Edid(edid::edid(scanout, width, height)));
            }
            Command::Create { id, format, width, height } => {
                resources.create(record, again, [id, format, width, height])?;
            }
            Command::Unref { id } => {
                for head in heads.iter_mut().filter(|head| head.view().is_some_and(|view| view.id == id)) {
                    head.show(record, None);
                }
                resources.unref(record, again, id)?;
            }
            Command::SetScanout { scanout, id: 0, .. } => head(heads, scanout)?.show(record, None),
            Command::SetScanout { rect, scanout, id } => {
                let head = head(heads, scanout)?;
                let resource = resources.get(id)?;
                if !geometry::is_within(rect, resource.width, resource.height) {
                    return Err(Refusal::Rect(rect));
                }
                head.show(record, Some(View { id, rect }));
            }
            Command::Flush { rect, id } => {
                let resource = resources.get(id)?;
                if !geometry::is_within(rect, resource.width, resource.height) {
                    return Err(Refusal::Rect(rect));
                }
                heads.iter_mut().for_each(|head| head.flush(id, rect));
            }
            Command::Transfer { rect, offset, id } => *read = resources.transfer((record, mem), id, rect, offset)?,
            Command::Attach { id, entries } => resources.attach((record, mem), again, id, entries, said)?,
            Command::Detach { id } => resources.detach(record, again, id)?,
        }
        Ok(Answer::Status(Status::Ok))
    }

    /// Executes what stands in `said`, a request of the cursor queue.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn cursor<M: GuestMemory>(&mut self, mem: &M, said: Segments<'_>) -> Result<(), Refusal> {
        let mut room = [0; COMMAND_LEN_MAX];
        let (header, body) = Header::read(take(mem, said, &mut room)?)?;
        match CursorCommand::read(&header, body)? {
            CursorCommand::Move { position, id } => {
                head(&mut self.heads, position.scanout)?.move_cursor(&self.record, position, id != 0);
                Ok(())
            }
            CursorCommand::Update { position, id: 0, .. } => {
                head(&mut self.heads, position.scanout)?.move_cursor(&self.record, position, false);
                Ok(())
            }
            CursorCommand::Update { position, id, hot_x, hot_y } => self.draw_cursor(position, id, (hot_x, hot_y)),
        }
    }

    fn draw_cursor(&mut self, position: CursorPosition, id: u32, hot: (u32, u32)) -> Result<(), Refusal> {
        let head = head(&mut self.heads, position.scanout)?;
        let resource = self.resources.get(id)?;
        if (resource.width, resource.height) != (CURSOR_SIDE, CURSOR_SIDE) {
            return Err(Refusal::CursorSize(resource.width, resource.height));
        }
        let mut picture = Vec::with_capacity(CURSOR_BYTES);
        self.resources.read(&self.record, resource, geometry::whole(CURSOR_SIDE, CURSOR_SIDE), &mut picture);
        if let Ok(picture) = <&[u8; CURSOR_BYTES]>::try_from(picture.as_slice()) {
            head.draw_cursor(&self.record, position, hot, picture);
        }
        Ok(())
    }
}

fn head(heads: &mut [Head], scanout: u32) -> Result<&mut Head, Refusal> {
    heads.get_mut(scanout as usize).ok_or(Refusal::Scanout(scanout))
}

/// The first bytes of a request, as many as any command has.
fn take<'a, M: GuestMemory>(
    mem: &M,
    said: Segments<'_>,
    room: &'a mut [u8; COMMAND_LEN_MAX],
) -> Result<&'a [u8], Refusal> {
    let len = said.bytes().min(COMMAND_LEN_MAX as u64) as usize;
    let bytes = room.get_mut(..len).unwrap_or_default();
    said.read_at(mem, 0, bytes).map_err(|_| Refusal::Memory)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests;
