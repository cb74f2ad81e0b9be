//! Stories of actors.

use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use atoll_devices::access::{Answer, RegisterDevice};
use atoll_protocol::lifecycle::LifecycleEvent;
use atoll_protocol::{AccessKind, DeviceId};
use tokio::runtime::Runtime;

use super::*;

pub(super) fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime")
}

/// Hands every event to a test.
pub(super) struct Listener(Mutex<mpsc::Sender<LifecycleEvent>>);

impl Listener {
    pub(super) fn new() -> (Arc<Self>, mpsc::Receiver<LifecycleEvent>) {
        let (sender, events) = mpsc::channel();
        (Arc::new(Self(Mutex::new(sender))), events)
    }
}

impl Supervision for Listener {
    fn report(&self, event: LifecycleEvent) {
        let _ = self.0.lock().expect("no panic").send(event);
    }
}

enum Word {
    Add(u32),
    Get(Reply<u32>),
    /// Holds the actor until the test lets go.
    Hold(tokio::sync::oneshot::Receiver<()>),
    Forget(Reply<u32>),
    Panic,
    Access(RegisterAccess),
}

impl Mail for Word {
    fn when_full(&self) -> WhenFull {
        match self {
            Self::Add(_) => WhenFull::Refuse,
            _ => WhenFull::Wait,
        }
    }
}

struct Counter {
    sum: u32,
    kept: Vec<RegisterAccess>,
    last: Option<mpsc::Sender<&'static str>>,
}

impl Counter {
    fn new() -> Self {
        Self { sum: 0, kept: Vec::new(), last: None }
    }
}

impl Actor for Counter {
    type Message = Word;

    async fn handle(&mut self, word: Word) -> Flow {
        match word {
            Word::Add(n) => self.sum += n,
            Word::Get(reply) => reply.send(self.sum),
            Word::Hold(until) => {
                let _ = until.await;
            }
            Word::Forget(reply) => drop(reply),
            Word::Panic => panic!("as told"),
            Word::Access(access) => match (access.offset, access.kind) {
                (0, AccessKind::Read) => access.token.complete(u64::from(self.sum)),
                (0, AccessKind::Write(value)) => {
                    self.sum = value as u32;
                    access.token.complete(0);
                }
                _ => self.kept.push(access),
            },
        }
        Flow::Continue
    }

    async fn ending(&mut self) {
        if let Some(last) = &self.last {
            let _ = last.send("ended");
        }
    }
}

fn far(clock: &dyn Clock) -> Moment {
    clock.now().after(Duration::from_secs(30))
}

