//! What a serving process can no longer do.

mod process;

use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result};
use atoll_kit::driver::Options;
use atoll_kit::driver::disk::Kind;
use process::{DATA, Process, image, run};

/// The value of a line in a thread's status.
fn status(task: &std::path::Path, name: &str) -> Result<String> {
    let text = std::fs::read_to_string(task.join("status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)).context("no such line")?;
    Ok(line.trim_start_matches(':').trim().to_owned())
}

#[test]
fn every_thread_is_jailed_and_no_stray_descriptor_is_kept() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = image(folder.path(), 1 << 20)?;
    let socket = folder.path().join("blk.sock");
    // A descriptor that a careless parent lets it inherit: the process must not keep it.
    let stray: OwnedFd = std::fs::File::open("/")?.into();
    let mut command = process::command();
    command.arg("--socket").arg(&socket).arg("--path").arg(&path).args(["--num-queues", "3"]);
    process::keep_open(&mut command, stray.as_raw_fd());
    let mut blk = Process { child: command.spawn()?, socket: Some(socket) };
    let mut driver = blk.driver(Options::default())?;
    assert_eq!(run(&mut driver, Kind::In, 0, &[(DATA, 512)])?.0, 0);
    let process = std::path::PathBuf::from(format!("/proc/{}", blk.child.id()));
    let mut threads = 0;
    for task in std::fs::read_dir(process.join("task"))? {
        let task = task?.path();
        let name = status(&task, "Name")?;
        assert_eq!(status(&task, "NoNewPrivs")?, "1", "{name}");
        assert_eq!(status(&task, "Seccomp")?, "2", "{name}");
        assert_eq!(u64::from_str_radix(&status(&task, "CapEff")?, 16)?, 0, "{name}");
        // The root that it sees is empty.
        if let Ok(mut root) = std::fs::read_dir(task.join("root")) {
            assert!(root.next().is_none(), "{name}");
        }
        threads += 1;
    }
    assert!(threads >= 5, "three queues, signals and the conversation: {threads}");
    let fds = match std::fs::read_dir(process.join("fd")) {
        // Nobody looks into it but root.
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => return Ok(()),
        fds => fds?,
    };
    for fd in fds {
        let target = std::fs::read_link(fd?.path())?;
        assert_ne!(target, std::path::Path::new("/"), "the stray descriptor");
    }
    Ok(())
}
