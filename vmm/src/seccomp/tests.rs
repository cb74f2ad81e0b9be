//! A forbidden call ends the process, so each is made in a child: this test's binary, started again.

use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use super::*;

const VARIABLE: &str = "ATOLL_TEST_SECCOMP";

/// In the child: puts a filter on a thread and does what the variable says.
fn act(part: &str) {
    let (class, deed) = part.split_once(' ').expect("a class and a deed");
    let class = ThreadClass::ALL.into_iter().find(|known| known.name() == class).expect("a class");
    choose(Mode::Enforce).expect("filters");
    let deed = deed.to_owned();
    let thread = std::thread::Builder::new().name("vcpu7".into()).spawn(move || {
        enter(class);
        match deed.as_str() {
            "socket" => drop(std::net::TcpListener::bind("127.0.0.1:0")),
            "open" => assert_eq!(std::fs::File::open("/etc/hostname").is_ok(), class == ThreadClass::Device),
            "remove" => drop(std::fs::remove_file("/nonexistent")),
            "exec" => drop(Command::new("/bin/true").status()),
            "thread" => std::thread::spawn(|| vec![1_u8; 1 << 20].len()).join().map(drop).expect("a thread"),
            _ => {}
        }
    });
    thread.expect("a thread").join().expect("no panic");
}

fn child(part: &str) -> (std::process::ExitStatus, String) {
    let mut command = Command::new(std::env::current_exe().expect("a name"));
    command.args(["--exact", "seccomp::tests::forbidden_calls_end_the_process_with_a_word", "--nocapture"]);
    let output = command.env(VARIABLE, part).output().expect("a child");
    (output.status, String::from_utf8_lossy(&output.stderr).into_owned())
}

/// What a class may not do ends the process, and its last words name the thread and the call; what it may is done, also by
/// a thread that it starts.
#[test]
fn forbidden_calls_end_the_process_with_a_word() {
    if let Ok(part) = std::env::var(VARIABLE) {
        return act(&part);
    }
    for part in [
        "soft-vcpu socket",
        "soft-vcpu remove",
        "events exec",
        "talk remove",
        "line socket",
        "operator socket",
        "operator exec",
        "device exec",
    ] {
        let (status, errors) = child(part);
        assert_eq!(status.signal(), Some(libc::SIGSYS), "{part}: {status}: {errors}");
        // The C library starts a program with all signals blocked: then there are no last words.
        let (class, deed) = part.split_once(' ').expect("a class and a deed");
        let call = if deed == "socket" { "socket, number 41" } else { "unlink, number 87" };
        let told = errors.contains(&format!("the thread vcpu7 (class {class}) made system call {call}"));
        assert!(told || part.ends_with("exec"), "{part}: {errors}");
    }
    for part in [
        "soft-vcpu thread",
        "soft-vcpu open",
        "kvm-vcpu nothing",
        "operator open",
        "operator remove",
        "device open",
        "device thread",
    ] {
        let (status, errors) = child(part);
        assert!(status.success(), "{part}: {status}: {errors}");
    }
}
