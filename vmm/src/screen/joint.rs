//! The sockets between GPU, display and input devices.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::config::InputKind;

/// Takes the display's end of a new pair of sockets.
type Show = Arc<dyn Fn(OwnedFd) + Send + Sync>;
/// Hears that there is a new display.
type Heed = Arc<dyn Fn() + Send + Sync>;

#[derive(Default)]
struct Ends {
    display: Option<Show>,
    gpu: Option<Heed>,
    /// Of each kind: where is spoken, and where is heard.
    typed: [Option<(OwnedFd, OwnedFd)>; InputKind::ALL.len()],
}

/// Where they meet; one for each virtual machine.
#[derive(Default)]
pub struct Joint(Mutex<Ends>);

impl std::fmt::Debug for Joint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Joint")
    }
}

impl Joint {
    fn lock(&self) -> MutexGuard<'_, Ends> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new socket for the GPU's process, whose other end the display has been given; none while there is no display.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn draw(&self) -> io::Result<Option<OwnedFd>> {
        let Some(show) = self.lock().display.clone() else { return Ok(None) };
        let (gpus, displays) = UnixStream::pair()?;
        show(displays.into());
        Ok(Some(gpus.into()))
    }

    /// `heed` is told when there is a display that has not been given a socket yet: then it is time to [`Self::draw`].
    pub fn drawn_by(&self, heed: impl Fn() + Send + Sync + 'static) {
        self.lock().gpu = Some(Arc::new(heed));
    }

    /// A display is there, and `show` takes sockets for it.
    pub fn shown_by(&self, show: impl Fn(OwnedFd) + Send + Sync + 'static) {
        let heed = {
            let mut ends = self.lock();
            ends.display = Some(Arc::new(show));
            ends.gpu.clone()
        };
        if let Some(heed) = heed {
            heed();
        }
    }

    /// The display is gone.
    pub fn shown_by_nobody(&self) {
        self.lock().display = None;
    }

    fn typed(&self, kind: InputKind) -> io::Result<(OwnedFd, OwnedFd)> {
        let mut ends = self.lock();
        let slot = InputKind::ALL.iter().position(|known| *known == kind).and_then(|at| ends.typed.get_mut(at));
        let slot = slot.ok_or(io::ErrorKind::NotFound)?;
        if slot.is_none() {
            *slot = Some(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?);
        }
        match slot {
            Some((speaker, hearer)) => Ok((speaker.try_clone()?, hearer.try_clone()?)),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Where the display says what is typed.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn speaker(&self, kind: InputKind) -> io::Result<OwnedFd> {
        self.typed(kind).map(|(speaker, _)| speaker)
    }

    /// Where the device hears it.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn hearer(&self, kind: InputKind) -> io::Result<OwnedFd> {
        self.typed(kind).map(|(_, hearer)| hearer)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    /// Whoever is new is joined with whoever is there, once; what is typed arrives whatever dies.
    #[test]
    fn whoever_is_new_is_joined() {
        let joint = Arc::<Joint>::default();
        assert!(joint.draw().unwrap().is_none(), "nobody shows it");
        let told = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&told);
        joint.drawn_by(move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
        let shown = Arc::new(Mutex::new(Vec::new()));
        let got = Arc::clone(&shown);
        joint.shown_by(move |socket| got.lock().unwrap().push(socket));
        assert_eq!(told.load(Ordering::Relaxed), 1);
        let gpus = joint.draw().unwrap().unwrap();
        rustix::io::write(&gpus, b"picture").unwrap();
        let mut heard = [0; 7];
        rustix::io::read(&shown.lock().unwrap()[0], &mut heard).unwrap();
        assert_eq!(&heard, b"picture");
        joint.shown_by_nobody();
        assert!(joint.draw().unwrap().is_none());

        rustix::io::write(joint.speaker(InputKind::Mouse).unwrap(), b"click").unwrap();
        let mut heard = [0; 16];
        let hearer = joint.hearer(InputKind::Mouse).unwrap();
        assert_eq!(rustix::io::read(hearer, &mut heard).unwrap(), 5);
    }
}
