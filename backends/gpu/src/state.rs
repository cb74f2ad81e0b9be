//! The device without queues and sockets: commands in, answers out, and what a screen is to be told.

use std::sync::Arc;
use std::time::Instant;

use atoll_kit::memory::Segments;
use atoll_protocol::display::{CURSOR_BYTES, CURSOR_SIDE, CursorPosition, DisplayInfo, Rect, SCANOUTS_MAX, Screen};
use vm_memory::GuestMemory;

use crate::command::{Answer, COMMAND_LEN_MAX, Command, CursorCommand, Header, Refusal, Status};
use crate::command3d::Command3d;
use crate::edid::{self, MODE_MAX, MODE_MIN};
use crate::frame_memory::Telling;
use crate::geometry;
use crate::head::{Head, Turn, View};
use crate::record::Record;
use crate::render::{Box3, Ram, Render, Transfer};
use crate::resource::Resources;
use crate::scene::{Job, Next, Scene};

/// VIRTIO_GPU_EVENT_DISPLAY: what the screens want has changed.
const EVENT_DISPLAY: u32 = 1;

/// What is kept of the room for pixels that are read back.
const ROOM_KEPT: usize = 16 << 20;

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
    /// 3D, where it is served.
    scene: Option<Scene>,
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

/// How far a command has come.
pub enum Begun {
    /// To its end.
    Done(Done),
    /// There is something to be drawn, without a lock; then comes [`Gpu::end`].
    Job(Job),
}

