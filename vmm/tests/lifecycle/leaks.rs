//! What a machine that is gone leaves behind: nothing.

use std::time::{Duration, Instant};

use atoll_vmm::lifecycle::VmControl;

use super::bench::{Bench, count};

fn entries(folder: &str) -> usize {
    std::fs::read_dir(folder).unwrap().count()
}

/// Threads of this process by name, other tests' left out as far as their names tell.
fn threads() -> usize {
    let own = ["vcpu", "relay", "irq-events", "serial"];
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().filter_map(Result::ok);
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
    names.filter(|name| own.iter().any(|own| name.starts_with(own))).count()
}

/// Runs in a process of its own: other tests open and close things beside it.
#[test]
fn machines_leave_nothing_behind() {
    if std::env::var_os("ATOLL_LEAK_CHILD").is_none() {
        let own = std::env::current_exe().unwrap();
        let ended = std::process::Command::new(own)
            .args(["--exact", "leaks::machines_leave_nothing_behind", "--test-threads=1", "--nocapture"])
            .env("ATOLL_LEAK_CHILD", "1")
            .status()
            .unwrap();
        assert!(ended.success());
        return;
    }
    let bench = Bench::new();
    let counts = || (threads(), entries("/proc/self/fd"));
    let once = || {
        bench.control.create(bench.config(count)).unwrap();
        bench.control.boot().unwrap();
        bench.control.pause().unwrap();
        bench.control.delete().unwrap();
    };
    once();
    let before = counts();
    for _ in 0..20 {
        once();
    }
    // A thread that has been joined may be in the list for a moment.
    let deadline = Instant::now() + Duration::from_secs(5);
    while counts() != before && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(counts(), before);
    assert_eq!(before.0, 0);
    bench.finish();
}
