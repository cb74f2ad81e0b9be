//! What may follow on what, and what is told about it.

use atoll_vmm::config::{DeviceConfig, DiskConfig, VmConfig};
use atoll_vmm::lifecycle::{ErrorKind, VmControl, VmState};
use atoll_vmm::machine::{MachineEnd, NewSize, StopCause};

use super::bench::{Bench, chatter, count, farewell};

/// The whole life of a machine, in the words of Cloud Hypervisor's event monitor.
#[test]
fn a_life_is_told() {
    let bench = Bench::new();
    let control = &bench.control;
    let state = || control.info().unwrap().state;
    control.create(bench.config(count)).unwrap();
    assert_eq!(state(), VmState::Created);
    control.boot().unwrap();
    assert_eq!(state(), VmState::Running);
    control.pause().unwrap();
    assert_eq!(state(), VmState::Paused);
    control.resume().unwrap();
    control.reset().unwrap();
    assert_eq!(state(), VmState::Running);
    control.shutdown().unwrap();
    assert_eq!(state(), VmState::Shutdown);
    control.boot().unwrap();
    control.delete().unwrap();
    assert_eq!(control.info().unwrap_err().kind, ErrorKind::NotFound);
    let told: Vec<_> = (0..13).map(|_| bench.event()).collect();
    let words =
        "booting booted pausing paused resuming resumed rebooting rebooted shutdown booting booted shutdown deleted";
    let expected: Vec<_> = words.split(' ').map(|word| format!("vm {word}")).collect();
    assert_eq!(told, expected);
    assert_eq!(bench.finish().end, MachineEnd::Asked);
}

/// A request that does not fit the state says what would; nothing changes.
#[test]
fn wrong_states_are_told_with_a_remedy() {
    let bench = Bench::new();
    let control = &bench.control;
    let wrong = |result: Result<(), atoll_vmm::lifecycle::VmError>, kind, remedy: &str| {
        let error = result.unwrap_err();
        assert!(error.kind == kind && error.text.contains(remedy), "{error:?}");
    };
    wrong(control.boot(), ErrorKind::NotFound, "vm.create");
    wrong(control.pause(), ErrorKind::NotFound, "vm.create");
    wrong(control.create(VmConfig::default()), ErrorKind::Bad, "kernel");
    control.delete().unwrap();
    control.create(bench.config(count)).unwrap();
    wrong(control.create(bench.config(count)), ErrorKind::WrongState, "vm.delete");
    wrong(control.resume(), ErrorKind::WrongState, "vm.boot");
    wrong(control.nmi(), ErrorKind::WrongState, "vm.boot");
    control.boot().unwrap();
    wrong(control.boot(), ErrorKind::WrongState, "vm.reboot");
    wrong(control.resume(), ErrorKind::WrongState, "vm.pause");
    control.pause().unwrap();
    wrong(control.pause(), ErrorKind::WrongState, "vm.resume");
    wrong(control.power_button(), ErrorKind::WrongState, "vm.resume");
    wrong(
        control.resize_disk("_disk7", NewSize { bytes: 1 << 20, allow_shrink: false }),
        ErrorKind::NotFound,
        "_disk7",
    );
    control.shutdown().unwrap();
    wrong(control.shutdown(), ErrorKind::WrongState, "vm.boot");
    bench.finish();
}

/// A machine that cannot be built leaves the state as it was, and can be mended.
#[test]
fn a_failed_boot_leaves_a_configuration() {
    let bench = Bench::new();
    let control = &bench.control;
    let mut config = bench.config(farewell);
    config.disks = Some(vec![DiskConfig { path: Some(bench.folder().join("missing")), ..DiskConfig::default() }]);
    control.create(config).unwrap();
    let error = control.boot().unwrap_err();
    assert!(error.kind == ErrorKind::Failed && error.text.contains("missing"), "{error:?}");
    let info = control.info().unwrap();
    assert_eq!((info.state, info.config.disks.unwrap()[0].id.as_deref()), (VmState::Created, Some("_disk0")));
    control.remove_device("_disk0").unwrap();
    assert_eq!(control.info().unwrap().config.disks, None);
    let disk = DiskConfig { path: Some("x".into()), ..DiskConfig::default() };
    assert_eq!(control.add_device(DeviceConfig::Disk(disk)).unwrap(), None);
    control.remove_device("_disk0").unwrap();
    control.boot().unwrap();
    assert_eq!(bench.end().end, MachineEnd::PowerOff);
}

/// A guest that switches itself off ends the process's only machine, however it was created; so does a signal, and a
/// handle that is dropped.
#[test]
fn ends() {
    let bench = Bench::new();
    bench.boot(bench.config(farewell));
    assert_eq!([bench.event(), bench.event(), bench.event()], ["vm shutdown", "vm deleted", "vmm shutdown"]);
    let text = bench.text();
    let end = bench.end();
    assert!(end.end == MachineEnd::PowerOff && end.figures.instructions > 8, "{end:?}");
    drop(text);

    let bench = Bench::new();
    bench.boot(bench.config(chatter));
    bench.control.stop(StopCause::Signal(15));
    assert_eq!(bench.end().end, MachineEnd::Stopped(StopCause::Signal(15)));
}

/// The tree shows each part by its path.
#[test]
fn inspect_shows_parts() {
    let bench = Bench::new();
    bench.boot(bench.config(count));
    let control = &bench.control;
    let first = control.inspect("vcpus/vcpu0/instructions").unwrap().as_u64().unwrap();
    let phase = control.inspect("vcpus/vcpu0/phase").unwrap();
    assert_eq!((phase, control.inspect("state").unwrap()), ("running".into(), "Running".into()));
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert!(control.counters().unwrap()["vcpu0"]["instructions"] > first);
    assert_eq!(control.inspect("actors/machine/waiting").unwrap(), 0);
    assert!(control.inspect("actors/vmm.supervisor/capacity").unwrap().as_u64().unwrap() > 0);
    // Everybody who has a mailbox is there, with all that is known of it.
    let actors = control.inspect("actors").unwrap();
    for name in ["machine", "listener0", "spawner", "vmm.supervisor"] {
        let about = |key: &str| &actors[name][key];
        assert!(about("waiting").is_u64() && about("full").is_u64() && about("state").is_string(), "{name}: {actors}");
        assert!(about("capacity").as_u64() > Some(0) && about("generation") == 1, "{name}: {actors}");
    }
    let error = control.inspect("vcpus/vcpu9").unwrap_err();
    assert!(error.kind == ErrorKind::NotFound && error.text.contains("vcpu9"), "{error:?}");
    bench.finish();
}
