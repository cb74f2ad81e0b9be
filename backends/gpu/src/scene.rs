//! 3D between the guest and a renderer: contexts, what each may use, and what is to be drawn.
//!
//! What takes a moment is done at once, under the lock of the device; what may take long (a stream, a transfer, pixels that are
//! read back) is a [`Job`], which its thread carries out without the lock.
//!
//! Contexts are the renderer's and go with it. A successor knows their ids from the record and takes them for *lost*: each
//! command of a lost context is answered as done, so that the guest's driver has nothing to complain of, and nothing is drawn,
//! until its program makes another.
//!
//! A resource of 2D that a context may use, too, is mirrored: the renderer has a texture of the same id, which is filled
//! from the record when a stream of that context comes.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use atoll_kit::memory::Segments;
use atoll_protocol::display::{PIXEL_BYTES, Rect};
use vm_memory::GuestMemory;

use crate::command::{Answer, FENCE, Header, Refusal, Status};
use crate::command3d::{Command3d, SUBMIT_LEN};
use crate::geometry;
use crate::record::{CONTEXTS, Record};
use crate::render::{Failed, Ram, Render, Shape, Transfer};
use crate::resource::Resources;

/// A context.
#[derive(Debug)]
struct Context {
    /// Where it stands in the record.
    place: usize,
    /// It was a predecessor's.
    lost: bool,
    /// Resources of 2D that it may use.
    flat: BTreeSet<u32>,
}

/// A resource of 2D that the renderer has a texture of.
#[derive(Debug)]
struct Mirror {
    made: bool,
    /// What has changed since it was filled.
    damage: Option<Rect>,
}

/// What takes its time.
#[derive(Debug)]
enum Task {
    Submit { context: u32, stream: Vec<u32>, uploads: Vec<Upload> },
    Transfer(Transfer),
    Read { id: u32, rect: Rect, pixels: Vec<u8> },
}

/// Pixels for a mirror.
#[derive(Debug)]
struct Upload {
    id: u32,
    rect: Rect,
    pixels: Vec<u8>,
}

/// Something to be drawn or moved, by who has no lock.
pub struct Job {
    /// What was said before the command.
    pub header: Header,
    render: Arc<dyn Render>,
    task: Task,
    outcome: Result<(), Failed>,
}

impl Job {
    /// Does it.
    pub fn run(&mut self) {
        let (render, fenced) = (&self.render, self.header.flags & FENCE != 0);
        self.outcome = match &mut self.task {
            Task::Submit { context, stream, uploads } => {
                for Upload { id, rect, pixels } in uploads {
                    // A mirror that cannot be filled shows what it had.
                    let _ = render.write(*id, *rect, pixels);
                }
                render.submit(*context, stream)
            }
            Task::Transfer(transfer) => render.transfer(transfer),
            Task::Read { id, rect, pixels } => render.read(*id, *rect, pixels),
        };
        if fenced && !matches!(self.task, Task::Read { .. }) {
            render.finish();
        }
    }

    /// What came of it, and the pixels if it has read some.
    pub fn end(self) -> Result<Option<(u32, Rect, Vec<u8>)>, Failed> {
        self.outcome?;
        Ok(match self.task {
            Task::Read { id, rect, pixels } => Some((id, rect, pixels)),
            _ => None,
        })
    }

    /// It may have written to memory of the guest's.
    fn writes(&self) -> Option<Written> {
        match &self.task {
            Task::Submit { .. } => Some(Written::Queries),
            Task::Transfer(Transfer { id, to_host: false, .. }) => Some(Written::Backing(*id)),
            _ => None,
        }
    }
}

enum Written {
    Backing(u32),
    Queries,
}

/// What is to be done with a command.
pub enum Next {
    /// Nothing more.
    Answer(Answer),
    /// This.
    Job(Job),
}

const DONE: Next = Next::Answer(Answer::Status(Status::Ok));

/// 3D of one guest.
pub struct Scene {
    render: Arc<dyn Render>,
    contexts: BTreeMap<u32, Context>,
    mirrors: BTreeMap<u32, Mirror>,
    ram: Option<Arc<dyn Ram>>,
    /// Resources whose backings could not be lent when memory was exchanged. To ask for one of these would be held against the
    /// context.
    unlent: BTreeSet<u32>,
    /// The driver has agreed to it.
    agreed: bool,
    /// Room for pixels that are read back.
    room: Vec<u8>,
    /// Streams of lost contexts.
    lost: u64,
}

