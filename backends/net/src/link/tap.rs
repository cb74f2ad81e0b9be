//! A TAP interface of the host. The kernel does what the driver left undone: each frame travels with its header. How
//! frames are read is in [`tap_intake`](super::tap_intake).

#![allow(unsafe_code, reason = "ioctls of the TUN driver; vectored I/O on guest memory")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use atoll_kit::inlet::{Buffers, Inlet};
use atoll_kit::memory::{Direction, GuestRam, Transfer};
use atoll_kit::{Fetched, Wait};
use rustix::event::{EventfdFlags, eventfd};
use vm_memory::GuestMemory;

use super::tap_intake::{IOVECS_MAX, Intake};
use super::{Link, Outgoing, Receiver, Sender, Spreader};
use crate::face::Face;
use crate::frame::Frame;
use crate::header::{Features, Offloads};

/// An interface with its queues.
pub struct Tap {
    queues: Vec<Arc<Queue>>,
    intakes: Vec<Arc<Intake>>,
    /// Who switches queues holds it.
    switching: Arc<Mutex<()>>,
    told: Option<(u64, libc::c_int)>,
}

/// One queue. The kernel uses it only while the driver does.
#[derive(Debug)]
pub(super) struct Queue {
    file: File,
    attached: AtomicBool,
    /// Written to when the queue is switched on.
    wake: OwnedFd,
}

impl Queue {
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Whether the kernel uses it.
    pub(super) fn is_attached(&self) -> bool {
        self.attached.load(Ordering::Acquire)
    }

    /// Takes the news that it was switched on.
    pub(super) fn forget_wake(&self) {
        let _ = rustix::io::read(&self.wake, &mut [0_u8; 8]);
    }

    /// What to wait for: frames, or that it is switched on.
    pub(super) fn source(&self) -> BorrowedFd<'_> {
        if self.is_attached() { self.file.as_fd() } else { self.wake.as_fd() }
    }
}

impl Tap {
    /// An interface by its open queues, one for each pair.
    pub fn new(queues: Vec<File>) -> io::Result<Self> {
        let queue = |file| -> io::Result<Arc<Queue>> {
            let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
            Ok(Arc::new(Queue { file, attached: AtomicBool::new(true), wake }))
        };
        let queues = queues.into_iter().map(queue).collect::<io::Result<Vec<_>>>()?;
        let intakes = queues.iter().map(|queue| Intake::new(Arc::clone(queue)).map(Arc::new));
        let intakes = intakes.collect::<io::Result<_>>()?;
        let tap = Self { queues, intakes, switching: Arc::default(), told: None };
        (tap.spreader())(1);
        Ok(tap)
    }
}

