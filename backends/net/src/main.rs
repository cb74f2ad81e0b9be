//! The program `atoll-net`.

use std::os::fd::{OwnedFd, RawFd};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Result, bail};
use atoll_kit::fence::NoFence;
use atoll_kit::jail::{self, Jail, Profile};
use atoll_kit::serve::{self, Listening, Service, Transport};
use atoll_kit::sidecar::{Reports, Sidecar};
use atoll_kit::{logging, signals};
use atoll_net::capture::Capture;
use atoll_net::card::{Card, Look};
use atoll_net::face::{Captures, Face};
use atoll_net::link::connector::Connector;
use atoll_net::link::none::Nowhere;
use atoll_net::link::stream::Stream;
use atoll_net::link::switch::{Port, Switch};
use atoll_net::link::tap::Tap;
use atoll_net::link::{Link, tap_device};
use atoll_net::options::Options;
use atoll_protocol::sidecar::{DeviceClass, GoodbyeReason};
use clap::Parser;

fn main() -> ExitCode {
    let options = match Options::try_parse() {
        Ok(options) => options,
        Err(e) => return usage(&e),
    };
    if let Err(reason) = options.check() {
        report(&format!("{reason}; see atoll-net --help"));
        return ExitCode::from(2);
    }
    signals::hold();
    match start(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // Not the chain: each error's text has its cause in it.
            report(&e.to_string());
            ExitCode::FAILURE
        }
    }
}

/// What clap has to say: help and version as they are, mistakes in one line.
fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        // With standard output gone there is nobody left to tell.
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    let text = error.render().to_string();
    let first: Vec<&str> = text.lines().take_while(|line| !line.trim().is_empty()).map(str::trim).collect();
    let first = first.join(" ");
    report(&format!("{}; see atoll-net --help", first.trim_start_matches("error: ")));
    ExitCode::from(2)
}

#[allow(clippy::print_stderr, reason = "the one line that says why the program ends")]
fn report(line: &str) {
    eprintln!("atoll-net: {line}");
}

/// The cards, by what they are plugged into.
enum Cards {
    Tap(Card<Tap>),
    Stream(Card<Stream>),
    Switch(Vec<Card<Port>>),
    Nowhere(Card<Nowhere>),
}

fn start(options: &Options) -> Result<()> {
    let supervised = options.sidecar_fd.is_some();
    jail::begin(&options.inherited(), supervised)?;
    let sidecar = options
        .sidecar_fd
        .map(|fd| -> Result<Sidecar> {
            let fd = serve::inherited("--sidecar-fd", fd)?;
            Ok(Sidecar::hello(fd, DeviceClass::Net)?)
        })
        .transpose()?;
    let reports = sidecar.as_ref().map(|s| s.reports().clone());
    logging::start(reports.clone());
    let prepared = prepare(options, reports.as_ref());
    if let (Err(e), Some(reports)) = (&prepared, &reports) {
        reports.goodbye(GoodbyeReason::Config(e.to_string()));
    }
    let (cards, transport) = prepared?;
    let profile = if matches!(cards, Cards::Tap(_)) { &Profile::NET_TAP } else { &Profile::NET };
    let jail = Jail { mode: options.jail.mode(), profile, supervised, writes_files: !options.pcap.is_empty() };
    // Frames that are under way die with the process that holds them: there is nothing to wait for.
    let stats = options.stats_fd.map(|fd| serve::inherited("--stats-fd", fd)).transpose()?;
    let service = Service { transport, sidecar, fence: Box::new(NoFence), jail, stats };
    match cards {
        Cards::Tap(card) => serve::run(card, service)?,
        Cards::Stream(card) => serve::run(card, service)?,
        Cards::Switch(cards) => serve::run_all(cards, service)?,
        Cards::Nowhere(card) => serve::run(card, service)?,
    }
    Ok(())
}

fn prepare(options: &Options, reports: Option<&Reports>) -> Result<(Cards, Transport)> {
    // First of all: it forks.
    let connector = options.stream.as_ref().map(|path| Connector::start(path)).transpose()?;
    let captures = Recorder::open(options)?;
    let cards = match (&options.tap, options.stream_fd, connector) {
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
            let own = |fd: &RawFd| Ok(serve::inherited("--fd", *fd)?);
            let queues = tap_device::adopt(options.fd.iter().map(own).collect::<Result<Vec<OwnedFd>>>()?)?;
            Cards::Tap(card(options, &captures, Tap::new(queues)?))
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
        _ => bail!("say where frames go: --tap, --fd, --stream, --stream-fd, --switch or --none"),
    };
    let transport = match (&options.socket, options.vhost_fd) {
        (Some(path), _) => Transport::Listen(Listening::bind(path)?),
        (None, Some(fd)) => Transport::Connected(serve::inherited("--vhost-fd", fd)?.into()),
        (None, None) => bail!("say where the front end is: --socket or --vhost-fd"),
    };
    Ok((cards, transport))
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
            None => report(reason),
        }
        std::process::exit(1)
    })
}

/// The captures of the command line.
struct Recorder {
    captures: Vec<(Option<u16>, Arc<Capture>)>,
}

impl Recorder {
    fn open(options: &Options) -> Result<Self> {
        let open = |option: &atoll_net::options::CaptureOption| -> Result<_> {
            Ok((option.port, Arc::new(Capture::create(&option.path)?)))
        };
        Ok(Self { captures: options.pcap.iter().map(open).collect::<Result<_>>()? })
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
