//! What is said of functions of machines that differ: each is a tree of files as sysfs lays it out, with the configuration space of
//! each function, and the kernel's part in binding is played on it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use proptest::collection::vec;
use proptest::prelude::any;
use proptest::{prop_assert_eq, proptest};
use tempfile::TempDir;

use super::*;

/// A machine's files, laid out as Linux lays them out.
struct Tree {
    folder: TempDir,
}

/// Configuration space of a port: its kind, and what its ACS can do and does.
fn port(kind: u8, acs: Option<(u16, u16)>) -> Vec<u8> {
    let mut config = vec![0; 4096];
    (config[6], config[0x34], config[0x40], config[0x42]) = (0x10, 0x40, 0x10, kind << 4);
    // An extended capability that is something else comes first.
    config[0x100..0x104].copy_from_slice(&[1, 0, 0, 0]);
    if let Some((able, on)) = acs {
        config[0x102..0x104].copy_from_slice(&[0x01, 0x20]);
        config[0x200..0x204].copy_from_slice(&[0x0d, 0, 1, 0]);
        config[0x204..0x206].copy_from_slice(&able.to_le_bytes());
        config[0x206..0x208].copy_from_slice(&on.to_le_bytes());
    }
    config
}

const ROOT_PORT: u8 = 4;
const ENDPOINT: u8 = 0;
const TO_PCI: u8 = 7;
const ISOLATES: Option<(u16, u16)> = Some((0x1f, 0x1d));

impl Tree {
    fn new(vendor: &str, cmdline: &str, interrupts: &str) -> Self {
        let tree = Self { folder: tempfile::tempdir().unwrap() };
        tree.put("proc/cpuinfo", &format!("processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: 6\n"));
        tree.put("proc/cmdline", &format!("BOOT_IMAGE=/vmlinuz root=/dev/sda1 ro {cmdline}\n"));
        tree.put("proc/interrupts", &format!("            CPU0\n 24:  0   {interrupts}  0-edge  eth0\n"));
        for folder in ["sys/bus/pci/devices", "sys/bus/pci/drivers", "sys/class/iommu", "dev/vfio"] {
            fs::create_dir_all(tree.at(folder)).unwrap();
        }
        tree.put("sys/bus/pci/drivers_probe", "");
        tree
    }
    fn at(&self, path: &str) -> PathBuf {
        self.folder.path().join(path)
    }
    fn put(&self, path: &str, text: &str) {
        self.put_bytes(path, text.as_bytes());
    }
    fn put_bytes(&self, path: &str, bytes: &[u8]) {
        fs::create_dir_all(self.at(path).parent().unwrap()).unwrap();
        fs::write(self.at(path), bytes).unwrap();
    }
    fn link(&self, path: &str, target: &Path) {
        fs::create_dir_all(self.at(path).parent().unwrap()).unwrap();
        symlink(target, self.at(path)).unwrap();
    }
    fn iommu(self, name: &str) -> Self {
        fs::create_dir_all(self.at("sys/class/iommu").join(name)).unwrap();
        self
    }
    fn vfio(self) -> Self {
        fs::create_dir_all(self.at("sys/bus/pci/drivers/vfio-pci")).unwrap();
        self.put("dev/vfio/vfio", "");
        self
    }
    /// A function behind those of `path`, the last of which it is itself.
    fn function(self, path: &[&str], id: &str, class: &str, driver: &str, group: Option<u32>, config: &[u8]) -> Self {
        let bdf = path.last().unwrap();
        let folder = format!("sys/devices/pci0000:00/{}", path.join("/"));
        let (vendor, device) = id.split_once(':').unwrap();
        self.put(&format!("{folder}/vendor"), &format!("0x{vendor}\n"));
        self.put(&format!("{folder}/device"), &format!("0x{device}\n"));
        self.put(&format!("{folder}/class"), &format!("0x{class}\n"));
        self.put(&format!("{folder}/driver_override"), "(null)\n");
        self.put_bytes(&format!("{folder}/config"), config);
        self.put(&format!("{folder}/reset_method"), "flr bus\n");
        let none = "0x0000000000000000 0x0000000000000000 0x0000000000000000\n";
        let bar = "0x00000000f7c00000 0x00000000f7c1ffff 0x0000000000040200\n";
        self.put(&format!("{folder}/resource"), &[bar, none, none, none, none, none, bar].concat());
        self.link(&format!("sys/bus/pci/devices/{bdf}"), &self.at(&folder));
        if !driver.is_empty() {
            fs::create_dir_all(self.at("sys/bus/pci/drivers").join(driver)).unwrap();
            self.link(&format!("{folder}/driver"), &self.at("sys/bus/pci/drivers").join(driver));
            self.put(&format!("sys/bus/pci/drivers/{driver}/unbind"), "");
        }
        if let Some(group) = group {
            let groups = self.at("sys/kernel/iommu_groups").join(group.to_string());
            self.put(
                &format!("sys/kernel/iommu_groups/{group}/reserved_regions"),
                "0x00000000fee00000 0x00000000feefffff msi\n",
            );
            symlink(&groups, self.at(&folder).join("iommu_group")).unwrap();
        }
        self
    }
    fn device(&self, bdf: &str, file: &str, text: &str) {
        let folder = fs::canonicalize(self.at("sys/bus/pci/devices").join(bdf)).unwrap();
        fs::write(folder.join(file), text).unwrap();
    }
    fn look(&self) -> Host {
        Host::look(self.folder.path()).unwrap()
    }
    #[track_caller]
    fn check(&self, bdf: &str) -> Report {
        let caller = Caller { uid: 1000, gids: vec![1000] };
        let report = check(&self.look(), bdf.parse().unwrap(), &caller).unwrap();
        for finding in &report.findings {
            assert_eq!(finding.remedy.is_none(), finding.verdict == Verdict::Ok, "{finding:?}");
        }
        report
    }
}

