//! The live tree, as nested JSON: `vcpus/vcpu0`, `devices/_disk0/queues`, `machine/requests`, …

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use super::error::{ErrorKind, VmError};
use super::report::{DeviceReport, VmState};
use super::story::Story;
use crate::actor::ActorReport;
use crate::machine::{Machine, PauseFigures};
use crate::metrics::{CountedBy, DeviceSnapshot, QueueSnapshot};
use crate::seccomp;

/// What the tree is made of.
pub(super) struct Tree<'a> {
    pub(super) state: VmState,
    pub(super) memory: u64,
    pub(super) machine: Option<&'a Machine>,
    pub(super) devices: BTreeMap<String, DeviceReport>,
    /// Devices that are being prepared.
    pub(super) coming: Vec<String>,
    pub(super) actors: Vec<ActorReport>,
    pub(super) last_pause: Option<&'a PauseFigures>,
    pub(super) story: &'a Story,
}

/// What the last pause took, step by step.
fn pause(figures: &PauseFigures) -> Value {
    let micros = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
    let slowest = figures.devices.iter().max_by_key(|(_, took)| *took);
    let devices: BTreeMap<_, _> = figures.devices.iter().map(|(name, took)| (name, micros(*took))).collect();
    json!({
        "whole_us": micros(figures.whole),
        "vcpus_us": micros(figures.vcpus),
        "slowest_drain_us": slowest.map_or(0, |(_, took)| micros(*took)),
        "slowest_request_us": figures.slowest_request.map(micros),
        "devices_us": devices,
        "interrupts_us": micros(figures.interrupts),
    })
}

/// What the devices have done, queue by queue and in all.
fn figures(machine: &Machine) -> Value {
    let of = |device: &DeviceSnapshot| {
        let mut about = match device.counted {
            CountedBy::Nobody => json!({ "counted": device.counted }),
            CountedBy::Rings => json!({ "counted": device.counted, "completed": device.completed }),
            CountedBy::Process => {
                let queues: Vec<QueueSnapshot> = device.queues.iter().map(QueueSnapshot::from).collect();
                json!({ "counted": device.counted, "all": QueueSnapshot::from(&device.total()), "queues": queues })
            }
        };
        if let (false, Value::Object(fields)) = (device.translation.is_empty(), &mut about) {
            let events: BTreeMap<_, _> = device.translation.iter().copied().collect();
            fields.insert("iommu".into(), json!(events));
        }
        (device.id.clone(), about)
    };
    machine.figures().snapshot().devices.iter().map(of).collect::<serde_json::Map<String, Value>>().into()
}

impl Tree<'_> {
    fn whole(&self) -> Value {
        let vcpus: serde_json::Map<String, Value> = self
            .machine
            .map(Machine::vcpu_reports)
            .unwrap_or_default()
            .into_iter()
            .map(|vcpu| {
                let about =
                    json!({ "phase": vcpu.phase, "instructions": vcpu.instructions, "code_bytes": vcpu.code_bytes });
                (format!("vcpu{}", vcpu.index), about)
            })
            .collect();
        json!({
            "state": self.state,
            "cpu": self.machine.map(|machine| machine.board().processor().name()),
            "vcpus": vcpus,
            "memory": { "size": self.memory },
            "devices": self.devices,
            "coming": self.coming,
            "figures": self.machine.map(figures),
            "seccomp": { "mode": seccomp::mode().name(), "threads": seccomp::filtered() },
            "last_pause": self.last_pause.map(pause),
            "actors": self.actors(),
            "story": { "elapsed_ms": u64::try_from(self.story.elapsed().as_millis()).unwrap_or(u64::MAX) },
        })
    }

    /// Everybody who has a mailbox.
    fn actors(&self) -> Value {
        let mut actors = serde_json::Map::new();
        for actor in &self.actors {
            let about = json!({
                "waiting": actor.waiting,
                "capacity": actor.capacity,
                "full": actor.full,
                "generation": actor.generation,
                "state": actor.state,
            });
            // A slash leads a step further down in a path. Two of a name are one that ends and its successor.
            let name = actor.name.replace('/', ".");
            let free = (1..).map(|number| if number == 1 { name.clone() } else { format!("{name}.{number}") });
            let key = free.into_iter().find(|key| !actors.contains_key(key)).unwrap_or(name);
            actors.insert(key, about);
        }
        actors.into()
    }

    /// The part at `path`, its steps separated by slashes; an empty path means all of it.
    pub(super) fn part(&self, path: &str) -> Result<Value, VmError> {
        let mut part = self.whole();
        let mut above = String::new();
        for step in path.split('/').filter(|step| !step.is_empty()) {
            let next = match &mut part {
                Value::Object(fields) => fields.remove(step),
                Value::Array(items) => {
                    step.parse::<usize>().ok().filter(|at| *at < items.len()).map(|at| items.swap_remove(at))
                }
                _ => None,
            };
            part = next.ok_or_else(|| {
                VmError::new(
                    ErrorKind::NotFound,
                    match above.as_str() {
                        "" => format!("there is no '{step}'; `atoll inspect` without a path shows what there is"),
                        above => format!("there is no '{step}' in '{above}'; inspect '{above}' to see what there is"),
                    },
                )
            })?;
            above = if above.is_empty() { step.to_owned() } else { format!("{above}/{step}") };
        }
        Ok(part)
    }
}
