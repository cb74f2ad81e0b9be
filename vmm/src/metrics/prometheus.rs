//! Figures in Prometheus' text format, version 0.0.4: families with HELP and TYPE, labels escaped, times in seconds.

use std::fmt::Write;

use super::device::{DeviceSnapshot, Phase};
use super::page::QueueFigures;
use super::registry::Snapshot;
use super::rings::CountedBy;
use crate::vhost::Spare;

/// A label's value: backslash, quote and line feed are escaped.
struct Value<'a>(&'a str);

impl std::fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.chars().try_for_each(|letter| match letter {
            '\\' => f.write_str("\\\\"),
            '"' => f.write_str("\\\""),
            '\n' => f.write_str("\\n"),
            letter => f.write_char(letter),
        })
    }
}

/// Collects the text. Writing to a string cannot fail, so results are dropped.
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn sample(&mut self, name: &str, labels: std::fmt::Arguments<'_>, value: impl std::fmt::Display) {
        let _ = writeln!(self.0, "{name}{{{labels}}} {value}");
    }
}

/// A counter of each queue: its name, its help, where it is.
type QueueCounter = (&'static str, &'static str, fn(&QueueFigures) -> u64);

const REQUESTS: &str = "atoll_device_requests_total";

const QUEUE_COUNTERS: [QueueCounter; 7] = [
    (REQUESTS, "Requests completed.", |queue| queue.requests),
    ("atoll_device_errors_total", "Requests completed with an error.", |queue| queue.errors),
    ("atoll_device_malformed_total", "Descriptor chains that made no sense.", |queue| queue.malformed),
    ("atoll_device_wakeups_total", "Sleeps of the queue that ended.", |queue| queue.wakeups),
    ("atoll_device_spins_total", "Spins that saved the queue a sleep.", |queue| queue.spins),
    ("atoll_device_interrupts_total", "Interrupts sent to the guest.", |queue| queue.calls),
    ("atoll_device_throttled_total", "Requests that waited because of a rate limit.", |queue| queue.throttled),
];

fn queues(devices: &[DeviceSnapshot]) -> impl Iterator<Item = (Value<'_>, usize, &QueueFigures)> {
    devices
        .iter()
        .flat_map(|device| device.queues.iter().enumerate().map(|(index, queue)| (Value(&device.id), index, queue)))
}

/// Completed requests of devices of which no more is known.
fn in_rings(devices: &[DeviceSnapshot]) -> impl Iterator<Item = (Value<'_>, u16, u64)> {
    let of = |device| move |(queue, completed): (&u16, &u64)| (Value(device), *queue, *completed);
    devices.iter().flat_map(move |device| device.completed.iter().map(of(&device.id)))
}

/// All of it.
pub(super) fn render(snapshot: &Snapshot) -> String {
    let mut text = Text(String::with_capacity(16 << 10));
    devices(&mut text, &snapshot.devices);
    vcpus(&mut text, snapshot);
    text.0
}