#[track_caller]
fn expect(report: &Report, topic: Topic, verdict: Verdict, found: &str, remedy: &str) {
    let finding = report.findings.iter().find(|finding| finding.topic == topic);
    let finding = finding.unwrap_or_else(|| panic!("nothing about {topic:?} in {report:#?}"));
    assert_eq!(finding.verdict, verdict, "{finding:?}");
    assert!(finding.found.contains(found), "{finding:?}");
    assert!(finding.remedy.as_deref().unwrap_or_default().contains(remedy), "{finding:?}");
}

/// An Intel desktop: the card and the disk are behind ports of the chipset, which have no ACS, and so in one group.
fn intel_desktop() -> Tree {
    let tree = Tree::new("GenuineIntel", "intel_iommu=on", "IR-PCI-MSI").iommu("dmar0").iommu("dmar1").vfio();
    let (a, b) = ("0000:00:1c.0", "0000:00:1c.4");
    let no_acs = port(ROOT_PORT, None);
    let end = port(ENDPOINT, None);
    let tree = tree
        .function(&["0000:00:00.0"], "8086:3e30", "060000", "", Some(0), &[0; 64])
        .function(&[a], "8086:a338", "060400", "pcieport", Some(7), &no_acs)
        .function(&[b], "8086:a33c", "060400", "pcieport", Some(7), &no_acs)
        .function(&[a, "0000:02:00.0"], "8086:1533", "020000", "igb", Some(7), &end)
        .function(&[b, "0000:03:00.0"], "144d:a808", "010802", "nvme", Some(7), &end);
    let disk = "sys/devices/pci0000:00/0000:00:1c.4/0000:03:00.0/nvme/nvme0/nvme0n1";
    tree.put(&format!("{disk}/dev"), "259:0\n");
    fs::create_dir_all(tree.at("sys/class/block")).unwrap();
    tree.link(&format!("{disk}/subsystem"), &tree.at("sys/class/block"));
    tree.put("proc/self/mountinfo", "29 1 259:0 / /home rw,relatime shared:1 - ext4 /dev/nvme0n1 rw\n");
    tree
}

