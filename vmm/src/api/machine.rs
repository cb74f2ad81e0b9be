//! A machine's life: create, boot, pause, resume, reboot, power button, shutdown, delete, and what it is.

use schemars::JsonSchema;
use serde::Serialize;

use super::body::{self, Resize};
use super::reply::{Reply, Status};
use super::routes::{Answer, Asked, Good, Route, Served, get, of, put};
use super::server::Api;
use crate::config::VmConfig;
use crate::lifecycle::{ErrorKind, VmError, VmInfo};

/// What a monitor says of itself.
#[derive(Serialize, JsonSchema)]
struct Ping {
    /// Atoll's release.
    build_version: String,
    /// The release of Cloud Hypervisor whose interface is spoken.
    version: String,
    /// Process id.
    pid: u32,
    /// What it has beyond that interface.
    features: Vec<String>,
}

const FEATURES: [&str; 5] = ["devices", "events", "inspect", "metrics", "software-cpu"];

type Counters = std::collections::BTreeMap<String, std::collections::BTreeMap<String, u64>>;

/// The resources of this file.
pub(super) fn routes() -> Vec<Route> {
    use Good::{Json, Never, Nothing};
    const GONE: &[Status] = &[Status::NotFound];
    vec![
        get("/api/v1/vmm.ping", "Tells who answers.", Json(of::<Ping>), ping),
        put("/api/v1/vmm.shutdown", "Ends the machine and the process.", Nothing, shutdown_vmm),
        put("/api/v1/vm.create", "Keeps a configuration; nothing is opened before boot.", Nothing, create)
            .takes::<VmConfig>()
            .refuses(&[Status::BadRequest, Status::Conflict]),
        put("/api/v1/vm.boot", "Builds the machine and starts it.", Nothing, |api, _, _| done(api.control.boot()))
            .refuses(&[Status::BadRequest, Status::NotFound]),
        put("/api/v1/vm.pause", "Stops the vCPUs.", Nothing, |api, _, _| done(api.control.pause())).refuses(GONE),
        put("/api/v1/vm.resume", "Lets them run.", Nothing, |api, _, _| done(api.control.resume())).refuses(GONE),
        put("/api/v1/vm.reboot", "Presses the reset button; what was booted starts again.", Nothing, |api, _, _| {
            done(api.control.reset())
        })
        .refuses(GONE),
        put("/api/v1/vm.power-button", "Presses the power button; the guest decides.", Nothing, |api, _, _| {
            done(api.control.power_button())
        })
        .refuses(GONE),
        put("/api/v1/vm.shutdown", "Switches the machine off; its configuration stays.", Nothing, |api, _, _| {
            done(api.control.shutdown())
        })
        .refuses(GONE),
        put("/api/v1/vm.delete", "Forgets the machine, if there is one.", Nothing, |api, _, _| {
            done(api.control.delete())
        }),
        put("/api/v1/vm.nmi", "Sends a non-maskable interrupt to every vCPU.", Nothing, nmi).refuses(GONE),
        put("/api/v1/vmm.nmi", "The same as vm.nmi.", Nothing, nmi).refuses(GONE),
        get("/api/v1/vm.info", "The configuration as it is now, and the state.", Json(of::<VmInfo>), |api, _, _| {
            said(api.control.info())
        })
        .refuses(GONE),
        get("/api/v1/vm.counters", "Counters by device and name.", Json(of::<Counters>), |api, _, _| {
            said(api.control.counters())
        })
        .refuses(GONE),
        put("/api/v1/vm.resize", "Asks for vCPUs and RAM; only what is there already is granted.", Nothing, resize)
            .takes::<Resize>()
            .refuses(&[Status::BadRequest, Status::NotFound]),
        put("/api/v1/vm.resize-zone", "Not supported.", Never, |_, _, _| refuse("memory zones are not supported")),
        put("/api/v1/vm.snapshot", "Not supported.", Never, |_, _, _| refuse("snapshots are not supported")),
        put("/api/v1/vm.restore", "Not supported.", Never, |_, _, _| refuse("snapshots are not supported")),
        put("/api/v1/vm.coredump", "Not supported.", Never, |_, _, _| {
            refuse("dumps of guest memory are not supported; inside the guest, kdump makes one on vm.nmi")
        }),
        put("/api/v1/vm.send-migration", "Not supported.", Never, |_, _, _| {
            refuse("live migration is not supported: shut the machine down, then boot it there")
        }),
        put("/api/v1/vm.receive-migration", "Not supported.", Never, |_, _, _| {
            refuse("live migration is not supported: create and boot the machine here")
        }),
    ]
}

/// 204, or why not.
pub(super) fn done(result: Result<(), VmError>) -> Served {
    result?;
    Ok(Reply::done().into())
}

/// 200 and what was found, or why not.
pub(super) fn said<T: Serialize>(result: Result<T, VmError>) -> Served {
    Ok(Reply::json(&result?).into())
}

/// What is not there, by name.
pub(super) fn refuse(why: &str) -> Served {
    Err(VmError::new(ErrorKind::Unsupported, why).into())
}

fn ping(_: &Api, _: &str, _: &mut Asked<'_>) -> Served {
    let ping = Ping {
        build_version: concat!("atoll ", env!("CARGO_PKG_VERSION")).into(),
        version: super::SPOKEN_VERSION.into(),
        pid: std::process::id(),
        features: FEATURES.map(String::from).into(),
    };
    Ok(Reply::json(&ping).into())
}

fn shutdown_vmm(_: &Api, _: &str, _: &mut Asked<'_>) -> Served {
    // The answer must be on its way before the process is.
    Ok(Answer::Last(Reply::done(), |api| {
        if let Err(error) = api.control.shutdown_vmm() {
            tracing::error!(%error, "the process was asked to end, and does not");
        }
    }))
}

fn create(api: &Api, _: &str, asked: &mut Asked<'_>) -> Served {
    let mut config: VmConfig = body::decode(asked.body)?;
    for (index, net) in config.net.iter_mut().flatten().enumerate() {
        if net.fds.take().is_some_and(|fds| !fds.is_empty()) {
            let why =
                format!("net[{index}].fds: descriptors cannot come with vm.create; send the card with vm.add-net");
            return Err(Reply::refused(Status::BadRequest, &[why]));
        }
    }
    config.check().map_err(VmError::from)?;
    done(api.control.create(config))
}

fn nmi(api: &Api, _: &str, _: &mut Asked<'_>) -> Served {
    done(api.control.nmi())
}

fn resize(api: &Api, _: &str, asked: &mut Asked<'_>) -> Served {
    let Resize { desired_vcpus, desired_ram, desired_balloon } = body::decode(asked.body)?;
    let config = api.control.info()?.config;
    if desired_vcpus.is_some_and(|wanted| wanted != config.cpus.boot_vcpus) {
        return refuse("desired_vcpus: vCPU hotplug is not supported; give cpus.boot_vcpus at creation");
    }
    if desired_ram.is_some_and(|wanted| wanted != config.memory.size) {
        return refuse("desired_ram: memory hotplug is not supported; give memory.size at creation");
    }
    if desired_balloon.is_some_and(|wanted| wanted != 0) {
        return refuse("desired_balloon: there is no balloon");
    }
    Ok(Reply::done().into())
}
