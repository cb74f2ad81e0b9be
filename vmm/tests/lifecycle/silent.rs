//! Somebody else's backend that takes a connection and says nothing keeps nobody waiting but who asked for it.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

use atoll_vmm::config::{DeviceConfig, DiskConfig};
use atoll_vmm::lifecycle::{ErrorKind, Plugged, VmControl, VmError, VmState};

use super::bench::{Bench, PATIENCE, count};

/// What the most impatient client gives a machine for a pause, or for a word about itself.
const BUDGET: Duration = Duration::from_secs(1);

/// A backend that never answers.
struct Silent {
    path: PathBuf,
    listener: UnixListener,
}

impl Silent {
    fn new(bench: &Bench, name: &str) -> Self {
        let path = bench.folder().join(name);
        Self { listener: UnixListener::bind(&path).unwrap(), path }
    }

    fn disk(&self, id: &str) -> DiskConfig {
        let (id, vhost_socket) = (Some(id.to_owned()), Some(self.path.clone()));
        DiskConfig { id, vhost_user: true, vhost_socket, ..DiskConfig::default() }
    }

    /// Waits until somebody has come; nobody is answered.
    fn taken(&self) -> UnixStream {
        self.listener.accept().unwrap().0
    }
}

/// Does something on a thread of its own; what comes of it.
fn meanwhile<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
    let (told, outcome) = channel();
    std::thread::spawn(move || told.send(act()));
    outcome
}

fn add(bench: &Bench, disk: DiskConfig) -> Receiver<Result<Option<Plugged>, VmError>> {
    let control = Arc::clone(&bench.control);
    meanwhile(move || control.add_device(DeviceConfig::Disk(disk)))
}

/// Within the budget; the best of three, as this machine may have other things to do.
fn prompt(what: &str, act: impl Fn()) {
    let best = (0..3).map(|_| {
        let start = Instant::now();
        act();
        start.elapsed()
    });
    let best = best.min().unwrap();
    assert!(best < BUDGET, "{what} took {best:?}");
}

/// The whole story of a device that never comes: everybody else is answered, name and place are kept for it and given
/// back, and the request fails by name.
#[test]
fn a_plug_that_hangs_keeps_nobody_waiting() {
    let bench = Bench::new();
    bench.boot(bench.config(count));
    let silent = Silent::new(&bench, "silent.sock");
    let adding = add(&bench, silent.disk("mute"));
    let line = silent.taken();
    let control = &bench.control;
    prompt("info, inspect and metrics", || {
        assert_eq!(control.info().unwrap().state, VmState::Running);
        assert_eq!(control.inspect("coming").unwrap(), serde_json::json!(["mute"]));
        assert!(control.metrics().unwrap().contains("atoll_vcpu"));
        assert!(control.devices().unwrap().is_empty());
    });
    prompt("pause and resume", || {
        control.pause().unwrap();
        control.resume().unwrap();
    });
    let kind = |result: Result<(), VmError>| result.unwrap_err().kind;
    assert_eq!(kind(control.add_device(DeviceConfig::Disk(silent.disk("mute"))).map(drop)), ErrorKind::Duplicate);
    assert_eq!(kind(control.remove_device("mute")), ErrorKind::WrongState);
    assert_eq!(adding.try_recv(), Err(TryRecvError::Empty), "all that was answered while it was waited for");
    let error = adding.recv_timeout(PATIENCE).unwrap().unwrap_err();
    assert!(error.kind == ErrorKind::Failed && error.text.contains("within 5 s"), "{error}");
    assert!(error.text.contains("mute") && error.text.contains("silent.sock"), "{error}");
    assert_eq!(control.inspect("coming").unwrap(), serde_json::json!([]));
    assert_eq!((control.devices().unwrap(), control.info().unwrap().config.disks), (vec![], None));
    drop(line);

    // Whoever switches the machine off waits for nobody, and the next life is as good as the first.
    let adding = add(&bench, silent.disk("mute"));
    let _line = silent.taken();
    control.shutdown().unwrap();
    let error = adding.recv_timeout(PATIENCE).unwrap().unwrap_err();
    assert!(
        error.kind == ErrorKind::WrongState && error.text.contains("mute: the machine was switched off"),
        "{error}"
    );
    control.boot().unwrap();
    assert_eq!((control.info().unwrap().state, control.devices().unwrap()), (VmState::Running, vec![]));
    bench.finish();
}

/// A machine whose device does not come is Created, and can be asked, given up and ended; a request that wants the
/// machine to run waits for it.
#[test]
fn a_boot_that_hangs_can_be_given_up() {
    let bench = Bench::new();
    let silent = Silent::new(&bench, "silent.sock");
    let mut config = bench.config(count);
    config.disks = Some(vec![silent.disk("mute")]);
    bench.control.create(config).unwrap();
    let boot = || {
        let control = Arc::clone(&bench.control);
        meanwhile(move || control.boot())
    };
    let booting = boot();
    let line = silent.taken();
    prompt("info, inspect and metrics", || {
        assert_eq!(bench.control.info().unwrap().state, VmState::Created);
        assert_eq!(bench.control.inspect("state").unwrap(), "Created");
        bench.control.metrics().unwrap();
    });
    let control = Arc::clone(&bench.control);
    let pausing = meanwhile(move || control.pause());
    bench.control.shutdown().unwrap();
    let error = booting.recv_timeout(PATIENCE).unwrap().unwrap_err();
    assert!(error.text.contains("switched off"), "{error}");
    assert_eq!(pausing.recv_timeout(PATIENCE).unwrap().unwrap_err().kind, ErrorKind::WrongState);
    assert_eq!(bench.control.info().unwrap().state, VmState::Created);
    drop(line);

    let booting = boot();
    let _line = silent.taken();
    let error = booting.recv_timeout(PATIENCE).unwrap().unwrap_err();
    assert!(error.kind == ErrorKind::Failed && error.text.contains("within 5 s"), "{error}");

    let booting = boot();
    let _line = silent.taken();
    bench.finish();
    assert!(booting.recv_timeout(PATIENCE).unwrap().is_err());
}
