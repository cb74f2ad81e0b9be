//! The live tree, as nested JSON: `vcpus/vcpu0`, `devices/_disk0/queues`, `machine/requests`, …

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::error::{ErrorKind, VmError};
use super::report::{DeviceReport, VmState};
use super::story::Story;
use crate::machine::Machine;

/// What the tree is made of.
pub(super) struct Tree<'a> {
    pub(super) state: VmState,
    pub(super) memory: u64,
    pub(super) machine: Option<&'a Machine>,
    pub(super) devices: BTreeMap<String, DeviceReport>,
    pub(super) waiting: usize,
    pub(super) story: &'a Story,
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
            "actors": { "machine": { "mailbox": self.waiting } },
            "story": { "elapsed_ms": u64::try_from(self.story.elapsed().as_millis()).unwrap_or(u64::MAX) },
        })
    }

    /// The part at `path`, its steps separated by slashes; an empty path means all of it.
    pub(super) fn part(&self, path: &str) -> Result<Value, VmError> {
        let mut part = self.whole();
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
                    format!("there is no '{step}' in '{path}'; inspect its parent to see what there is"),
                )
            })?;
        }
        Ok(part)
    }
}
