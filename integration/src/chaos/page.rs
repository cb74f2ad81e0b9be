//! The campaign's side of the page beside a test build's programs ([`atoll_kit::step`]).

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use atoll_kit::bad_build::Bad;
use atoll_kit::step::{DURABLE_NAME, PAGE_BYTES, PAGE_NAME, Sabotage, Step, word};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

/// A folder of programs with a page beside them.
pub struct Page {
    folder: tempfile::TempDir,
    words: MmapRegion<()>,
}

impl Page {
    /// Copies the programs in `programs`, and lays out a page and, with `durable` bytes, a durable image.
    pub fn new(programs: &Path, durable: Option<u64>) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        for name in ["atoll-blk", "atoll-nvme", "atoll-net", "atoll-rng", "atoll-console"] {
            let (from, to) = (programs.join(name), folder.path().join(name));
            std::fs::copy(&from, &to).with_context(|| format!("no test build at {}", from.display()))?;
            std::fs::set_permissions(&to, std::fs::Permissions::from_mode(0o755))?;
        }
        let file = |name: &str, bytes: u64| -> Result<File> {
            let path = folder.path().join(name);
            let file = File::options().read(true).write(true).create(true).truncate(true).open(&path)?;
            file.set_len(bytes)?;
            Ok(file)
        };
        let words = MmapRegion::from_file(FileOffset::new(file(PAGE_NAME, PAGE_BYTES as u64)?, 0), PAGE_BYTES)?;
        if let Some(bytes) = durable {
            file(DURABLE_NAME, bytes)?;
        }
        Ok(Self { folder, words })
    }

    /// Where the programs are.
    pub fn programs(&self) -> &Path {
        self.folder.path()
    }

    /// The durable image.
    pub fn durable(&self) -> PathBuf {
        self.folder.path().join(DURABLE_NAME)
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        self.words.get_atomic_ref(8 * index).expect("a word of the page")
    }

    /// Reads a word.
    pub fn get(&self, index: usize) -> u64 {
        self.word(index).load(Ordering::Acquire)
    }

    /// The process that reaches `step` for the `depth`th time from now on dies there.
    pub fn arm(&self, step: Step, depth: u64) {
        self.word(word::DIED_AT).store(0, Ordering::Release);
        self.word(word::COUNTDOWN).store(depth.max(1), Ordering::Release);
        self.word(word::ARMED).store(step as u64 + 1, Ordering::Release);
    }

    /// Nobody dies any more.
    pub fn disarm(&self) {
        self.word(word::ARMED).store(0, Ordering::Release);
    }

    /// The step at which a process died since the page was armed.
    pub fn died_at(&self) -> Option<Step> {
        let number = usize::try_from(self.get(word::DIED_AT)).ok()?;
        Step::ALL.get(number.checked_sub(1)?).copied()
    }

    /// Commits `sabotage` at every `period`th opportunity.
    pub fn sabotage(&self, sabotage: Sabotage, period: u64) {
        self.word(word::PERIOD).store(period, Ordering::Release);
        self.word(word::SABOTAGE).store(sabotage as u64 + 1, Ordering::Release);
    }

    /// The next `count` operations on the image end with `errno`.
    pub fn fail(&self, count: u64, errno: i32) {
        self.word(word::ERROR).store(u64::from(errno.unsigned_abs()), Ordering::Release);
        self.word(word::ERRORS_LEFT).store(count, Ordering::Release);
    }

    /// Operations that are still to fail.
    pub fn failures_left(&self) -> u64 {
        self.get(word::ERRORS_LEFT)
    }

    /// The programs of this folder are such a build from now on.
    pub fn spoil(&self, bad: Option<Bad>) {
        self.word(word::BUILD).store(bad.map_or(0, |bad| bad as u64 + 1), Ordering::Release);
    }

    /// How often each step was passed.
    pub fn passed(&self, step: Step) -> u64 {
        self.get(word::PASSED + step as usize)
    }

    /// How long the last incarnation waited for the fence of its predecessor.
    pub fn fence(&self) -> Duration {
        Duration::from_nanos(self.get(word::FENCE_NS))
    }

    /// Incarnations that have passed their fence.
    pub fn fences(&self) -> u64 {
        self.get(word::FENCES)
    }
}