impl Scene {
    /// Nothing yet.
    pub fn new(render: Arc<dyn Render>) -> Self {
        let (contexts, mirrors) = (BTreeMap::new(), BTreeMap::new());
        Self { render, contexts, mirrors, ram: None, unlent: BTreeSet::new(), agreed: false, room: Vec::new(), lost: 0 }
    }

    /// How many capability sets there are.
    pub fn capsets(&self) -> usize {
        self.render.capsets().len()
    }
    /// Whether the driver has agreed to 3D.
    pub fn agree(&mut self, agreed: bool) {
        self.agreed = agreed;
    }
    /// It has.
    pub fn is_agreed(&self) -> bool {
        self.agreed
    }

    /// Goes on from a predecessor's record: contexts are lost, resources are made anew, with their backings.
    pub fn load(&mut self, record: &Record, resources: &mut Resources) {
        for place in 0..CONTEXTS {
            let id = record.context(place);
            if id == 0 {
                continue;
            }
            match self.contexts.entry(id) {
                Entry::Occupied(_) => record.set_context(place, 0),
                Entry::Vacant(vacant) => {
                    vacant.insert(Context { place, lost: true, flat: BTreeSet::new() });
                }
            }
        }
        let solids: Vec<(u32, Shape)> = resources.solids().map(|(id, solid)| (id, solid.shape)).collect();
        for (id, shape) in &solids {
            if let Err(error) = self.render.create(*id, shape) {
                tracing::warn!(id, %error, "a resource of 3D cannot be made anew and is dropped");
                let _ = resources.unref(record, true, *id);
            } else if let Err(error) = self.lend(resources, *id) {
                tracing::warn!(id, %error, "a resource of 3D has lost its backing");
            }
        }
        if !solids.is_empty() || !self.contexts.is_empty() {
            let (contexts, resources) = (self.contexts.len(), solids.len());
            tracing::warn!(
                contexts,
                resources,
                "3D was lost: what these drew is gone, and programs have to begin anew"
            );
        }
    }

    /// As no driver has touched it.
    pub fn clear(&mut self, resources: &Resources) {
        for (id, context) in std::mem::take(&mut self.contexts) {
            if !context.lost {
                self.render.destroy_context(id);
            }
        }
        std::mem::take(&mut self.mirrors).into_iter().filter(|(_, m)| m.made).for_each(|(id, _)| self.render.unref(id));
        resources.solids().for_each(|(id, _)| self.render.unref(id));
        self.unlent.clear();
    }

    /// Another memory: what was lent of the old one is taken back.
    pub fn memory(&mut self, ram: Arc<dyn Ram>, resources: &Resources) {
        self.ram = Some(ram);
        for (id, _) in resources.solids() {
            self.render.detach(id);
            if let Err(error) = self.lend(resources, id) {
                tracing::warn!(id, %error, "a resource of 3D has lost its backing");
            }
        }
    }

    /// Lends the renderer the backing of a resource, if there is one.
    ///
    /// # Errors
    /// [`Refusal::Lent`] and the renderer's.
    pub fn lend(&mut self, resources: &Resources, id: u32) -> Result<(), Refusal> {
        let Some(mut ranges) = resources.ranges(id) else { return Ok(()) };
        self.unlent.insert(id);
        let pinned = self.ram.as_ref().and_then(|ram| ram.pin(&mut ranges)).ok_or(Refusal::Lent(id))?;
        self.render.attach(id, pinned)?;
        self.unlent.remove(&id);
        Ok(())
    }

    /// Takes it back; before the entries of the backing are forgotten.
    pub fn take_back(&mut self, resources: &Resources, id: u32) {
        self.render.detach(id);
        self.unlent.remove(&id);
        // What is kept in the guest's memory only is written there now.
        self.mark(resources, id);
    }

    /// A resource goes.
    pub fn unref(&mut self, resources: &Resources, id: u32) {
        let Ok(resource) = resources.get(id) else { return };
        if resource.solid.is_some() {
            self.take_back(resources, id);
            self.render.unref(id);
        } else if self.mirrors.remove(&id).is_some_and(|mirror| mirror.made) {
            self.render.unref(id);
        }
        self.contexts.values_mut().for_each(|context| {
            context.flat.remove(&id);
        });
    }

    /// A resource of 2D has other pixels.
    pub fn changed(&mut self, id: u32, rect: Rect) {
        if let Some(mirror) = self.mirrors.get_mut(&id) {
            mirror.damage = Some(mirror.damage.map_or(rect, |damage| geometry::around(damage, rect)));
        }
    }

