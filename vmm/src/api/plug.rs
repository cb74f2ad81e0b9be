//! Devices that are plugged in, pulled out and changed.

use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;

use super::body::{self, FaultDevice, RemoveDevice, ResizeDisk, ReviveDevice, SetLink, UpgradeDevice};
use super::machine::{done, refuse};
use super::reply::{Reply, Status};
use super::routes::{Asked, Good, Route, Served, of, put};
use super::server::Api;
use crate::config::{
    Descriptors, DeviceConfig, DiskConfig, FsConfig, GenericVhostUserConfig, NetConfig, NvmeConfig, PassthroughConfig,
    UserDeviceConfig, VsockConfig,
};
use crate::lifecycle::{Plugged, Upgraded, VmError};
use crate::machine::NewSize;
use crate::vhost::{SWITCH_STEP, UpgradeOrder};

/// The resources of this file.
pub(super) fn routes() -> Vec<Route> {
    use Good::{Never, Nothing, Perhaps};
    const MISTAKES: &[Status] = &[Status::BadRequest, Status::NotFound, Status::Conflict];
    let place = Perhaps(of::<Plugged>);
    vec![
        put("/api/v1/vm.add-disk", "Plugs a disk in.", place, |api, _, asked| {
            add::<DiskConfig>(api, asked, DeviceConfig::Disk)
        })
        .takes::<DiskConfig>()
        .refuses(MISTAKES),
        put("/api/v1/vm.add-net", "Plugs a network card in; TAP descriptors come beside the request.", place, add_net)
            .takes::<NetConfig>()
            .refuses(MISTAKES),
        put("/api/v1/vm.add-fs", "Plugs a shared folder in.", place, |api, _, asked| {
            add::<FsConfig>(api, asked, DeviceConfig::Fs)
        })
        .takes::<FsConfig>()
        .refuses(MISTAKES),
        put("/api/v1/vm.add-vsock", "Plugs sockets between guest and host in.", place, |api, _, asked| {
            add::<VsockConfig>(api, asked, DeviceConfig::Vsock)
        })
        .takes::<VsockConfig>()
        .refuses(MISTAKES),
        put("/api/v1/vm.add-generic-vhost-user", "Plugs any vhost-user device in.", place, |api, _, asked| {
            add::<GenericVhostUserConfig>(api, asked, DeviceConfig::Generic)
        })
        .takes::<GenericVhostUserConfig>()
        .refuses(MISTAKES),
        put("/api/v1/vm.remove-device", "Asks the guest to let a device go.", Nothing, |api, _, asked| {
            let RemoveDevice { id } = body::decode(asked.body)?;
            done(api.control.remove_device(&id))
        })
        .takes::<RemoveDevice>()
        .refuses(&[Status::BadRequest, Status::NotFound]),
        put("/api/v1/vm.resize-disk", "Changes the size of a disk; the guest is told.", Nothing, |api, _, asked| {
            let ResizeDisk { id, desired_size, allow_shrink } = body::decode(asked.body)?;
            done(api.control.resize_disk(&id, NewSize { bytes: desired_size, allow_shrink }))
        })
        .takes::<ResizeDisk>()
        .refuses(&[Status::BadRequest, Status::NotFound]),
        put(
            "/api/v1/vm.set-link",
            "Plugs the cable of a network card in or out; the guest is told.",
            Nothing,
            |api, _, asked| {
                let SetLink { id, link } = body::decode(asked.body)?;
                done(api.control.set_link(&id, link))
            },
        )
        .takes::<SetLink>()
        .refuses(&[Status::BadRequest, Status::NotFound]),
        put(
            "/api/v1/vm.revive-device",
            "Gives a device whose backend was given up another chance.",
            Nothing,
            |api, _, asked| {
                let ReviveDevice { id } = body::decode(asked.body)?;
                done(api.control.revive_device(&id))
            },
        )
        .takes::<ReviveDevice>()
        .refuses(&[Status::BadRequest, Status::NotFound]),
        put(
            "/api/v1/vm.upgrade-device",
            "Puts another program in the place of the one that serves a device; the guest does not notice.",
            Good::Json(of::<Upgraded>),
            |api, _, asked| {
                let UpgradeDevice { id, exe, step_ms } = body::decode(asked.body)?;
                if step_ms == Some(0) {
                    return refuse("step_ms is how long each word may take, at least 1");
                }
                let step = step_ms.map_or(SWITCH_STEP, |ms| Duration::from_millis(ms.into()));
                let generation = api.control.upgrade_device(&id, UpgradeOrder { exe, step })?;
                Ok(Reply::json(&Upgraded { generation }).into())
            },
        )
        .takes::<UpgradeDevice>()
        .refuses(&[Status::BadRequest, Status::NotFound]),
        put(
            "/api/v1/vm.fault-device",
            "Does to a device what the world may do, for a test; needs platform.allow_faults.",
            Nothing,
            |api, _, asked| {
                let FaultDevice { id, fault, seed } = body::decode(asked.body)?;
                done(api.control.fault_device(&id, fault, seed))
            },
        )
        .takes::<FaultDevice>()
        .refuses(&[Status::BadRequest, Status::NotFound]),
        put(
            "/api/v1/vm.add-device",
            "Plugs a PCI function of the host in; its group's descriptor may come beside the request.",
            place,
            add_function,
        )
        .takes::<PassthroughConfig>()
        .refuses(MISTAKES),
        put(
            "/api/v1/vm.add-user-device",
            "Plugs a PCI device of another process in (vfio-user).",
            place,
            |api, _, asked| add::<UserDeviceConfig>(api, asked, DeviceConfig::User),
        )
        .takes::<UserDeviceConfig>()
        .refuses(MISTAKES),
        put("/api/v1/vm.add-nvme", "Plugs an NVMe disk in.", place, |api, _, asked| {
            add::<NvmeConfig>(api, asked, DeviceConfig::Nvme)
        })
        .takes::<NvmeConfig>()
        .refuses(MISTAKES),
        put("/api/v1/vm.add-vdpa", "Not supported.", Never, |_, _, _| {
            refuse("vDPA devices are not supported; vm.add-generic-vhost-user takes vhost-user ones")
        }),
        put("/api/v1/vm.add-pmem", "Not supported.", Never, |_, _, _| {
            refuse("persistent memory is not supported; use vm.add-disk")
        }),
    ]
}