#[test]
fn a_desktop_without_acs_shares_its_group() {
    let tree = intel_desktop();
    let card = tree.check("02:00.0");
    assert!(!card.ready);
    assert_eq!((card.id.as_str(), card.kind, card.group), ("8086:1533", "network card", Some(7)));
    assert_eq!(card.members.len(), 4);
    assert_eq!(card.acs, [("0000:00:1c.0".parse().unwrap(), Acs::Missing)]);
    assert_eq!(card.bars, [Bar { index: 0, bytes: 0x2_0000, kind: "memory32", prefetchable: false }]);
    expect(&card, Topic::Iommu, Verdict::Ok, "dmar0, dmar1", "");
    expect(&card, Topic::Group, Verdict::Fail, "0000:03:00.0 (NVMe disk, nvme)", "sudo atoll vfio bind 0000:03:00.0");
    expect(&card, Topic::Acs, Verdict::Warn, "0000:00:1c.0 cannot", "another port");
    expect(&card, Topic::Driver, Verdict::Fail, "igb drives it", "sudo atoll vfio bind 0000:02:00.0");
    expect(&card, Topic::Interrupts, Verdict::Ok, "remapped", "");
    let disk = tree.check("0000:03:00.0");
    expect(&disk, Topic::InUse, Verdict::Warn, "nvme0n1 is mounted at /home", "umount");
    let bridge = tree.check("00:1c.0");
    expect(&bridge, Topic::Function, Verdict::Fail, "a bridge, which belongs to the host", "behind it");
    let told: Vec<&str> = bridge.findings.iter().filter_map(|finding| finding.remedy.as_deref()).collect();
    assert!(told.iter().all(|remedy| !remedy.contains("bind")), "a bridge is nothing to give away: {told:?}");
    expect(&disk, Topic::Function, Verdict::Ok, "an NVMe disk", "");
}

/// A bridge with a driver of its own in the group is in VFIO's way; it is not VFIO's for that.
#[test]
fn a_bridge_in_the_way_is_let_go() {
    let tree = Tree::new("GenuineIntel", "intel_iommu=on", "IR-PCI-MSI").iommu("dmar0").vfio();
    let tree = tree.function(&["0000:00:1f.0"], "8086:a304", "060100", "lpc_ich", Some(12), &[0; 64]).function(
        &["0000:00:1f.3"],
        "8086:a348",
        "040300",
        "vfio-pci",
        Some(12),
        &[0; 64],
    );
    let remedy = "echo 0000:00:1f.0 | sudo tee /sys/bus/pci/drivers/lpc_ich/unbind";
    expect(&tree.check("00:1f.3"), Topic::Group, Verdict::Fail, "ISA bridge, lpc_ich", remedy);
}

/// What cannot be read is said to be so: a device without BARs or without a reset is something else.
#[test]
fn what_cannot_be_read_is_not_absent() {
    let tree = intel_desktop();
    let spoil = |bdf: &str, file: &str| {
        let folder = fs::canonicalize(tree.at("sys/bus/pci/devices").join(bdf)).unwrap();
        let _ = fs::remove_file(folder.join(file));
        // Reading a folder fails for root, too.
        fs::create_dir(folder.join(file)).unwrap();
    };
    for file in ["resource", "reset_method", "sriov_totalvfs", "boot_vga"] {
        spoil("0000:02:00.0", file);
    }
    let card = tree.check("02:00.0");
    for (topic, file) in [(Topic::Bars, "resource"), (Topic::Reset, "reset_method"), (Topic::Sriov, "sriov_totalvfs")] {
        let finding = card.findings.iter().find(|finding| finding.topic == topic).unwrap();
        assert_eq!(finding.verdict, Verdict::Warn, "{finding:?}");
        assert_eq!(finding.found, format!("not known: {file} cannot be read"));
    }
    assert!(card.findings.iter().any(|finding| finding.found == "not known: boot_vga cannot be read"), "{card:#?}");
    spoil("0000:03:00.0", "vendor");
    let caller = Caller { uid: 0, gids: vec![0] };
    let error = check(&tree.look(), "03:00.0".parse().unwrap(), &caller).unwrap_err();
    assert_eq!(error.to_string(), "0000:03:00.0: vendor cannot be read; root can: sudo atoll vfio check 0000:03:00.0");
}

