//! Account of what a backend has taken, kept from outside, for backends that keep no record and complete in any order.
//!
//! What lies between the used and the available index is not what such a backend has not finished: with A and B made
//! available and B completed, B is what lies there and A is what is missing, maybe long overwritten in the ring. To
//! complete B once more would break the driver, to leave A out would hang it. But each head is made available and
//! completed in turn, so it is enough to count both for each head, and to look often enough that no entry of either ring
//! is overwritten unseen: a thread does that while the backend runs, and nobody waits for it.
//!
//! When it came too late, so many requests are out as the indices say, and nobody knows which. They are known again as
//! they complete: a head that is completed without having been seen to come was one of them, one that comes was none.
//! When all have been met, or the ring was seen idle, the account is exact again. A death before that is not survived
//! without a reset; that is why the API says `idle-only`.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use atoll_devices::virtio::QueueConfig;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::rings::RingPosition;
use super::standin::Stock;
use crate::seccomp::{self, ThreadClass};

/// How often rings are looked at, at most and at least.
const LOOK_MIN: Duration = Duration::from_micros(200);
const LOOK_MAX: Duration = Duration::from_millis(4);
/// After this long indices may have gone round without anybody seeing it.
const BLIND: Duration = Duration::from_millis(200);
const HEADER: u64 = 4;

/// What is known of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Head {
    /// The driver has it.
    Free,
    /// The backend may take it or has taken it; it was this entry of the available ring, counted on without wrapping.
    Out(u64),
    /// One or the other.
    Unknown,
}

/// The account of one ring.
struct Account {
    queue: QueueConfig,
    /// Both indices, up to which everything is accounted for.
    seen: RingPosition,
    heads: Vec<Head>,
    /// How many of the unknown heads are out.
    unknown: u16,
    /// Entries of the available ring that were accounted for.
    entries: u64,
    /// Comings and goings of each head since the last look.
    moves: Vec<(u16, u16)>,
}

impl Account {
    /// Of a ring in which nothing is in flight and `base` is the next entry to take.
    fn new(queue: QueueConfig, base: u16, used: u16) -> Self {
        let size = usize::from(queue.size);
        let seen = RingPosition { available: base, used };
        let (heads, moves) = (vec![Head::Free; size], vec![(0, 0); size]);
        Self { queue, seen, heads, unknown: 0, entries: 0, moves }
    }

    /// Nobody knows any more which requests are out.
    fn lose(&mut self, now: RingPosition) {
        self.seen = now;
        self.unknown = now.available.wrapping_sub(now.used);
        let mark = if self.unknown == 0 { Head::Free } else { Head::Unknown };
        self.heads.fill(mark);
    }

    /// Looks at the ring; how many entries were new. `blind` is how long ago the last look was.
    fn look(&mut self, memory: &GuestMemoryMmap, blind: Duration) -> u16 {
        let Some(now) = RingPosition::read(memory, &self.queue) else { return 0 };
        let (came, went) = (now.available.wrapping_sub(self.seen.available), now.used.wrapping_sub(self.seen.used));
        if now.is_idle() || blind > BLIND || came.max(went) > self.queue.size {
            self.lose(now);
        } else if (came, went) != (0, 0) && self.follow(memory, now).is_none() {
            // Overwritten meanwhile, or nonsense.
            let latest = RingPosition::read(memory, &self.queue).unwrap_or(now);
            self.lose(latest);
        }
        came.max(went)
    }

