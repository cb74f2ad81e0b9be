//! The devices in a configuration: their names, and how one is added or taken out.

use std::collections::BTreeSet;

use super::error::{ErrorKind, VmError};
use crate::config::{ConsoleMode, DeviceConfig, DeviceKind, VmConfig};

/// A name that no device has: `_disk0`, `_disk1`, …
fn fresh(kind: DeviceKind, taken: &BTreeSet<String>) -> String {
    let mut number = 0_u32;
    loop {
        let name = format!("_{}{number}", kind.name());
        if !taken.contains(&name) {
            return name;
        }
        number += 1;
    }
}

fn names(config: &VmConfig) -> BTreeSet<String> {
    config.devices().iter().filter_map(|device| device.id().map(str::to_owned)).collect()
}

/// Gives every device a name that has none, so that an operator can speak of it.
pub(super) fn name_devices(config: &mut VmConfig) {
    let mut taken = names(config);
    let mut name = |kind: DeviceKind, id: &mut Option<String>| {
        if id.is_none() {
            let made = fresh(kind, &taken);
            taken.insert(made.clone());
            *id = Some(made);
        }
    };
    config.rng.iter_mut().for_each(|rng| name(DeviceKind::Rng, &mut rng.id));
    config.disks.iter_mut().flatten().for_each(|disk| name(DeviceKind::Disk, &mut disk.id));
    config.net.iter_mut().flatten().for_each(|net| name(DeviceKind::Net, &mut net.id));
    config.fs.iter_mut().flatten().for_each(|fs| name(DeviceKind::Fs, &mut fs.id));
    config.vsock.iter_mut().for_each(|vsock| name(DeviceKind::Vsock, &mut vsock.id));
    let generic = config.generic_vhost_user.iter_mut().flatten();
    generic.for_each(|device| name(DeviceKind::Generic, &mut device.id));
    config.nvme.iter_mut().flatten().for_each(|nvme| name(DeviceKind::Nvme, &mut nvme.id));
    config.user_devices.iter_mut().flatten().for_each(|device| name(DeviceKind::User, &mut device.id));
    config.gpu.iter_mut().for_each(|gpu| name(DeviceKind::Gpu, &mut gpu.id));
    config.input.iter_mut().flatten().for_each(|input| name(DeviceKind::Input, &mut input.id));
    config.devices.iter_mut().flatten().for_each(|function| name(DeviceKind::Vfio, &mut function.id));
}

/// Adds a device, named if it has no name. Gives it back as it is in the configuration.
///
/// # Errors
/// When a device of its name is there, or one of which there can be one only.
pub(super) fn add(config: &mut VmConfig, mut device: DeviceConfig) -> Result<DeviceConfig, VmError> {
    device.check()?;
    let taken = names(config);
    let kind = device.kind();
    device.name_it(|| fresh(kind, &taken));
    if let Some(id) = device.id().filter(|id| taken.contains(*id)) {
        let text = format!("a device named '{id}' is there already; give this one another id, or leave it out");
        return Err(VmError::new(ErrorKind::Duplicate, text));
    }
    let only_one = |is_there: bool| {
        let text = format!("there is a {} already, and a machine has one only", kind.name());
        if is_there { Err(VmError::new(ErrorKind::Duplicate, text)) } else { Ok(()) }
    };
    match device.clone() {
        DeviceConfig::Disk(disk) => config.disks.get_or_insert_default().push(disk),
        DeviceConfig::Net(net) => config.net.get_or_insert_default().push(net),
        DeviceConfig::Fs(fs) => config.fs.get_or_insert_default().push(fs),
        DeviceConfig::Generic(device) => config.generic_vhost_user.get_or_insert_default().push(device),
        DeviceConfig::Nvme(nvme) => config.nvme.get_or_insert_default().push(nvme),
        DeviceConfig::User(device) => config.user_devices.get_or_insert_default().push(device),
        DeviceConfig::Passthrough(function) => config.devices.get_or_insert_default().push(function),
        DeviceConfig::Gpu(_) | DeviceConfig::Input(_) => {
            let text = format!("a {} is there from the start: give it when the machine is made", kind.name());
            return Err(VmError::new(ErrorKind::Unsupported, text));
        }
        DeviceConfig::Vsock(vsock) => {
            only_one(config.vsock.is_some())?;
            config.vsock = Some(vsock);
        }
        DeviceConfig::Rng(rng) => {
            only_one(config.rng.is_some())?;
            config.rng = Some(rng);
        }
        DeviceConfig::Console(console) => {
            only_one(config.console.as_ref().is_some_and(|there| there.mode != ConsoleMode::Off))?;
            config.console = Some(console);
        }
    }
    Ok(device)
}

