//! From a configuration to a machine that runs, and from a description to a device that is plugged in: what is described is
//! prepared elsewhere (`preparing`), and what comes of that is put on the board here.

use super::error::VmError;
use super::keeper::{Keeper, Live, State, failed, wrong};
use super::mailbox::Answer;
use super::plan::Plan;
use super::preparing::{BootPlan, Booting, Plugging, Prepared, Purpose};
use crate::machine::{DeviceBuilder, Ground, Machine};

impl Keeper {
    /// Begins to boot: devices are prepared on a thread of their own, and the answer comes when the machine runs.
    pub(super) fn begin_boot(&mut self, answer: Answer<()>) {
        match self.describe_boot() {
            Ok((description, builders)) => {
                let ground = description.ground.clone();
                self.begin_preparation(Purpose::Boot(Box::new(Booting { description, answer })), builders, ground);
            }
            Err(error) => answer.give(Err(error)),
        }
    }

    fn describe_boot(&mut self) -> Result<(BootPlan, Vec<Box<dyn DeviceBuilder>>), VmError> {
        let config = match &self.state {
            State::Created(config) | State::Shutdown(config) => config,
            State::Running(..) => return Err(wrong("the machine runs already; start it again with vm.reboot")),
            State::Empty | State::Paused(..) => return Err(self.state.not_running()),
        };
        self.story.tell("vm", "booting", []);
        let plan = Plan::open(config, &self.home, &self.household, &self.story)?;
        let config = config.clone();
        let (life, events) = self.next_life();
        let builders = plan.builders(&config, &events)?;
        let ground = Ground::new(plan.machine()).map_err(failed)?;
        Ok((BootPlan { plan, ground, life, events }, builders))
    }

    /// All devices of a machine that boots are ready.
    fn boot(&mut self, description: BootPlan, builders: Vec<Box<dyn DeviceBuilder>>) -> Result<(), VmError> {
        let (State::Created(config) | State::Shutdown(config)) = &self.state else {
            return Err(self.state.not_running());
        };
        let mut config = config.clone();
        let BootPlan { plan, ground, life, events } = description;
        let mut machine = Machine::build_on(ground, plan.machine(), builders, &events).map_err(failed)?;
        plan.begin_lines();
        plan.tell_choice();
        plan.tell_lines(&mut config);
        machine.count_in(self.household.metrics());
        machine.start().map_err(failed)?;
        self.enter(State::Running(config, Box::new(Live { plan, machine, life })));
        self.story.tell("vm", "booted", []);
        Ok(())
    }

    pub(super) fn begin_preparation(
        &mut self,
        purpose: Purpose,
        builders: Vec<Box<dyn DeviceBuilder>>,
        ground: Ground,
    ) {
        match self.preparations.begin(purpose, builders, ground, &self.mailbox) {
            Ok(()) => {}
            Err((Purpose::Boot(booting), error)) => booting.answer.give(Err(error)),
            Err((Purpose::Plug(plugging), error)) => plugging.answer.give(Err(error)),
        }
    }

    /// Goes on with what was prepared.
    pub(super) fn go_on(&mut self, prepared: Prepared) {
        match self.preparations.finish(prepared) {
            None => {}
            Some((Purpose::Boot(booting), outcome)) => {
                let Booting { description, answer } = *booting;
                answer.give(outcome.and_then(|builders| self.boot(description, builders)));
            }
            Some((Purpose::Plug(plugging), outcome)) => {
                let Plugging { device, answer } = *plugging;
                let id = device.id().unwrap_or_default().to_owned();
                let builder = outcome.and_then(|mut builders| builders.pop().ok_or_else(|| failed("not prepared")));
                let plugged = builder.and_then(|builder| self.plug(device, builder));
                answer.give(plugged.map(Some).map_err(|error| error.of_device(&id)));
            }
        }
    }
}