    /// Accounts for all entries up to `now`; `None` when they cannot be had or make no sense.
    fn follow(&mut self, memory: &GuestMemoryMmap, now: RingPosition) -> Option<()> {
        let size = self.queue.size;
        self.moves.fill((0, 0));
        let came = now.available.wrapping_sub(self.seen.available);
        let mut at = Vec::with_capacity(usize::from(came));
        for step in 0..came {
            let slot = u64::from(self.seen.available.wrapping_add(step) % size);
            let address = self.queue.available_ring.checked_add(HEADER + 2 * slot)?;
            let head = u16::from_le(memory.load::<u16>(GuestAddress(address), Ordering::Relaxed).ok()?);
            self.moves.get_mut(usize::from(head))?.0 += 1;
            at.push((head, self.entries + u64::from(step)));
        }
        for step in 0..now.used.wrapping_sub(self.seen.used) {
            let slot = u64::from(self.seen.used.wrapping_add(step) % size);
            let address = self.queue.used_ring.checked_add(HEADER + 8 * slot)?;
            let id = u32::from_le(memory.load::<u32>(GuestAddress(address), Ordering::Relaxed).ok()?);
            self.moves.get_mut(usize::try_from(id).ok()?)?.1 += 1;
        }
        // What was read must not have been overwritten before it was.
        fence(Ordering::Acquire);
        let latest = RingPosition::read(memory, &self.queue)?;
        let overrun = |seen: u16, latest: u16| latest.wrapping_sub(seen) > size;
        if overrun(self.seen.available, latest.available) || overrun(self.seen.used, latest.used) {
            return None;
        }
        for (head, (came, went)) in self.heads.iter_mut().zip(&self.moves) {
            let known = *head != Head::Unknown;
            let was_out = i32::from(matches!(head, Head::Out(_)));
            match (known, was_out + i32::from(*came) - i32::from(*went)) {
                (true, 0) => *head = Head::Free,
                // Its entry is set below, unless it is the old one.
                (true, 1) if *came > 0 => *head = Head::Out(0),
                (true, 1) => {}
                // It came and went equally often: it is again what it was, whatever that is.
                (false, 0) => {}
                (false, 1) => *head = Head::Out(0),
                (false, -1) => {
                    *head = Head::Free;
                    self.unknown = self.unknown.checked_sub(1)?;
                }
                _ => return None,
            }
        }
        // The last time that a head came is the one that counts.
        for (head, entry) in at {
            if let Some(Head::Out(since)) = self.heads.get_mut(usize::from(head)) {
                *since = entry;
            }
        }
        self.entries += u64::from(came);
        self.seen = now;
        if self.unknown == 0 {
            self.heads.iter_mut().filter(|head| **head == Head::Unknown).for_each(|head| *head = Head::Free);
        }
        let out = self.heads.iter().filter(|head| matches!(head, Head::Out(_))).count();
        let expected = usize::from(now.available.wrapping_sub(now.used));
        (out + usize::from(self.unknown) == expected).then_some(())
    }

    /// What is out now, after the last look.
    fn close(self) -> (u16, Result<Stock, String>) {
        let mut out: Vec<(u64, u16)> = (0..)
            .zip(&self.heads)
            .filter_map(|(head, known)| match known {
                Head::Out(entry) => Some((*entry, head)),
                Head::Free | Head::Unknown => None,
            })
            .collect();
        out.sort_unstable();
        let stock = match self.unknown {
            0 => Ok(Stock {
                next_avail: self.seen.available,
                unfinished: out.into_iter().map(|(_, head)| head).collect(),
            }),
            unknown => Err(format!(
                "{unknown} of {} requests in flight were taken while nobody saw it; track=shadow sees all",
                usize::from(unknown) + out.len()
            )),
        };
        (self.queue.index, stock)
    }
}

/// A thread that keeps the accounts of a device's rings. Dropping it ends it.
pub(super) struct Ledger {
    end: Arc<AtomicBool>,
    /// Dropped to wake the thread up.
    wake: Option<mpsc::SyncSender<()>>,
    thread: Option<JoinHandle<Vec<Account>>>,
    memory: Arc<GuestMemoryMmap>,
}

impl Ledger {
    /// Keeps the accounts of rings that are about to be given to a backend, each with the entry that it will take first;
    /// nothing is in flight.
    ///
    /// # Errors
    /// If there is no thread left.
    pub(super) fn start(
        name: &str,
        memory: &Arc<GuestMemoryMmap>,
        rings: impl IntoIterator<Item = (QueueConfig, u16)>,
    ) -> io::Result<Self> {
        let accounts: Vec<Account> = rings.into_iter().map(|(queue, base)| Account::new(queue, base, base)).collect();
        let end = Arc::new(AtomicBool::new(false));
        let (wake, woken) = mpsc::sync_channel(0);
        let (ended, seen) = (Arc::clone(&end), Arc::clone(memory));
        let thread = std::thread::Builder::new().name(format!("ledger-{name}"));
        let thread = thread.spawn(move || keep(accounts, &seen, &ended, &woken))?;
        Ok(Self { end, wake: Some(wake), thread: Some(thread), memory: Arc::clone(memory) })
    }

    /// Ends it, when the backend is gone: what it had taken of each ring, or why nobody knows.
    pub(super) fn close(mut self) -> Vec<(u16, Result<Stock, String>)> {
        let mut accounts = self.finish();
        accounts.iter_mut().for_each(|account| {
            account.look(&self.memory, Duration::ZERO);
        });
        accounts.into_iter().map(Account::close).collect()
    }

