//! Everything outside RAM that answers, by address, and how a vCPU waits for an answer.
//!
//! An access finds its device in the map and asks it. *Now* is the end of it; *later* parks the vCPU's thread on the
//! reply, a deadline and the end of the machine, whichever comes first. A late read gives all ones, a late write is
//! dropped, and the [`StallSink`] hears of it: no device can hang a guest's CPU.

use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use atoll_devices::{AddressMap, AddressMapError, AddressRange, Answer, Deferred, RegisterDevice};

use super::{GuestBus, Space};
use crate::actor::{Clock, Parked, StopSignal, park_access};
use crate::doorbell::DoorbellTable;
use crate::metrics::{AnswerKind, VcpuCounters};

/// How long a vCPU waits for an answer that comes later.
pub const ANSWER_BUDGET: Duration = Duration::from_secs(10);

/// A device as the map holds it.
pub type SharedDevice = Arc<Mutex<dyn RegisterDevice>>;

/// An access whose answer did not come in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stall {
    /// The vCPU that asked.
    pub vcpu: u32,
    /// The space of the access.
    pub space: Space,
    /// Its address.
    pub address: u64,
    /// Whether the guest wrote.
    pub write: bool,
    /// How long it waited: the budget.
    pub waited: Duration,
}

/// Who hears of stalls. Called on the vCPU's thread: it notes the event and returns.
pub trait StallSink: Send + Sync {
    /// A device did not answer in time.
    fn device_stalled(&self, stall: Stall);
}

/// The two address spaces of a machine.
pub struct AddressSpace {
    ports: RwLock<AddressMap<SharedDevice>>,
    memory: RwLock<AddressMap<SharedDevice>>,
    doorbells: Arc<DoorbellTable>,
}

impl AddressSpace {
    /// Two empty spaces. The doorbells see a guest's writes first.
    pub fn new(doorbells: Arc<DoorbellTable>) -> Self {
        Self { ports: RwLock::default(), memory: RwLock::default(), doorbells }
    }

    fn map(&self, space: Space) -> &RwLock<AddressMap<SharedDevice>> {
        match space {
            Space::Pio => &self.ports,
            Space::Mmio => &self.memory,
        }
    }

    /// Maps a device.
    ///
    /// # Errors
    /// When any byte of the range is taken, or the range is empty or wraps.
    pub fn insert(&self, space: Space, start: u64, len: u64, device: SharedDevice) -> Result<(), AddressMapError> {
        let range = AddressRange::new(start, len)?;
        self.map(space).write().unwrap_or_else(PoisonError::into_inner).insert(range, device)
    }

    /// Unmaps the device whose range starts at `start`.
    ///
    /// # Errors
    /// When nothing starts there.
    pub fn remove(&self, space: Space, start: u64) -> Result<(), AddressMapError> {
        self.map(space).write().unwrap_or_else(PoisonError::into_inner).remove(start).map(drop)
    }

    /// The device that answers an access, and the offset in it. The map is not locked afterwards: a device's answer
    /// may change the map.
    fn find(&self, space: Space, address: u64, width: usize) -> Option<(SharedDevice, u64)> {
        let map = self.map(space).read().unwrap_or_else(PoisonError::into_inner);
        let hit = map.lookup(address, width as u64)?;
        Some((Arc::clone(hit.value), hit.offset))
    }
}

/// One vCPU's way to the board.
pub struct VcpuBus {
    /// Number of the vCPU.
    pub vcpu: u32,
    /// What answers.
    pub space: Arc<AddressSpace>,
    /// Ends waiting: the machine ends.
    pub stop: StopSignal,
    /// Hears of stalls.
    pub stalls: Arc<dyn StallSink>,
    /// Time of the deadline.
    pub clock: Arc<dyn Clock>,
    /// How long to wait for an answer. Devices that answer later have budgets of their own: this is longer.
    pub budget: Duration,
    /// What this vCPU asked, and who answered.
    pub counters: Arc<VcpuCounters>,
}

impl VcpuBus {
    /// Waits for an answer: the value, or `None` when nobody gave one in time.
    fn wait(&self, deferred: Deferred, space: Space, address: u64, write: bool) -> Option<u64> {
        match park_access(deferred, self.clock.as_ref(), self.budget, &self.stop) {
            Parked::Done(value) => value,
            Parked::Stopped => None,
            Parked::Late => {
                self.counters.stall();
                let waited = self.budget;
                self.stalls.device_stalled(Stall { vcpu: self.vcpu, space, address, write, waited });
                None
            }
        }
    }
}

fn kind(answer: &Answer) -> AnswerKind {
    match answer {
        Answer::Now => AnswerKind::Inline,
        Answer::Later(deferred) if deferred.is_elsewhere() => AnswerKind::Elsewhere,
        Answer::Later(_) => AnswerKind::Later,
    }
}

