//! Hosts that lack a layer of the jail, played by a filter that answers for an older kernel or a stricter policy: with
//! --jail=strict there is no device, and the message names layer and remedy; else what is missing is told, once.
#![allow(unsafe_code, reason = "a filter is put on between fork and exec")]

use std::io;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use atoll_integration::guests::hostile;
use xtask::place;

/// Calls that the host answers with an error.
#[derive(Clone, Copy)]
struct Lacks {
    call: libc::c_long,
    errno: libc::c_int,
}

const OLD_KERNEL: Lacks = Lacks { call: libc::SYS_landlock_create_ruleset, errno: libc::ENOSYS };
const NO_NAMESPACES: Lacks = Lacks { call: libc::SYS_unshare, errno: libc::EPERM };

impl Lacks {
    /// Has `command` run on such a host.
    fn around(self, command: &mut Command) -> &mut Command {
        let op = |code: u32, k: u32, jt, jf| libc::sock_filter { code: code as u16, jt, jf, k };
        let program = [
            // The number of the call, then: is it this one?
            op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
            op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, self.call as u32, 0, 1),
            op(libc::BPF_RET, libc::SECCOMP_RET_ERRNO | self.errno.cast_unsigned(), 0, 0),
            op(libc::BPF_RET, libc::SECCOMP_RET_ALLOW, 0, 0),
        ];
        let enter = move || {
            let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
            // SAFETY: the program is there; both calls change this process alone.
            let done = unsafe {
                libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                    && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) == 0
            };
            if done { Ok(()) } else { Err(io::Error::last_os_error()) }
        };
        // SAFETY: it makes two system calls and allocates nothing.
        unsafe { command.pre_exec(enter) }
    }
}

/// A process by itself: it ends with one line, or serves and says what is missing.
#[test]
fn a_process_says_what_its_host_lacks() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for (lacks, layer, remedy) in [
        (OLD_KERNEL, "landlock-files (kernel-lacks-it)", "CONFIG_SECURITY_LANDLOCK"),
        (NO_NAMESPACES, "network-namespace (not-permitted)", "user.max_user_namespaces"),
    ] {
        let socket = folder.path().join("rng.sock");
        let rng = |mode: &str| -> Result<Command> {
            let mut command = Command::new(place::program("atoll-rng")?);
            command.arg("--socket").arg(&socket).arg(format!("--jail={mode}"));
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
            lacks.around(&mut command);
            Ok(command)
        };
        let refused = rng("strict")?.output()?;
        let errors = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(1), "{errors}");
        assert!(errors.contains(layer) && errors.contains(remedy) && errors.trim().lines().count() == 1, "{errors}");

        let mut serving = rng("default")?.spawn()?;
        let deadline = Instant::now() + Duration::from_secs(20);
        while UnixStream::connect(&socket).is_err() {
            assert!(Instant::now() < deadline, "it never listened");
            std::thread::sleep(Duration::from_millis(5));
        }
        // It has said so before it takes a front end; that it serves is another test's business.
        std::thread::sleep(Duration::from_millis(200));
        serving.kill()?;
        let output = serving.wait_with_output()?;
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert!(said.contains(&format!("the jail lacks {layer}")) && said.contains(remedy), "{said}");
    }
    Ok(())
}

/// The same under a machine: the device is refused by name, and the guest never starts.
#[test]
fn a_strict_machine_refuses_the_device_by_name() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let kernel = folder.path().join("guest.elf");
    std::fs::write(&kernel, hostile::triple_fault()?)?;
    let mut command = Command::new(place::program("atoll")?);
    command.args(["run", "--cpu", "soft", "--memory", "size=64M", "--serial", "null", "--jail", "strict"]);
    command.args(["--rng", "src=/dev/urandom", "--kernel"]).arg(&kernel).stdin(Stdio::null());
    let output = OLD_KERNEL.around(&mut command).output().context("atoll did not start")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && !errors.contains("triple fault"), "{errors}");
    for word in ["_rng0", "--jail=strict", "landlock-files", "CONFIG_SECURITY_LANDLOCK"] {
        assert!(errors.contains(word), "{word} is missing: {errors}");
    }
    Ok(())
}