/// A cursor whose picture is read back.
pub struct CursorJob {
    /// The reading.
    pub job: Job,
    position: CursorPosition,
    id: u32,
    hot: (u32, u32),
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
        Self { record, loaded: false, resources, scene: None, heads, events: 0, takes_over: false }
    }

    /// Serves 3D from now on; before any front end.
    pub fn serve(&mut self, render: Arc<dyn Render>) {
        self.scene = Some(Scene::new(render));
    }
    /// How many capability sets of 3D there are; 0 where it is not served.
    pub fn capsets(&self) -> usize {
        self.scene.as_ref().map_or(0, Scene::capsets)
    }
    /// Whether the driver has agreed to 3D.
    pub fn agree(&mut self, agreed: bool) {
        if let Some(scene) = &mut self.scene {
            scene.agree(agreed);
        }
    }
    /// Commands point into this memory from now on.
    pub fn memory(&mut self, ram: Arc<dyn Ram>) {
        if let Some(scene) = &mut self.scene {
            scene.memory(ram, &self.resources);
        }
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
        self.resources = Resources::load(&self.record, self.scene.is_some());
        if let Some(scene) = &mut self.scene {
            scene.load(&self.record, &mut self.resources);
        }
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
        if let Some(scene) = &mut self.scene {
            scene.clear(&self.resources);
        }
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
    /// Tells what is to be told: of one scanout at a time.
    pub fn tell(&mut self, now: Instant, out: &mut Telling<'_>) -> Turn {
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

    /// Executes what stands in `said`, a request of the control queue, to its end. Said `again`, it is one that a predecessor
    /// may have executed already, as the last thing that it did.
    pub fn control<M: GuestMemory>(&mut self, mem: &M, said: Segments<'_>, again: bool) -> Done {
        match self.begin(mem, said, again) {
            Begun::Done(done) => done,
            Begun::Job(mut job) => {
                job.run();
                self.end(job)
            }
        }
    }

    /// The same up to where it takes its time.
    pub fn begin<M: GuestMemory>(&mut self, mem: &M, said: Segments<'_>, again: bool) -> Begun {
        let mut header = Header::default();
        let mut read = 0;
        let next = self.try_control((mem, said), again, &mut header, &mut read);
        match next.unwrap_or_else(|refusal| Next::Answer(refused(&header, &refusal))) {
            Next::Answer(answer) => Begun::Done(Done { header, answer, read }),
            Next::Job(job) => Begun::Job(job),
        }
    }

    /// The rest of it, when the job has run.
    pub fn end(&mut self, job: Job) -> Done {
        let header = job.header;
        if let Some(scene) = &self.scene {
            scene.done(&job, &self.resources);
        }
        let answer = match job.end() {
            Ok(None) => Answer::Status(Status::Ok),
            Ok(Some((id, rect, pixels))) => {
                self.resources.paint(&self.record, id, rect, &pixels);
                self.heads.iter_mut().for_each(|head| head.flush(id, rect));
                if let Some(scene) = &mut self.scene {
                    scene.give_back(pixels, ROOM_KEPT);
                }
                Answer::Status(Status::Ok)
            }
            Err(failed) => refused(&header, &failed.into()),
        };
        Done { header, answer, read: 0 }
    }

    fn try_control<M: GuestMemory>(
        &mut self,
        (mem, said): (&M, Segments<'_>),
        again: bool,
        header: &mut Header,
        read: &mut u64,
    ) -> Result<Next, Refusal> {
        let mut room = [0; COMMAND_LEN_MAX];
        let bytes = take(mem, said, &mut room)?;
        let (said_header, body) = Header::read(bytes)?;
        *header = said_header;
        let Self { record, resources, heads, scene, .. } = self;
        let command = match (Command::read(header, body), scene.as_mut().filter(|scene| scene.is_agreed())) {
            (Err(Refusal::Command(_)), Some(scene)) => {
                let command = Command3d::read(header, body)?;
                tracing::trace!(?command);
                return scene.control((record, resources), (mem, said), again, header, command);
            }
            (command, _) => command?,
        };
        tracing::trace!(?command);
        match command {
            Command::GetDisplayInfo => {
                let mut info = DisplayInfo::default();
                info.screens.iter_mut().zip(heads).for_each(|(screen, head)| *screen = head.wanted);
                return Ok(Next::Answer(Answer::DisplayInfo(Box::new(info))));
            }
            Command::GetEdid { scanout } => {
                let Rect { width, height, .. } = head(heads, scanout)?.wanted.rect;
                return Ok(Next::Answer(Answer::Edid(edid::edid(scanout, width, height))));
            }
            Command::Create { id, format, width, height } => {
                resources.create(record, again, [id, format, width, height])?;
            }
            Command::Unref { id } => {
                for head in heads.iter_mut().filter(|head| head.view().is_some_and(|view| view.id == id)) {
                    head.show(record, None);
                }
                if let Some(scene) = scene {
                    scene.unref(resources, id);
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
                resources.make_visible(record, id)?;
                head.show(record, Some(View { id, rect }));
            }
            Command::Flush { rect, id } => {
                let resource = resources.get(id)?;
                if !geometry::is_within(rect, resource.width, resource.height) {
                    return Err(Refusal::Rect(rect));
                }
                let told = heads.iter().filter_map(|head| head.tells(id, rect)).reduce(geometry::around);
                // What was lost is shown as it was last.
                if let (Some(scene), Some(told)) = (scene, told)
                    && resource.solid.is_some_and(|solid| !solid.lost)
                {
                    return Ok(scene.read(header, id, told));
                }
                heads.iter_mut().for_each(|head| head.flush(id, rect));
            }
            Command::Transfer { rect, offset, id } => match scene {
                Some(scene) if resources.get(id)?.solid.is_some() => {
                    let transfer =
                        Transfer { id, area: Box3::from(rect), offset, to_host: true, ..Transfer::default() };
                    return scene.transfer(header, resources, transfer);
                }
                scene => {
                    *read = resources.transfer((record, mem), id, rect, offset)?;
                    if let Some(scene) = scene {
                        scene.changed(id, rect);
                    }
                }
            },
            Command::Attach { id, entries } => {
                resources.attach((record, mem), again, id, entries, said)?;
                if let Some(scene) = scene.as_mut().filter(|_| resources.get(id).is_ok_and(|r| r.solid.is_some())) {
                    // Said again, there is an old one.
                    scene.take_back(resources, id);
                    if let Err(refusal) = scene.lend(resources, id) {
                        resources.detach(record, true, id)?;
                        return Err(refusal);
                    }
                }
            }
            Command::Detach { id } => {
                if let Some(scene) = scene.as_mut().filter(|_| resources.get(id).is_ok_and(|r| r.solid.is_some())) {
                    scene.take_back(resources, id);
                }
                resources.detach(record, again, id)?;
            }
        }
        Ok(Next::Answer(Answer::Status(Status::Ok)))
    }

    /// Executes what stands in `said`, a request of the cursor queue, to its end.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn cursor<M: GuestMemory>(&mut self, mem: &M, said: Segments<'_>) -> Result<(), Refusal> {
        match self.begin_cursor(mem, said)? {
            None => Ok(()),
            Some(mut reading) => {
                reading.job.run();
                self.end_cursor(reading)
            }
        }
    }

    /// The same up to where its picture is to be read back.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn begin_cursor<M: GuestMemory>(&mut self, mem: &M, said: Segments<'_>) -> Result<Option<CursorJob>, Refusal> {
        let mut room = [0; COMMAND_LEN_MAX];
        let (header, body) = Header::read(take(mem, said, &mut room)?)?;
        match CursorCommand::read(&header, body)? {
            CursorCommand::Move { position, id } => {
                head(&mut self.heads, position.scanout)?.move_cursor(&self.record, position, id != 0);
                Ok(None)
            }
            CursorCommand::Update { position, id: 0, .. } => {
                head(&mut self.heads, position.scanout)?.move_cursor(&self.record, position, false);
                Ok(None)
            }
            CursorCommand::Update { position, id, hot_x, hot_y } => {
                let hot = (hot_x, hot_y);
                head(&mut self.heads, position.scanout)?;
                let resource = self.resources.get(id)?;
                if (resource.width, resource.height) != (CURSOR_SIDE, CURSOR_SIDE) {
                    return Err(Refusal::CursorSize(resource.width, resource.height));
                }
                let lost = resource.solid.map(|solid| solid.lost);
                self.resources.make_visible(&self.record, id)?;
                if let (Some(scene), Some(false)) = (&mut self.scene, lost)
                    && let Next::Job(job) = scene.read(&header, id, geometry::whole(CURSOR_SIDE, CURSOR_SIDE))
                {
                    return Ok(Some(CursorJob { job, position, id, hot }));
                }
                self.draw_cursor(position, id, hot).map(|()| None)
            }
        }
    }

    /// The rest of it, when the job has run.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn end_cursor(&mut self, reading: CursorJob) -> Result<(), Refusal> {
        let CursorJob { job, position, id, hot } = reading;
        if let Some((id, rect, pixels)) = job.end()? {
            self.resources.paint(&self.record, id, rect, &pixels);
        }
        self.draw_cursor(position, id, hot)
    }

    fn draw_cursor(&mut self, position: CursorPosition, id: u32, hot: (u32, u32)) -> Result<(), Refusal> {
        let head = head(&mut self.heads, position.scanout)?;
        let resource = self.resources.get(id)?;
        let mut picture = Vec::with_capacity(CURSOR_BYTES);
        self.resources.read(&self.record, resource, geometry::whole(CURSOR_SIDE, CURSOR_SIDE), &mut picture);
        if let Ok(picture) = <&[u8; CURSOR_BYTES]>::try_from(picture.as_slice()) {
            head.draw_cursor(&self.record, position, hot, picture);
        }
        Ok(())
    }
}

fn refused(header: &Header, refusal: &Refusal) -> Answer {
    // The guest decides how often: it is told of it, nobody else needs to be.
    tracing::debug!(kind = header.kind, %refusal, "a command is refused");
    Answer::Status(refusal.status())
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