/// A user attaches a record to a report, and whoever reads it sees what the user saw.
#[test]
fn a_record_says_the_same() {
    let tree = intel_desktop();
    tree.put("dev/vfio/7", "");
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("copy");
    let done = record(tree.folder.path(), &copy).unwrap();
    assert_eq!((done.functions, done.unreadable.as_slice()), (5, &[][..]));
    let (here, there) = (tree.look(), Host::look(&copy).unwrap());
    assert_eq!(here.functions, there.functions);
    let caller = Caller { uid: rustix::process::geteuid().as_raw(), gids: Vec::new() };
    for bdf in here.functions.keys() {
        assert_eq!(check(&here, *bdf, &caller).unwrap(), check(&there, *bdf, &caller).unwrap(), "{bdf}");
    }
    let again = record(tree.folder.path(), &copy).unwrap_err().to_string();
    assert!(again.contains("is there already") && again.contains("nothing is overwritten"), "{again}");
    let nothing = record(&copy.join("nowhere"), &copy.with_extension("other")).unwrap_err();
    assert!(nothing.to_string().contains("is sysfs mounted"), "{nothing}");
}

/// A server: every port keeps apart what is behind it; a virtual function has a group of its own.
#[test]
fn a_server_gives_a_virtual_function_away() {
    let tree = Tree::new("AuthenticAMD", "", "IR-PCI-MSIX-0000:41:00.0").iommu("ivhd0").vfio();
    let tree = tree
        .function(&["0000:40:01.1"], "1022:1483", "060400", "pcieport", Some(20), &port(ROOT_PORT, ISOLATES))
        .function(
            &["0000:40:01.1", "0000:41:00.0"],
            "15b3:1017",
            "020000",
            "mlx5_core",
            Some(21),
            &port(ENDPOINT, None),
        )
        .function(
            &["0000:40:01.1", "0000:41:00.2"],
            "15b3:1018",
            "020000",
            "vfio-pci",
            Some(22),
            &port(ENDPOINT, None),
        );
    tree.device("0000:41:00.0", "sriov_totalvfs", "8\n");
    tree.device("0000:41:00.0", "sriov_numvfs", "1\n");
    let virtual_function = fs::canonicalize(tree.at("sys/bus/pci/devices/0000:41:00.2")).unwrap();
    symlink("../0000:41:00.0", virtual_function.join("physfn")).unwrap();
    tree.put("dev/vfio/22", "");
    let modes = |mode| {
        for node in ["22", "vfio"] {
            let permissions = std::os::unix::fs::PermissionsExt::from_mode(mode);
            fs::set_permissions(tree.at("dev/vfio").join(node), permissions).unwrap();
        }
    };
    modes(0o666);
    let own = tree.check("41:00.2");
    assert!(own.ready, "{own:#?}");
    expect(&own, Topic::Group, Verdict::Ok, "group 22, alone", "");
    expect(&own, Topic::Acs, Verdict::Ok, "0000:40:01.1 on", "");
    expect(&own, Topic::Sriov, Verdict::Ok, "of 0000:41:00.0 (mlx5_core)", "");
    expect(&own, Topic::Access, Verdict::Ok, "/dev/vfio/22", "");
    modes(0o600);
    expect(&tree.check("41:00.2"), Topic::Access, Verdict::Fail, "not yours", "sudo chown 1000 /dev/vfio/22");
    fs::remove_file(tree.at("dev/vfio/22")).unwrap();
    expect(&tree.check("41:00.2"), Topic::Access, Verdict::Fail, "not there", "modprobe");
    let physical = tree.check("41:00.0");
    expect(&physical, Topic::Sriov, Verdict::Ok, "1 of 8", "");
    expect(&physical, Topic::Driver, Verdict::Fail, "mlx5_core", "sudo atoll vfio bind");
}

