//! Those who arrive: so many at a time, each in a task of its own.
//!
//! Who has not shown yet that he may look has no viewer's place. There are so many of these, too, and the oldest gives way to one more:
//! who arrives and says nothing keeps nobody out.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::AbortHandle;

use crate::listen::{Arrival, Place};
use crate::secret::{self, Secret};
use crate::stage::Stage;
use crate::viewer::{self, ViewerError};

/// Viewers at a time.
pub const VIEWERS_MAX: usize = 16;
/// Those at a time who have not introduced themselves.
const NEWCOMERS_MAX: usize = 32;
/// How long nobody is let in when the kernel has no descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// Those who have not introduced themselves, the oldest first.
#[derive(Default)]
struct Newcomers(Mutex<VecDeque<(u64, AbortHandle)>>);

impl Newcomers {
    fn arrives(&self, number: u64, task: AbortHandle) {
        let mut list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        list.retain(|(_, task)| !task.is_finished());
        list.push_back((number, task));
        if list.len() > NEWCOMERS_MAX
            && let Some((_, oldest)) = list.pop_front()
        {
            oldest.abort();
        }
    }
    fn is_let_in(&self, number: u64) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|(other, _)| *other != number);
    }
}

/// Lets viewers of a head in, one after the other.
pub async fn receive(place: Place, stage: Arc<Stage>, head: usize, secret: Option<Secret>, seats: Arc<Semaphore>) {
    let newcomers = Arc::<Newcomers>::default();
    for number in 0.. {
        let arrival = match place.accept().await {
            Ok(arrival) => arrival,
            Err(error) => {
                tracing::debug!(%error, "a viewer did not arrive");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let security = match secret::security(secret.as_ref()) {
            Ok(security) => security,
            Err(error) => {
                tracing::error!(%error, "there are no random bytes: nobody is let in");
                continue;
            }
        };
        let (stage, seats, list) = (Arc::clone(&stage), Arc::clone(&seats), Arc::clone(&newcomers));
        let task = tokio::spawn(async move {
            let admit = move || {
                list.is_let_in(number);
                Arc::clone(&seats).try_acquire_owned().ok()
            };
            let end = match arrival {
                Arrival::Unix(stream) => viewer::serve(stage, head, security, stream, admit).await,
                Arrival::Tcp(stream) => viewer::serve(stage, head, security, stream, admit).await,
            };
            farewell(end);
        });
        newcomers.arrives(number, task.abort_handle());
    }
}

/// Says why a viewer is gone; who only hung up is nothing to speak of.
pub fn farewell(end: Result<(), ViewerError>) {
    match end {
        Ok(()) | Err(ViewerError::Gone) => tracing::debug!("a viewer is gone"),
        Err(error) => tracing::info!(%error, "a viewer is given up"),
    }
}
