//! A device process that was taken over by its guest stays in its jail: everything that its kind does not need is refused
//! or ends that process alone, by system call and through its ring.

use std::collections::BTreeMap;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use atoll_integration::hostile::calls::CONTROL;

/// The kinds of processes that have a jail of their own.
const PROFILES: [&str; 13] = [
    "blk",
    "probe",
    "net",
    "net-tap",
    "rng",
    "console",
    "vsock",
    "gpu",
    "gpu-virgl",
    "input",
    "display",
    "uart",
    "generic",
];

/// What a kind of process needs for its work, and may do therefore: the other layers hold what would come of it.
const NEEDED: [(&str, &str); 4] = [
    // Its renderer has a compiler.
    ("gpu-virgl", "make memory code"),
    // It reaches programs of the host at paths of one folder, which is entered by a descriptor.
    ("vsock", "fchdir to a stray directory"),
    ("vsock", "socket, local"),
    // It waits for its lane, its port and its pipe at once.
    ("uart", "epoll"),
];

/// One line of the hostile process' report.
struct Line {
    verdict: String,
    wall: String,
    name: String,
    outcome: String,
}

fn report(profile: &str) -> Result<Vec<Line>> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("secret");
    std::fs::write(&file, "8 bytes.")?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_hostile-backend"));
    let output = command.args(["--profile", profile, "--file"]).arg(&file).output()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{profile}: {}: {errors}", output.status);
    ensure!(std::fs::read(&file)? == b"8 bytes.", "{profile}: the file was reached");
    let text = String::from_utf8(output.stdout)?;
    let line = |text: &str| {
        let mut words = text.split('\t').map(str::to_owned);
        let mut word = || words.next().context("half a line");
        Ok(Line { verdict: word()?, wall: word()?, name: word()?, outcome: word()? })
    };
    text.lines().map(line).collect()
}

/// Each kind, everything, and a table of what came of it. Without a jail the same attempts succeed. What other layers than
/// the filter must hold by themselves they hold on a host that has them all.
#[test]
fn nothing_comes_of_what_a_hostile_process_tries() -> Result<()> {
    let mut table: BTreeMap<String, BTreeMap<&str, String>> = BTreeMap::new();
    let mut breaches = Vec::new();
    let mut tried = 0;
    for profile in PROFILES {
        let lines = report(profile)?;
        let whole = lines.iter().any(|line| line.verdict == "whole" && line.wall == "true");
        let control = lines.iter().filter(|line| line.wall == "no jail").count();
        ensure!(control == CONTROL.len(), "{profile}: {control} attempts were made without a jail");
        for line in lines.iter().filter(|line| line.verdict != "whole") {
            tried += 1;
            if line.wall == "filter" && NEEDED.contains(&(profile, &line.name)) {
                ensure!(line.verdict != "ok", "{profile} does not need {} any more", line.name);
                continue;
            }
            if line.verdict != "ok" && (whole || line.wall != "walls") {
                breaches.push(format!("{profile}: {} ({}): {}", line.name, line.wall, line.outcome));
            }
            table.entry(format!("{} [{}]", line.name, line.wall)).or_default().insert(profile, line.outcome.clone());
        }
    }
    show(&table);
    assert!(breaches.is_empty(), "{} breaches:\n{}", breaches.len(), breaches.join("\n"));
    assert!(tried > 1000, "only {tried} attempts were made");
    Ok(())
}

#[allow(clippy::print_stdout, reason = "the table")]
fn show(table: &BTreeMap<String, BTreeMap<&str, String>>) {
    println!("{:<44}{}", "attempt [held by]", PROFILES.map(|profile| format!("{profile:<13}")).concat());
    for (name, outcomes) in table {
        let cells = PROFILES.map(|profile| format!("{:<13}", outcomes.get(profile).map_or("-", String::as_str)));
        println!("{name:<44}{}", cells.concat());
    }
}