fn add<T: DeserializeOwned>(api: &Api, asked: &Asked<'_>, kind: fn(T) -> DeviceConfig) -> Served {
    plug(api, kind(body::decode(asked.body)?))
}

fn add_net(api: &Api, _: &str, asked: &mut Asked<'_>) -> Served {
    let mut net: NetConfig = body::decode(asked.body)?;
    // The client's numbers mean nothing here, but it expects to read them back.
    let numbers = net.fds.take().filter(|fds| !fds.is_empty());
    if asked.descriptors.is_empty() && numbers.is_some() {
        let why = "fds: no descriptors came beside the request; send them with its first bytes (SCM_RIGHTS)".into();
        return Err(Reply::refused(Status::BadRequest, &[why]));
    }
    if !asked.descriptors.is_empty() {
        let count = asked.descriptors.len();
        net.fds = Some(numbers.filter(|fds| fds.len() == count).unwrap_or_else(|| vec![-1; count]));
        net.descriptors = Descriptors(std::mem::take(&mut asked.descriptors).into_iter().map(Arc::new).collect());
    }
    plug(api, DeviceConfig::Net(net))
}

fn add_function(api: &Api, _: &str, asked: &mut Asked<'_>) -> Served {
    let mut function: PassthroughConfig = body::decode(asked.body)?;
    let descriptors = std::mem::take(&mut asked.descriptors);
    let refused = |why: &str| Err(Reply::refused(Status::BadRequest, &[why.to_owned()]));
    match (function.fd, descriptors.len()) {
        (_, 2..) => return refused("fd: a function has one group, and more descriptors came beside the request"),
        (Some(_), 0) => {
            return refused("fd: no descriptor came beside the request; send it with its first bytes (SCM_RIGHTS)");
        }
        // The client's number means nothing here, but it expects to read it back.
        (None, 1) => function.fd = Some(-1),
        _ => {}
    }
    function.group = Descriptors(descriptors.into_iter().map(Arc::new).collect());
    plug(api, DeviceConfig::Passthrough(function))
}

fn plug(api: &Api, device: DeviceConfig) -> Served {
    device.check().map_err(VmError::from)?;
    let reply = match api.control.add_device(device)? {
        Some(place) => Reply::json(&place),
        None => Reply::done(),
    };
    Ok(reply.into())
}
