//! What a device process says, and the thread that hears it when no vCPU does.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use atoll_devices::interrupt::MsiMessage;
use atoll_protocol::SocketError;
use atoll_protocol::bus::{BusEvent, Refusal};
use atoll_protocol::lane::SLOTS;
use atoll_protocol::lifecycle::LifecycleEvent;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::table::Settled;
use super::{Incoming, OVERSLEPT, Shared, State};
use crate::actor::clock::Moment;

impl Shared {
    /// The thread: receives, and watches the deadlines. It always takes what has come before it calls anybody late.
    pub(super) fn serve(&self) {
        let clock = &self.surroundings.clock;
        let mut incoming: Option<Incoming> = None;
        let mut active = true;
        loop {
            self.tell(self.take_from_lane());
            if let Some(link) = &mut incoming
                && let Err(event) = self.receive_all(link)
            {
                incoming = None;
                self.tell(event);
            }
            let now = clock.now();
            let mut state = self.lock();
            if state.closing {
                return;
            }
            if let Some(arriving) = state.arriving.take() {
                incoming = Some(arriving);
                active = true;
            } else if state.link.is_none() {
                incoming = None;
            }
            let generation = state.generation;
            let expired = state.table.expire(now);
            state.counts.stalled += expired.len() as u64;
            // Nothing open: wait for one budget more, without being woken for each question. A question that is asked
            // meanwhile has its deadline after that. Then sleep until woken.
            let until = match state.table.earliest_deadline() {
                Some(deadline) => Some(deadline),
                None if active => Some(now.after(self.surroundings.budget)),
                None => None,
            };
            state.asleep = until.is_none();
            drop(state);
            for cause in expired {
                self.tell(Some(self.stalled(generation, cause)));
            }
            active = self.wait(until, incoming.as_ref());
        }
    }

    /// Waits for the socket, a wake-up or the moment; whether it was one of the first two.
    fn wait(&self, until: Option<Moment>, incoming: Option<&Incoming>) -> bool {
        let nap = until.map(|until| self.surroundings.clock.nap(until));
        let expected = nap.and_then(|nap| Instant::now().checked_add(nap));
        let nap = nap.map(|nap| Timespec::try_from(nap).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 }));
        let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
        let post = incoming.and_then(|incoming| incoming.post.as_deref());
        if let Some(incoming) = incoming {
            fds.push(PollFd::from_borrowed_fd(incoming.reader.as_fd(), PollFlags::IN));
        }
        fds.extend(post.map(|post| PollFd::new(post, PollFlags::IN)));
        let ready = match poll(&mut fds, nap.as_ref()) {
            Ok(ready) => ready > 0,
            Err(Errno::INTR) => true,
            Err(errno) => {
                // Cannot be: the descriptors are ours and valid. Without this it would be a busy loop.
                tracing::error!(%errno, "poll failed");
                std::thread::sleep(Duration::from_millis(10));
                true
            }
        };
        for event in [Some(&self.wake), post].into_iter().flatten() {
            let _ = rustix::io::read(event, &mut [0u8; 8]);
        }
        if let Some(late) = expected.map(|expected| expected.elapsed()).filter(|late| *late > OVERSLEPT) {
            self.lock().table.postpone(late);
        }
        ready
    }

    /// Takes whatever has come. `Err`: the connection is over.
    fn receive_all(&self, incoming: &mut Incoming) -> Result<(), Option<LifecycleEvent>> {
        let generation = incoming.generation;
        // So many in one turn that deadlines are still looked at while a peer floods.
        for _ in 0..64 {
            let error = match incoming.reader.receive_message::<BusEvent>(Some(Duration::ZERO)) {
                Ok(event) => match self.handle(&mut self.lock(), event) {
                    Ok(()) => continue,
                    Err(wrong) => wrong.to_owned(),
                },
                Err(SocketError::Timeout(_)) => return Ok(()),
                Err(error) => error.to_string(),
            };
            // What it said before its end counts.
            self.tell(self.take_from_lane());
            let mut state = self.lock();
            // A successor may have come meanwhile; its connection is not this one.
            if state.generation != generation || state.link.is_none() {
                return Err(None);
            }
            let device = self.device;
            tracing::info!(%device, %generation, error, "the connection to a device process is closed");
            return Err(self.unlink(&mut state));
        }
        self.wake();
        Ok(())
    }

    /// Takes what has come by the lane; an event if that ends the connection. On any thread.
    pub(super) fn take_from_lane(&self) -> Option<LifecycleEvent> {
        let mut state = self.lock();
        // So many in one turn: a peer that floods does not keep a vCPU.
        for _ in 0..SLOTS {
            let lane = state.link.as_mut()?.lane_mut()?;
            let error = match lane.take() {
                Ok(None) => return None,
                Ok(Some(event)) => match self.handle(&mut state, event) {
                    Ok(()) => continue,
                    Err(wrong) => wrong.to_owned(),
                },
                Err(error) => error.to_string(),
            };
            let (device, generation) = (self.device, state.generation);
            tracing::warn!(%device, %generation, error, "the lane to a device process is closed");
            return self.unlink(&mut state);
        }
        self.wake();
        None
    }

    /// One word of the device process. `Err`: it cannot be right.
    fn handle(&self, state: &mut State, event: BusEvent) -> Result<(), &'static str> {
        let spoken = event.generation();
        if spoken > state.generation {
            return Err("it speaks for a generation that does not exist yet");
        }
        if spoken < state.generation || state.link.is_none() {
            state.counts.stale += 1;
            return Ok(());
        }
        match event {
            BusEvent::Answer { id, answer, .. } => match state.table.settle(id, &answer) {
                Settled::Completed => state.counts.answered += 1,
                Settled::Stale => state.counts.stale += 1,
                Settled::Refused(refusal) => self.note_refusal(state, refusal),
                Settled::Wrong(reason) => return Err(reason),
            },
            BusEvent::Line { line, level, .. } => match self.wires.get(usize::from(line.0)) {
                Some(wire) => wire.set(level),
                None => return Err("it sets an interrupt line that it does not have"),
            },
            BusEvent::Msi { message, .. } => match &self.msi {
                Some(sink) => sink.fire(MsiMessage { address: message.address, data: message.data }),
                None => return Err("it fires a message and has none"),
            },
        }
        Ok(())
    }

    fn note_refusal(&self, state: &mut State, refusal: Refusal) {
        state.counts.refused += 1;
        if let Some(suppressed) = state.limit.admit() {
            tracing::warn!(device = %self.device, ?refusal, suppressed, "a device process refused an access");
        }
    }
}