fn ioctl<T>(file: &File, request: u64, argument: T) -> io::Result<()> {
    // SAFETY: each request here takes either a number or a pointer to a structure that outlives the call.
    if unsafe { libc::ioctl(file.as_raw_fd(), request as _, argument) } < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

impl Link for Tap {
    type Sender = TapSender;
    type Receiver = TapReceiver;

    fn offers(&self) -> Offloads {
        Offloads::ALL
    }

    fn negotiated(&mut self, features: Features) {
        let takes = Offloads::to_driver(features);
        // Segments need checksums there as here.
        let bits = [
            (takes.csum, libc::TUN_F_CSUM),
            (takes.csum && takes.tso4, libc::TUN_F_TSO4),
            (takes.csum && takes.tso6, libc::TUN_F_TSO6),
            (takes.csum && (takes.tso4 || takes.tso6) && takes.ecn, libc::TUN_F_TSO_ECN),
        ];
        let offload = bits.iter().filter(|(on, _)| *on).fold(0, |all, (_, bit)| all | bit);
        let header = features.header_bytes() as libc::c_int;
        if self.told.replace((u64::from(offload), header)) == Some((u64::from(offload), header)) {
            return;
        }
        for queue in &self.queues {
            let told = ioctl(&queue.file, libc::TUNSETOFFLOAD, libc::c_ulong::from(offload))
                .and_then(|()| ioctl(&queue.file, libc::TUNSETVNETHDRSZ, &raw const header));
            if let Err(error) = told {
                tracing::error!(%error, "the TAP interface does not take what the driver has agreed to");
            }
        }
    }

    fn sender(&mut self, pair: u16) -> TapSender {
        let pair = usize::from(pair);
        let (queue, intake) = (self.queues.get(pair).cloned(), self.intakes.get(pair).cloned());
        TapSender { queue, intake, transfer: Transfer::default() }
    }

    fn receiver(&mut self, pair: u16) -> TapReceiver {
        TapReceiver { intake: self.intakes.get(usize::from(pair)).cloned() }
    }

    fn opened(&mut self, pair: u16, inlet: &Arc<Inlet<GuestRam>>) {
        if let Some(intake) = self.intakes.get(usize::from(pair)) {
            intake.opened(inlet);
        }
    }

    fn spreader(&self) -> Spreader {
        if self.queues.len() < 2 {
            return Arc::new(|_| {});
        }
        let (queues, switching) = (self.queues.clone(), Arc::clone(&self.switching));
        Arc::new(move |pairs| {
            let _switching = switching.lock().unwrap_or_else(PoisonError::into_inner);
            for (pair, queue) in queues.iter().enumerate() {
                let wanted = pair < usize::from(pairs);
                if queue.attached.load(Ordering::Acquire) != wanted && attach(&queue.file, wanted) {
                    queue.attached.store(wanted, Ordering::Release);
                    let _ = rustix::io::write(&queue.wake, &1_u64.to_ne_bytes());
                }
            }
        })
    }
}

/// Lets the kernel use a queue of the interface, or not.
fn attach(queue: &File, on: bool) -> bool {
    let flags = if on { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE } as i16;
    let mut request = [0_u8; 40];
    for (to, from) in request.iter_mut().skip(libc::IFNAMSIZ).zip(flags.to_ne_bytes()) {
        *to = from;
    }
    let done = ioctl(queue, libc::TUNSETQUEUE, request.as_mut_ptr());
    if let Err(error) = &done {
        tracing::warn!(%error, on, "a queue of the TAP interface could not be switched");
    }
    done.is_ok()
}

/// One queue of an interface, towards the host.
pub struct TapSender {
    queue: Option<Arc<Queue>>,
    intake: Option<Arc<Intake>>,
    transfer: Transfer,
}

impl Sender for TapSender {
    type Turn<'a> = &'a mut Self;

    fn turn(&mut self) -> &mut Self {
        self
    }

    fn naps(&self) -> bool {
        true
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        self.intake.as_deref().map(Intake::source)
    }

    fn fetch(&mut self, face: &Face, readable: bool) -> Fetched {
        self.intake.as_deref().map_or_else(Fetched::default, |intake| intake.fetch(face, readable))
    }
}

impl Outgoing for &mut TapSender {
    fn send<M: GuestMemory>(&mut self, face: &Face, frame: &Frame<'_, M>) -> bool {
        let Some(queue) = &self.queue else { return false };
        let whole = face.features().header_bytes() + frame.len;
        if self.transfer.set(frame.mem, frame.chain, 0, whole, Direction::FromGuest).is_err() {
            return false;
        }
        let (iovec, entries) = self.transfer.iovec();
        if entries > IOVECS_MAX {
            return false;
        }
        // SAFETY: the iovec points into guest memory, which stays mapped during the call. What the guest writes there
        // meanwhile is the kernel's to check, as it checks everything that comes through a TAP.
        let written = unsafe { libc::writev(queue.file.as_raw_fd(), iovec, entries as libc::c_int) };
        written.cast_unsigned() == whole as usize
    }
}

/// One queue of an interface, from the host.
pub struct TapReceiver {
    intake: Option<Arc<Intake>>,
}

impl Receiver for TapReceiver {
    fn receive<M: GuestMemory>(&mut self, face: &Face, buffers: &mut Buffers<'_, M>) -> Wait {
        self.intake.as_deref().map_or(Wait::Nothing, |intake| intake.receive(face, buffers))
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        self.intake.as_deref().map(Intake::back)
    }

    fn stopped(&mut self) {
        if let Some(intake) = &self.intake {
            intake.stopped();
        }
    }

    fn discard(&mut self) {
        if let Some(intake) = &self.intake {
            intake.discard();
        }
    }
}
