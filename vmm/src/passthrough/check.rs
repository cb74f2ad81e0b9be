//! What stands between a function and a guest, and the command that mends it.

use serde::Serialize;

use super::bdf::Bdf;
use super::capabilities::{Acs, PortKind};
use super::host::{Caller, Cpu, Function, Group, Host, HostError, Region};
use super::in_use;
use crate::machine::layout;

/// How a point stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// It will do, with a drawback.
    Warn,
    /// The function cannot be passed through like this.
    Fail,
}

/// What a point is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Topic {
    /// That it can be passed through at all.
    Function,
    /// There is an IOMMU, and it is on.
    Iommu,
    /// What the IOMMU cannot tell apart from it.
    Group,
    /// Whether the ports above it keep it apart.
    Acs,
    /// Who drives it.
    Driver,
    /// What the host does with it.
    InUse,
    /// How it can be reset.
    Reset,
    /// Whether its BARs fit into a guest.
    Bars,
    /// Whether its interrupts can be trusted.
    Interrupts,
    /// Virtual functions.
    Sriov,
    /// Whether the caller may open it.
    Access,
}

impl Topic {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Function => "function",
            Self::Iommu => "iommu",
            Self::Group => "group",
            Self::Acs => "acs",
            Self::Driver => "driver",
            Self::InUse => "in use",
            Self::Reset => "reset",
            Self::Bars => "bars",
            Self::Interrupts => "interrupts",
            Self::Sriov => "sr-iov",
            Self::Access => "access",
        }
    }
}

/// One point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is about.
    pub topic: Topic,
    /// How it stands.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do; there for everything that is not ok.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// A BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Bar {
    /// Its number.
    pub index: u8,
    /// Its length.
    pub bytes: u64,
    /// `io`, `memory32` or `memory64`.
    pub kind: &'static str,
    /// May be read ahead.
    pub prefetchable: bool,
}

/// All about one function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Where it is.
    pub bdf: Bdf,
    /// `8086:1533`.
    pub id: String,
    /// What it is, in a word or two.
    pub kind: &'static str,
    /// Who drives it.
    pub driver: Option<String>,
    /// Its group.
    pub group: Option<u32>,
    /// Everything in the group, itself included.
    pub members: Vec<Bdf>,
    /// The ports above it that have access control, or should.
    pub acs: Vec<(Bdf, Acs)>,
    /// How it can be reset.
    pub reset_methods: Vec<String>,
    /// Its BARs.
    pub bars: Vec<Bar>,
    /// Nothing fails.
    pub ready: bool,
    /// The points, in the order in which they are best mended.
    pub findings: Vec<Finding>,
}

/// With its article.
fn one(kind: &str) -> String {
    let article = if matches!(kind, "NVMe disk" | "ISA bridge" | "SMBus" | "accelerator") { "an" } else { "a" };
    format!("{article} {kind}")
}

/// A class in a word (PCI code and ID assignment, base class and subclass).
fn kind(class: u32) -> &'static str {
    match (class >> 16, class >> 8 & 0xff) {
        (0x01, 0x08) => "NVMe disk",
        (0x01, _) => "storage",
        (0x02, _) => "network card",
        (0x03, _) => "display",
        (0x04, _) => "sound or video",
        (0x06, 0x00) => "host bridge",
        (0x06, 0x01) => "ISA bridge",
        (0x06, _) => "bridge",
        (0x0c, 0x03) => "USB controller",
        (0x0c, 0x05) => "SMBus",
        (0x0c, _) => "serial bus",
        (0x12, _) => "accelerator",
        _ => "device",
    }
}

fn bar(region: &Region) -> Bar {
    let kind = match (region.io, region.wide) {
        (true, _) => "io",
        (false, true) => "memory64",
        (false, false) => "memory32",
    };
    Bar { index: region.index, bytes: region.bytes, kind, prefetchable: region.prefetchable }
}

fn list<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
}