#[test]
fn without_an_iommu_the_way_to_one_is_named() {
    for (vendor, cmdline, iommu, found, remedy) in [
        ("GenuineIntel", "", None, "no IOMMU is switched on", "intel_iommu=on"),
        ("GenuineIntel", "intel_iommu=on", None, "and no IOMMU", "VT-d"),
        ("GenuineIntel", "quiet intel_iommu=off", None, "switched off by intel_iommu=off", "sed -i"),
        ("AuthenticAMD", "", None, "no IOMMU is switched on", "AMD-Vi"),
        ("AuthenticAMD", "amd_iommu=off", None, "amd_iommu=off", "update-grub"),
        ("TCGTCGTCG", "", None, "no IOMMU is switched on", "virtual machine"),
        ("GenuineIntel", "intel_iommu=on", Some("dmar0"), "not behind it", "another"),
    ] {
        let remedy = if remedy == "another" { "slot" } else { remedy };
        let mut tree = Tree::new(vendor, cmdline, "PCI-MSI");
        if let Some(name) = iommu {
            tree = tree.iommu(name);
        }
        let tree = tree.function(&["0000:00:03.0"], "8086:100e", "020000", "e1000", None, &[0; 256]);
        let report = tree.check("0000:00:03.0");
        expect(&report, Topic::Iommu, Verdict::Fail, found, remedy);
        expect(&report, Topic::Driver, Verdict::Fail, "e1000", "sudo modprobe vfio-pci && sudo atoll vfio bind");
        assert!(!report.ready && report.findings.iter().all(|finding| finding.topic != Topic::Interrupts));
    }
}

/// Conventional PCI behind a bridge, a display with the host's screen, no reset, a BAR beyond the board.
#[test]
fn old_and_odd_devices_are_told_apart() {
    let tree = Tree::new("GenuineIntel", "intel_iommu=on", "PCI-MSI").iommu("dmar0").vfio();
    let bridge = ["0000:00:1e.0"];
    let tree = tree
        .function(&bridge, "8086:244e", "060401", "", Some(9), &port(TO_PCI, None))
        .function(&["0000:00:1e.0", "0000:05:00.0"], "10ec:8139", "020000", "vfio-pci", Some(9), &[0; 256])
        .function(&["0000:00:1e.0", "0000:05:01.0"], "1274:1371", "040100", "", Some(9), &[0; 256])
        .function(&["0000:00:02.0"], "8086:3e92", "030000", "i915", Some(2), &[0; 64])
        .function(&["0000:00:03.0"], "10de:20b0", "030200", "", Some(3), &[0; 64]);
    let card = tree.check("05:00.0");
    expect(&card, Topic::Group, Verdict::Warn, "0000:05:01.0 (sound or video, no driver)", "one guest");
    expect(&card, Topic::Acs, Verdict::Warn, "0000:00:1e.0 leads to conventional PCI", "Express");
    expect(&card, Topic::Interrupts, Verdict::Fail, "not remapped", "allow_unsafe_interrupts");
    tree.put("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "Y\n");
    expect(&tree.check("05:00.0"), Topic::Interrupts, Verdict::Warn, "allowed", "trust");
    tree.device("0000:00:02.0", "boot_vga", "1\n");
    tree.device("0000:00:02.0", "reset_method", "\n");
    let screen = tree.check("00:02.0");
    expect(&screen, Topic::Function, Verdict::Warn, "the host's screen", "another display");
    expect(&screen, Topic::Reset, Verdict::Warn, "no way to reset", "one guest");
    tree.device("0000:00:02.0", "reset_method", "pm\n");
    expect(&tree.check("00:02.0"), Topic::Reset, Verdict::Warn, "power management", "second time");
    let wide = "0x0000000000000000 0x000000ffffffffff 0x000000000014220c\n";
    tree.device("0000:00:03.0", "resource", wide);
    expect(&tree.check("00:03.0"), Topic::Bars, Verdict::Fail, "BAR 0 of 1T", "Resizable");
    tree.put("sys/kernel/iommu_groups/3/reserved_regions", "0x00000000d0000000 0x00000000d01fffff direct\n");
    expect(&tree.check("00:03.0"), Topic::Group, Verdict::Fail, "RMRR", "firmware");
    tree.put("sys/kernel/iommu_groups/3/reserved_regions", "0x00000000d0000000 0x00000000d01fffff direct-relaxable\n");
    expect(&tree.check("00:03.0"), Topic::Group, Verdict::Ok, "alone", "");
}

/// What a user other than root sees of a port is not taken for what is there.
#[test]
fn what_only_root_can_read_is_unknown() {
    let tree = Tree::new("AuthenticAMD", "", "IR-PCI-MSI").iommu("ivhd0").vfio();
    let above = port(ROOT_PORT, ISOLATES);
    let tree = tree.function(&["0000:00:01.0"], "1022:1483", "060400", "pcieport", Some(1), &above[..256]).function(
        &["0000:00:01.0", "0000:01:00.0"],
        "144d:a808",
        "010802",
        "nvme",
        Some(2),
        &[0; 64],
    );
    expect(
        &tree.check("01:00.0"),
        Topic::Acs,
        Verdict::Warn,
        "only root can read it of 0000:00:01.0",
        "sudo atoll vfio check",
    );
    assert_eq!(Capabilities::read(&port(ROOT_PORT, Some((0x1f, 0)))).acs, Some(Acs::Off));
    assert_eq!(Capabilities::read(&port(ROOT_PORT, Some((0x01, 0)))).acs, Some(Acs::Missing));
}

/// The kernel's side of binding: a driver takes a function when it is asked to look.
struct Kernel<'a> {
    tree: &'a Tree,
    /// Who drives what when nobody else is named.
    usual: BTreeMap<&'static str, &'static str>,
    refuses: Option<&'static str>,
    fails: Option<&'static str>,
    writes: Vec<String>,
}

