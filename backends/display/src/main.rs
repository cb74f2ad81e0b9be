//! The command line of `atoll-display`, and the order of its start: everything is opened, the jail closes, viewers come.

use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, bail};
use atoll_display::asked::Asked;
use atoll_display::control::Control;
use atoll_display::listen::Place;
use atoll_display::secret::Secret;
use atoll_display::serial::Serial;
use atoll_display::stage::{SIDE_MAX, SIDE_MIN, Stage};
use atoll_display::web::novnc::Novnc;
use atoll_display::web::serve::Site;
use atoll_display::{gpu, visits, web};
use atoll_kit::jail::{self, Jail, Profile};
use atoll_kit::program::{JailArgs, report};
use atoll_kit::serve::{inherited, tell_jail};
use atoll_kit::sidecar::{Orders, Reports, Sidecar};
use atoll_kit::{logging, signals};
use atoll_protocol::display::SCANOUTS_MAX;
use atoll_protocol::input::InputKind;
use atoll_protocol::sidecar::{DeviceClass, GoodbyeReason, SidecarFeatures, SidecarReport};
use clap::Parser;
use tokio::sync::{Semaphore, mpsc};

/// Threads that move pictures. They exist before the jail closes: it lets none begin.
const THREADS: usize = 2;
/// The size of a head of which nothing was said.
const SIZE: (u32, u32) = (1280, 800);
/// Where Debian has noVNC.
const NOVNC: &str = "/usr/share/novnc";

/// A screen for a guest: shows viewers (VNC) and browsers what a GPU's process tells it, and tells input devices what they type
///
/// Every socket is inherited, bound and connected by whoever starts this program, so that addresses outlive it.
#[derive(Debug, Parser)]
#[command(name = "atoll-display", version)]
struct Options {
    /// The screen's end of a GPU's socket (vhost-user-gpu); later ones come on the control socket
    #[arg(long, value_name = "N")]
    display_fd: Option<RawFd>,
    /// Where an input device's process listens, as in keyboard:7; also tablet and mouse
    #[arg(long, value_name = "KIND:N")]
    events_fd: Vec<Events>,
    /// The guest's serial console: a stream, both ways
    #[arg(long, value_name = "N")]
    serial_fd: Option<RawFd>,
    /// A listening socket for VNC viewers, of head 0 or another one, as in 1:9
    #[arg(long, value_name = "[HEAD:]N")]
    vnc_fd: Vec<Vnc>,
    /// A listening socket for browsers
    #[arg(long, value_name = "N")]
    web_fd: Option<RawFd>,
    /// A file or pipe with the secret that viewers and browsers have to know; of a VNC password eight characters count
    #[arg(long, value_name = "N")]
    secret_fd: Option<RawFd>,
    /// The VMM's orders: pictures, recordings, sockets
    #[arg(long, value_name = "N")]
    control_fd: Option<RawFd>,
    /// The size that a head is to have: the first, the second, …; default 1280x800 for one head, and for each at which
    /// viewers arrive
    #[arg(long, value_name = "WIDTHxHEIGHT", value_parser = parse_size)]
    size: Vec<(u32, u32)>,
    /// A memfd of 128 bytes in which sizes that are asked for outlive this process: each start reads there what its predecessors
    /// were asked for
    #[arg(long, value_name = "N")]
    asked_fd: Option<RawFd>,
    /// noVNC's folder
    #[arg(long, value_name = "DIR", default_value = NOVNC)]
    novnc: PathBuf,
    /// The supervisor's socket; without it, the process serves unsupervised
    #[arg(long, value_name = "N")]
    sidecar_fd: Option<RawFd>,
    #[command(flatten)]
    jail: JailArgs,
}

/// An input device's socket.
#[derive(Clone, Copy, Debug)]
struct Events(InputKind, RawFd);

impl FromStr for Events {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, fd) = text.split_once(':').ok_or("give a kind and a descriptor, as in keyboard:7")?;
        Ok(Self(kind.parse()?, fd.parse().map_err(|_| format!("{fd} is no descriptor"))?))
    }
}

/// A head's listening socket.
#[derive(Clone, Copy, Debug)]
struct Vnc(usize, RawFd);

impl FromStr for Vnc {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (head, fd) = text.split_once(':').unwrap_or(("0", text));
        let head = head.parse().ok().filter(|head| *head < SCANOUTS_MAX);
        let head = head.ok_or_else(|| format!("there are heads 0 to {}", SCANOUTS_MAX - 1))?;
        Ok(Self(head, fd.parse().map_err(|_| format!("{fd} is no descriptor"))?))
    }
}

fn parse_size(text: &str) -> Result<(u32, u32), String> {
    let sides = text.split_once('x').and_then(|(width, height)| Some((width.parse().ok()?, height.parse().ok()?)));
    sides
        .filter(|(width, height)| [*width, *height].iter().all(|side| (SIDE_MIN..=SIDE_MAX).contains(side)))
        .ok_or_else(|| format!("a size is WIDTHxHEIGHT, each from {SIDE_MIN} to {SIDE_MAX}, as in 1280x800"))
}

/// Nothing is in flight in a screen, so every order is carried out at once.
struct AtOnce;

impl Orders for AtOnce {
    fn quiesce(&self) {}

    fn exit(&self, reports: &Reports) -> ! {
        reports.goodbye(GoodbyeReason::Asked);
        std::process::exit(0)
    }

    fn orphaned(&self) -> ! {
        std::process::exit(atoll_kit::EXIT_ORPHANED)
    }
}

