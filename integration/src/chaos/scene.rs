//! The scene of a campaign: a device of a class on what it needs, the shipped front end, and a load.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use atoll_kit::step::{Sabotage, Step};
use atoll_vmm::config::{
    ConsoleConfig, ConsoleMode, Descriptors, DeviceConfig, DiskConfig, ImageType, Isolation, NetConfig, NvmeConfig,
    OnFailure, RngConfig,
};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::console::Printing;
use super::disk::DiskLoad;
use super::entropy::Filling;
use super::load::{Findings, Load};
use super::net::NetLoad;
use super::one_queue::{self, OneQueue};
use super::rig::{House, Rig};
use super::tap::Tap;
use super::victim::ended;

/// How long it may take until a backend serves.
const SERVES_MAX: Duration = Duration::from_secs(30);

/// A class of devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Class {
    /// `atoll-blk`.
    Blk,
    /// `atoll-nvme`.
    Nvme,
    /// `atoll-net`.
    Net,
    /// `atoll-rng`.
    Rng,
    /// `atoll-console`.
    Console,
}

/// What a disk's image is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Image {
    /// Sectors as they are.
    #[default]
    Raw,
    /// qcow2.
    Qcow2,
}

impl Image {
    /// As the command line calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// What to do.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The class.
    pub class: Class,
    /// SIGKILLs.
    pub kills: u64,
    /// Everything follows from it that does not follow from the machine's mood.
    pub seed: u64,
    /// A disk's image.
    pub image: Image,
    /// Past the page cache.
    pub direct: bool,
    /// What the backend has of the memory of the one who drives it.
    pub isolation: Isolation,
    /// Where images are; memory by default.
    pub folder: Option<PathBuf>,
    /// A fault to commit, at every which opportunity. The campaign then ends with the first thing that it finds.
    pub sabotage: Option<(Sabotage, u64)>,
}

impl Plan {
    /// The class and, for a disk, its image.
    pub fn name(&self) -> String {
        let device = match (self.class, self.image, self.direct) {
            (Class::Blk, Image::Raw, false) => "blk raw",
            (Class::Blk, Image::Raw, true) => "blk raw direct",
            (Class::Blk, Image::Qcow2, false) => "blk qcow2",
            (Class::Blk, Image::Qcow2, true) => "blk qcow2 direct",
            (Class::Nvme, ..) => "nvme",
            (Class::Net, ..) => "net",
            (Class::Rng, ..) => "rng",
            (Class::Console, ..) => "console",
        };
        format!("{device}{}", if self.isolation == Isolation::Copy { " by copies" } else { "" })
    }

    pub(super) fn program(&self) -> &'static str {
        match self.class {
            Class::Blk => "atoll-blk",
            Class::Nvme => "atoll-nvme",
            Class::Net => "atoll-net",
            Class::Rng => "atoll-rng",
            Class::Console => "atoll-console",
        }
    }

    /// Steps that this class has.
    pub fn steps(&self) -> Vec<Step> {
        let has = |step: &Step| match step {
            Step::Status | Step::Flush => matches!(self.class, Class::Blk | Class::Nvme),
            // Its registers are written, and its settings asked for, in other steps.
            Step::ConfigWrite => self.class == Class::Blk,
            Step::Counted => self.class == Class::Nvme,
            // A card's requests are done in order, and the used index says all; where rings are copied the VMM knows what is to be
            // done again, and hands it to a successor as new.
            Step::Replay => self.class != Class::Net && self.isolation == Isolation::Shared,
            _ => true,
        };
        Step::ALL.into_iter().filter(has).collect()
    }
}

/// A device under load, with all that it needs.
pub struct Scene {
    pub(super) rig: Rig,
    pub(super) load: Box<dyn Load>,
    pub(super) house: House,
    pub(super) image: Option<PathBuf>,
    pub(super) _folder: tempfile::TempDir,
    pub(super) _tap: Option<Tap>,
}

/// Where images are that need no disk.
pub fn memory() -> &'static Path {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { memory } else { Path::new("/tmp") }
}

