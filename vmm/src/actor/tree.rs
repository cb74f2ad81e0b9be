//! A tree of actors: who started whom, who hears of an end, and the order in which all of them stop.
//!
//! A tree stops its youngest member first, a member being an actor or a whole subtree, so that whatever was started
//! later, and may lean on what was there before, is gone before that is. An actor that is told to stop handles what is
//! in its mailbox, then says goodbye; one that takes longer than it is given is aborted, and that is reported.

use std::future::Future;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::address::{Address, Mail};
use super::roll::ActorReport;

/// Whether an actor goes on after a message.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// With the next message.
    Continue,
    /// No more: it ends by itself.
    End,
}

/// State that is changed by messages only.
pub trait Actor: Send + 'static {
    /// What it takes.
    type Message: Mail;

    /// Handles one message. Other messages wait meanwhile, so work that takes long goes elsewhere.
    fn handle(&mut self, message: Self::Message) -> impl Future<Output = Flow> + Send;

    /// Last act, after the last message.
    fn ending(&mut self) -> impl Future<Output = ()> + Send {
        async {}
    }
}

/// How an actor ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// By itself: [`Flow::End`], or nobody holds its address any more.
    Finished,
    /// It was told to stop, and did.
    Stopped,
    /// It panicked, with these words.
    Panicked(String),
    /// It did not stop in the time given.
    Aborted,
}

/// The report of an end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Whose.
    pub actor: Arc<str>,
    /// How.
    pub ending: Ending,
}

type Hook = Arc<dyn Fn(Ended) + Send + Sync>;

/// Messages that wait, how many may, and how often there was no room.
type Depth = Box<dyn Fn() -> (usize, usize, u64) + Send + Sync>;

enum Member {
    Actor { name: Arc<str>, stop: oneshot::Sender<()>, task: JoinHandle<()>, depth: Depth },
    Subtree(Tree),
}

/// Actors and subtrees, in the order of their start.
#[derive(Clone)]
pub struct Tree {
    name: Arc<str>,
    runtime: Handle,
    hook: Hook,
    members: Arc<Mutex<Members>>,
}

#[derive(Default)]
struct Members {
    list: Vec<Member>,
    closed: bool,
}

impl std::fmt::Debug for Tree {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tree({})", self.name)
    }
}

impl Tree {
    /// A tree without members. `hook` hears of each end, on whatever thread it happens: it must not wait.
    pub fn new(name: &str, runtime: Handle, hook: impl Fn(Ended) + Send + Sync + 'static) -> Self {
        Self { name: name.into(), runtime, hook: Arc::new(hook), members: Arc::default() }
    }

    /// A tree that is a member of this one, with the same hook.
    #[must_use]
    pub fn subtree(&self, name: &str) -> Self {
        let tree = Self {
            name: format!("{}/{name}", self.name).into(),
            runtime: self.runtime.clone(),
            hook: Arc::clone(&self.hook),
            members: Arc::default(),
        };
        let mut members = self.lock();
        if members.closed {
            tree.lock().closed = true;
        } else {
            members.list.push(Member::Subtree(tree.clone()));
        }
        drop(members);
        tree
    }

    /// Starts an actor with a mailbox for `capacity` messages (at least one). In a tree that has been shut down it is
    /// stopped at once.
    pub fn start<A: Actor>(&self, name: &str, capacity: usize, actor: A) -> Address<A::Message> {
        let name: Arc<str> = format!("{}/{name}", self.name).into();
        let (sender, mailbox) = mpsc::channel(capacity.max(1));
        // Weak: an actor whose address nobody holds ends by itself.
        let weak = sender.downgrade();
        let (stop, stopped) = oneshot::channel();
        let address = Address::new(sender, Arc::clone(&name));
        let full = address.counter();
        let depth: Depth = Box::new(move || {
            // Nothing waits when nobody holds its address any more.
            let waiting = weak.upgrade().map_or(0, |sender| sender.max_capacity() - sender.capacity());
            (waiting, capacity, full.load(Ordering::Relaxed))
        });
        let hook = Arc::clone(&self.hook);
        let reported = Arc::clone(&name);
        let mut members = self.lock();
        let task = self.runtime.spawn(async move {
            let ended = tokio::spawn(live(actor, mailbox, stopped));
            // Aborting this task must abort the actor as well: a JoinHandle alone would detach it.
            let abort = AbortOnDrop(ended.abort_handle());
            let ending = match ended.await {
                Ok(ending) => ending,
                Err(error) if error.is_panic() => Ending::Panicked(panic_words(&*error.into_panic())),
                Err(_) => Ending::Aborted,
            };
            drop(abort);
            hook(Ended { actor: reported, ending });
        });
        members.list.retain(|member| !matches!(member, Member::Actor { task, .. } if task.is_finished()));
        if members.closed {
            let _ = stop.send(());
        } else {
            members.list.push(Member::Actor { name, stop, task, depth });
        }
        drop(members);
        address
    }

    /// The actors that live, those of subtrees too, in the order of their start.
    #[must_use]
    pub fn census(&self) -> Vec<ActorReport> {
        let mut reports = Vec::new();
        for member in &self.lock().list {
            match member {
                Member::Subtree(tree) => reports.extend(tree.census()),
                Member::Actor { task, .. } if task.is_finished() => {}
                Member::Actor { name, depth, .. } => {
                    let (waiting, capacity, full) = depth();
                    let state = if waiting > 0 { "busy" } else { "idle" }.to_owned();
                    let name = Arc::clone(name);
                    reports.push(ActorReport { name, waiting, capacity, full, generation: 1, state });
                }
            }
        }
        reports
    }

    /// Stops all members, youngest first, each within `patience`. New ones can no longer be started.
    pub async fn shutdown(&self, patience: Duration) {
        let members = {
            let mut members = self.lock();
            members.closed = true;
            std::mem::take(&mut members.list)
        };
        for member in members.into_iter().rev() {
            match member {
                Member::Subtree(tree) => Box::pin(tree.shutdown(patience)).await,
                Member::Actor { name, stop, mut task, .. } => {
                    // An actor that has ended already does not hear it.
                    let _ = stop.send(());
                    if tokio::time::timeout(patience, &mut task).await.is_err() {
                        task.abort();
                        // One that ended at the last moment has been reported.
                        if task.await.is_err() {
                            (self.hook)(Ended { actor: name, ending: Ending::Aborted });
                        }
                    }
                }
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Members> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn live<A: Actor>(
    mut actor: A,
    mut mailbox: mpsc::Receiver<A::Message>,
    mut stopped: oneshot::Receiver<()>,
) -> Ending {
    let mut ending = Ending::Finished;
    loop {
        let message = tokio::select! {
            biased;
            _ = &mut stopped, if ending == Ending::Finished => {
                // Nothing new gets in; what is in, at most the mailbox's capacity, is handled.
                mailbox.close();
                ending = Ending::Stopped;
                continue;
            }
            message = mailbox.recv() => message,
        };
        let Some(message) = message else { break };
        if actor.handle(message).await == Flow::End {
            break;
        }
    }
    drop(mailbox);
    actor.ending().await;
    ending
}

fn panic_words(payload: &(dyn std::any::Any + Send)) -> String {
    payload
        .downcast_ref::<&str>()
        .map(|words| (*words).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without words".to_owned())
}