/// A mailbox for two. The third message that may be refused is given back, typed; one that must not be lost waits, and
/// its sender with it.
#[test]
fn full_mailbox_refuses_or_holds_back() {
    let runtime = runtime();
    let tree = Tree::new("vm", runtime.handle().clone(), |_| {});
    let counter = tree.start("counter", 2, Counter::new());
    let clock = RealClock::new();
    runtime.block_on(async {
        let (release, held) = tokio::sync::oneshot::channel();
        counter.tell(Word::Hold(held)).await.expect("room");
        while counter.try_tell(Word::Add(0)).is_ok() {}
        let refused = counter.refused();
        match counter.tell(Word::Add(5)).await {
            Err(TellError::Full { message: Word::Add(5), actor }) => assert_eq!(&*actor, "vm/counter"),
            other => panic!("{other:?}"),
        }
        assert_eq!(counter.refused(), refused + 1);
        let waiting = tokio::spawn({
            let counter = counter.clone();
            async move { counter.ask(&RealClock::new(), far(&RealClock::new()), Word::Get).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        release.send(()).expect("it waits");
        assert_eq!(waiting.await.expect("no panic"), Ok(0));
        assert_eq!(
            counter.ask(&clock, far(&clock), Word::Forget).await,
            Err(AskError::Unanswered("vm/counter".into()))
        );
    });
}

/// The deadline is on the clock that was given, not on the wall: nothing happens until a test moves it.
#[test]
fn deadline_is_on_the_given_clock() {
    let runtime = runtime();
    let tree = Tree::new("vm", runtime.handle().clone(), |_| {});
    let counter = tree.start("counter", 4, Counter::new());
    let clock = Arc::new(ManualClock::new());
    let (_release, held) = tokio::sync::oneshot::channel();
    counter.try_tell(Word::Hold(held)).expect("room");
    let deadline = clock.now().after(Duration::from_hours(1));
    let asked = runtime.spawn({
        let (counter, clock) = (counter.clone(), Arc::clone(&clock));
        async move { counter.ask(&*clock, deadline, Word::Get).await }
    });
    let vcpu = std::thread::spawn({
        let (counter, clock) = (counter.clone(), Arc::clone(&clock));
        move || counter.ask_parked(&*clock, deadline, &StopSignal::new(), Word::Get)
    });
    clock.advance(Duration::from_mins(59));
    std::thread::sleep(Duration::from_millis(20));
    assert!(!asked.is_finished() && !vcpu.is_finished());
    clock.advance(Duration::from_mins(1));
    let late = Err(AskError::Late("vm/counter".into()));
    assert_eq!(runtime.block_on(asked).expect("no panic"), late);
    assert_eq!(vcpu.join().expect("no panic"), late);
}

/// A vCPU waits for an actor that will not answer; the machine is ended under it.
#[test]
fn stop_signal_ends_a_parked_thread() {
    let runtime = runtime();
    let tree = Tree::new("vm", runtime.handle().clone(), |_| {});
    let counter = tree.start("counter", 4, Counter::new());
    let (_release, held) = tokio::sync::oneshot::channel();
    counter.try_tell(Word::Hold(held)).expect("room");
    let stop = StopSignal::new();
    let vcpu = std::thread::spawn({
        let stop = stop.clone();
        move || counter.ask_parked(&ManualClock::new(), Moment::from_start(Duration::from_hours(1)), &stop, Word::Get)
    });
    std::thread::sleep(Duration::from_millis(10));
    stop.raise();
    assert_eq!(vcpu.join().expect("no panic"), Err(AskError::Stopped("vm/counter".into())));
}

/// Three levels, started outside in. They stop inside out, each after what is in its mailbox; one that hangs is aborted
/// and reported, one that panicked was reported when it did; what is started afterwards ends at once.
#[test]
fn shutdown_is_ordered_and_every_end_is_reported() {
    let runtime = runtime();
    let (sender, ends) = mpsc::channel();
    let sender = Mutex::new(sender);
    let tree = Tree::new("vm", runtime.handle().clone(), move |ended| {
        let _ = sender.lock().expect("no panic").send((ended.actor.to_string(), ended.ending));
    });
    let (last, said) = mpsc::channel();
    let first = tree.start("first", 4, Counter { last: Some(last), ..Counter::new() });
    let devices = tree.subtree("devices");
    let hanging = devices.start("hanging", 4, Counter::new());
    let (_release, held) = tokio::sync::oneshot::channel();
    hanging.try_tell(Word::Hold(held)).expect("room");
    let _second = devices.start("second", 4, Counter::new());
    let panicking = tree.start("panicking", 4, Counter::new());
    panicking.try_tell(Word::Panic).expect("room");
    let wait = Duration::from_secs(10);
    let panicked = ("vm/panicking".to_owned(), Ending::Panicked("as told".into()));
    assert_eq!(ends.recv_timeout(wait), Ok(panicked));
    for _ in 0..3 {
        first.try_tell(Word::Add(1)).expect("room");
    }
    let (reply, sum) = tokio::sync::oneshot::channel();
    first.try_tell(Word::Get(Reply::new(reply))).expect("room for four");

    runtime.block_on(tree.shutdown(Duration::from_millis(100)));
    let order: Vec<_> = ends.try_iter().collect();
    let expected = [
        ("vm/devices/second", Ending::Stopped),
        ("vm/devices/hanging", Ending::Aborted),
        ("vm/first", Ending::Stopped),
    ];
    assert_eq!(order, expected.map(|(name, ending)| (name.to_owned(), ending)));
    assert_eq!(sum.blocking_recv().expect("handled before the end"), Ok(3));
    assert_eq!(said.try_recv(), Ok("ended"));
    assert!(matches!(first.try_tell(Word::Add(1)), Err(TellError::Gone { .. })));

    let late = tree.subtree("late").start("one", 1, Counter::new());
    assert_eq!(ends.recv_timeout(wait), Ok(("vm/late/one".to_owned(), Ending::Stopped)));
    assert!(matches!(late.try_tell(Word::Add(1)), Err(TellError::Gone { .. })));
}

/// A vCPU reads and writes a register that an actor keeps. An access that the actor sits on is all ones by the deadline
/// and the supervisor hears of it; so is one that finds the actor gone.
#[test]
fn actor_behind_a_register() {
    let runtime = runtime();
    let tree = Tree::new("vm", runtime.handle().clone(), |_| {});
    let counter = tree.start("counter", 4, Counter::new());
    let clock = Arc::new(ManualClock::new());
    let (supervision, events) = Listener::new();
    let surroundings = Surroundings {
        clock: Arc::clone(&clock) as Arc<dyn Clock>,
        budget: Duration::from_millis(100),
        supervision,
        causes: Arc::default(),
        roll: Roll::default(),
    };
    let mut device = ActorDevice::new(DeviceId(9), counter, Word::Access, surroundings);
    let complete = |answer: Answer| match answer {
        Answer::Later(later) => match park_access(later, &*clock, Duration::from_secs(10), &StopSignal::new()) {
            Parked::Done(value) => value,
            other => panic!("{other:?}"),
        },
        Answer::Now => panic!("an actor never answers now"),
    };
    assert_eq!(complete(device.write(0, &[0x34, 0x12])), Some(0));
    assert_eq!(complete(device.read(0, &mut [0; 4])), Some(0x1234));

    let asked = device.read(4, &mut [0; 4]);
    let time = std::thread::spawn({
        let clock = Arc::clone(&clock);
        move || {
            std::thread::sleep(Duration::from_millis(20));
            clock.advance(Duration::from_millis(100));
        }
    });
    assert_eq!(complete(asked), None);
    time.join().expect("no panic");
    let wait = Duration::from_secs(10);
    let stalled = events.recv_timeout(wait).expect("heard");
    assert!(matches!(stalled, LifecycleEvent::DeviceStalled { device: DeviceId(9), .. }), "{stalled:?}");

    runtime.block_on(tree.shutdown(Duration::from_secs(1)));
    assert_eq!(complete(device.read(0, &mut [0; 1])), None);
    assert!(events.recv_timeout(wait).is_ok(), "the supervisor hears of an actor that is gone");
}
