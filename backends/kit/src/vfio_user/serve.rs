//! The life of a process that serves a PCI device. The order is that of [`serve`](crate::serve): everything that needs
//! rights, the jail, the fence, and only then a client and its memory.

use std::time::{Duration, Instant};

use atoll_protocol::sidecar::{GoodbyeReason, SidecarReport};
use atoll_protocol::vfio_user::Channel;

use super::PciDevice;
use super::session::{End, Session};
use crate::bad_build::{self, Bad};
use crate::fence::FenceError;
use crate::program::Served;
use crate::serve::{ServeError, Service, Transport, tell_jail};
use crate::sidecar::{Orders, Reports, Sidecar};
use crate::step::{Sabotage, fence_took, strikes};

/// How long a first incarnation waits for a fence, and how long a successor.
const FENCE_WAIT: Duration = Duration::from_secs(2);
const FENCE_WAIT_SUCCESSOR: Duration = Duration::from_secs(60);

/// A PCI device, as a program serves it.
#[derive(Debug)]
pub struct VfioUser<D>(pub D);

/// What a supervisor orders: all that must survive is in the record and in the file, so an end needs no preparation.
struct AtOnce {
    socket: Option<std::sync::Arc<crate::jail::SocketFile>>,
}

impl AtOnce {
    fn end(&self, status: i32) -> ! {
        if let Some(socket) = &self.socket {
            socket.remove();
        }
        std::process::exit(status)
    }
}

impl Orders for AtOnce {
    /// The client does that, by taking memory away.
    fn quiesce(&self) {}
    fn exit(&self, reports: &Reports) -> ! {
        reports.goodbye(GoodbyeReason::Asked);
        self.end(0)
    }
    fn orphaned(&self) -> ! {
        self.end(crate::EXIT_ORPHANED)
    }
}

impl<D: PciDevice> Served for VfioUser<D> {
    fn serve(self, service: Service) -> Result<(), ServeError> {
        let Service { transport, sidecar, fence, jail, stats: _ } = service;
        let mut device = self.0;
        crate::serve::end_on_panic();
        let socket = match &transport {
            Transport::Listen(listening) => Some(listening.file()),
            Transport::Connected(_) => None,
        };
        let jail = jail.confine(socket.as_ref())?;
        let reports = sidecar.as_ref().map(|sidecar| sidecar.reports().clone());
        let attend = |sidecar: Sidecar| {
            let orders = AtOnce { socket: socket.clone() };
            sidecar.attend(Vec::new(), orders).map_err(|source| ServeError::Thread { what: "sidecar", source })
        };
        let started = sidecar.map(attend).transpose()?;
        let ender = AtOnce { socket: socket.clone() };
        crate::signals::end_on_signal(move || ender.end(0))
            .map_err(|source| ServeError::Thread { what: "signal", source })?;
        device.prepare()?;
        tell_jail(jail.lock(1)?, reports.as_ref())?;
        let started = started.map(|started| started.recv().map_err(|_| ServeError::NeverStarted)).transpose()?;
        bad_build::fail(None, Some(Bad::HangsBeforeReady));
        let successor = started.is_some_and(|started| started.generation.0 > 1);
        let began = Instant::now();
        let outcome = if successor && strikes(Sabotage::SkipFence) {
            fence.skip()
        } else {
            fence.raise(if successor { FENCE_WAIT_SUCCESSOR } else { FENCE_WAIT })
        };
        fence_took(began.elapsed());
        let outcome = outcome.map_err(ServeError::from).and_then(|()| Ok(device.begin()?)).and_then(|()| {
            if let (Some(reports), Some(started)) = (&reports, started) {
                reports.send(&SidecarReport::Ready { generation: started.generation })?;
            }
            talk(&mut device, transport)
        });
        if let Some(reports) = &reports {
            reports.goodbye(match &outcome {
                Ok(()) => GoodbyeReason::Asked,
                Err(e @ ServeError::Client(_)) => GoodbyeReason::Peer(e.to_string()),
                Err(e @ ServeError::Fence(FenceError::Unfit(_))) => GoodbyeReason::Config(e.to_string()),
                Err(e) => GoodbyeReason::Resource(e.to_string()),
            });
        }
        outcome
    }
}

fn talk<D: PciDevice>(device: &mut D, transport: Transport) -> Result<(), ServeError> {
    match transport {
        Transport::Connected(stream) => match Session::new(device, Channel::new(stream)).run() {
            End::HungUp => Ok(()),
            End::Device(error) => Err(error.into()),
            End::Client(error) => Err(ServeError::Client(error.to_string())),
        },
        Transport::Listen(listening) => loop {
            let stream = listening.accept()?;
            match Session::new(device, Channel::new(stream)).run() {
                End::Device(error) => return Err(error.into()),
                end => tracing::info!(%end, "waiting for the next client"),
            }
        },
    }
}