/// Takes a device out; whether it was there.
pub(super) fn remove(config: &mut VmConfig, id: &str) -> bool {
    fn without<T>(list: &mut Option<Vec<T>>, is_it: impl Fn(&T) -> bool) -> bool {
        let Some(at) = list.as_ref().and_then(|list| list.iter().position(is_it)) else { return false };
        if let Some(list) = list {
            list.remove(at);
        }
        // A key that was not given is not echoed.
        if list.as_ref().is_some_and(Vec::is_empty) {
            *list = None;
        }
        true
    }
    let is = |other: &Option<String>| other.as_deref() == Some(id);
    without(&mut config.disks, |disk| is(&disk.id))
        || without(&mut config.net, |net| is(&net.id))
        || without(&mut config.fs, |fs| is(&fs.id))
        || without(&mut config.generic_vhost_user, |device| is(&device.id))
        || without(&mut config.nvme, |nvme| is(&nvme.id))
        || without(&mut config.user_devices, |device| is(&device.id))
        || without(&mut config.devices, |function| is(&function.id))
        || without(&mut config.input, |input| is(&input.id))
        || config.gpu.take_if(|gpu| is(&gpu.id)).is_some()
        || config.vsock.take_if(|vsock| is(&vsock.id)).is_some()
        || config.rng.take_if(|rng| is(&rng.id)).is_some()
        || (id == "_console" && config.console.take().is_some())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{DiskConfig, OnFailure, RngConfig};

    fn disk(id: Option<&str>) -> DiskConfig {
        DiskConfig { id: id.map(str::to_owned), path: Some("image".into()), ..DiskConfig::default() }
    }

    /// A user's own `_disk0` is left to the user; what is taken out can be plugged in again under the same name.
    #[test]
    fn every_device_has_a_name_of_its_own() {
        let mut config = VmConfig {
            disks: Some(vec![disk(None), disk(Some("_disk0")), disk(None)]),
            rng: Some(RngConfig {
                src: "/dev/urandom".into(),
                id: None,
                stall_timeout: None,
                start_attempts: None,
                on_failure: OnFailure::Error,
                iommu: false,
                isolation: Default::default(),
            }),
            ..VmConfig::default()
        };
        name_devices(&mut config);
        let named: Vec<_> = config.devices().iter().map(|device| device.id().unwrap().to_owned()).collect();
        assert_eq!(named, ["_rng0", "_disk1", "_disk0", "_disk2"]);

        let error = add(&mut config, DeviceConfig::Disk(disk(Some("_disk2")))).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Duplicate);
        let rng = RngConfig {
            src: "/dev/random".into(),
            id: None,
            stall_timeout: None,
            start_attempts: None,
            on_failure: OnFailure::Error,
            iommu: false,
            isolation: Default::default(),
        };
        assert_eq!(add(&mut config, DeviceConfig::Rng(rng)).unwrap_err().kind, ErrorKind::Duplicate);
        assert!(remove(&mut config, "_disk1") && !remove(&mut config, "_disk1"));
        let again = add(&mut config, DeviceConfig::Disk(disk(None))).unwrap();
        assert_eq!(again.id(), Some("_disk1"));

        for id in ["_disk0", "_disk1", "_disk2", "_rng0"] {
            assert!(remove(&mut config, id));
        }
        assert_eq!(config, VmConfig::default());
    }
}
