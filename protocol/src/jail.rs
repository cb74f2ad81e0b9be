//! The layers of a device process' jail, and what became of each: words that the process says to its VMM and that the VMM
//! shows to people.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One wall of the jail. Each stands without the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum JailLayer {
    /// No program that it could execute would give it rights.
    NoNewPrivileges,
    /// No descriptors but those that it was given.
    Descriptors,
    /// No core dump, and no debugger of the same user.
    Undumpable,
    /// No capabilities.
    Capabilities,
    /// Limits of descriptors, heap, locked memory, sizes of files.
    Limits,
    /// An empty root directory, read-only.
    Mounts,
    /// A network of its own, without interfaces.
    Network,
    /// No System V or POSIX message queues of others.
    Ipc,
    /// A host name of its own.
    HostName,
    /// Does not see where it is among control groups.
    Cgroup,
    /// Landlock: no path.
    Files,
    /// Landlock: no TCP port.
    Ports,
    /// Landlock: no abstract socket and no signal outside.
    Scopes,
    /// Its io_urings do what the device needs and nothing else.
    Rings,
    /// An allow-list of system calls.
    Calls,
}

impl JailLayer {
    /// All of them, in the order in which they are put up.
    pub const ALL: [Self; 15] = [
        Self::NoNewPrivileges,
        Self::Descriptors,
        Self::Undumpable,
        Self::Capabilities,
        Self::Limits,
        Self::Mounts,
        Self::Network,
        Self::Ipc,
        Self::HostName,
        Self::Cgroup,
        Self::Files,
        Self::Ports,
        Self::Scopes,
        Self::Rings,
        Self::Calls,
    ];

    /// What people know it by.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::NoNewPrivileges => "no-new-privileges",
            Self::Descriptors => "closed-descriptors",
            Self::Undumpable => "undumpable",
            Self::Capabilities => "no-capabilities",
            Self::Limits => "limits",
            Self::Mounts => "mount-namespace",
            Self::Network => "network-namespace",
            Self::Ipc => "ipc-namespace",
            Self::HostName => "uts-namespace",
            Self::Cgroup => "cgroup-namespace",
            Self::Files => "landlock-files",
            Self::Ports => "landlock-ports",
            Self::Scopes => "landlock-scopes",
            Self::Rings => "restricted-rings",
            Self::Calls => "seccomp",
        }
    }

    /// What to do about a host on which the layer is missing.
    #[must_use]
    pub fn remedy(self, outcome: JailOutcome) -> &'static str {
        match (self, outcome) {
            (_, JailOutcome::Off) => "leave --jail=off or --no-jail away",
            (Self::Mounts | Self::Network | Self::Ipc | Self::HostName | Self::Cgroup, JailOutcome::NotPermitted) => {
                "allow user namespaces: sysctl user.max_user_namespaces=10000, kernel.unprivileged_userns_clone=1, \
                 kernel.apparmor_restrict_unprivileged_userns=0, whichever the host has; in a chroot there are none"
            }
            (Self::Mounts | Self::Network | Self::Ipc | Self::HostName | Self::Cgroup, _) => {
                "boot a kernel with CONFIG_NAMESPACES and all kinds below it"
            }
            (Self::Files, _) => "boot a kernel with CONFIG_SECURITY_LANDLOCK, and landlock in its lsm= list",
            (Self::Ports, _) => "boot Linux 6.7 or newer with landlock",
            (Self::Scopes, _) => "boot Linux 6.12 or newer with landlock",
            (Self::Calls, JailOutcome::KernelLacks) => "boot a kernel with CONFIG_SECCOMP_FILTER",
            (Self::Rings, _) => "boot Linux 6.1 or newer, with sysctl kernel.io_uring_disabled=0",
            _ => "see what the container or the security policy around the VMM forbids",
        }
    }
}

impl fmt::Display for JailLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What became of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum JailOutcome {
    /// It stands.
    Applied,
    /// This kernel does not know it.
    KernelLacks,
    /// The kernel knows it, and this process may not.
    NotPermitted,
    /// Nobody wanted it.
    Off,
}

impl JailOutcome {
    /// What people know it by.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Applied => "applied",
            Self::KernelLacks => "kernel-lacks-it",
            Self::NotPermitted => "not-permitted",
            Self::Off => "off",
        }
    }
}

impl fmt::Display for JailOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One line of a jail's report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct JailedLayer {
    /// Which.
    pub layer: JailLayer,
    /// What became of it.
    pub outcome: JailOutcome,
}

impl JailedLayer {
    /// It stands.
    #[must_use]
    pub fn stands(self) -> bool {
        self.outcome == JailOutcome::Applied
    }

    /// What to do where it does not.
    #[must_use]
    pub fn remedy(self) -> &'static str {
        self.layer.remedy(self.outcome)
    }
}

impl fmt::Display for JailedLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.layer, self.outcome)
    }
}

/// The most layers of one report: each at most once.
pub const LAYERS_MAX: usize = JailLayer::ALL.len();
