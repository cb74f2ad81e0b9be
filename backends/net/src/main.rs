//! The program `atoll-net`.

use std::os::fd::{OwnedFd, RawFd};
use std::process::ExitCode;
use std::sync::Arc;

use atoll_kit::fence::{Fence, NoFence};
use atoll_kit::jail::Profile;
use atoll_kit::program::{self, Program, ServeArgs, Served, StartError};
use atoll_kit::serve::{self, ServeError, Service};
use atoll_kit::sidecar::Reports;
use atoll_net::capture::Capture;
use atoll_net::card::{Card, Look};
use atoll_net::face::{Captures, Face};
use atoll_net::link::connector::Connector;
use atoll_net::link::none::Nowhere;
use atoll_net::link::stream::Stream;
use atoll_net::link::switch::{Port, Switch};
use atoll_net::link::tap::Tap;
use atoll_net::link::{self, Link, tap_device};
use atoll_net::options::Options;
use atoll_protocol::sidecar::{DeviceClass, GoodbyeReason};
use clap::Parser;

/// The cards, by what they are plugged into.
enum Cards {
    Tap(Card<Tap>),
    Stream(Card<Stream>),
    Switch(Vec<Card<Port>>),
    Nowhere(Card<Nowhere>),
}

impl Served for Cards {
    fn serve(self, service: Service) -> Result<(), ServeError> {
        match self {
            Self::Tap(card) => serve::run(card, service),
            Self::Stream(card) => serve::run(card, service),
            Self::Switch(cards) => serve::run_all(cards, service),
            Self::Nowhere(card) => serve::run(card, service),
        }
    }
}

/// The program's command line: [`Options`], which this crate's library knows too.
#[derive(Debug, Parser)]
#[command(name = "atoll-net", version)]
struct Cli {
    #[command(flatten)]
    options: Options,
}

impl Program for Cli {
    type Device = Cards;
    const NAME: &'static str = "atoll-net";

    fn class(&self) -> DeviceClass {
        DeviceClass::Net
    }
    fn serve_args(&self) -> &ServeArgs {
        &self.options.serve
    }
    fn descriptors(&self) -> Vec<RawFd> {
        self.options.inherited()
    }
    fn profile(&self) -> &'static Profile {
        if self.options.tap.is_some() || !self.options.fd.is_empty() { &Profile::NET_TAP } else { &Profile::NET }
    }
    fn writes_files(&self) -> bool {
        !self.options.pcap.is_empty()
    }
    fn check(&self) -> Result<(), String> {
        self.options.check()
    }
    fn errand(&self) -> Option<Result<(), StartError>> {
        let (fd, name) = (self.options.hand_over?, self.options.tap.as_ref()?);
        Some(hand_over(&self.options, name, fd))
    }
    /// Frames that are under way die with the process that holds them: there is nothing for a successor to wait for.
    fn open(&self, reports: Option<&Reports>) -> Result<(Cards, Box<dyn Fence>), StartError> {
        Ok((cards(&self.options, reports)?, Box::new(NoFence)))
    }
}

fn cards(options: &Options, reports: Option<&Reports>) -> Result<Cards, StartError> {
    // First of all: it forks.
    let connector = options.stream.as_ref().map(|path| Connector::start(path)).transpose()?;
    let captures = Recorder::open(options)?;
    Ok(match (&options.tap, options.stream_fd, connector) {
        (Some(name), ..) => {
            let queues = tap_device::open(name, options.queue_pairs, &options.host_end())?;
            Cards::Tap(card(options, &captures, Tap::new(queues)?))
        }
        (_, Some(fd), _) => {
            let stream = serve::inherited("--stream-fd", fd)?.into();
            Cards::Stream(card(options, &captures, Stream::inherited(stream, lost(reports))?))
        }
        (.., Some(connector)) => Cards::Stream(card(options, &captures, Stream::reconnecting(connector))),
        _ if !options.fd.is_empty() => {
            let own = |fd: &RawFd| serve::inherited("--fd", *fd);
            let queues = options.fd.iter().map(own).collect::<Result<Vec<OwnedFd>, _>>()?;
            Cards::Tap(card(options, &captures, Tap::new(tap_device::adopt(queues)?)?))
        }
        _ if options.switch => {
            let faces: Vec<_> = (0..options.ports).map(|port| face(options, &captures, port)).collect();
            let switch = Switch::new(&faces);
            let port = |(port, face)| {
                Card::new(look(options, port as u16), face, switch.port(port)).limited(options.limiter())
            };
            Cards::Switch(faces.into_iter().enumerate().map(port).collect())
        }
        _ if options.none => Cards::Nowhere(card(options, &captures, Nowhere)),
        _ => return Err("say where frames go: --tap, --fd, --stream, --stream-fd, --switch or --none".into()),
    })
}

fn look(options: &Options, port: u16) -> Look {
    Look { mac: options.mac(port), mtu: options.mtu, offload: !options.no_offload }
}

fn face(options: &Options, recorder: &Recorder, port: u16) -> Arc<Face> {
    let captures = recorder.captures(port, options.switch);
    Arc::new(Face::new(options.mac(port), options.queue_pairs, options.limiter(), captures))
}

fn card<L: Link>(options: &Options, recorder: &Recorder, link: L) -> Card<L> {
    Card::new(look(options, 0), face(options, recorder, 0), link).limited(options.limiter())
}

/// An inherited stream cannot be had again: its supervisor must make a new one.
fn lost(reports: Option<&Reports>) -> Box<dyn Fn() + Send + Sync> {
    let reports = reports.cloned();
    Box::new(move || {
        let reason = "the other end of --stream-fd is gone: start it again and pass a new connection";
        match &reports {
            Some(reports) => reports.goodbye(GoodbyeReason::Resource(reason.to_owned())),
            None => program::report(Cli::NAME, reason),
        }
        std::process::exit(1)
    })
}

/// The captures of the command line.
struct Recorder {
    captures: Vec<(Option<u16>, Arc<Capture>)>,
}

impl Recorder {
    fn open(options: &Options) -> Result<Self, StartError> {
        let open = |option: &atoll_net::options::CaptureOption| -> Result<_, StartError> {
            Ok((option.port, Arc::new(Capture::create(&option.path)?)))
        };
        Ok(Self { captures: options.pcap.iter().map(open).collect::<Result<_, _>>()? })
    }

    /// What is written down of a port. A capture of a whole switch sees each frame once, when it enters.
    fn captures(&self, port: u16, switch: bool) -> Captures {
        let mut captures = Captures::default();
        for (wanted, capture) in &self.captures {
            if wanted.is_none_or(|wanted| wanted == port) {
                captures.sent.push(Arc::clone(capture));
                if wanted.is_some() || !switch {
                    captures.received.push(Arc::clone(capture));
                }
            }
        }
        captures
    }
}

/// Opens the interface for a supervisor that keeps it (`--hand-over`).
fn hand_over(options: &Options, name: &str, fd: RawFd) -> Result<(), StartError> {
    let socket = serve::inherited("--hand-over", fd)?;
    let opened = tap_device::open(name, options.queue_pairs, &options.host_end());
    link::hand_over::hand_over(&socket, &opened)?;
    Ok(opened.map(drop)?)
}

fn main() -> ExitCode {
    program::main::<Cli>()
}