/// How the IOMMU of a host is switched on, by who made its processor.
pub fn switch_on(cpu: Cpu) -> String {
    match cpu {
        Cpu::Intel => format!("switch VT-d on in the firmware's setup, then: {}", boot_parameter("intel_iommu=on")),
        Cpu::Amd => "switch IOMMU (AMD-Vi) on in the firmware's setup; Linux needs no parameter for it".to_owned(),
        Cpu::Other => {
            "in a virtual machine, have its host give it a virtual IOMMU (QEMU: -device intel-iommu,intremap=on)"
                .to_owned()
        }
    }
}

/// A parameter put on the kernel's command line for good.
fn boot_parameter(parameter: &str) -> String {
    format!(
        "sudo sed -i 's/^GRUB_CMDLINE_LINUX=\"/&{parameter} /' /etc/default/grub && sudo update-grub && sudo reboot"
    )
}

/// Collects points.
struct Checks<'a> {
    host: &'a Host,
    function: &'a Function,
    group: Option<(u32, &'a Group)>,
    caller: &'a Caller,
    findings: Vec<Finding>,
}

impl Checks<'_> {
    fn ok(&mut self, topic: Topic, found: impl Into<String>) {
        self.findings.push(Finding { topic, verdict: Verdict::Ok, found: found.into(), remedy: None });
    }
    fn warn(&mut self, topic: Topic, found: impl Into<String>, remedy: impl Into<String>) {
        let remedy = Some(remedy.into());
        self.findings.push(Finding { topic, verdict: Verdict::Warn, found: found.into(), remedy });
    }
    fn fail(&mut self, topic: Topic, found: impl Into<String>, remedy: impl Into<String>) {
        let remedy = Some(remedy.into());
        self.findings.push(Finding { topic, verdict: Verdict::Fail, found: found.into(), remedy });
    }

    fn function(&mut self) {
        let kind = one(kind(self.function.class));
        if self.function.is_bridge() {
            let remedy = "pass through a device behind it: atoll vfio check";
            self.fail(Topic::Function, format!("{kind}, which belongs to the host"), remedy);
        } else if self.function.boot_vga {
            let remedy =
                "boot the host from another display adapter (a setting of the firmware), or use it without a screen";
            self.warn(Topic::Function, format!("{kind}, and the host's screen is on it"), remedy);
        } else {
            self.ok(Topic::Function, kind);
        }
        // What hangs on those below says so itself; of the rest nothing is known here.
        let told = ["resource", "reset_method", "sriov_totalvfs"];
        let others: Vec<&str> = self.function.unreadable.iter().copied().filter(|name| !told.contains(name)).collect();
        if !others.is_empty() {
            self.unreadable(Topic::Function, &list(others));
        }
    }

    /// An attribute is there and could not be read: what it would say is not known.
    fn unreadable(&mut self, topic: Topic, what: &str) {
        let remedy = format!("sudo atoll vfio check {}", self.function.bdf);
        self.warn(topic, format!("not known: {what} cannot be read"), remedy);
    }

    fn lacks(&self, attribute: &str) -> bool {
        self.function.unreadable.contains(&attribute)
    }

    fn iommu(&mut self) {
        if self.group.is_some() {
            let iommus = &self.host.iommus;
            return self
                .ok(Topic::Iommu, if iommus.is_empty() { "on".into() } else { format!("on ({})", list(iommus)) });
        }
        let said = |word: &str| self.host.cmdline.split_whitespace().any(|parameter| parameter == word);
        let off = ["intel_iommu=off", "amd_iommu=off", "iommu=off"].into_iter().find(|word| said(word));
        let (found, remedy) = match (off, self.host.cpu) {
            (Some(word), _) => (
                format!("switched off by {word} on the kernel's command line"),
                format!("sudo sed -i 's/\\b{word}\\b//g' /etc/default/grub && sudo update-grub && sudo reboot"),
            ),
            (None, _) if !self.host.iommus.is_empty() => (
                "there is one, and this function is not behind it".to_owned(),
                "plug the device into a slot that is wired to the processor or the chipset".to_owned(),
            ),
            (None, Cpu::Intel) if said("intel_iommu=on") => (
                "intel_iommu=on is there, and no IOMMU".to_owned(),
                "switch VT-d on in the firmware's setup; a processor or board without it cannot pass devices through"
                    .to_owned(),
            ),
            (None, cpu) => ("no IOMMU is switched on".to_owned(), switch_on(cpu)),
        };
        self.fail(Topic::Iommu, found, remedy);
    }

    /// The others of the group that something drives which is not VFIO's and would get in its way.
    fn group(&mut self) {
        let Some((number, group)) = self.group else { return };
        if group.firmware_memory {
            let found = format!(
                "group {number}: the firmware keeps memory of its own mapped for it (RMRR), so that VFIO refuses"
            );
            return self.fail(Topic::Group, found, "switch off what uses it in the firmware's setup (USB legacy support, remote management), or update the firmware");
        }
        let others: Vec<&Function> = group
            .members
            .iter()
            .filter(|member| **member != self.function.bdf)
            .filter_map(|member| self.host.functions.get(member))
            .collect();
        let strangers: Vec<&&Function> = others
            .iter()
            .filter(|other| !other.is_bridge() || !matches!(other.driver.as_deref(), None | Some("pcieport")))
            .collect();
        let in_the_way: Vec<Bdf> = strangers
            .iter()
            .filter(|other| !matches!(other.driver.as_deref(), None | Some("vfio-pci" | "pci-stub")))
            .map(|other| other.bdf)
            .collect();
        let about = |bdfs: &[Bdf]| {
            let told = bdfs.iter().filter_map(|bdf| self.host.functions.get(bdf)).map(|other| {
                let driver = other.driver.as_deref().unwrap_or("no driver");
                format!("{} ({}, {driver})", other.bdf, kind(other.class))
            });
            list(told)
        };
        if !in_the_way.is_empty() {
            // A bridge is the host's, and VFIO is content when nothing drives it.
            let freed = |bdf: &Bdf| match self.host.functions.get(bdf) {
                Some(Function { driver: Some(driver), .. }) if self.is_bridge(*bdf) => {
                    format!("echo {bdf} | sudo tee /sys/bus/pci/drivers/{driver}/unbind")
                }
                _ => format!("sudo atoll vfio bind {bdf}"),
            };
            let commands: Vec<String> = in_the_way.iter().map(freed).collect();
            let found = format!("group {number} is shared with {}", about(&in_the_way));
            let remedy = format!(
                "take all of them from the host: {}; or plug the device into another slot",
                commands.join(" && ")
            );
            self.fail(Topic::Group, found, remedy);
        } else if !strangers.is_empty() {
            let bdfs: Vec<Bdf> = strangers.iter().map(|other| other.bdf).collect();
            let found = format!("group {number} is shared with {}, which are free", about(&bdfs));
            self.warn(Topic::Group, found, "let one guest have all of them: they reach each other's memory");
        } else if others.is_empty() {
            self.ok(Topic::Group, format!("group {number}, alone"));
        } else {
            self.ok(Topic::Group, format!("group {number}, alone but for bridges"));
        }
    }

    fn is_bridge(&self, bdf: Bdf) -> bool {
        self.host.functions.get(&bdf).is_some_and(Function::is_bridge)
    }

    fn ports(&self) -> Vec<(Bdf, Acs)> {
        let above = self.function.path.iter().filter_map(|bdf| self.host.functions.get(bdf));
        above.filter_map(|port| Some((port.bdf, port.capabilities.acs?))).collect()
    }

    fn acs(&mut self) {
        let Some((_, group)) = self.group else { return };
        let above = self.function.path.iter().filter_map(|bdf| self.host.functions.get(bdf));
        let bridge =
            above.into_iter().find(|port| port.capabilities.port == Some(PortKind::ToPci)).map(|port| port.bdf);
        let ports = self.ports();
        let of =
            |wanted: Acs| ports.iter().filter(move |(_, acs)| *acs == wanted).map(|(bdf, _)| *bdf).collect::<Vec<_>>();
        let (missing, off, unknown) = (of(Acs::Missing), of(Acs::Off), of(Acs::Unknown));
        // A port without it matters to those who share a group because of it.
        let shared = group.members.iter().any(|member| {
            let other = self.host.functions.get(member);
            *member != self.function.bdf && other.is_some_and(|other| !other.is_bridge())
        });
        if let Some(bridge) = bridge.filter(|_| shared) {
            let found = format!("{bridge} leads to conventional PCI, where devices are one to the IOMMU");
            self.warn(Topic::Acs, found, "pass all of them to one guest, or use a PCI Express card");
        } else if shared && !missing.is_empty() {
            let found = format!("{} cannot keep devices apart", list(missing));
            self.warn(
                Topic::Acs,
                found,
                "plug the device into a slot below another port (one of the processor's, on most boards)",
            );
        } else if shared && !off.is_empty() {
            let found = format!("{} could keep devices apart and does not", list(off));
            self.warn(Topic::Acs, found, "switch ACS on in the firmware's setup");
        } else if !unknown.is_empty() {
            let found = format!("only root can read it of {}", list(unknown));
            self.warn(Topic::Acs, found, format!("sudo atoll vfio check {}", self.function.bdf));
        } else if ports.is_empty() {
            self.ok(Topic::Acs, "no port above it needs it");
        } else {
            let told = ports.iter().map(|(bdf, acs)| match acs {
                Acs::On => format!("{bdf} on"),
                Acs::Off => format!("{bdf} off"),
                Acs::Missing => format!("{bdf} has none"),
                Acs::Unknown => format!("{bdf} unknown"),
            });
            let told = list(told);
            self.ok(Topic::Acs, told);
        }
    }

    fn driver(&mut self) {
        let bind = format!("sudo atoll vfio bind {}", self.function.bdf);
        let bind = if self.host.vfio_loaded { bind } else { format!("sudo modprobe vfio-pci && {bind}") };
        match self.function.driver.clone() {
            Some(driver) if driver == "vfio-pci" => self.ok(Topic::Driver, "vfio-pci"),
            Some(driver) => self.fail(Topic::Driver, format!("{driver} drives it"), bind),
            None => self.fail(Topic::Driver, "nothing drives it", bind),
        }
        for loss in in_use::losses(self.host, self.function.bdf) {
            let remedy =
                "stop using it (umount, swapoff, ip link set … down) before it is bound; `bind` refuses otherwise";
            self.warn(Topic::InUse, loss, remedy);
        }
    }

    fn reset(&mut self) {
        if self.lacks("reset_method") {
            return self.unreadable(Topic::Reset, "reset_method");
        }
        let methods = &self.function.reset_methods;
        let told = list(methods);
        match methods.first().map(String::as_str) {
            None => self.warn(
                Topic::Reset,
                "there is no way to reset it: what one guest leaves in it the next one finds",
                "use it for one guest, and switch the host off and on between two",
            ),
            Some("pm") => self.warn(
                Topic::Reset,
                "only by power management (pm), which many devices do not take for a reset",
                "look whether it works a second time before you depend on it",
            ),
            Some("bus") => self.warn(
                Topic::Reset,
                "only with everything else on its bus (bus)",
                "pass everything on that bus to one guest",
            ),
            Some(_) => self.ok(Topic::Reset, told),
        }
    }

    fn bars(&mut self) {
        if self.lacks("resource") {
            return self.unreadable(Topic::Bars, "resource");
        }
        let big = |region: &&Region| match (region.io, region.wide) {
            (true, _) => region.bytes > layout::PCI_IO.len,
            (false, true) => region.bytes > layout::MMIO64.len,
            (false, false) => region.bytes > layout::MMIO32.len,
        };
        if let Some(region) = self.function.regions.iter().find(big) {
            let found =
                format!("BAR {} of {} is larger than the guest's window for it", region.index, size(region.bytes));
            return self.fail(
                Topic::Bars,
                found,
                "switch Resizable BAR off, or make it smaller, in the firmware's setup",
            );
        }
        let told = self.function.regions.iter().map(|region| {
            let kind = if region.io { "ports" } else { "memory" };
            format!("{}: {} {kind}", region.index, size(region.bytes))
        });
        let told = list(told);
        self.ok(Topic::Bars, if told.is_empty() { "none".into() } else { told });
    }

    fn interrupts(&mut self) {
        if self.group.is_none() {
            return;
        }
        match (self.host.interrupts_remapped, self.host.unsafe_interrupts) {
            (true, _) => self.ok(Topic::Interrupts, "remapped"),
            (false, true) => self.warn(
                Topic::Interrupts,
                "not remapped, and allowed all the same: a guest can send the host any interrupt",
                "trust the guest, or switch interrupt remapping on in the firmware's setup",
            ),
            (false, false) => self.fail(
                Topic::Interrupts,
                "not remapped, so that a guest could send the host any interrupt",
                "switch interrupt remapping (x2APIC) on in the firmware's setup, and remove intremap=off; for a guest that you trust: echo 1 | sudo tee /sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts",
            ),
        }
    }

    fn sriov(&mut self) {
        if self.lacks("sriov_totalvfs") {
            return self.unreadable(Topic::Sriov, "sriov_totalvfs");
        }
        if let Some(physical) = self.function.physical {
            let driver = self.host.functions.get(&physical).and_then(|function| function.driver.clone());
            let driver = driver.unwrap_or_else(|| "no driver".into());
            self.ok(Topic::Sriov, format!("a virtual function of {physical} ({driver})"));
        } else if let Some((now, most)) = self.function.virtual_functions.filter(|(_, most)| *most > 0) {
            let more = format!(
                "has {now} of {most} virtual functions; more of them: echo {most} | sudo tee /sys/bus/pci/devices/{}/sriov_numvfs",
                self.function.bdf
            );
            self.ok(Topic::Sriov, more);
        }
    }

    fn access(&mut self) {
        let (Some((number, _)), true) = (self.group, self.function.is_vfio()) else { return };
        let nodes = [format!("dev/vfio/{number}"), "dev/vfio/vfio".to_owned()];
        for node in nodes {
            match self.host.may_open(&node, self.caller) {
                Some(true) => {}
                Some(false) => {
                    let remedy = format!("sudo chown {} /{node}", self.caller.uid);
                    return self.fail(Topic::Access, format!("/{node} is not yours to open"), remedy);
                }
                None => return self.fail(Topic::Access, format!("/{node} is not there"), "sudo modprobe vfio-pci"),
            }
        }
        self.ok(Topic::Access, format!("/dev/vfio/{number} is yours to open"));
    }
}

