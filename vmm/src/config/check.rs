//! What can be wrong with a configuration by itself.

use std::collections::BTreeSet;

use thiserror::Error;

use super::{DeviceConfig, NetConfig, VmConfig};

/// A configuration that no machine can be built from. The text names the thing and the remedy.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// Nothing to boot.
    #[error("there is no kernel: give --kernel FILE, or payload.kernel over the API")]
    NoKernel,
    /// A kind of payload that is not there.
    #[error("firmware is not supported: boot a kernel directly with payload.kernel")]
    Firmware,
    /// Two devices of one name.
    #[error("two devices have the id '{0}': give each its own")]
    DuplicateId(String),
    /// A device that contradicts itself.
    #[error("{device}: {what}")]
    Device {
        /// Which.
        device: String,
        /// What is the matter, and the remedy.
        what: String,
    },
    /// Something that is not there yet.
    #[error("{0}")]
    Unsupported(String),
}

impl VmConfig {
    /// Finds what is wrong without opening anything.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.payload.firmware.is_some() {
            return Err(ConfigError::Firmware);
        }
        if self.payload.kernel.is_none() {
            return Err(ConfigError::NoKernel);
        }
        if self.memory.hotplug_size.is_some_and(|size| size > 0) {
            return Err(ConfigError::Unsupported(
                "memory hotplug is not supported: leave memory.hotplug_size out and give all of it as size".into(),
            ));
        }
        if self.cpus.max_vcpus != self.cpus.boot_vcpus {
            return Err(ConfigError::Unsupported(
                "vCPU hotplug is not supported: give cpus.max_vcpus the value of cpus.boot_vcpus".into(),
            ));
        }
        let mut seen = BTreeSet::new();
        for device in self.devices() {
            device.check()?;
            if let Some(id) = device.id()
                && !seen.insert(id.to_owned())
            {
                return Err(ConfigError::DuplicateId(id.to_owned()));
            }
        }
        Ok(())
    }
}

impl DeviceConfig {
    /// Finds what is wrong with a device without opening anything.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<(), ConfigError> {
        let wrong = |what: &str| {
            let device =
                self.id().map_or_else(|| self.kind().name().to_owned(), |id| format!("{} {id}", self.kind().name()));
            Err(ConfigError::Device { device, what: what.into() })
        };
        match self {
            Self::Disk(disk) => match (&disk.path, disk.vhost_user, &disk.vhost_socket) {
                (None, false, None) => wrong("it has no image: give path=FILE, or vhost_user=true,socket=PATH"),
                (_, false, Some(_)) => wrong("a socket needs vhost_user=true"),
                (_, true, None) => wrong("vhost_user=true needs socket=PATH"),
                (Some(_), true, _) => wrong("path does not go with vhost_user=true: leave one of them out"),
                _ => Ok(()),
            },
            Self::Net(net) => net.check_way().or_else(wrong),
            Self::Generic(device) if device.queue_sizes.is_empty() => {
                wrong("it has no queues: give queue_sizes=[256] with one size a queue")
            }
            Self::Vsock(vsock) if vsock.cid < 3 || vsock.cid >= u64::from(u32::MAX) => {
                wrong("cid is a number from 3 to 4294967294")
            }
            _ => Ok(()),
        }
    }
}

impl NetConfig {
    fn check_way(&self) -> Result<(), &'static str> {
        let tap = self.tap.is_some() || self.fds.is_some();
        let ways = [tap, self.user, self.switch.is_some(), self.vhost_user];
        if ways.iter().filter(|way| **way).count() > 1 {
            return Err("tap or fds, user, switch and vhost_user exclude each other: give one of them");
        }
        if self.vhost_user != self.vhost_socket.is_some() {
            return Err("vhost_user=true and socket=PATH go together");
        }
        if !self.forward.is_empty() && !self.user {
            return Err("forward needs user=on");
        }
        if self.num_queues.is_some_and(|queues| queues == 0 || queues % 2 != 0) {
            return Err("num_queues counts both directions: an even number from 2 on");
        }
        Ok(())
    }
}