fn devices(text: &mut Text, devices: &[DeviceSnapshot]) {
    for (name, help, of) in QUEUE_COUNTERS {
        text.family(name, "counter", help);
        if name == REQUESTS {
            for (device, queue, completed) in in_rings(devices) {
                text.sample(name, format_args!("device=\"{device}\",queue=\"{queue}\""), completed);
            }
        }
        for (device, index, queue) in queues(devices) {
            text.sample(name, format_args!("device=\"{device}\",queue=\"{index}\""), of(queue));
        }
    }
    let directions = ["read", "write"];
    let name = "atoll_device_operations_total";
    text.family(name, "counter", "Requests that moved data, by direction; read is to the guest.");
    for (device, index, queue) in queues(devices) {
        for (direction, value) in directions.iter().zip([queue.reads, queue.writes]) {
            text.sample(name, format_args!("device=\"{device}\",queue=\"{index}\",direction=\"{direction}\""), value);
        }
    }
    let name = "atoll_device_bytes_total";
    text.family(name, "counter", "Bytes moved, by direction; read is to the guest.");
    for (device, index, queue) in queues(devices) {
        for (direction, value) in directions.iter().zip([queue.read_bytes, queue.write_bytes]) {
            text.sample(name, format_args!("device=\"{device}\",queue=\"{index}\",direction=\"{direction}\""), value);
        }
    }
    let name = "atoll_device_throttled_seconds_total";
    text.family(name, "counter", "Time that requests waited because of a rate limit.");
    for (device, index, queue) in queues(devices) {
        text.sample(name, format_args!("device=\"{device}\",queue=\"{index}\""), queue.throttled_ns as f64 / 1e9);
    }
    let name = "atoll_device_class_total";
    text.family(name, "counter", "What only devices of this class count, by name.");
    for device in devices {
        for (index, queue) in device.queues.iter().enumerate() {
            for (event, value) in device.class_counters().iter().zip(queue.class) {
                let id = Value(&device.id);
                text.sample(name, format_args!("device=\"{id}\",queue=\"{index}\",event=\"{event}\""), value);
            }
        }
    }
    let name = "atoll_device_latency_seconds";
    text.family(name, "histogram", "Time of a request from taken to completed.");
    for (device, index, queue) in queues(devices) {
        let labels = format!("device=\"{device}\",queue=\"{index}\"");
        for (end, below) in queue.latency.octaves() {
            text.sample(&format!("{name}_bucket"), format_args!("{labels},le=\"{}\"", end.as_secs_f64()), below);
        }
        let count = queue.latency.count();
        text.sample(&format!("{name}_bucket"), format_args!("{labels},le=\"+Inf\""), count);
        text.sample(&format!("{name}_sum"), format_args!("{labels}"), queue.latency_sum_ns as f64 / 1e9);
        text.sample(&format!("{name}_count"), format_args!("{labels}"), count);
    }
    let name = "atoll_device_restarts_total";
    text.family(name, "counter", "Backends that the device has lost.");
    for device in devices {
        text.sample(name, format_args!("device=\"{}\"", Value(&device.id)), device.lost);
    }
    let name = "atoll_backend_failed_starts_total";
    text.family(name, "counter", "Successors that could not be started, or did not get ready.");
    for device in devices {
        text.sample(name, format_args!("device=\"{}\"", Value(&device.id)), device.failed_starts);
    }
    let name = "atoll_backend_last_exit";
    text.family(name, "gauge", "1, with how the last process of the device ended; left out where none has.");
    for device in devices {
        let Some(reason) = &device.last_exit else { continue };
        text.sample(name, format_args!("device=\"{}\",reason=\"{}\"", Value(&device.id), Value(reason)), 1);
    }
    let name = "atoll_backend_spare";
    text.family(name, "gauge", "1 for what the spare process beside the device's backend is at.");
    for device in devices {
        let at = match device.spare {
            Spare::Off => "off",
            Spare::Coming => "coming",
            Spare::Ready { .. } => "ready",
        };
        for state in ["off", "coming", "ready"] {
            text.sample(
                name,
                format_args!("device=\"{}\",state=\"{state}\"", Value(&device.id)),
                u8::from(state == at),
            );
        }
    }
    let name = "atoll_iommu_events_total";
    text.family(name, "counter", "What has happened to the addresses of a device behind the IOMMU.");
    for device in devices {
        for (event, times) in &device.translation {
            text.sample(name, format_args!("device=\"{}\",event=\"{event}\"", Value(&device.id)), *times);
        }
    }
    let name = "atoll_device_generation";
    text.family(name, "gauge", "Incarnation of the backend that serves the device, from 1.");
    for device in devices {
        text.sample(name, format_args!("device=\"{}\"", Value(&device.id)), device.generation);
    }
    let name = "atoll_device_full_recovery";
    text.family(
        name,
        "gauge",
        "1 when the device survives its backend's death whatever is in flight, 0 when only idle.",
    );
    for device in devices {
        text.sample(name, format_args!("device=\"{}\"", Value(&device.id)), u8::from(device.full_recovery));
    }
    let name = "atoll_device_counted_by_process";
    let help =
        "1 when the device's process counts what it does, 0 when its completed requests are all that is counted.";
    text.family(name, "gauge", help);
    for device in devices {
        let counted = device.counted == CountedBy::Process;
        text.sample(name, format_args!("device=\"{}\"", Value(&device.id)), u8::from(counted));
    }
    let name = "atoll_device_state";
    text.family(name, "gauge", "1 for the state that the device is in.");
    for device in devices {
        for phase in Phase::ALL {
            let labels = (Value(&device.id), phase.name());
            text.sample(
                name,
                format_args!("device=\"{}\",state=\"{}\"", labels.0, labels.1),
                u8::from(device.phase == phase),
            );
        }
    }
}

fn vcpus(text: &mut Text, snapshot: &Snapshot) {
    let name = "atoll_vcpu_exits_total";
    text.family(name, "counter", "Accesses that left the guest, by what they were and who answered.");
    for vcpu in &snapshot.vcpus {
        for (access, answer, value) in &vcpu.exits {
            let index = vcpu.index;
            text.sample(name, format_args!("vcpu=\"{index}\",access=\"{access}\",answer=\"{answer}\""), value);
        }
    }
    let name = "atoll_vcpu_doorbells_total";
    text.family(name, "counter", "Writes that left the guest and rang a doorbell.");
    for vcpu in &snapshot.vcpus {
        text.sample(name, format_args!("vcpu=\"{}\"", vcpu.index), vcpu.doorbells);
    }
    let name = "atoll_vcpu_stalls_total";
    text.family(name, "counter", "Accesses whose answer did not come in time.");
    for vcpu in &snapshot.vcpus {
        text.sample(name, format_args!("vcpu=\"{}\"", vcpu.index), vcpu.stalls);
    }
    let name = "atoll_vcpu_instructions_total";
    text.family(name, "counter", "Instructions retired, where the CPU counts them.");
    for vcpu in snapshot.vcpus.iter().filter(|vcpu| vcpu.instructions > 0) {
        text.sample(name, format_args!("vcpu=\"{}\"", vcpu.index), vcpu.instructions);
    }
}
