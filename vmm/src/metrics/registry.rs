//! Where all figures of a machine are found.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use atoll_protocol::sidecar::DeviceClass;
use thiserror::Error;

use super::device::{Account, DeviceMeter, DeviceSnapshot};
use super::page::StatsPage;
use super::prometheus;
use super::rings;
use super::vcpu::{VcpuCounters, VcpuSnapshot};
use crate::config::DeviceKind;

/// Devices that one machine can have figures of; more than any board has places.
const DEVICES_MAX: usize = 1024;
/// vCPUs likewise.
const VCPUS_MAX: usize = 1024;

/// Why a device has no figures.
#[derive(Debug, Error)]
pub enum MetricsError {
    /// No memory or descriptor.
    #[error("no page of figures for {device}: {source}; raise the limit of open files")]
    Page {
        /// The device.
        device: String,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// No thread to look at its rings.
    #[error("nobody can count what {device} does: {source}; raise the limit of threads (ulimit -u)")]
    Thread {
        /// The device.
        device: String,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// Too many.
    #[error("{device}: a machine has figures of {DEVICES_MAX} devices at most")]
    Full {
        /// The device.
        device: String,
    },
}

#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) devices: BTreeMap<String, Weak<DeviceMeter>>,
    /// A thread looks at rings.
    pub(super) rings_watched: bool,
    vcpus: BTreeMap<u32, Arc<VcpuCounters>>,
}

/// The figures of one machine; copies share them. It outlives resets of the machine.
#[derive(Clone, Debug, Default)]
pub struct Registry(Arc<Mutex<Known>>);

/// All figures at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// By name.
    pub devices: Vec<DeviceSnapshot>,
    /// By number.
    pub vcpus: Vec<VcpuSnapshot>,
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to count for a device, with a page for `queues` queues where its process is ours. A device of the same name
    /// that was there before is forgotten.
    ///
    /// # Errors
    /// All of [`MetricsError`].
    pub fn device(
        &self,
        id: &str,
        kind: DeviceKind,
        class: DeviceClass,
        queues: Option<u16>,
    ) -> Result<Arc<DeviceMeter>, MetricsError> {
        let page = queues.map(StatsPage::new).transpose();
        let page = page.map_err(|source| MetricsError::Page { device: id.to_owned(), source })?;
        let meter = Arc::new(DeviceMeter::new(id, kind, class, page));
        let mut known = self.know(&meter)?;
        if meter.rings().is_some() && !known.rings_watched {
            rings::watch(&self.0).map_err(|source| MetricsError::Thread { device: id.to_owned(), source })?;
            known.rings_watched = true;
        }
        Ok(meter)
    }

    /// Begins to show what the process of a device counts for its successors.
    ///
    /// # Errors
    /// [`MetricsError::Full`].
    pub fn accounted(
        &self,
        id: &str,
        kind: DeviceKind,
        account: Arc<dyn Account>,
    ) -> Result<Arc<DeviceMeter>, MetricsError> {
        let meter = Arc::new(DeviceMeter::accounted(id, kind, account));
        drop(self.know(&meter)?);
        Ok(meter)
    }

    /// Begins to count for a device that the guest drives by itself: what becomes of its addresses, and no requests.
    ///
    /// # Errors
    /// [`MetricsError::Full`].
    pub fn uncounted(&self, id: &str, kind: DeviceKind) -> Result<Arc<DeviceMeter>, MetricsError> {
        let meter = Arc::new(DeviceMeter::uncounted(id, kind));
        drop(self.know(&meter)?);
        Ok(meter)
    }

    fn know(&self, meter: &Arc<DeviceMeter>) -> Result<MutexGuard<'_, Known>, MetricsError> {
        let (mut known, id) = (self.lock(), meter.id());
        known.devices.retain(|_, device| device.strong_count() > 0);
        if known.devices.len() >= DEVICES_MAX && !known.devices.contains_key(id) {
            return Err(MetricsError::Full { device: id.to_owned() });
        }
        known.devices.insert(id.to_owned(), Arc::downgrade(meter));
        Ok(known)
    }

    /// The counters of a vCPU; they go on over resets of the machine.
    pub fn vcpu(&self, index: u32) -> Arc<VcpuCounters> {
        let mut known = self.lock();
        if known.vcpus.len() >= VCPUS_MAX && !known.vcpus.contains_key(&index) {
            return Arc::default();
        }
        Arc::clone(known.vcpus.entry(index).or_default())
    }

    /// All figures now.
    pub fn snapshot(&self) -> Snapshot {
        let known = self.lock();
        let devices: Vec<Arc<DeviceMeter>> = known.devices.values().filter_map(Weak::upgrade).collect();
        let vcpus: Vec<(u32, Arc<VcpuCounters>)> = known.vcpus.iter().map(|(n, vcpu)| (*n, Arc::clone(vcpu))).collect();
        drop(known);
        Snapshot {
            devices: devices.iter().map(|device| device.snapshot()).collect(),
            vcpus: vcpus.iter().map(|(index, vcpu)| vcpu.snapshot(*index)).collect(),
        }
    }

    /// Counters by device and name, for `vm.counters`. Devices without any are left out.
    pub fn counters(&self) -> BTreeMap<String, BTreeMap<String, u64>> {
        self.snapshot().devices.into_iter().map(|device| (device.id.clone(), device.counters())).collect()
    }

    /// Everything in Prometheus' text format, version 0.0.4.
    pub fn prometheus(&self) -> String {
        prometheus::render(&self.snapshot())
    }
}

#[cfg(test)]
mod tests {
    use crate::metrics::TranslationEvent;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use atoll_protocol::stats::{self, QueueStats, bucket};

