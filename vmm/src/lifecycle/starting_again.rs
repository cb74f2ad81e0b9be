//! A machine that starts again: because an operator wants it, which may be refused, or because its guest has reset the board,
//! which may not.
//!
//! What the guest was shown is frozen: it starts from the very files that it was booted from, held open since then
//! (`machine::boot`), and every device is built from what it was described with.

use super::error::VmError;
use super::keeper::{Keeper, Live, State, failed};
use super::roster;
use crate::machine::{DeviceBuilder, EventSender, MachineEnd, Rebuilt};

impl Keeper {
    pub(super) fn reset(&mut self) -> Result<(), VmError> {
        let Some(live) = self.state.live() else { return Err(self.state.not_running()) };
        // What can be seen beforehand is a refusal, and the guest runs on.
        live.machine.can_reset().map_err(failed)?;
        let (life, events) = self.next_life();
        let builders = self.builders_again(&events)?;
        let again = self.start_again(builders, life, &events);
        if let Err(error) = &again {
            self.finish(MachineEnd::Failed(error.text.clone()));
        }
        again
    }

    /// The guest has reset its board: there is no going on as before.
    pub(super) fn guest_resets(&mut self) -> Result<(), VmError> {
        if let Some(Err(error)) = self.state.live().map(|live| live.machine.can_reset()) {
            tracing::warn!(target: "atoll::machine", %error, "the guest starts from what is there now");
        }
        let (life, events) = self.next_life();
        let builders = self.builders_again(&events)?;
        self.start_again(builders, life, &events)
    }

    fn builders_again(&self, events: &EventSender) -> Result<Vec<Box<dyn DeviceBuilder>>, VmError> {
        match &self.state {
            State::Running(config, live) | State::Paused(config, live) => live.plan.builders(config, events),
            other => Err(other.not_running()),
        }
    }

    /// The machine starts again from its memory and its device processes. When it cannot, it is gone.
    fn start_again(
        &mut self,
        builders: Vec<Box<dyn DeviceBuilder>>,
        life: u64,
        events: &EventSender,
    ) -> Result<(), VmError> {
        let (mut config, live) = match self.take() {
            State::Running(config, live) | State::Paused(config, live) => (config, live),
            state => {
                self.state = state;
                return Err(self.state.not_running());
            }
        };
        self.story.tell("vm", "rebooting", []);
        let Live { plan, machine, .. } = *live;
        let Rebuilt { figures, gone, next } = machine.reset(builders, events);
        self.figures.add(&figures);
        for id in gone {
            roster::remove(&mut config, &id);
            self.story.tell("vm", "device-removed", [("id", id), ("asked", true.to_string())]);
        }
        let rebuilt = next.map_err(failed).and_then(|mut next| {
            next.count_in(self.household.metrics());
            next.start().map_err(failed)?;
            Ok(next)
        });
        match rebuilt {
            Ok(machine) => {
                self.enter(State::Running(config, Box::new(Live { plan, machine, life })));
                self.story.tell("vm", "rebooted", []);
                Ok(())
            }
            Err(error) => {
                self.enter(State::Shutdown(config));
                Err(error)
            }
        }
    }
}
