//! Mistakes on the command line: one line that names the thing and the remedy, status 1, and nothing left behind.

mod process;

use std::path::Path;

use anyhow::Result;
use process::{fails, image};

fn left(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn each_mistake_is_one_line_with_its_remedy_and_leaves_nothing() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let good = image(folder.path(), 1 << 20)?.to_str().unwrap().to_owned();
    std::fs::write(at("odd.img"), vec![0; 1000])?;
    std::fs::write(at("empty.img"), [])?;
    std::fs::write(at("plain"), [])?;
    std::fs::create_dir(at("folder"))?;
    let before = left(folder.path());
    let socket = at("s");
    let deep = at("no/such/folder/s");
    // (what is wrong, arguments, what the line must contain)
    let cases: &[(&str, &[&str], &[&str])] = &[
        ("no image", &["--socket", &socket, "--path", &at("none.img")], &["none.img", "truncate"]),
        ("odd size", &["--socket", &socket, "--path", &at("odd.img")], &["1000 bytes", "truncate -s %512"]),
        ("no bytes", &["--socket", &socket, "--path", &at("empty.img")], &["empty", "truncate"]),
        ("a folder", &["--socket", &socket, "--path", &at("folder")], &["folder", "neither"]),
        ("a device", &["--socket", &socket, "--path", "/dev/null"], &["/dev/null", "neither"]),
        ("odd null", &["--socket", &socket, "--null", "1000"], &["1000 bytes", "512"]),
        ("no folder", &["--socket", &deep, "--path", &good], &["no/such/folder", "choose a path"]),
        ("a file as socket", &["--socket", &at("plain"), "--path", &good], &["plain", "not a socket"]),
        ("no descriptor", &["--vhost-fd", "77", "--path", &good], &["77", "--vhost-fd"]),
        ("no image descriptor", &["--socket", &socket, "--fd", "78"], &["78", "inherited"]),
    ];
    for (name, args, words) in cases {
        let (status, text) = fails(args);
        assert_eq!(status.code(), Some(1), "{name}: {text}");
        assert_eq!(text.lines().count(), 1, "{name}: {text}");
        assert!(text.matches("os error").count() <= 1, "{name} gives its cause twice: {text}");
        for word in *words {
            assert!(text.contains(word), "{name}: {word} is missing in {text}");
        }
    }
    assert_eq!(left(folder.path()), before);
    // Usage errors have status 2.
    for args in [
        &["--socket", &socket][..],
        &["--path", &good][..],
        &["--socket", &socket, "--path", &good, "--null", "1G"][..],
        &["--socket", &socket, "--path", &good, "--num-queues", "0"][..],
        &["--socket", &socket, "--path", &good, "--serial", "more-than-twenty-bytes"][..],
        &["--socket", &socket, "--path", &good, "--frobnicate"][..],
    ] {
        let (status, text) = fails(args);
        assert_eq!(status.code(), Some(2), "{args:?}: {text}");
        assert_eq!(text.lines().count(), 1, "{args:?}: {text}");
        assert!(text.contains("see atoll-blk --help"), "{args:?}: {text}");
    }
    assert_eq!(left(folder.path()), before);
    Ok(())
}

#[test]
fn an_image_on_a_read_only_descriptor_is_not_opened_for_writing() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = image(folder.path(), 1 << 20)?;
    let file = std::fs::File::open(&path)?;
    let socket = folder.path().join("s");
    let output =
        process::with_fds(process::command().arg("--socket").arg(&socket), &[("--fd", file.into())]).output()?;
    let text = String::from_utf8(output.stderr)?;
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("--read-only"), "{text}");
    assert!(!socket.exists());
    Ok(())
}

#[test]
fn a_socket_that_nobody_listens_on_is_replaced_and_one_in_use_is_not() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = image(folder.path(), 1 << 20)?;
    let socket = folder.path().join("device.sock");
    // A predecessor that was killed leaves its file.
    drop(std::os::unix::net::UnixListener::bind(&socket)?);
    let mut blk = process::listen(folder.path(), &["--path", path.to_str().unwrap()])?;
    blk.connect()?;
    let (status, text) = fails(&["--socket", socket.to_str().unwrap(), "--null", "1M"]);
    assert_eq!(status.code(), Some(1));
    assert!(text.contains("another process listens"), "{text}");
    // In order: the file goes with the process.
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(blk.child.id().cast_signed()).unwrap(),
        rustix::process::Signal::TERM,
    )?;
    assert_eq!(blk.end()?.code(), Some(0));
    assert!(!socket.exists());
    Ok(())
}
