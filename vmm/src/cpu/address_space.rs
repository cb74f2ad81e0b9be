//! Everything outside RAM that answers, by address, and how a vCPU waits for an answer.
//!
//! An access finds its device in the map and asks it. *Now* is the end of it; *later* parks the vCPU's thread on the
//! reply, a deadline and the end of the machine, whichever comes first. A late read gives all ones, a late write is
//! dropped, and the [`StallSink`] hears of it: no device can hang a guest's CPU.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use atoll_devices::{AddressMap, AddressMapError, AddressRange, Answer, Deferred, RegisterDevice};

use super::{GuestBus, Space};

/// How long a vCPU waits for an answer that comes later.
pub const ANSWER_DEADLINE: Duration = Duration::from_secs(5);

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
    /// How long it waited.
    pub waited: Duration,
}

/// Who hears of stalls. Called on the vCPU's thread: it notes the event and returns.
pub trait StallSink: Send + Sync {
    /// A device did not answer in time.
    fn device_stalled(&self, stall: Stall);
}

/// Sees a guest's write before the map does: doorbells, where the CPU cannot watch them by itself.
pub trait WriteTap: Send + Sync {
    /// Whether the write was a doorbell and is done with.
    fn write(&self, space: Space, address: u64, data: &[u8]) -> bool;
}

/// The two address spaces of a machine.
#[derive(Default)]
pub struct AddressSpace {
    ports: RwLock<AddressMap<SharedDevice>>,
    memory: RwLock<AddressMap<SharedDevice>>,
    tap: RwLock<Option<Arc<dyn WriteTap>>>,
}

impl AddressSpace {
    /// Two empty spaces.
    pub fn new() -> Self {
        Self::default()
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

    /// Lets `tap` see writes first.
    pub fn set_tap(&self, tap: Arc<dyn WriteTap>) {
        *self.tap.write().unwrap_or_else(PoisonError::into_inner) = Some(tap);
    }

    /// The device that answers an access, and the offset in it. The map is not locked afterwards: a device's answer
    /// may change the map.
    fn find(&self, space: Space, address: u64, width: usize) -> Option<(SharedDevice, u64)> {
        let map = self.map(space).read().unwrap_or_else(PoisonError::into_inner);
        let hit = map.lookup(address, width as u64)?;
        Some((Arc::clone(hit.value), hit.offset))
    }

    fn tapped(&self, space: Space, address: u64, data: &[u8]) -> bool {
        let tap = self.tap.read().unwrap_or_else(PoisonError::into_inner);
        tap.as_ref().is_some_and(|tap| tap.write(space, address, data))
    }
}

/// Set when the machine ends: a parked vCPU stops waiting.
#[derive(Clone, Debug, Default)]
pub struct Ending(Arc<AtomicBool>);

impl Ending {
    /// Ends all waiting, once the waiting threads are unparked.
    pub fn set(&self) {
        self.0.store(true, Ordering::Release);
    }
    /// Whether the machine ends.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// One vCPU's way to the board.
pub struct VcpuBus {
    /// Number of the vCPU.
    pub vcpu: u32,
    /// What answers.
    pub space: Arc<AddressSpace>,
    /// Ends waiting.
    pub ending: Ending,
    /// Hears of stalls.
    pub stalls: Arc<dyn StallSink>,
    /// How long to wait for an answer.
    pub deadline: Duration,
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

impl VcpuBus {
    /// Waits for an answer: the value, or `None` when nobody gave one in time.
    fn wait(&self, mut deferred: Deferred, space: Space, address: u64, write: bool) -> Option<u64> {
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        let mut context = Context::from_waker(&waker);
        let asked = Instant::now();
        loop {
            if let Poll::Ready(value) = Pin::new(&mut deferred).poll(&mut context) {
                return value;
            }
            let waited = asked.elapsed();
            if self.ending.is_set() {
                return None;
            }
            let Some(left) = self.deadline.checked_sub(waited).filter(|left| !left.is_zero()) else {
                self.stalls.device_stalled(Stall { vcpu: self.vcpu, space, address, write, waited });
                return None;
            };
            std::thread::park_timeout(left);
        }
    }
}

impl GuestBus for VcpuBus {
    fn read(&mut self, space: Space, address: u64, data: &mut [u8]) {
        // What nobody answers reads as all ones.
        data.fill(0xff);
        let Some((device, offset)) = self.space.find(space, address, data.len()) else { return };
        let answer = device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
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
        if self.space.tapped(space, address, data) {
            return;
        }
        let Some((device, offset)) = self.space.find(space, address, data.len()) else { return };
        let answer = device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
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

    fn bus(deadline: Duration) -> (VcpuBus, Arc<Mutex<Slow>>, Arc<Heard>) {
        let (slow, heard) = (Arc::new(Mutex::new(Slow::default())), Arc::new(Heard::default()));
        let space = Arc::new(AddressSpace::new());
        space.insert(Space::Mmio, 0x1000, 0x100, Arc::clone(&slow) as SharedDevice).unwrap();
        let stalls = Arc::clone(&heard) as Arc<dyn StallSink>;
        (VcpuBus { vcpu: 0, space, ending: Ending::default(), stalls, deadline }, slow, heard)
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
        let (ending, asking) = (bus.ending.clone(), std::thread::current());
        let end = std::thread::spawn(move || {
            ending.set();
            asking.unpark();
        });
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
