//! `vfio`: which PCI devices of the host a guest can have, and giving them to VFIO and back.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use anyhow::Context;
use atoll_vmm::passthrough::{self, Bdf, Caller, Finding, Host, Report, SysfsHands, Verdict};

use crate::operate::{print, print_json};
use crate::table::{bytes, table};

/// Where it is kept who drove a function before; it means nothing after the host's next start.
const RECORDS: &str = "/run/atoll-vfio";

fn word(verdict: Verdict, colour: bool) -> String {
    let (word, code) = match verdict {
        Verdict::Ok => ("ok  ", 32),
        Verdict::Warn => ("warn", 33),
        Verdict::Fail => ("FAIL", 31),
    };
    if colour { format!("\x1b[{code}m{word}\x1b[0m") } else { word.into() }
}

/// One function, a point a line, with what to do below those that are not ok.
fn shown(report: &Report, colour: bool) -> String {
    let ready = if report.ready { "ready for a guest" } else { "not ready for a guest" };
    let mut text = format!("{} {} {}: {ready}\n", report.bdf, report.id, report.kind);
    let width = report.findings.iter().map(|finding| finding.topic.name().len()).max().unwrap_or(0);
    for Finding { topic, verdict, found, remedy } in &report.findings {
        text.push_str(&format!("{}  {:<width$}  {found}\n", word(*verdict, colour), topic.name()));
        if let Some(remedy) = remedy {
            text.push_str(&format!("      {:<width$}  -> {remedy}\n", ""));
        }
    }
    text
}

/// All functions, one a line, and what stands in the way of most of them.
fn listed(reports: &[Report]) -> String {
    let heading = ["BDF", "ID", "KIND", "DRIVER", "GROUP", "MEMORY", "READY"].map(str::to_owned).to_vec();
    let row = |report: &Report| {
        let first = report.findings.iter().find(|finding| finding.verdict == Verdict::Fail);
        let memory: u64 = report.bars.iter().filter(|bar| bar.kind != "io").map(|bar| bar.bytes).sum();
        vec![
            report.bdf.to_string(),
            report.id.clone(),
            report.kind.to_owned(),
            report.driver.clone().unwrap_or_else(|| "-".into()),
            report.group.map_or_else(|| "-".into(), |group| group.to_string()),
            if memory == 0 { "-".into() } else { bytes(memory) },
            first.map_or_else(|| "yes".into(), |finding| format!("no: {}", finding.found)),
        ]
    };
    table(&std::iter::once(heading).chain(reports.iter().map(row)).collect::<Vec<_>>(), &[4, 5])
}

/// `vfio check`; the exit status: 0 when the function, or one of all when none was named, is ready.
pub(crate) fn check(bdf: Option<Bdf>, as_json: bool, tree: &Path) -> anyhow::Result<u8> {
    let (host, caller) = (Host::look(tree)?, Caller::this());
    let Some(bdf) = bdf else {
        // Bridges are the host's whatever one does.
        let devices = host.functions.values().filter(|function| !function.is_bridge());
        let reports: Vec<Report> =
            devices.map(|function| passthrough::check(&host, function.bdf, &caller)).collect::<Result<_, _>>()?;
        if as_json {
            print_json(&reports)?;
        } else {
            print(&listed(&reports))?;
        }
        return Ok(u8::from(!reports.iter().any(|report| report.ready)));
    };
    let report = passthrough::check(&host, bdf, &caller)?;
    if as_json {
        print_json(&report)?;
    } else {
        print(&shown(&report, std::io::stdout().is_terminal()))?;
    }
    Ok(u8::from(!report.ready))
}

/// `vfio record`.
pub(crate) fn record(folder: &Path) -> anyhow::Result<()> {
    let done = passthrough::record(Path::new("/"), folder)?;
    let (shown, functions) = (folder.display(), done.functions);
    let mut text = format!("{functions} functions are written down in {shown}: atoll vfio check --tree {shown}\n");
    if let Some(first) = done.unreadable.first() {
        let (count, first) = (done.unreadable.len(), first.display());
        text.push_str(&format!("{count} files could not be read, {first} among them: as root there would be more\n"));
    }
    print(&text)
}

/// `vfio bind`.
pub(crate) fn bind(bdf: Bdf) -> anyhow::Result<()> {
    let host = Host::look(Path::new("/"))?;
    let before = passthrough::bind(&host, bdf, &PathBuf::from(RECORDS), &mut SysfsHands)
        .with_context(|| format!("{bdf} was not bound"))?;
    let was = before.driver.as_deref().unwrap_or("nothing");
    print(&format!("{bdf} is bound to vfio-pci; {was} drove it. atoll vfio unbind {bdf} gives it back.\n"))
}

/// `vfio unbind`.
pub(crate) fn unbind(bdf: Bdf) -> anyhow::Result<()> {
    let host = Host::look(Path::new("/"))?;
    let driver = passthrough::unbind(&host, bdf, &PathBuf::from(RECORDS), &mut SysfsHands)
        .with_context(|| format!("{bdf} was not given back"))?;
    let now = driver.map_or_else(|| "nothing drives it".to_owned(), |driver| format!("{driver} drives it"));
    print(&format!("{bdf} is the host's again; {now}.\n"))
}