    fn finish(&mut self) -> Vec<Account> {
        self.end.store(true, Ordering::Relaxed);
        self.wake = None;
        // It only fails if the thread panicked, which its hook has reported.
        self.thread.take().and_then(|thread| thread.join().ok()).unwrap_or_default()
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        self.finish();
    }
}

/// The thread. Ends with a look that was not blind.
fn keep(
    mut accounts: Vec<Account>,
    memory: &GuestMemoryMmap,
    end: &AtomicBool,
    woken: &mpsc::Receiver<()>,
) -> Vec<Account> {
    seccomp::enter(ThreadClass::Events);
    let mut pause = LOOK_MIN;
    let mut last = Instant::now();
    loop {
        // Nothing is ever sent: this is a sleep that ends when the sender does.
        let _ = woken.recv_timeout(pause);
        let ending = end.load(Ordering::Relaxed);
        let now = Instant::now();
        let blind = now.duration_since(last);
        last = now;
        let mut wanted = LOOK_MAX;
        for account in &mut accounts {
            let news = account.look(memory, blind);
            // So that a quarter of the ring is new at the next look.
            let quarter = u32::from(account.queue.size / 4).max(1);
            let next = blind.saturating_mul(quarter) / u32::from(news).max(1);
            wanted = wanted.min(next);
        }
        pause = wanted.max(LOOK_MIN);
        if ending {
            return accounts;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, VecDeque};

    use proptest::prelude::*;

    use super::*;

    const SIZE: u16 = 8;

    fn queue() -> QueueConfig {
        QueueConfig {
            index: 3,
            size: SIZE,
            descriptor_table: 0,
            available_ring: 0x1000,
            used_ring: 0x2000,
            vector: None,
        }
    }

    /// A driver and a backend that completes in any order.
    struct Play {
        memory: Arc<GuestMemoryMmap>,
        now: RingPosition,
        free: VecDeque<u16>,
        out: Vec<u16>,
    }

    impl Play {
        fn new(start: u16) -> Self {
            let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x3000)]).unwrap());
            let play = Self {
                memory,
                now: RingPosition { available: start, used: start },
                free: (0..SIZE).collect(),
                out: Vec::new(),
            };
            play.publish();
            play
        }
        fn publish(&self) {
            self.memory.write_obj(self.now.available, GuestAddress(0x1002)).unwrap();
            self.memory.write_obj(self.now.used, GuestAddress(0x2002)).unwrap();
        }
        /// A driver's free list is last in, first out as a rule; `fifo` takes it from the other end.
        fn offer(&mut self, fifo: bool) {
            let head = if fifo { self.free.pop_front() } else { self.free.pop_back() };
            let Some(head) = head else { return };
            let slot = u64::from(self.now.available % SIZE);
            self.memory.write_obj(head, GuestAddress(0x1004 + 2 * slot)).unwrap();
            self.now.available = self.now.available.wrapping_add(1);
            self.out.push(head);
            self.publish();
        }
        fn complete(&mut self, which: usize) {
            if self.out.is_empty() {
                return;
            }
            let head = self.out.remove(which % self.out.len());
            let slot = u64::from(self.now.used % SIZE);
            self.memory.write_obj(u64::from(head), GuestAddress(0x2004 + 8 * slot)).unwrap();
            self.now.used = self.now.used.wrapping_add(1);
            self.free.push_back(head);
            self.publish();
        }
    }

    #[derive(Clone, Copy, Debug)]
    enum Act {
        Offer(bool),
        Complete(usize),
        Look,
    }

    fn acts() -> impl Strategy<Value = Vec<Act>> {
        let act = prop_oneof![
            4 => any::<bool>().prop_map(Act::Offer),
            4 => any::<usize>().prop_map(Act::Complete),
            2 => Just(Act::Look),
        ];
        prop::collection::vec(act, 0..120)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Whatever driver and backend do, and however seldom one looks: the account names exactly what is out, in the
        /// order in which it came, or it says that it does not know.
        #[test]
        fn an_account_is_exact_or_says_that_it_is_not(start in any::<u16>(), acts in acts()) {
            let mut play = Play::new(start);
            let mut account = Account::new(queue(), start, start);
            let mut most = (0, 0);
            for act in acts {
                match act {
                    Act::Offer(fifo) => play.offer(fifo),
                    Act::Complete(which) => play.complete(which),
                    Act::Look => {
                        account.look(&play.memory, Duration::ZERO);
                        // Never a head that is not out.
                        for (head, known) in (0..).zip(&account.heads) {
                            match known {
                                Head::Free => prop_assert!(!play.out.contains(&head)),
                                Head::Out(_) => prop_assert!(play.out.contains(&head)),
                                Head::Unknown => {}
                            }
                        }
                        let unknown = play.out.iter().filter(|head| account.heads[usize::from(**head)] == Head::Unknown);
                        prop_assert_eq!(unknown.count(), usize::from(account.unknown));
                    }
                }
                let came = play.now.available.wrapping_sub(account.seen.available);
                let went = play.now.used.wrapping_sub(account.seen.used);
                most = (most.0.max(came), most.1.max(went));
            }
            account.look(&play.memory, Duration::ZERO);
            let (index, stock) = account.close();
            prop_assert_eq!(index, 3);
            match stock {
                Ok(stock) => prop_assert_eq!(stock, Stock { next_avail: play.now.available, unfinished: play.out }),
                Err(_) => prop_assert!(most.0.max(most.1) > SIZE, "nothing was overwritten"),
            }
        }

        /// Rings full of nonsense.
        #[test]
        fn any_ring_is_survived(rings in prop::collection::vec(any::<[u8; 0x60]>(), 2..6)) {
            let play = Play::new(0);
            let mut account = Account::new(queue(), 0, 0);
            for bytes in rings {
                play.memory.write_slice(&bytes, GuestAddress(0x1000)).unwrap();
                play.memory.write_slice(&bytes[1..], GuestAddress(0x2000)).unwrap();
                account.look(&play.memory, Duration::ZERO);
            }
            if let (_, Ok(stock)) = account.close() {
                let mut heads: BTreeMap<u16, ()> = BTreeMap::new();
                prop_assert!(stock.unfinished.iter().all(|head| *head < SIZE && heads.insert(*head, ()).is_none()));
            }
        }
    }

    /// The one that the window between the indices gets wrong: the first of two is out, and the second would be completed
    /// again. And one that stays out while others go round is not forgotten, though its entry is long overwritten.
    #[test]
    fn a_slow_request_is_not_taken_for_its_neighbour() {
        let mut play = Play::new(0xfff0);
        let mut account = Account::new(queue(), 0xfff0, 0xfff0);
        play.offer(true);
        for _ in 0..100 {
            play.offer(true);
            play.complete(1);
            account.look(&play.memory, Duration::ZERO);
        }
        play.offer(true);
        account.look(&play.memory, Duration::ZERO);
        let (_, stock) = account.close();
        let stock = stock.unwrap();
        assert_eq!((stock.unfinished, stock.next_avail), (play.out, play.now.available));
    }

    /// After a look that came too late the account becomes exact again while requests come and go.
    #[test]
    fn a_late_look_is_made_good() {
        let mut play = Play::new(0);
        let mut account = Account::new(queue(), 0, 0);
        (0..4).for_each(|_| play.offer(true));
        for _ in 0..20 {
            play.complete(0);
            play.offer(true);
        }
        account.look(&play.memory, Duration::ZERO);
        assert_eq!(account.unknown, 4);
        for _ in 0..4 {
            play.complete(0);
            play.offer(true);
            account.look(&play.memory, Duration::ZERO);
        }
        let (_, stock) = account.close();
        assert_eq!(stock.unwrap().unfinished, play.out);
        // Blindness counts as too late, however little there is to see.
        let mut account = Account::new(queue(), play.now.available.wrapping_sub(4), play.now.used);
        account.look(&play.memory, BLIND + Duration::from_millis(1));
        assert!(account.close().1.unwrap_err().contains("4 of 4"));
    }

    /// The thread sees everything of a backend that is not too fast, and ends when it is told to. A busy machine may keep
    /// it from looking; then it says so, and has another try.
    #[test]
    fn the_thread_keeps_up() {
        let kept_up = (0..10).any(|_| {
            let mut play = Play::new(7);
            let ledger = Ledger::start("disk0", &play.memory, [(queue(), 7)]).unwrap();
            for round in 0..40 {
                play.offer(true);
                play.offer(false);
                (0..play.out.len() / 2).for_each(|_| play.complete(round));
                std::thread::sleep(Duration::from_millis(2));
            }
            let (index, stock) = ledger.close().pop().unwrap();
            assert_eq!(index, 3);
            let exact = stock.map(|stock| assert_eq!(stock.unfinished, play.out)).is_ok();
            drop(Ledger::start("disk0", &play.memory, [(queue(), play.now.used)]).unwrap());
            exact
        });
        assert!(kept_up);
    }
}