    fn mark(&self, resources: &Resources, id: u32) {
        if let (Some(ram), Some(mut ranges)) = (&self.ram, resources.ranges(id)) {
            ram.mark(&mut ranges);
        }
    }

    /// Tells the dirty log what a job may have written.
    pub fn done(&self, job: &Job, resources: &Resources) {
        match job.writes() {
            Some(Written::Backing(id)) => self.mark(resources, id),
            Some(Written::Queries) => resources
                .solids()
                .filter(|(_, solid)| solid.shape.bind & Shape::BIND_CUSTOM != 0)
                .for_each(|(id, _)| self.mark(resources, id)),
            None => {}
        }
    }

    fn job(&self, header: &Header, task: Task) -> Next {
        Next::Job(Job { header: *header, render: Arc::clone(&self.render), task, outcome: Ok(()) })
    }

    /// Reads pixels of a resource of 3D.
    pub fn read(&mut self, header: &Header, id: u32, rect: Rect) -> Next {
        let mut pixels = std::mem::take(&mut self.room);
        pixels.resize(rect.width as usize * rect.height as usize * PIXEL_BYTES, 0);
        self.job(header, Task::Read { id, rect, pixels })
    }

    /// Room for the next pixels.
    pub fn give_back(&mut self, mut room: Vec<u8>, kept: usize) {
        room.shrink_to(kept);
        self.room = room;
    }

