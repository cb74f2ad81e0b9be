//! Each way in which a machine ends, and what its user is told.

use std::path::PathBuf;

use super::kernel::{kernel, obedient, power_off, print};
use super::process::{Running, command, outcome, run};

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// The guest switches itself off: status 0, its text on standard output, the report beside.
#[test]
fn power_off_is_success() {
    let folder = folder();
    let guest = kernel(folder.path(), |code| {
        print(code, "so long\n");
        power_off(code);
    });
    let report = folder.path().join("report");
    let mut command = run(&guest);
    command.arg("--report").arg(&report);
    let end = outcome(command);
    assert_eq!((end.status, end.out.as_str(), end.err.as_str()), (Some(0), "so long\n", ""));
    let report: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(report).unwrap()).unwrap();
    assert_eq!((&report["reason"], &report["cpu"]), (&"power-off".into(), &"soft".into()));
    assert!(report["instructions"].as_u64().unwrap() > 8 && report["run_ns"].as_u64().unwrap() > 0);
}

/// Without `run`, with the output in a file.
#[test]
fn options_alone_mean_run() {
    let folder = folder();
    let guest = kernel(folder.path(), |code| {
        print(code, "to a file\n");
        power_off(code);
    });
    let text = folder.path().join("text");
    let mut command = command();
    command.args(["--cpu", "soft", "--memory", "size=32M", "--kernel"]).arg(&guest);
    command.arg("--serial").arg(format!("file={}", text.display()));
    let end = outcome(command);
    assert_eq!((end.status, end.out.as_str()), (Some(0), ""));
    assert_eq!(std::fs::read_to_string(text).unwrap(), "to a file\n");
}

/// A guest that resets starts again, as often as it likes, in the same process; a machine that is gone leaves neither
/// threads nor descriptors behind.
#[test]
fn reset_starts_again() {
    let folder = folder();
    let mut running = Running::start(run(&obedient(folder.path())));
    let (tasks, descriptors) = (format!("/proc/{}/task", running.pid()), format!("/proc/{}/fd", running.pid()));
    let count = |folder: &str| std::fs::read_dir(folder).unwrap().count();
    assert_eq!(running.line(), "hello\n");
    let before = (count(&tasks), count(&descriptors));
    for _ in 0..20 {
        running.send(b"r");
        assert_eq!(running.line(), "hello\n");
    }
    assert_eq!((count(&tasks), count(&descriptors)), before);
    running.send(b"q");
    assert_eq!(running.end().status, Some(0));
}

fn failing(command: &[u8]) -> String {
    let folder = folder();
    let mut running = Running::start(run(&obedient(folder.path())));
    running.line();
    running.send(command);
    let end = running.end();
    assert_eq!(end.status, Some(1));
    assert_eq!(end.err.lines().count(), 1, "{}", end.err);
    end.err
}

/// A guest that shuts its CPU down ends with one line that says where.
#[test]
fn triple_fault_names_rip() {
    let error = failing(b"t");
    assert!(error.contains("triple fault") && error.contains("rip 0x100"), "{error}");
}

/// So does one that jumps to where nothing is.
#[test]
fn jump_into_nowhere_names_rip() {
    let error = failing(b"j");
    assert!(error.contains("rip 0xd0000000"), "{error}");
}

/// Ctrl-A x ends the machine whatever the guest does; Ctrl-A Ctrl-A reaches it as one Ctrl-A.
#[test]
fn escape_ends_it() {
    let folder = folder();
    let mut running = Running::start(run(&obedient(folder.path())));
    running.line();
    running.send(b"\x01\x01x\x01x");
    assert_eq!(running.end().status, Some(0));
}

/// Names of a process's threads.
fn threads(pid: i32) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let mut names: Vec<String> = tasks
        .filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok())
        .map(|name| name.trim().to_owned())
        .collect();
    names.sort();
    names
}

/// Users pin vCPUs by the names of their threads, in the very process that they have started. The second one waits for
/// the guest to start it, and its waiting must not keep the machine from ending.
#[test]
fn vcpus_are_named_threads() {
    if !std::path::Path::new("/dev/kvm").exists() {
        let allowed = std::env::var_os("ATOLL_ALLOW_SKIP").is_some_and(|value| value == "1");
        assert!(allowed, "/dev/kvm is missing; set ATOLL_ALLOW_SKIP=1 to leave this test out");
        return;
    }
    let folder = folder();
    let mut command = command();
    command.args(["run", "--cpu", "kvm", "--cpus", "boot=2", "--memory", "size=32M", "--kernel"]);
    command.arg(obedient(folder.path()));
    let mut running = Running::start(command);
    running.line();
    let vcpus: Vec<_> = threads(running.pid()).into_iter().filter(|name| name.starts_with("vcpu")).collect();
    assert_eq!(vcpus, ["vcpu0", "vcpu1"]);
    running.send(b"q");
    assert_eq!(running.end().status, Some(0));
}

/// A long script on standard input reaches the guest whole, however slowly it reads.
#[test]
fn piped_input_is_not_lost() {
    let folder = folder();
    let mut running = Running::start(run(&obedient(folder.path())));
    running.line();
    // The guest ignores all but the last byte; 20,000 of them do not fit into any buffer on the way.
    let mut script = vec![b'.'; 20_000];
    script.push(b'q');
    running.send(&script);
    drop(running.stdin.take());
    assert_eq!(running.end().status, Some(0));
}

/// A signal that asks for an end gets one: the machine stops, devices are taken down, the status says which signal.
#[test]
fn sigterm_is_a_clean_stop() {
    let folder = folder();
    let report: PathBuf = folder.path().join("report");
    let mut command = run(&obedient(folder.path()));
    command.arg("--report").arg(&report);
    let running = Running::start(command);
    running.line();
    let pid = rustix::process::Pid::from_raw(running.pid()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(running.end().status, Some(128 + 15));
    assert!(std::fs::read_to_string(report).unwrap().contains("signal 15"));
}

/// Time comes from retired instructions: two runs agree to the last register, and another guest's run differs.
#[test]
fn deterministic_runs_are_identical() {
    let folder = folder();
    let run_of = |text: &str| {
        let guest = kernel(folder.path(), |code| {
            print(code, text);
            power_off(code);
        });
        let report = folder.path().join("report");
        let mut command = run(&guest);
        command.arg("--deterministic").arg("--report").arg(&report);
        assert_eq!(outcome(command).status, Some(0));
        let report: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(report).unwrap()).unwrap();
        report["trace_hash"].as_str().unwrap().to_owned()
    };
    let first = run_of("same\n");
    assert_eq!(run_of("same\n"), first);
    assert_ne!(run_of("other\n"), first);
}
