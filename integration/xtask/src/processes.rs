//! What the kernel says of processes: who is alive, who is whose child, what memory is theirs.

use anyhow::{Context, Result, bail};
use std::path::Path;
use std::time::{Duration, Instant};

/// Process ids of the children of `parent`, all threads' children included.
pub fn children(parent: u32) -> Vec<u32> {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{parent}/task")) else { return Vec::new() };
    tasks
        .flatten()
        .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<u32>>())
        .collect()
}

/// The children of `parent` whose program is named `name`.
pub fn children_named(parent: u32, name: &str) -> Vec<u32> {
    let named =
        |pid: &u32| std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim_end() == name);
    children(parent).into_iter().filter(named).collect()
}

/// The first child of `parent` whose program is named `name`, as soon as there is one.
pub fn child_named(parent: u32, name: &str, within: Duration) -> Result<u32> {
    let deadline = Instant::now() + within;
    loop {
        match children_named(parent, name).first().copied() {
            Some(pid) => return Ok(pid),
            None if Instant::now() >= deadline => bail!("process {parent} has no child {name} within {within:?}"),
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Processor time so far of a process and of all that descend from it, as far as they live, in nanoseconds.
pub fn processor_ns(pid: u32) -> u64 {
    processor_ns_of(pid, &|_| true)
}

/// The same of those threads whose name `counts`.
pub fn processor_ns_of(pid: u32, counts: &dyn Fn(&str) -> bool) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let named = |folder: &Path| std::fs::read_to_string(folder.join("comm")).is_ok_and(|name| counts(name.trim_end()));
    let own: u64 = tasks
        .map(|task| task.path())
        .filter(|task| named(task))
        .filter_map(|task| std::fs::read_to_string(task.join("schedstat")).ok())
        .filter_map(|stat| stat.split_whitespace().next()?.parse::<u64>().ok())
        .sum();
    own + children(pid).into_iter().map(|child| processor_ns_of(child, counts)).sum::<u64>()
}

/// Whether the process runs (a zombie does not).
pub fn alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|stat| stat.rsplit(')').next().map(|rest| !rest.trim_start().starts_with(['Z', 'X'])))
        .unwrap_or(false)
}

/// Waits until the process is gone.
pub fn wait_gone(pid: u32, within: Duration) -> Result<()> {
    let deadline = Instant::now() + within;
    while alive(pid) {
        if Instant::now() >= deadline {
            bail!("process {pid} is still there after {within:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Sends a signal.
pub fn signal(pid: u32, signal: rustix::process::Signal) -> Result<()> {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid)?).context("process ids are positive")?;
    rustix::process::kill_process(pid, signal)
        .with_context(|| format!("cannot signal process {}", pid.as_raw_nonzero()))
}

/// Proportional set size of a process in KiB, without mappings whose name contains one of `without`.
pub fn pss_kib(pid: u32, without: &[&str]) -> Result<u64> {
    let smaps =
        std::fs::read_to_string(format!("/proc/{pid}/smaps")).with_context(|| format!("no smaps of process {pid}"))?;
    let mut counted = true;
    let mut total = 0;
    for line in smaps.lines() {
        let first = line.split_whitespace().next().unwrap_or_default();
        if !first.ends_with(':') {
            counted = !without.iter().any(|name| line.contains(name));
        } else if counted && let Some(size) = line.strip_prefix("Pss:") {
            total += size.trim().trim_end_matches(" kB").parse::<u64>()?;
        }
    }
    Ok(total)
}