/// A number of bytes: `16K`, `256M`.
fn size(bytes: u64) -> String {
    let units = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
    let unit = units.into_iter().find(|(shift, _)| bytes >= 1 << shift && bytes.is_multiple_of(1 << shift));
    let (shift, name) = unit.unwrap_or((0, ""));
    format!("{}{name}", bytes >> shift)
}

/// Looks at one function.
///
/// # Errors
/// When there is none.
pub fn check(host: &Host, bdf: Bdf, caller: &Caller) -> Result<Report, HostError> {
    let function = host.function(bdf)?;
    let group = function.group.and_then(|number| Some((number, host.groups.get(&number)?)));
    let mut checks = Checks { host, function, group, caller, findings: Vec::new() };
    checks.function();
    // A bridge stays with the host: how it could be given away is nobody's question.
    if !function.is_bridge() {
        checks.iommu();
        checks.group();
        checks.acs();
        checks.driver();
        checks.reset();
        checks.bars();
        checks.interrupts();
        checks.sriov();
        checks.access();
    }
    let acs = checks.ports();
    let findings = checks.findings;
    Ok(Report {
        bdf,
        id: format!("{:04x}:{:04x}", function.id.0, function.id.1),
        kind: kind(function.class),
        driver: function.driver.clone(),
        group: function.group,
        members: group.map_or_else(Vec::new, |(_, group)| group.members.clone()),
        acs,
        reset_methods: function.reset_methods.clone(),
        bars: function.regions.iter().map(bar).collect(),
        ready: findings.iter().all(|finding| finding.verdict != Verdict::Fail),
        findings,
    })
}