impl Scene {
    /// Starts the device of a plan with `programs`, and its load.
    pub fn open(plan: &Plan, programs: &Path) -> Result<Self> {
        let folder = tempfile::tempdir_in(plan.folder.as_deref().unwrap_or(memory()))?;
        let house = House::new(programs)?;
        let (mut image, mut tap) = (None, None);
        let (rig, load): (Rig, Box<dyn Load>) = match plan.class {
            Class::Blk => {
                let path = image.insert(folder.path().join("image"));
                make_image(plan.image, path)?;
                let config = DiskConfig {
                    num_queues: Some(2),
                    queue_size: Some(DiskLoad::QUEUE_SIZE),
                    direct: plan.direct,
                    isolation: plan.isolation,
                    ..disk(plan.image, path)
                };
                let mut rig = house.device(&DeviceConfig::Disk(config), DiskLoad::MEMORY)?;
                let load = DiskLoad::start(&mut rig, plan.seed, 2)?;
                (rig, Box::new(load))
            }
            Class::Nvme => {
                let path = image.insert(folder.path().join("image"));
                make_image(Image::Raw, path)?;
                let config = NvmeConfig { path: path.clone(), num_queues: Some(2), ..NvmeConfig::default() };
                let mut rig = house.device(&DeviceConfig::Nvme(config), DiskLoad::MEMORY)?;
                let load = DiskLoad::start(&mut rig, plan.seed, 2)?;
                (rig, Box::new(load))
            }
            Class::Rng => {
                let config = RngConfig {
                    src: "/dev/urandom".into(),
                    id: None,
                    stall_timeout: None,
                    start_attempts: None,
                    on_failure: OnFailure::default(),
                    iommu: false,
                    isolation: plan.isolation,
                };
                let mut rig = house.device(&DeviceConfig::Rng(config), one_queue::MEMORY)?;
                let load = OneQueue::start(&mut rig, Filling::default())?;
                (rig, Box::new(load))
            }
            Class::Console => {
                let output = folder.path().join("output");
                let config =
                    ConsoleConfig { mode: ConsoleMode::File, file: Some(output.clone()), ..ConsoleConfig::default() };
                let mut rig = house.device(&DeviceConfig::Console(config), one_queue::MEMORY)?;
                let load = OneQueue::start(&mut rig, Printing::into(output))?;
                (rig, Box::new(load))
            }
            Class::Net => {
                let tap = tap.insert(Tap::new()?);
                let descriptors = Descriptors(vec![tap.descriptor()]);
                let isolation = plan.isolation;
                let config = NetConfig { fds: Some(vec![0]), descriptors, isolation, ..NetConfig::default() };
                let mut rig = house.device(&DeviceConfig::Net(config), NetLoad::MEMORY)?;
                let load = NetLoad::start(&mut rig, plan.seed, tap)?;
                (rig, Box::new(load))
            }
        };
        Ok(Self { rig, load, house, image, _folder: folder, _tap: tap })
    }

    /// Awaits everything that is in flight, and ends the device.
    pub(super) fn finish(self) -> Result<Findings> {
        let Self { rig, load, house, image: _, _folder, _tap } = self;
        let findings = load.finish()?;
        drop(rig);
        drop(house);
        Ok(findings)
    }

    /// The backend's process, as soon as it serves.
    pub(super) fn running(&mut self) -> Result<OwnedFd> {
        let deadline = Instant::now() + SERVES_MAX;
        while Instant::now() < deadline {
            if let Some(pid) = self.rig.status().pid.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?))
                && let Ok(process) = pidfd_open(pid, PidfdFlags::empty())
                && !ended(&process, Duration::ZERO)
            {
                return Ok(process);
            }
            self.load.turn()?;
        }
        bail!("no backend within {SERVES_MAX:?}: {:?}", self.rig.status())
    }
}

/// A disk's configuration.
pub(super) fn disk(image: Image, path: &Path) -> DiskConfig {
    let image_type = match image {
        Image::Raw => ImageType::Raw,
        Image::Qcow2 => ImageType::Qcow2,
    };
    DiskConfig { path: Some(path.to_owned()), image_type: Some(image_type), ..DiskConfig::default() }
}

pub(super) fn make_image(image: Image, path: &Path) -> Result<()> {
    match image {
        Image::Raw => Ok(std::fs::File::create(path)?.set_len(DiskLoad::IMAGE)?),
        Image::Qcow2 => {
            // Small clusters: more of the kills fall between two tables.
            let options = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k"];
            let made = Command::new("qemu-img").args(options).arg(path).arg(DiskLoad::IMAGE.to_string()).status();
            let made = made.context("qemu-img does not start: install the package qemu-utils")?;
            ensure!(made.success(), "qemu-img cannot make {}: {made}", path.display());
            Ok(())
        }
    }
}