    /// A transfer between a resource of 3D and its backing.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn transfer(
        &mut self,
        header: &Header,
        resources: &mut Resources,
        mut transfer: Transfer,
    ) -> Result<Next, Refusal> {
        let Transfer { id, context, level, .. } = transfer;
        if context != 0 && self.contexts.get(&context).ok_or(Refusal::NoContext(context))?.lost {
            // The renderer does not know it; the resource it does.
            transfer.context = 0;
        }
        let solid = resources.get(id)?.solid.ok_or(Refusal::Kind(id))?;
        if resources.ranges(id).is_none() {
            return Err(Refusal::Unbacked(id));
        }
        if self.unlent.contains(&id) {
            return Err(Refusal::Lent(id));
        }
        if !solid.shape.has(&transfer.area, level) {
            return Err(Refusal::Box { id, level });
        }
        if transfer.to_host {
            resources.found(id);
        }
        Ok(self.job(header, Task::Transfer(transfer)))
    }

    /// Executes a command of 3D. Said `again`, it is one that a predecessor may have executed already.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn control<M: GuestMemory>(
        &mut self,
        (record, resources): (&Record, &mut Resources),
        (mem, said): (&M, Segments<'_>),
        again: bool,
        header: &Header,
        command: Command3d,
    ) -> Result<Next, Refusal> {
        let context = header.context;
        match command {
            Command3d::CapsetInfo { index } => {
                let capset = self.render.capsets().get(index as usize).ok_or(Refusal::Capset(index))?;
                let info = [capset.id, capset.version, capset.bytes.len() as u32];
                Ok(Next::Answer(Answer::CapsetInfo(info)))
            }
            Command3d::Capset { id, version } => {
                let capset = self.render.capsets().iter().find(|capset| capset.id == id && version <= capset.version);
                Ok(Next::Answer(Answer::Capset(Arc::clone(&capset.ok_or(Refusal::Capset(id))?.bytes))))
            }
            Command3d::Begin { name, len } => {
                self.begin(record, again, context, name.get(..len).unwrap_or_default()).map(|()| DONE)
            }
            Command3d::End => {
                let Some(ended) = self.contexts.remove(&context) else {
                    return if again { Ok(DONE) } else { Err(Refusal::NoContext(context)) };
                };
                record.set_context(ended.place, 0);
                if !ended.lost {
                    self.render.destroy_context(context);
                }
                Ok(DONE)
            }
            Command3d::Join { id } => self.join(resources, context, id).map(|()| DONE),
            Command3d::Part { id } => {
                let known = self.contexts.get_mut(&context).ok_or(Refusal::NoContext(context))?;
                resources.get(id)?;
                known.flat.remove(&id);
                if !known.lost {
                    self.render.part(context, id);
                }
                Ok(DONE)
            }
            Command3d::Create { id, shape } => {
                if resources.create_solid(record, again, id, &shape)?
                    && let Err(failed) = self.render.create(id, &shape)
                {
                    resources.unref(record, true, id)?;
                    return Err(failed.into());
                }
                Ok(DONE)
            }
            Command3d::Transfer(transfer) => match resources.get(transfer.id)?.solid {
                Some(_) => self.transfer(header, resources, transfer),
                None => self.transfer_flat((record, resources), mem, &transfer).map(|()| DONE),
            },
            Command3d::Submit { bytes } => self.submit((record, resources), (mem, said), header, bytes),
        }
    }

    fn begin(&mut self, record: &Record, again: bool, id: u32, name: &[u8]) -> Result<(), Refusal> {
        let place = match self.contexts.get(&id) {
            // It was written down, and its maker died.
            Some(there) if again && there.lost => there.place,
            Some(_) if again => return Ok(()),
            Some(_) => return Err(Refusal::ContextName(id)),
            None if id == 0 => return Err(Refusal::ContextName(id)),
            None => (0..CONTEXTS).find(|place| record.context(*place) == 0).ok_or(Refusal::Count(CONTEXTS))?,
        };
        self.render.create_context(id, name)?;
        record.set_context(place, id);
        self.contexts.insert(id, Context { place, lost: false, flat: BTreeSet::new() });
        Ok(())
    }

    fn join(&mut self, resources: &mut Resources, context: u32, id: u32) -> Result<(), Refusal> {
        let known = self.contexts.get_mut(&context).ok_or(Refusal::NoContext(context))?;
        let resource = resources.get(id)?;
        if known.lost {
            return Ok(());
        }
        if resource.solid.is_some() {
            self.render.join(context, id);
            resources.found(id);
            return Ok(());
        }
        let whole = geometry::whole(resource.width, resource.height);
        known.flat.insert(id);
        let mirror = self.mirrors.entry(id).or_insert(Mirror { made: false, damage: Some(whole) });
        if mirror.made {
            self.render.join(context, id);
        }
        Ok(())
    }

    /// A transfer of 3D's for a resource of 2D, whose rows follow each other.
    fn transfer_flat<M: GuestMemory>(
        &mut self,
        (record, resources): (&Record, &mut Resources),
        mem: &M,
        transfer: &Transfer,
    ) -> Result<(), Refusal> {
        let Transfer { id, area, level, stride, offset, to_host, .. } = *transfer;
        let resource = resources.get(id)?;
        if level != 0 || area.z != 0 || area.depth != 1 || (stride != 0 && u64::from(stride) != resource.stride()) {
            return Err(Refusal::Kind(id));
        }
        let rect = Rect { x: area.x, y: area.y, width: area.width, height: area.height };
        // The other way there is nothing to do: nobody but the guest draws on it.
        if to_host {
            resources.transfer((record, mem), id, rect, offset)?;
            self.changed(id, rect);
        }
        Ok(())
    }

    fn submit<M: GuestMemory>(
        &mut self,
        (record, resources): (&Record, &Resources),
        (mem, said): (&M, Segments<'_>),
        header: &Header,
        len: u32,
    ) -> Result<Next, Refusal> {
        let context = header.context;
        let known = self.contexts.get(&context).ok_or(Refusal::NoContext(context))?;
        if said.bytes() < SUBMIT_LEN + u64::from(len) {
            return Err(Refusal::Short(said.bytes()));
        }
        if known.lost {
            self.lost += 1;
            // The guest decides how often.
            if self.lost.is_power_of_two() {
                tracing::info!(context, count = self.lost, "a stream of a lost context is dropped");
            }
            return Ok(DONE);
        }
        let mut bytes = vec![0; len as usize];
        said.read_at(mem, SUBMIT_LEN, &mut bytes).map_err(|_| Refusal::Memory)?;
        let stream = bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
        let mut uploads = Vec::new();
        for id in &known.flat {
            let Some(mirror) = self.mirrors.get_mut(id) else { continue };
            let Some(damage) = mirror.damage else { continue };
            if !mirror.made {
                let Ok(resource) = resources.get(*id) else { continue };
                let shape = Shape::flat(resource.number(), resource.width, resource.height);
                if self.render.create(*id, &shape).is_err() {
                    // The stream will find that it is not there.
                    continue;
                }
                mirror.made = true;
                let users = self.contexts.iter().filter(|(_, context)| !context.lost && context.flat.contains(id));
                users.for_each(|(context, _)| self.render.join(*context, *id));
            }
            mirror.damage = None;
            uploads.extend(resources.raw(record, *id, damage).map(|pixels| Upload { id: *id, rect: damage, pixels }));
        }
        Ok(self.job(header, Task::Submit { context, stream, uploads }))
    }
}

#[cfg(test)]
mod tests;