    use super::super::Phase;
    use super::super::vcpu::AnswerKind;
    use super::*;
    use crate::cpu::Space;
    use crate::vhost::Spare;

    fn write(meter: &DeviceMeter, queue: u16, name: &str, value: u64) {
        let (_, offset) = QueueStats::COUNTERS.iter().find(|(known, _)| *known == name).unwrap();
        let file = File::from(meter.pass().unwrap().unwrap());
        file.write_all_at(&value.to_le_bytes(), (stats::queue_at(queue) + offset) as u64).unwrap();
    }

    /// An unplugged device leaves no figures behind, and its name can be taken by another.
    #[test]
    fn a_device_that_is_gone_is_not_told_of() {
        let registry = Registry::default();
        let disk = registry.device("_disk0", DeviceKind::Disk, DeviceClass::Block, Some(2)).unwrap();
        let foreign = registry.device("_fs1", DeviceKind::Fs, DeviceClass::Other(26), None).unwrap();
        foreign.tell(Phase::Recovering, 3, 2);
        (0..2).for_each(|queue| write(&disk, queue, "read_bytes", 4096));
        write(&disk, 1, "writes", 7);
        let counters = registry.counters();
        assert_eq!((counters["_disk0"]["read_bytes"], counters["_disk0"]["write_ops"]), (8192, 7));
        let known = [("generation".into(), 3), ("restarts".into(), 2), ("requests".into(), 0)];
        assert_eq!(counters["_fs1"], BTreeMap::from(known), "what nobody counts is left out");
        drop(disk);
        assert!(!registry.counters().contains_key("_disk0"));
        let net = registry.device("_disk0", DeviceKind::Net, DeviceClass::Net, Some(3)).unwrap();
        assert_eq!(registry.counters()["_disk0"]["rx_bytes"], 0);
        drop(net);
    }

    /// The text, line by line where it matters: names, labels, cumulative buckets in seconds, one HELP and TYPE each.
    #[test]
    fn prometheus_can_read_it() {
        let registry = Registry::default();
        let disk = registry.device("disk \"a\"\\", DeviceKind::Disk, DeviceClass::Block, Some(1)).unwrap();
        disk.tell(Phase::Running, 2, 1);
        disk.tell_recovery(true);
        disk.tell_end(7, Some("exit status 3; its last words: \"no\""), Spare::Coming);
        disk.translation().add(TranslationEvent::Fault, 2);
        write(&disk, 0, "requests", 3);
        write(&disk, 0, "read_bytes", 4096);
        write(&disk, 0, "latency_sum_ns", 1_500_000);
        let file = File::from(disk.pass().unwrap().unwrap());
        let at = stats::queue_at(0) + stats::LATENCY_AT + 8 * bucket(500_000);
        file.write_all_at(&3_u64.to_le_bytes(), at as u64).unwrap();
        registry.vcpu(0).exit(Space::Mmio, true, AnswerKind::Elsewhere);
        let text = registry.prometheus();
        let wanted = [
            r#"atoll_device_requests_total{device="disk \"a\"\\",queue="0"} 3"#,
            r#"atoll_device_bytes_total{device="disk \"a\"\\",queue="0",direction="read"} 4096"#,
            r#"atoll_device_restarts_total{device="disk \"a\"\\"} 1"#,
            r#"atoll_backend_failed_starts_total{device="disk \"a\"\\"} 7"#,
            r#"atoll_backend_last_exit{device="disk \"a\"\\",reason="exit status 3; its last words: \"no\""} 1"#,
            r#"atoll_backend_spare{device="disk \"a\"\\",state="coming"} 1"#,
            r#"atoll_backend_spare{device="disk \"a\"\\",state="off"} 0"#,
            r#"atoll_iommu_events_total{device="disk \"a\"\\",event="fault"} 2"#,
            r#"atoll_iommu_events_total{device="disk \"a\"\\",event="map"} 0"#,
            r#"atoll_device_generation{device="disk \"a\"\\"} 2"#,
            r#"atoll_device_full_recovery{device="disk \"a\"\\"} 1"#,
            r#"atoll_device_state{device="disk \"a\"\\",state="running"} 1"#,
            r#"atoll_device_state{device="disk \"a\"\\",state="idle"} 0"#,
            r#"atoll_device_latency_seconds_bucket{device="disk \"a\"\\",queue="0",le="0.000262144"} 0"#,
            r#"atoll_device_latency_seconds_bucket{device="disk \"a\"\\",queue="0",le="0.000524288"} 3"#,
            r#"atoll_device_latency_seconds_bucket{device="disk \"a\"\\",queue="0",le="+Inf"} 3"#,
            r#"atoll_device_latency_seconds_sum{device="disk \"a\"\\",queue="0"} 0.0015"#,
            r#"atoll_device_latency_seconds_count{device="disk \"a\"\\",queue="0"} 3"#,
            r#"atoll_vcpu_exits_total{vcpu="0",access="mmio_write",answer="elsewhere"} 1"#,
        ];
        for line in wanted {
            assert!(text.lines().any(|found| found == line), "{line} is missing in\n{text}");
        }
        let mut families = std::collections::BTreeSet::new();
        for line in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
            assert!(families.insert(line.split(' ').next().unwrap().to_owned()), "twice: {line}");
        }
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let name = line.split(['{', ' ']).next().unwrap();
            let family = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
            assert!(families.contains(name) || families.contains(family), "{line} has no TYPE");
            assert!(line.rsplit_once(' ').unwrap().1.parse::<f64>().is_ok(), "{line}");
        }
        assert!(text.ends_with('\n'));
    }
}