impl Options {
    fn descriptors(&self) -> Vec<RawFd> {
        let single = [self.display_fd, self.serial_fd, self.web_fd, self.secret_fd, self.control_fd, self.sidecar_fd];
        let single = single.into_iter().chain([self.asked_fd]);
        let events = self.events_fd.iter().map(|Events(_, fd)| *fd);
        let places = self.vnc_fd.iter().map(|Vnc(_, fd)| *fd);
        single.flatten().chain(events).chain(places).collect()
    }

    fn take(option: &'static str, fd: Option<RawFd>) -> anyhow::Result<Option<OwnedFd>> {
        Ok(fd.map(|fd| inherited(option, fd)).transpose()?)
    }
}

fn main() -> ExitCode {
    signals::hold();
    match start(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report("atoll-display", &format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn start(options: &Options) -> anyhow::Result<()> {
    jail::begin(&options.descriptors(), options.sidecar_fd.is_some())?;
    let sidecar = Options::take("--sidecar-fd", options.sidecar_fd)?;
    let sidecar =
        sidecar.map(|fd| Sidecar::introduce(fd, DeviceClass::Display, SidecarFeatures::QUIESCE)).transpose()?;
    let reports = sidecar.as_ref().map(|sidecar| sidecar.reports().clone());
    logging::start(reports.clone());
    let outcome = serve(options, sidecar, reports.as_ref());
    if let (Err(error), Some(reports)) = (&outcome, &reports) {
        let text = format!("{error:#}");
        reports.goodbye(match error.downcast_ref::<atoll_display::control::ControlError>() {
            Some(_) => GoodbyeReason::Peer(text),
            None => GoodbyeReason::Config(text),
        });
    }
    outcome
}

fn serve(options: &Options, sidecar: Option<Sidecar>, reports: Option<&Reports>) -> anyhow::Result<()> {
    // What needs a path comes before the jail; what needs a runtime has its descriptor already.
    let secret = Options::take("--secret-fd", options.secret_fd)?.map(Secret::read).transpose()?;
    let novnc = if options.web_fd.is_some() {
        Novnc::read(&options.novnc).map_err(|error| {
            tracing::warn!("the page will have no picture: {error}");
            format!("{error}.")
        })
    } else {
        Ok(Novnc::default())
    };
    // Each head at which somebody can arrive has a size.
    let count = options.vnc_fd.iter().map(|Vnc(head, _)| head + 1).max().unwrap_or(1).max(options.size.len());
    let sizes: Vec<_> = (0..count).map(|head| options.size.get(head).copied().unwrap_or(SIZE)).collect();
    let stage = match Options::take("--asked-fd", options.asked_fd)? {
        Some(fd) => Stage::succeeding(&sizes, Asked::read(fd)?),
        None => Stage::new(&sizes),
    };
    for Events(kind, fd) in &options.events_fd {
        stage.seat().connect(*kind, inherited("--events-fd", *fd)?);
    }
    let display = Options::take("--display-fd", options.display_fd)?;
    let serial_line = Options::take("--serial-fd", options.serial_fd)?;
    let control = Options::take("--control-fd", options.control_fd)?;

    let (mode, supervised) = (options.jail.mode(), sidecar.is_some());
    let jail = Jail { mode, profile: &Profile::DISPLAY, supervised, writes_files: true }.confine(None)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .thread_name("display")
        .enable_all()
        .build()
        .context("no threads")?;
    let places = {
        let _inside = runtime.enter();
        let place = |option, fd| -> anyhow::Result<Place> {
            let place = Place::new(option, inherited(option, fd)?)?;
            if place.is_open() && secret.is_none() {
                bail!(
                    "{option} is a port that everybody on this host can reach: give a secret (--secret-fd), or a UNIX socket"
                );
            }
            Ok(place)
        };
        let vnc = options.vnc_fd.iter().map(|Vnc(head, fd)| Ok((*head, place("--vnc-fd", *fd)?)));
        let vnc = vnc.collect::<anyhow::Result<Vec<_>>>()?;
        (vnc, options.web_fd.map(|fd| place("--web-fd", fd)).transpose()?)
    };
    signals::end_on_signal(|| std::process::exit(0)).context("no thread for signals")?;
    // The supervisor must be heard while we wait for anything else.
    let started = sidecar.map(|sidecar| sidecar.attend(Vec::new(), AtOnce)).transpose().context("no thread")?;
    // Before a word of the guest's or of a viewer's comes in.
    tell_jail(jail.lock(0)?, reports)?;
    let started = started.map(|started| started.recv().context("the supervisor never said start")).transpose()?;

    let (displays, sockets) = mpsc::channel(4);
    if let Some(display) = display {
        displays.try_send(display).context("no room for a socket")?;
    }
    let seats = Arc::new(Semaphore::new(visits::VIEWERS_MAX));
    let serial = serial_line.map(|line| {
        let serial = Serial::new();
        let carrier = Arc::clone(&serial);
        runtime.spawn(async move { carrier.carry(line).await });
        serial
    });
    runtime.spawn(gpu::attend(Arc::clone(&stage), sockets));
    let (vnc, browsers) = places;
    for (head, place) in vnc {
        runtime.spawn(visits::receive(place, Arc::clone(&stage), head, secret.clone(), Arc::clone(&seats)));
    }
    if let Some(place) = browsers {
        let site = Site { stage: Arc::clone(&stage), serial, novnc, secret, seats };
        runtime.spawn(web::serve::receive(place, Arc::new(site)));
    }
    if let (Some(started), Some(reports)) = (started, reports) {
        reports.send(&SidecarReport::Ready { generation: started.generation })?;
    }
    let mut orders = Control::new(stage, displays.clone());
    runtime.block_on(async move {
        match control {
            Some(socket) => Ok(orders.attend(socket).await?),
            None => {
                // Until a signal or the supervisor ends it.
                std::future::pending::<()>().await;
                drop(displays);
                Ok(())
            }
        }
    })
}
