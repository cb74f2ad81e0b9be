//! Devices in the making: started and greeted on a thread of their own, so that the machine's thread answers everybody else
//! while a backend takes its time.
//!
//! A preparation belongs to a boot or to a device that is plugged in. Its outcome comes back as a message; only the
//! machine's thread touches board and configuration. A name is taken from the moment when a preparation begins until its
//! thread has ended, and a slot is kept free for it. One that nobody wants any more, because the machine was switched off or
//! the time is up, is withdrawn: whoever asked hears so at once, its waits end, and what it has made is undone on its thread.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::control::Plugged;
use super::error::{ErrorKind, VmError};
use super::mailbox::{Answer, Mailbox, Waits};
use super::plan::Plan;
use crate::config::DeviceConfig;
use crate::machine::{DeviceBuilder, EventSender, Ground, Withdrawal};

/// How long a device that is plugged in has to be reached: less than whoever asked waits.
const PLUG_TIME: Duration = Duration::from_secs(50);
/// The same for all devices of a machine that boots.
const BOOT_TIME: Duration = Duration::from_secs(170);

type Builders = Vec<Box<dyn DeviceBuilder>>;

/// What came of a preparation.
pub(super) struct Prepared {
    number: u64,
    outcome: Result<Builders, VmError>,
}

/// What a machine boots from, besides its devices.
pub(super) struct BootPlan {
    pub(super) plan: Plan,
    pub(super) ground: Ground,
    pub(super) life: u64,
    pub(super) events: EventSender,
}

/// A machine that is to boot.
pub(super) struct Booting {
    pub(super) description: BootPlan,
    pub(super) answer: Answer<()>,
}

/// A device that is to be plugged in.
pub(super) struct Plugging {
    pub(super) device: DeviceConfig,
    pub(super) answer: Answer<Option<Plugged>>,
}

/// What a preparation is for.
pub(super) enum Purpose {
    /// A boot.
    Boot(Box<Booting>),
    /// A device for a machine that runs.
    Plug(Box<Plugging>),
}

struct Preparing {
    /// The device, where it is one.
    device: Option<DeviceConfig>,
    /// `None` once it was withdrawn.
    purpose: Option<Purpose>,
    withdrawal: Withdrawal,
    deadline: Instant,
}

/// All of them.
#[derive(Default)]
pub(super) struct Preparations {
    next: u64,
    list: BTreeMap<u64, Preparing>,
}

/// Says what came of it, whatever becomes of the thread.
struct Report {
    mailbox: Arc<Mailbox>,
    number: u64,
    outcome: Option<Result<Builders, VmError>>,
}

impl Drop for Report {
    fn drop(&mut self) {
        let lost =
            || Err(VmError::new(ErrorKind::Failed, "the thread that prepares devices panicked; please report it"));
        let outcome = self.outcome.take().unwrap_or_else(lost);
        self.mailbox.deliver(Prepared { number: self.number, outcome });
    }
}

fn prepare(mut builders: Builders, ground: &Ground, withdrawal: &Withdrawal) -> Result<Builders, VmError> {
    for builder in &mut builders {
        if withdrawal.is_withdrawn() {
            break;
        }
        builder.prepare(ground, withdrawal).map_err(|error| VmError::new(ErrorKind::Failed, error))?;
    }
    // What is ready too late ends here, on its own thread.
    if withdrawal.is_withdrawn() { Err(VmError::new(ErrorKind::Failed, "it was withdrawn")) } else { Ok(builders) }
}

impl Preparations {
    /// Begins one. When there is no thread for it, its purpose is given back with the reason.
    pub(super) fn begin(
        &mut self,
        purpose: Purpose,
        builders: Builders,
        ground: Ground,
        mailbox: &Arc<Mailbox>,
    ) -> Result<(), (Purpose, VmError)> {
        let (number, withdrawal) = (self.next, Withdrawal::default());
        let (mailbox, wanted) = (Arc::clone(mailbox), withdrawal.clone());
        let spawned = std::thread::Builder::new().name("prepare".into()).spawn(move || {
            let mut report = Report { mailbox, number, outcome: None };
            report.outcome = Some(prepare(builders, &ground, &wanted));
        });
        if let Err(error) = spawned {
            let text = format!("no thread to prepare devices on ({error}); raise the limit (ulimit -u)");
            return Err((purpose, VmError::new(ErrorKind::Failed, text)));
        }
        let (device, time) = match &purpose {
            Purpose::Boot(_) => (None, BOOT_TIME),
            Purpose::Plug(plugging) => (Some(plugging.device.clone()), PLUG_TIME),
        };
        self.next += 1;
        let deadline = Instant::now() + time;
        self.list.insert(number, Preparing { device, purpose: Some(purpose), withdrawal, deadline });
        Ok(())
    }

    /// What an outcome is for, with the builders or the reason; `None` when nobody wants it any more.
    pub(super) fn finish(&mut self, prepared: Prepared) -> Option<(Purpose, Result<Builders, VmError>)> {
        let Prepared { number, outcome } = prepared;
        self.list.remove(&number)?.purpose.map(|purpose| (purpose, outcome))
    }

    /// The devices that are being plugged in, or were and have not ended yet.
    pub(super) fn devices(&self) -> impl Iterator<Item = &DeviceConfig> {
        self.list.values().filter_map(|preparing| preparing.device.as_ref())
    }

    /// Whether a machine is being booted.
    pub(super) fn is_booting(&self) -> bool {
        self.list.values().any(|preparing| matches!(preparing.purpose, Some(Purpose::Boot(_))))
    }

    /// Which requests have to wait now.
    pub(super) fn held(&self) -> &'static [Waits] {
        if self.is_booting() {
            &[Waits::ForBoot, Waits::ForAll]
        } else if self.list.values().any(|preparing| preparing.purpose.is_none()) {
            &[Waits::ForAll]
        } else {
            &[]
        }
    }

    /// When [`Self::withdraw_late`] is to be called.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.list.values().filter(|one| one.purpose.is_some()).map(|preparing| preparing.deadline).min()
    }

    /// Gives up those whose time is over.
    pub(super) fn withdraw_late(&mut self) {
        let now = Instant::now();
        self.withdraw(
            |preparing| preparing.deadline <= now,
            ErrorKind::Late,
            |name| {
                format!("{name} did not get ready in time; nothing of it is left: look at its backend, then ask again")
            },
        );
    }

    /// Gives up all of them, because of `why`.
    pub(super) fn withdraw_all(&mut self, why: &str) {
        self.withdraw(|_| true, ErrorKind::WrongState, |name| format!("{name}: {why}; nothing of it is left"));
    }

    fn withdraw(&mut self, which: impl Fn(&Preparing) -> bool, kind: ErrorKind, why: impl Fn(&str) -> String) {
        for preparing in self.list.values_mut().filter(|preparing| which(preparing)) {
            let Some(purpose) = preparing.purpose.take() else { continue };
            preparing.withdrawal.withdraw();
            match purpose {
                Purpose::Boot(booting) => booting.answer.give(Err(VmError::new(kind, why("vm.boot")))),
                Purpose::Plug(plugging) => {
                    let name = plugging.device.id().unwrap_or("the device").to_owned();
                    plugging.answer.give(Err(VmError::new(kind, why(&name))));
                }
            }
        }
    }
}
