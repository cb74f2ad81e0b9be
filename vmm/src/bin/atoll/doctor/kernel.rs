//! What the kernel offers: CPUs and networks.

use std::fs::{self, OpenOptions};
use std::io;

use atoll_vmm::cpu::probe::{Memo, probe};
use atoll_vmm::cpu::soft::{Pace, SoftConfig, SoftProcessor};
use atoll_vmm::machine::layout;
use atoll_vmm::memory::GuestMemory;

use super::Check;

/// Memory of the software CPU's trial.
const TRIAL_BYTES: u64 = 32 << 20;
/// `CAP_NET_ADMIN` as a bit of `CapEff`.
const NET_ADMIN: u32 = 12;

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// Hardware virtualisation, KVM and the software CPU.
pub(super) fn cpus() -> Vec<Check> {
    let info = read("/proc/cpuinfo").unwrap_or_default();
    let flags = info.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let has = |flag: &str| flags.split_whitespace().any(|known| known == flag);
    let hardware = match (has("vmx"), has("svm")) {
        (true, _) => Check::ok("virtualisation", "Intel VT-x"),
        (_, true) => Check::ok("virtualisation", "AMD-V"),
        _ => Check::warn(
            "virtualisation",
            "this processor shows neither VT-x nor AMD-V",
            "switch it on in the firmware, or in the settings of the virtual machine that this is; guests run on the \
             software CPU meanwhile",
        ),
    };
    let verdict = probe(Memo::of_user().as_ref());
    let kvm = if verdict.usable {
        Check::ok("kvm", verdict.reason).runs_guests()
    } else {
        let remedy = match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                "let this user open it: usermod -aG kvm USER, then log in again"
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound && (has("vmx") || has("svm")) => {
                "load its module: modprobe kvm_intel or kvm_amd"
            }
            Err(_) => "nothing to do here: --cpu auto takes the software CPU",
            Ok(_) => "it opens and cannot run a stock guest: --cpu auto takes the software CPU",
        };
        Check::warn("kvm", verdict.reason, remedy)
    };
    let software = match software_cpu() {
        Ok(()) => Check::ok("software CPU", "x86-64, one vCPU; needs nothing of the host").runs_guests(),
        Err(error) => Check::fail("software CPU", error, "allow this process memory that is written and then executed"),
    };
    vec![hardware, kvm, software]
}

/// Makes one, with all that it needs of the host.
fn software_cpu() -> Result<(), String> {
    let ram = layout::ram(TRIAL_BYTES).map_err(|error| error.to_string())?;
    let memory = GuestMemory::new(&ram).map_err(|error| error.to_string())?;
    let config =
        SoftConfig { ram: memory.cpu_ram(), model: "atoll-v1".into(), vcpus: 1, pace: Pace::Real, wall_base_ns: 0 };
    SoftProcessor::new(config).map(drop).map_err(|error| error.to_string())
}

/// TAP interfaces.
pub(super) fn networks() -> Vec<Check> {
    let status = read("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0);
    let tap = match OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        Err(error) => Check::warn(
            "tap",
            format!("/dev/net/tun cannot be opened ({error})"),
            "modprobe tun, or let this user open it; --net user=on and switch=NAME need neither",
        ),
        Ok(_) if effective >> NET_ADMIN & 1 == 1 => Check::ok("tap", "interfaces can be made (CAP_NET_ADMIN)"),
        Ok(_) => Check::warn(
            "tap",
            "/dev/net/tun opens; this user may only take interfaces that are its own",
            "as root: ip tuntap add tap0 mode tap user USER; --net user=on and switch=NAME need no rights",
        ),
    };
    vec![tap]
}
