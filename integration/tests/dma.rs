//! A guest that has its devices touch what they may not: a program in it drives disks and network cards through VFIO, maps memory, takes it back
//! and makes requests with addresses that lead nowhere.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use atoll_verify::dma::DmaVerdict;
use xtask::console::Console;
use xtask::demo::{BOOT_LIMIT, Demo, KernelForm};
use xtask::{images, place, verify};

const STEP: Duration = Duration::from_secs(60);
/// VFIO, in the order in which its parts are loaded.
const MODULES: [&str; 5] = [
    "virt/lib/irqbypass",
    "drivers/vfio/vfio",
    "drivers/vfio/vfio_iommu_type1",
    "drivers/vfio/pci/vfio-pci-core",
    "drivers/vfio/pci/vfio-pci",
];

/// A part of the machine's tree.
fn inspect(api: &Path, path: &str) -> Result<serde_json::Value> {
    let output = Command::new(place::program("atoll")?).arg("inspect").arg(api).arg(path).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// A guest with the verifier and VFIO's parts on its disk.
struct Behind {
    vm: Console,
    api: PathBuf,
    events: PathBuf,
    _folder: tempfile::TempDir,
}

impl Behind {
    /// Starts one with the devices that `with` adds behind its IOMMU.
    fn start(with: impl FnOnce(&mut Command, &Path) -> Result<()>) -> Result<Self> {
        let guest = images::guest("6.12")?;
        let folder = tempfile::tempdir()?;
        let root = images::copy_of_disk(&guest, folder.path())?;
        verify::install(&root)?;
        for module in MODULES {
            let bytes = images::module_of("6.12", module)?.with_context(|| format!("{module} is no module"))?;
            let name = module.rsplit('/').next().unwrap_or(module);
            let file = folder.path().join(name);
            std::fs::write(&file, bytes)?;
            verify::put_file(&root, &file, &format!("/root/{name}.ko"))?;
        }
        let (api, events) = (folder.path().join("api.sock"), folder.path().join("events"));
        let demo = Demo { series: "6.12".into(), form: KernelForm::Pvh, cpu: "soft".into() };
        let mut command = demo.command(&guest)?;
        command.args(["--cmdline", "console=ttyS0 atoll.load=iommu,net"]).arg("--api-socket").arg(&api);
        command.arg("--event-monitor").arg(format!("path={}", events.display()));
        command.arg("--disk").arg(format!("path={}", root.display()));
        with(&mut command, folder.path())?;
        let mut vm = Console::spawn(&mut command)?;
        vm.prompt(BOOT_LIMIT)?;
        vm.run("cd /root; insmod() { busybox insmod $1.ko; }", STEP)?;
        for module in MODULES {
            vm.run(&format!("insmod {}", module.rsplit('/').next().unwrap_or(module)), STEP)?;
        }
        // Nothing here remaps interrupts, and the program uses none.
        vm.run("P=/sys/module/vfio_iommu_type1/parameters", STEP)?;
        vm.run("echo 1 > $P/allow_unsafe_interrupts", STEP)?;
        Ok(Self { vm, api, events, _folder: folder })
    }

    /// Has the guest's program drive the device at `place` by `story`.
    fn verdict(&mut self, story: &str, place: &str) -> Result<DmaVerdict> {
        let said = self.vm.run(&format!("atoll-verify {story} device={place} 2>&1"), STEP)?;
        let line = said.lines().find(|line| line.starts_with('{')).with_context(|| said.clone())?;
        let verdict: DmaVerdict = serde_json::from_str(line)?;
        ensure!(verdict.ok, "{story}: {line}");
        Ok(verdict)
    }

    /// The faults of a device are told: in the guest's log by the number of the endpoint, which is its place on the bus, in the
    /// operator's figures, and as events with address and access.
    fn told(&mut self, id: &str, place: &str, verdict: &DmaVerdict, accesses: &[(&str, &str)]) -> Result<()> {
        let slot =
            place.get(8..10).and_then(|slot| u32::from_str_radix(slot, 16).ok()).with_context(|| place.to_owned())?;
        let log = self.vm.run(&format!("dmesg | grep 'fault from EP {} '", slot << 3), STEP)?;
        ensure!(log.contains("[R]") && log.contains("[W]"), "{id}: {log}");
        let deadline = Instant::now() + STEP;
        let figures = loop {
            let figures = inspect(&self.api, &format!("figures/{id}/iommu"))?;
            if figures["fault"].as_u64().is_some_and(|faults| faults >= verdict.faults.into()) {
                break figures;
            }
            ensure!(Instant::now() < deadline, "{id}: {figures}");
            std::thread::sleep(Duration::from_millis(50));
        };
        ensure!(figures["map"].as_u64() >= Some(6) && figures["unmap"].as_u64() >= Some(3), "{id}: {figures}");
        let told = |access: &str, address: &str| {
            let told = std::fs::read_to_string(&self.events).unwrap_or_default();
            told.split('{').any(|event| [id, access, address].iter().all(|word| event.contains(&format!("\"{word}\""))))
        };
        for (access, address) in accesses {
            let deadline = Instant::now() + STEP;
            while !told(access, address) {
                ensure!(Instant::now() < deadline, "{id}: no event of the {access} at {address}");
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        Ok(())
    }

    fn end(mut self) -> Result<()> {
        self.vm.run("mount -o remount,ro /", STEP)?;
        self.vm.send("poweroff -f\n")?;
        let (status, errors) = self.vm.wait(STEP)?;
        ensure!(status.success(), "{status}: {errors}");
        Ok(())
    }
}

/// Two disks behind the IOMMU, one with shared memory and one by copies. Of each the guest's program reads and writes what is
/// mapped, and has it read and write what is not, or not any more, or not for writing: nothing is touched, the requests
/// fail, the disk goes on. The guest's kernel is told of the faults with their endpoint, and so are the operator's events and
/// figures.
#[test]
fn a_guest_maps_unmaps_and_faults_on_purpose() -> Result<()> {
    let mut behind = Behind::start(|command, folder| {
        for (id, keys) in [("shared", ""), ("copied", ",isolation=copy")] {
            let image = folder.join(id);
            std::fs::File::create(&image)?.set_len(1 << 20)?;
            command.arg(format!("path={},iommu=on,id={id}{keys}", image.display()));
        }
        Ok(())
    })?;
    for (disk, id) in [("vdb", "shared"), ("vdc", "copied")] {
        behind.vm.run(&format!("while ! [ -b /dev/{disk} ]; do usleep 99999; done"), STEP)?;
        behind.vm.run(&format!("D=$(readlink -f /sys/block/{disk}/device)"), STEP)?;
        let place = behind.vm.run("D=${D%/*}; echo ${D##*/}", STEP)?;
        let verdict = behind.verdict("dma", &place).with_context(|| id)?;
        ensure!(verdict.faults == 4, "{id}: {verdict:?}");
        behind.told(id, &place, &verdict, &[("write", "0x300001000"), ("read", "0x200000000")])?;
    }
    behind.end()
}

/// The same with network cards: what is sent from an unmapped page is not sent, what comes for one is written nowhere, and the
/// card goes on.
#[test]
fn a_guest_has_its_cards_fault_on_purpose() -> Result<()> {
    let ids = ["shared", "copied"];
    let mut behind = Behind::start(|command, _| {
        command.arg("--net").args(["user=on,iommu=on,id=shared", "user=on,iommu=on,isolation=copy,id=copied"]);
        Ok(())
    })?;
    let places = behind.vm.run("cd /sys/bus/pci/drivers/virtio-pci; grep -l 0x1041 */device", STEP)?;
    let places: Vec<&str> = places.lines().filter_map(|line| line.trim().split('/').next()).collect();
    ensure!(places.len() == ids.len(), "the guest's cards are {places:?}");
    for (id, place) in ids.into_iter().zip(places) {
        let verdict = behind.verdict("card", place).with_context(|| id)?;
        ensure!(verdict.faults == 3, "{id}: {verdict:?}");
        behind.told(id, place, &verdict, &[("write", "0x300001000"), ("read", "0x200000000")])?;
    }
    behind.end()
}