impl<'a> Kernel<'a> {
    fn new(tree: &'a Tree) -> Self {
        let usual = [("0000:02:00.0", "igb"), ("0000:03:00.0", "nvme")].into();
        Self { tree, usual, refuses: None, fails: None, writes: Vec::new() }
    }
}

impl Hands for Kernel<'_> {
    fn write(&mut self, path: &Path, value: &str) -> io::Result<()> {
        let name = path.file_name().unwrap().to_str().unwrap();
        if self.fails == Some(name) {
            self.fails = None;
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        assert!(path.exists(), "{}", path.display());
        self.writes.push(format!("{name}={}", value.trim_end()));
        let devices = self.tree.at("sys/bus/pci/devices");
        match name {
            "driver_override" => fs::write(path, if value.trim().is_empty() { "(null)\n" } else { value })?,
            "unbind" => fs::remove_file(devices.join(value).join("driver"))?,
            "drivers_probe" => {
                let reserved = fs::read_to_string(devices.join(value).join("driver_override")).unwrap();
                let usual = self.usual.get(value).copied();
                let driver = if reserved.trim() == "(null)" { usual } else { Some(reserved.trim()) };
                if let Some(driver) = driver.filter(|driver| self.refuses != Some(driver)) {
                    symlink(self.tree.at("sys/bus/pci/drivers").join(driver), devices.join(value).join("driver"))?;
                    let unbind = self.tree.at("sys/bus/pci/drivers").join(driver).join("unbind");
                    fs::write(unbind, "")?;
                }
            }
            _ => panic!("{} is no file to write to", path.display()),
        }
        Ok(())
    }
}

