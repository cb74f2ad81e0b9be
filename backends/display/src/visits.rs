//! Those who arrive: so many at a time, each in a task of its own.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

use crate::listen::{Arrival, Place};
use crate::secret::{self, Secret};
use crate::stage::Stage;
use crate::viewer::{self, ViewerError};

/// Viewers at a time, those that have not introduced themselves included.
pub const VIEWERS_MAX: usize = 16;
/// How long nobody is let in when the kernel has no descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// Lets viewers of a head in, one after the other.
pub async fn receive(place: Place, stage: Arc<Stage>, head: usize, secret: Option<Secret>, seats: Arc<Semaphore>) {
    loop {
        let arrival = match place.accept().await {
            Ok(arrival) => arrival,
            Err(error) => {
                tracing::debug!(%error, "a viewer did not arrive");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        // A hang-up is all that one more hears.
        let Ok(seat) = Arc::clone(&seats).try_acquire_owned() else { continue };
        let security = match secret::security(secret.as_ref()) {
            Ok(security) => security,
            Err(error) => {
                tracing::error!(%error, "there are no random bytes: nobody is let in");
                continue;
            }
        };
        let stage = Arc::clone(&stage);
        tokio::spawn(async move {
            let end = match arrival {
                Arrival::Unix(stream) => viewer::serve(stage, head, security, stream).await,
                Arrival::Tcp(stream) => viewer::serve(stage, head, security, stream).await,
            };
            farewell(end);
            drop(seat);
        });
    }
}

/// Says why a viewer is gone; who only hung up is nothing to speak of.
pub fn farewell(end: Result<(), ViewerError>) {
    match end {
        Ok(()) | Err(ViewerError::Gone) => tracing::debug!("a viewer is gone"),
        Err(error) => tracing::info!(%error, "a viewer is given up"),
    }
}
