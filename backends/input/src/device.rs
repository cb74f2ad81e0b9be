//! The device on the kit: configuration space, a queue for events and one for lights (virtio 1.2, 5.8).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use atoll_devices::virtio::input_config::{self, Pages};
use atoll_kit::chain::Chain;
use atoll_kit::device::{Io, Wait};
use atoll_kit::inlet::Buffers;
use atoll_kit::{ConfigError, Device, Progress, QueueHandler, QueueLayout};
use atoll_protocol::input::{EVENT_LEN, Hearer, InputError, InputKind, Report};
use vm_memory::GuestMemory;

use crate::feed::Feed;
use crate::shape;

const QUEUE_SIZE_MAX: u16 = 256;
/// How long a report may wait for buffers of the guest.
const WAIT_MAX: Duration = Duration::from_secs(1);
/// Reports between two looks at the conversation with the front end.
const TURN: usize = 64;
/// Frames that are thrown away when a ring starts, at most: more than a socket holds.
const STALE_MAX: usize = 4096;

/// The device.
pub struct InputDevice {
    kind: InputKind,
    pages: Pages,
    selected: (u8, u8),
    events: Option<OwnedFd>,
}

impl InputDevice {
    /// A device of this kind, which hears what happens on `events`.
    #[must_use]
    pub fn new(kind: InputKind, serial: &str, events: OwnedFd) -> Self {
        Self { kind, pages: shape::pages(kind, serial), selected: (0, 0), events: Some(events) }
    }
}

impl Device for InputDevice {
    type Queue = Queue;

    fn layout(&self) -> QueueLayout {
        QueueLayout { queues: 2, size_max: QUEUE_SIZE_MAX }
    }
    fn features(&self) -> u64 {
        0
    }
    fn features_acked(&mut self, _features: u64) {}
    fn read_config(&self, offset: u32, out: &mut [u8]) {
        let config = self.pages.config(self.selected.0, self.selected.1);
        for (to, at) in out.iter_mut().zip(offset as usize..) {
            *to = config.get(at).copied().unwrap_or(0);
        }
    }
    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), ConfigError> {
        let start = offset as usize;
        // QEMU writes the whole of it; what is not one of the two fields stays as it is.
        if start.checked_add(data.len()).is_none_or(|end| end > input_config::LEN) {
            return Err(ConfigError { offset });
        }
        for (at, byte) in (start..).zip(data) {
            match at {
                0 => self.selected.0 = *byte,
                1 => self.selected.1 = *byte,
                _ => {}
            }
        }
        Ok(())
    }
    fn reset(&mut self) {
        self.selected = (0, 0);
    }
    fn queue(&mut self, index: u16) -> Queue {
        let events = if index == 0 { self.events.take() } else { None };
        Queue {
            hearer: events.map(Hearer::new),
            is_events: index == 0,
            feed: Feed::new(self.kind),
            size: 0,
            since: None,
            knows: false,
        }
    }
}

/// A queue.
pub struct Queue {
    /// Where it hears what happens, until that ends.
    hearer: Option<Hearer>,
    is_events: bool,
    feed: Feed,
    size: u16,
    /// When the guest began to have no buffers.
    since: Option<Instant>,
    /// It was this process that told the guest what it knows.
    knows: bool,
}

impl Queue {
    /// Puts a report into the guest's buffers, if there are enough.
    fn put<M: GuestMemory>(buffers: &mut Buffers<'_, M>, report: &Report) -> bool {
        let events = report.told();
        if !buffers.gather_each(events.len(), EVENT_LEN as u64) {
            return false;
        }
        for event in events {
            let written = buffers.write(1, 0, &event.to_bytes()).is_ok();
            buffers.finish(1, if written { EVENT_LEN as u64 } else { 0 });
        }
        true
    }

    /// Hears the next frame; whether there was one.
    fn hear(&mut self) -> bool {
        let Some(hearer) = &mut self.hearer else { return false };
        match hearer.try_hear() {
            Ok(Some(frame)) => {
                self.feed.hear(frame);
                true
            }
            Ok(None) => false,
            Err(error) => {
                match error {
                    InputError::Closed => tracing::info!("whoever typed is gone"),
                    error => tracing::warn!(%error, "the input wire is given up; start this device again"),
                }
                hearer.hang_up();
                self.hearer = None;
                self.feed.let_go();
                true
            }
        }
    }

    /// What the guest is to be told now, in as many events as its ring can ever have room for.
    fn next(&self) -> Option<Report> {
        self.feed.next(usize::from(self.size).saturating_sub(1))
    }

    /// The guest has no room for what waits. One that had none for long, or never can have, does not get it.
    fn wait_for_room(&mut self, report: &Report) -> bool {
        let since = *self.since.get_or_insert_with(Instant::now);
        let never = report.told().len() > usize::from(self.size);
        if never {
            self.feed.drop_waiting();
        }
        since.elapsed() < WAIT_MAX && !never
    }
}

impl QueueHandler for Queue {
    fn opcodes(&self) -> &'static [u8] {
        &[]
    }
    fn started(&mut self, size: u16) {
        self.size = size;
    }
    fn goes_on_at(&mut self, _taken: u16, served: Option<bool>) {
        if !self.is_events {
            return;
        }
        match served {
            Some(true) if self.knows => {}
            Some(true) => self.feed.take_over(),
            Some(false) | None => {
                self.feed.forget();
                // What was typed before there was a driver is not for this one.
                for _ in 0..STALE_MAX {
                    if !self.hear() {
                        break;
                    }
                }
                self.feed.forget();
            }
        }
        (self.knows, self.since) = (true, None);
    }
    fn stopped(&mut self) {}

    /// What lights are on is of no interest to whoever types: it is taken note of by nobody.
    fn request<M: GuestMemory>(&mut self, io: &mut Io<'_>, _mem: &M, chain: &Chain) -> Progress {
        io.figures().written(chain.readable_bytes());
        Progress::Done { written: 0 }
    }
    fn completion<M: GuestMemory>(&mut self, _io: &mut Io<'_>, _mem: &M, _head: u16, _result: i32) -> Progress {
        Progress::Done { written: 0 }
    }

    fn is_inlet(&self) -> bool {
        self.is_events
    }
    fn fill<M: GuestMemory>(&mut self, buffers: &mut Buffers<'_, M>) -> Wait {
        // Buffers have come after a long time: what waited meanwhile is dropped, and what is owed is told.
        let stale = self.since.is_some_and(|since| since.elapsed() >= WAIT_MAX);
        if stale {
            self.feed.drop_waiting();
            for _ in 0..STALE_MAX {
                if !self.hear() {
                    break;
                }
                self.feed.drop_waiting();
            }
        }
        for _ in 0..self.feed.take_dropped() {
            buffers.figures().failed();
        }
        for _ in 0..TURN {
            let Some(report) = self.next() else {
                if self.hear() {
                    continue;
                }
                return if self.hearer.is_some() { Wait::Source } else { Wait::Nothing };
            };
            if Self::put(buffers, &report) {
                self.feed.told(&report);
                self.since = None;
            } else {
                let waits = self.wait_for_room(&report);
                if waits || self.next().is_some() {
                    return Wait::Buffers;
                }
            }
        }
        Wait::Again
    }
    fn source(&self) -> Option<BorrowedFd<'_>> {
        self.hearer.as_ref().map(AsFd::as_fd)
    }
}
