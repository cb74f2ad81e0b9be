//! Which clusters' tables have changed and are not in the file yet.
//!
//! Whoever changes a mapping waits until that is in the file. But others see the new mapping at once: a write that comes
//! after it into the same cluster finds room there and changes no table itself, and yet a process that dies now takes it
//! away together with the mapping. So whatever is done in such a cluster waits for the change that made it so; a read too,
//! since what it has seen would be gone again.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::image::Change;

/// The clusters, by their first byte on the disk, and the last change of each.
#[derive(Debug)]
pub(super) struct Unsettled {
    cluster: u64,
    /// How many there are, so that nobody takes the lock where there are none.
    count: AtomicUsize,
    clusters: Mutex<BTreeMap<u64, Change>>,
}

impl Unsettled {
    pub(super) fn new(cluster: u64) -> Self {
        Self { cluster, count: AtomicUsize::new(0), clusters: Mutex::default() }
    }

    fn with<T>(&self, act: impl FnOnce(&mut BTreeMap<u64, Change>) -> T) -> T {
        let mut clusters: MutexGuard<'_, _> = self.clusters.lock().unwrap_or_else(PoisonError::into_inner);
        let result = act(&mut clusters);
        self.count.store(clusters.len(), Ordering::Release);
        result
    }

    /// The mapping of a stretch is about to be changed. To be said before anybody can see it.
    pub(super) fn note(&self, stretch: Range<u64>, change: Change) {
        let first = stretch.start - stretch.start % self.cluster;
        self.with(|clusters| {
            for cluster in (first..stretch.end).step_by(self.cluster as usize) {
                clusters.insert(cluster, change);
            }
        });
    }

    /// The last change of a stretch whose mapping was looked up just now, if it may not be in the file.
    pub(super) fn last(&self, stretch: Range<u64>) -> Change {
        if self.count.load(Ordering::Acquire) == 0 {
            return Change::default();
        }
        let first = stretch.start - stretch.start % self.cluster;
        self.with(|clusters| clusters.range(first..stretch.end).map(|(_, change)| *change).max().unwrap_or_default())
    }

    /// All changes up to this one are in the file.
    pub(super) fn settled(&self, change: Change) {
        self.with(|clusters| clusters.retain(|_, last| *last > change));
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::process::Command;
    use std::sync::Arc;

    use imago::StorageExt;

    use crate::qcow2::file::Align;
    use crate::qcow2::image::{Chain, Format, Image, Layer, Place};

    fn open(path: &std::path::Path) -> Image {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let top = Layer { file: Arc::new(file), name: "disk".into(), format: Format::Qcow2 };
        Image::open(&Chain { top, data: None, backing: Vec::new(), read_only: false, align: Align::NONE }).unwrap()
    }

    /// Two writes to one new cluster came in one batch. The first found room for it and waited for the tables; the second
    /// found the room there, waited for nothing and was acknowledged. The process died between the two, and the second
    /// write was gone. A campaign found it after four thousand kills.
    #[test]
    fn a_write_to_a_cluster_that_is_not_in_the_tables_waits_for_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("4M").status();
        assert!(made.expect("qemu-img (package qemu-utils)").success());
        for waits in [false, true] {
            let image = open(&path);
            let (_, first) = image.allocate(0, 4096, |file, at, len| file.write(&vec![1; len as usize], at)).unwrap();
            let (place, _) = image.place(8192, 512, true).unwrap();
            let Place::File { file, offset, writable: true } = place else { panic!("{place:?}") };
            file.write_all_at(&[2; 512], offset).unwrap();
            let last = image.last_change(8192, 512);
            assert_eq!(last, first);
            assert!(!image.is_settled(last) && image.last_change(1 << 20, 512) == Default::default());
            if waits {
                image.settle(last).unwrap();
                assert_eq!(image.last_change(8192, 512), Default::default());
            }
            // Death: whatever is not in the file is gone.
            std::mem::forget(image);
            let mut found = [0; 512];
            open(&path).read(&mut found, 8192).unwrap();
            assert_eq!(found, if waits { [2; 512] } else { [0; 512] });
        }
    }
}