#[test]
fn a_function_goes_to_vfio_and_back() {
    let tree = intel_desktop();
    let records = tree.at("run/atoll-vfio");
    let card: Bdf = "02:00.0".parse().unwrap();
    let mut kernel = Kernel::new(&tree);
    let before = bind(&tree.look(), card, &records, &mut kernel).unwrap();
    assert_eq!(before.driver.as_deref(), Some("igb"));
    assert_eq!(kernel.writes, ["driver_override=vfio-pci", "unbind=0000:02:00.0", "drivers_probe=0000:02:00.0"]);
    assert!(tree.look().functions[&card].is_vfio());
    kernel.writes.clear();
    bind(&tree.look(), card, &records, &mut kernel).unwrap();
    assert!(kernel.writes.is_empty(), "it is bound already");
    // A process that has it open keeps it.
    fs::create_dir_all(tree.at("proc/4711/fd")).unwrap();
    symlink("/dev/vfio/7", tree.at("proc/4711/fd/9")).unwrap();
    let open = unbind(&tree.look(), card, &records, &mut kernel).unwrap_err();
    assert!(open.to_string().contains("process 4711 has 0000:02:00.0 open"), "{open}");
    fs::remove_dir_all(tree.at("proc/4711")).unwrap();
    assert_eq!(unbind(&tree.look(), card, &records, &mut kernel).unwrap().as_deref(), Some("igb"));
    assert_eq!(tree.look().functions[&card].driver_override, None);
    assert_eq!(fs::read_dir(&records).unwrap().count(), 0);
    let twice = unbind(&tree.look(), card, &records, &mut kernel).unwrap_err();
    assert!(twice.to_string().contains("bound to vfio-pci but to igb"), "{twice}");
}

#[test]
fn what_cannot_be_bound_stays_as_it_is() {
    let tree = intel_desktop();
    let records = tree.at("run/atoll-vfio");
    let refused = |bdf: &str, kernel: &mut Kernel<'_>| {
        let error = bind(&tree.look(), bdf.parse().unwrap(), &records, kernel).unwrap_err().to_string();
        assert_eq!(tree.look().functions[&bdf.parse().unwrap()].driver_override, None);
        error
    };
    let mut kernel = Kernel::new(&tree);
    assert!(refused("03:00.0", &mut kernel).contains("nvme0n1 is mounted at /home; stop that first"));
    assert!(refused("00:1c.0", &mut kernel).contains("is a bridge"));
    assert!(kernel.writes.is_empty());
    let nobody = bind(&tree.look(), "07:00.0".parse().unwrap(), &records, &mut kernel).unwrap_err();
    assert!(nobody.to_string().contains("no PCI function 0000:07:00.0"));
    // The driver does not take it: it goes back to the one that it was taken from.
    kernel.refuses = Some("vfio-pci");
    assert!(refused("02:00.0", &mut kernel).contains("vfio-pci did not take 0000:02:00.0"));
    for step in ["driver_override", "unbind", "drivers_probe"] {
        let mut kernel = Kernel::new(&tree);
        kernel.fails = Some(step);
        assert!(refused("02:00.0", &mut kernel).contains("run it with sudo"), "{step}");
        assert_eq!(tree.look().functions[&"02:00.0".parse().unwrap()].driver.as_deref(), Some("igb"), "{step}");
    }
    assert_eq!(fs::read_dir(&records).unwrap().count(), 0);
}

#[test]
fn places_are_written_as_lspci_does() {
    for (text, shown) in
        [("01:00.0", "0000:01:00.0"), ("10000:e1:1f.7", "10000:e1:1f.7"), ("0001:ff:00.1", "0001:ff:00.1")]
    {
        assert_eq!(text.parse::<Bdf>().unwrap().to_string(), shown);
    }
    for text in ["", "01:00", "1:0.0", "01:20.0", "01:00.8", "000:01:00.0", "01:00.0/..", "+1:00.0", "pci0000:00"] {
        assert!(text.parse::<Bdf>().is_err(), "{text}");
    }
}

proptest! {
    /// Configuration space is a device's word: no bytes of it lead astray.
    #[test]
    fn any_configuration_space_can_be_read(mut config in vec(any::<u8>(), 0..4097), capability in any::<bool>()) {
        if capability && config.len() > 0x44 {
            (config[6], config[0x34]) = (0x10, 0x40);
        }
        Capabilities::read(&config);
    }

    #[test]
    fn a_place_reads_as_it_is_written(segment in any::<u16>(), bus in any::<u8>(), device in 0..32_u8, function in 0..8_u8) {
        let text = format!("{segment:04x}:{bus:02x}:{device:02x}.{function}");
        prop_assert_eq!(text.parse::<Bdf>().unwrap().to_string(), text);
    }
}