impl GuestBus for VcpuBus {
    fn read(&mut self, space: Space, address: u64, data: &mut [u8]) {
        // What nobody answers reads as all ones.
        data.fill(0xff);
        let Some((device, offset)) = self.space.find(space, address, data.len()) else {
            return self.counters.exit(space, false, AnswerKind::Nobody);
        };
        let answer = device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
        self.counters.exit(space, false, kind(&answer));
        if let Answer::Later(deferred) = answer {
            data.fill(0xff);
            if let Some(value) = self.wait(deferred, space, address, false) {
                for (byte, value) in data.iter_mut().zip(value.to_le_bytes()) {
                    *byte = value;
                }
            }
        }
    }

    fn write(&mut self, space: Space, address: u64, data: &[u8]) {
        if self.space.doorbells.write(space, address) {
            return self.counters.doorbell();
        }
        let Some((device, offset)) = self.space.find(space, address, data.len()) else {
            return self.counters.exit(space, true, AnswerKind::Nobody);
        };
        let answer = device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        self.counters.exit(space, true, kind(&answer));
        if let Answer::Later(deferred) = answer {
            let _ = self.wait(deferred, space, address, true);
        }
    }
}

#[cfg(test)]
mod tests {
    use atoll_devices::Completion;
    use atoll_devices::access::deferred;

    use super::*;
    use crate::actor::RealClock;

    /// A device that hands its completions to the test.
    #[derive(Default)]
    struct Slow {
        asked: Vec<Completion>,
    }

    impl RegisterDevice for Slow {
        fn read(&mut self, _offset: u64, data: &mut [u8]) -> Answer {
            data.fill(0);
            let (completion, asked) = deferred();
            self.asked.push(completion);
            Answer::Later(asked)
        }
        fn write(&mut self, _offset: u64, _data: &[u8]) -> Answer {
            let (completion, asked) = deferred();
            self.asked.push(completion);
            Answer::Later(asked)
        }
    }

    #[derive(Default)]
    struct Heard(Mutex<Vec<Stall>>);

    impl StallSink for Heard {
        fn device_stalled(&self, stall: Stall) {
            self.0.lock().unwrap().push(stall);
        }
    }

    fn bus(budget: Duration) -> (VcpuBus, Arc<Mutex<Slow>>, Arc<Heard>) {
        let (slow, heard) = (Arc::new(Mutex::new(Slow::default())), Arc::new(Heard::default()));
        let space = Arc::new(AddressSpace::new(Arc::new(DoorbellTable::new(None))));
        space.insert(Space::Mmio, 0x1000, 0x100, Arc::clone(&slow) as SharedDevice).unwrap();
        let stalls = Arc::clone(&heard) as Arc<dyn StallSink>;
        let clock = Arc::new(RealClock::new());
        let counters = Arc::default();
        (VcpuBus { vcpu: 0, space, stop: StopSignal::new(), stalls, clock, budget, counters }, slow, heard)
    }

    /// A device process that never answers costs the guest one deadline, and the supervisor hears of it.
    #[test]
    fn silent_device_reads_as_all_ones() {
        let (mut bus, slow, heard) = bus(Duration::from_millis(30));
        let mut data = [0; 4];
        bus.read(Space::Mmio, 0x1010, &mut data);
        assert_eq!(data, [0xff; 4]);
        bus.write(Space::Mmio, 0x1014, &[1]);
        let heard = heard.0.lock().unwrap();
        assert_eq!(
            heard.iter().map(|stall| (stall.address, stall.write)).collect::<Vec<_>>(),
            [(0x1010, false), (0x1014, true)]
        );
        let snapshot = bus.counters.snapshot(0);
        assert_eq!((snapshot.stalls, snapshot.exits_total()), (2, 2));
        // The answer that comes after all goes nowhere.
        slow.lock().unwrap().asked.pop().unwrap().complete(5);
    }

    #[test]
    fn answer_from_another_thread_arrives() {
        let (mut bus, slow, heard) = bus(Duration::from_secs(20));
        let answerer = std::thread::spawn(move || {
            loop {
                if let Some(completion) = slow.lock().unwrap().asked.pop() {
                    return completion.complete(0x1234_5678);
                }
                std::thread::yield_now();
            }
        });
        let mut data = [0; 2];
        bus.read(Space::Mmio, 0x1010, &mut data);
        assert_eq!(data, [0x78, 0x56]);
        answerer.join().unwrap();
        assert!(heard.0.lock().unwrap().is_empty());
    }

    /// A machine that ends does not wait for a device first.
    #[test]
    fn the_end_of_the_machine_ends_waiting() {
        let (mut bus, _slow, heard) = bus(Duration::from_secs(60));
        let stop = bus.stop.clone();
        let end = std::thread::spawn(move || stop.raise());
        bus.write(Space::Mmio, 0x1010, &[0]);
        end.join().unwrap();
        assert!(heard.0.lock().unwrap().is_empty());
    }

    #[test]
    fn nothing_there_reads_as_all_ones() {
        let (mut bus, ..) = bus(Duration::from_secs(1));
        let mut data = [0; 8];
        bus.read(Space::Mmio, 0x10fd, &mut data);
        assert_eq!(data, [0xff; 8]);
        bus.read(Space::Pio, 0x1010, &mut data[..1]);
        bus.write(Space::Pio, 0x1010, &[0]);
    }
}
