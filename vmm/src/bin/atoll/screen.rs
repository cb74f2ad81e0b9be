//! `display`, `screenshot`, `record` and `resize-display`.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use atoll_vmm::api::Method;
use atoll_vmm::config::Mode;
use serde_json::json;

use crate::operate::{print, print_json};
use crate::signals;
use crate::target::{Machine, ROOT};

/// Where to look.
pub(crate) fn display(name: &str, as_json: bool) -> anyhow::Result<()> {
    let place = Machine::find(name)?.get("vm.display")?;
    if as_json {
        return print_json(&place);
    }
    let lines = [("page", "url"), ("vnc", "vnc"), ("password", "password")];
    let told: String =
        lines.iter().filter_map(|(label, key)| Some(format!("{label:<9}{}\n", place.get(*key)?.as_str()?))).collect();
    print(if told.is_empty() {
        "nobody can connect: atoll screenshot takes pictures, and --display web=127.0.0.1:0 has a page\n"
    } else {
        &told
    })
}

/// A picture of a head.
pub(crate) fn screenshot(name: &str, head: u32, out: &Path) -> anyhow::Result<()> {
    let picture = Machine::find(name)?.bytes(&format!("vm.screenshot/{head}"))?;
    let mut file = File::create(out).with_context(|| format!("cannot write {}", out.display()))?;
    file.write_all(&picture).with_context(|| format!("cannot write {}", out.display()))
}

/// A recording, until it is long enough or Ctrl-C.
pub(crate) fn record(name: &str, head: u32, seconds: Option<u32>, out: &Path) -> anyhow::Result<()> {
    // What is written is read again when it is ended. It is emptied when the recording begins: one that is refused leaves the
    // file as it is.
    let is_new = !out.exists();
    let file = File::options().read(true).write(true).create(true).truncate(false).open(out);
    let file = file.with_context(|| format!("cannot write {}", out.display()))?;
    if let Err(error) = begin_record(name, head, &file) {
        if is_new {
            // Nothing was recorded. What cannot be removed is empty.
            let _ = std::fs::remove_file(out);
        }
        return Err(error);
    }
    let deadline = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds.into()));
    loop {
        let left =
            deadline.map_or(Duration::from_secs(1), |deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_zero() || signals::wait(Some(left.min(Duration::from_secs(1)))).is_some() {
            break;
        }
        if !still_recorded(name, head) {
            break;
        }
    }
    stop_record(name, head)
}

fn begin_record(name: &str, head: u32, file: &File) -> anyhow::Result<()> {
    signals::block()?;
    let mut client = Machine::find(name)?.into_client();
    let (path, body) = (format!("{ROOT}/vm.record"), json!({ "head": head }));
    client.request_with(Method::Put, &path, Some(&body), &[file.as_fd()])?.json()?;
    Ok(())
}

/// Whether a recording goes on, as far as the machine says.
fn still_recorded(name: &str, head: u32) -> bool {
    let told = Machine::find(name).and_then(|mut machine| machine.get("vm.display"));
    // One that says nothing of it, or is busy, is asked again: the end of the recording says how it went.
    let heads = told.ok().and_then(|told| told.get("recorded")?.as_array().cloned());
    heads.is_none_or(|heads| heads.iter().any(|recorded| *recorded == head))
}

/// The end of a recording.
pub(crate) fn stop_record(name: &str, head: u32) -> anyhow::Result<()> {
    let told = Machine::find(name)?.put("vm.stop-record", Some(&json!({ "head": head })))?.unwrap_or_default();
    print(&format!("{} pictures\n", told["frames"]))
}

/// Another size for a head.
pub(crate) fn resize(name: &str, head: u32, mode: Mode) -> anyhow::Result<()> {
    let body = json!({ "head": head, "width": mode.width, "height": mode.height });
    Machine::find(name)?.put("vm.resize-display", Some(&body)).map(drop)
}
