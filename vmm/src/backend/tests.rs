//! Stories of real child processes. The child is this test binary again: [`played_backend`] plays the part that its
//! environment names.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use atoll_protocol::sidecar::{
    DeviceClass, GoodbyeReason, LogLevel, QueueProgress, SidecarFeatures, SidecarOrder, SidecarReport,
};
use atoll_protocol::{DeviceId, FrameSocket, Generation, PROTOCOL_VERSION, ProcessId, QueueIndex};
use tokio::sync::mpsc;

use super::*;
use crate::actor::{RealClock, Tree};

const PART: &str = "ATOLL_TEST_PART";
const PATIENCE: Duration = Duration::from_secs(20);

fn spec(part: &str, generation: u64) -> BackendSpec {
    let limits =
        WatchLimits { ready: PATIENCE, progress: Duration::from_millis(20), stall: Duration::from_millis(200) };
    BackendSpec {
        name: "disk0".into(),
        device: DeviceId(1),
        generation: Generation(generation),
        class: DeviceClass::Block,
        exe: std::env::current_exe().expect("this binary"),
        // The flags of descriptors come after the dashes, where the test harness takes them for further names.
        args: ["backend::tests::played_backend", "--exact", "--nocapture", "--test-threads=1", "--"]
            .map(OsString::from)
            .to_vec(),
        env: vec![(PART.into(), part.into())],
        fds: Vec::new(),
        beside: false,
        limits,
    }
}

fn spawner() -> Spawner {
    Spawner::new(Arc::new(RealClock::new())).expect("a thread")
}

fn next(events: &mut mpsc::Receiver<BackendEvent>) -> EventKind {
    events.blocking_recv().expect("the last event is an exit").kind
}

fn exit(events: &mut mpsc::Receiver<BackendEvent>) -> BackendExit {
    loop {
        if let EventKind::Exited(exit) = next(events) {
            return exit;
        }
    }
}

fn passed_number(flag: &str) -> Option<RawFd> {
    let mut arguments = std::env::args().skip_while(|argument| argument != flag);
    arguments.nth(1)?.parse().ok()
}

/// The other side of all stories here; nothing unless a test started it.
#[test]
#[allow(unsafe_code, reason = "a descriptor that was passed by number")]
#[allow(clippy::print_stderr, reason = "it plays a process that writes to its standard error")]
fn played_backend() {
    let Ok(part) = std::env::var(PART) else { return };
    // SAFETY: the number was passed to this process as one that it owns, and is taken once.
    let take = |flag| unsafe { OwnedFd::from_raw_fd(passed_number(flag).expect("a number")) };
    let mut sidecar = FrameSocket::new(take("--sidecar-fd"));
    let say = |sidecar: &mut FrameSocket, report: &SidecarReport| {
        sidecar.writer.send(report, &[], PATIENCE).expect("the VMM listens");
    };
    let hello = SidecarReport::Hello {
        version: PROTOCOL_VERSION,
        class: DeviceClass::Block,
        pid: ProcessId(std::process::id()),
        features: SidecarFeatures::PROGRESS,
    };
    match part.as_str() {
        "silent" => loop {
            std::thread::park();
        },
        "dies at once" => {
            eprintln!("cannot open the frobnicator");
            eprintln!("giving up");
            std::process::exit(3);
        }
        _ => {}
    }
    say(&mut sidecar, &hello);
    let start: SidecarOrder = sidecar.reader.receive_message(Some(PATIENCE)).expect("an order");
    let SidecarOrder::Start { generation, .. } = start else { panic!("{start:?}") };
    if part == "never ready" {
        loop {
            std::thread::park();
        }
    }
    if part == "bad config" {
        let reason = GoodbyeReason::Config("no such file: give the disk another path".into());
        say(&mut sidecar, &SidecarReport::Goodbye { reason });
        std::process::exit(1);
    }
    if part == "checks descriptors" {
        // What is inherited is what was named: the sidecar, the passed file, the standard streams. The folder itself is
        // open while it is listed.
        let open = std::fs::read_dir("/proc/self/fd").expect("proc").count();
        let mut file = std::fs::File::from(take("--fd"));
        write!(file, "{open}").expect("written");
        let environment = std::env::vars_os().count();
        write!(file, " {environment}").expect("written");
    }
    say(&mut sidecar, &SidecarReport::Ready { generation });
    if part == "floods" {
        let queues: Vec<_> =
            (0..256).map(|queue| QueueProgress { queue: QueueIndex(queue), completed: 1, in_flight: 0 }).collect();
        let text = "x".repeat(atoll_protocol::sidecar::TEXT_MAX);
        // Until it is killed; what the VMM does not take waits here.
        loop {
            let _ = sidecar.writer.send(&SidecarReport::Progress { queues: queues.clone() }, &[], PATIENCE);
            let _ =
                sidecar.writer.send(&SidecarReport::Log { level: LogLevel::Info, text: text.clone() }, &[], PATIENCE);
            let _ = sidecar.writer.send(&SidecarReport::Pong { nonce: 7 }, &[], PATIENCE);
        }
    }
    say(&mut sidecar, &SidecarReport::Log { level: LogLevel::Info, text: "serving".into() });
    let mut completed = 0;
    loop {
        let in_flight = u32::from(part == "stalls");
        completed += u64::from(part != "stalls");
        let queues = vec![QueueProgress { queue: QueueIndex(0), completed, in_flight }];
        say(&mut sidecar, &SidecarReport::Progress { queues });
        match sidecar.reader.receive_message::<SidecarOrder>(Some(Duration::from_millis(20))) {
            Err(atoll_protocol::SocketError::Timeout(_)) => {}
            Ok(SidecarOrder::Exit) if part == "ignores exit" => {}
            Ok(SidecarOrder::Exit) => {
                say(&mut sidecar, &SidecarReport::Goodbye { reason: GoodbyeReason::Asked });
                std::process::exit(0);
            }
            Ok(SidecarOrder::Quiesce) => say(&mut sidecar, &SidecarReport::Quiesced),
            Ok(SidecarOrder::Ping { nonce }) => say(&mut sidecar, &SidecarReport::Pong { nonce }),
            Ok(other) => panic!("{other:?}"),
            Err(_) => std::process::exit(4),
        }
        if part == "talks nonsense" {
            say(&mut sidecar, &SidecarReport::Ready { generation: generation.next() });
        }
    }
}

/// The whole life of a well-behaved backend: ready, progress, ping, quiesce, told to end.
#[test]
fn life_of_a_backend() {
    let spawner = spawner();
    let (sink, mut events) = mpsc::channel(64);
    let child = spawner.spawn(spec("serves", 1), sink).expect("started");
    assert_eq!(next(&mut events), EventKind::Ready { features: SidecarFeatures::PROGRESS, jail: Vec::new() });
    child.order(&SidecarOrder::Ping { nonce: 7 }).expect("sent");
    child.order(&SidecarOrder::Quiesce).expect("sent");
    let mut heard = Vec::new();
    while heard.len() < 2 {
        match next(&mut events) {
            // On a busy machine its reports may be late.
            EventKind::Progress { .. } | EventKind::Stalled { .. } => {}
            other => heard.push(other),
        }
    }
    assert_eq!(heard, [EventKind::Pong { nonce: 7 }, EventKind::Quiesced]);
    child.stop(PATIENCE);
    let exit = exit(&mut events);
    assert_eq!((exit.cause, exit.status, exit.was_ready), (ExitCause::Asked, ExitStatus::Code(0), true));
    assert!(events.blocking_recv().is_none(), "the exit is the last event");
}

/// What an operator reads when a backend does not start: each names the thing and the remedy, in one line.
#[test]
fn failures_to_start_are_explained() {
    let spawner = spawner();
    let (sink, _events) = mpsc::channel(64);
    let missing = BackendSpec { exe: "/nonexistent/atoll-blk".into(), ..spec("", 1) };
    let error = spawner.spawn(missing, sink.clone()).expect_err("there is none").to_string();
    assert_eq!(error, "the backend of disk0 is missing: there is no /nonexistent/atoll-blk; install it beside atoll");
    let folder = BackendSpec { exe: "/".into(), ..spec("", 1) };
    let error = spawner.spawn(folder, sink.clone()).expect_err("not executable");
    assert!(matches!(error, SpawnError::Exec { .. }), "{error}");
    // The C library would have a shell run it, with everything that the device was to have.
    let scratch = tempfile::tempdir().unwrap();
    let text = scratch.path().join("text");
    std::fs::write(&text, "touch ran-as-a-script\n").unwrap();
    std::fs::set_permissions(&text, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let error = spawner.spawn(BackendSpec { exe: text, ..spec("", 1) }, sink).expect_err("no program");
    let SpawnError::Exec { source, .. } = error else { panic!("{error}") };
    assert_eq!(source.raw_os_error(), Some(libc::ENOEXEC));

    let quick = |part| {
        let mut spec = spec(part, 1);
        spec.limits.ready = Duration::from_millis(if part == "never ready" { 2000 } else { 300 });
        spec
    };
    let cases = [
        ("dies at once", "ended with exit status 3 before it was ready; its last words: giving up"),
        ("silent", "said nothing within 300 ms and was killed: is its binary a backend of this release?"),
        ("never ready", "was not ready within 2 s and was killed: look at its log"),
        ("bad config", "ended before it was ready: no such file: give the disk another path"),
    ];
    for (part, expected) in cases {
        let (sink, mut events) = mpsc::channel(64);
        let spec = if expected.contains("within") { quick(part) } else { spec(part, 1) };
        spawner.spawn(spec, sink).expect("started");
        let exit = exit(&mut events);
        let said = exit.to_string();
        assert!(said.starts_with(&format!("the process of disk0 {expected}")), "{part}: {said}");
        assert!(!exit.was_ready);
        if part == "dies at once" {
            let lines = exit.last_stderr.iter().filter(|line| line.contains("frobnicator")).count();
            assert_eq!(lines, 1, "the lines before the last are kept as well: {:?}", exit.last_stderr);
        }
    }
}

/// A queue with a request in flight that completes nothing; then the process is stopped and reports nothing: told, not
/// killed. Killed by somebody else, its exit names the signal.
#[test]
fn stalls_are_told_and_a_kill_is_reported() {
    let spawner = spawner();
    let (sink, mut events) = mpsc::channel(64);
    let child = spawner.spawn(spec("stalls", 1), sink).expect("started");
    let wait_stalled = |events: &mut mpsc::Receiver<BackendEvent>, queue| {
        while next(events) != (EventKind::Stalled { queue }) {}
    };
    wait_stalled(&mut events, Some(QueueIndex(0)));
    rustix::process::pidfd_send_signal(&**child.pidfd(), rustix::process::Signal::STOP).expect("it lives");
    wait_stalled(&mut events, None);
    child.kill();
    let exit = exit(&mut events);
    assert_eq!((exit.cause, exit.status), (ExitCause::Unknown, ExitStatus::Signal(9)));
}

/// A child that says what cannot be right is killed; one that will not end is killed after its grace.
#[test]
fn wrong_and_stubborn_children_are_killed() {
    let spawner = spawner();
    let (sink, mut events) = mpsc::channel(64);
    spawner.spawn(spec("talks nonsense", 1), sink).expect("started");
    let wrong = exit(&mut events);
    assert!(matches!(wrong.cause, ExitCause::Wrong(_)), "{wrong}");
    assert_eq!(wrong.status, ExitStatus::Signal(9));

    let (sink, mut events) = mpsc::channel(64);
    let child = spawner.spawn(spec("ignores exit", 1), sink).expect("started");
    next(&mut events);
    child.stop(Duration::from_millis(50));
    let stubborn = exit(&mut events);
    assert_eq!((stubborn.cause, stubborn.status), (ExitCause::Asked, ExitStatus::Signal(9)));
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("proc");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line");
    line.split_whitespace().next().and_then(|number| number.parse().ok()).expect("a number")
}

/// A child that talks without end to a listener that takes nothing: it fills no memory of the VMM, others are started and
/// heard meanwhile, and it is killed like any other.
#[test]
fn a_flood_is_borne() {
    let spawner = spawner();
    let (sink, deaf) = mpsc::channel(1);
    let noisy = spawner.spawn(spec("floods", 1), sink).expect("started");
    std::thread::sleep(Duration::from_millis(300));
    let before = resident_kib();
    std::thread::sleep(Duration::from_millis(1500));
    let grown = resident_kib().saturating_sub(before);
    assert!(grown < 16 << 10, "{grown} KiB more");
    let (sink, mut events) = mpsc::channel(64);
    let begun = Instant::now();
    let quiet = spawner.spawn(spec("", 1), sink).expect("started");
    assert!(matches!(next(&mut events), EventKind::Ready { .. }));
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    noisy.kill();
    quiet.stop(PATIENCE);
    assert_eq!(exit(&mut events).cause, ExitCause::Asked);
    drop(deaf);
}

/// The child holds what it was passed and nothing else, and the VMM's copy is closed: a pipe whose only writer was
/// passed ends with the child. A listener without room loses nothing but older progress.
#[test]
fn only_named_descriptors_are_inherited() {
    let spawner = spawner();
    // Left open without close-on-exec, as a careless library would.
    let careless = std::fs::File::open("/dev/null").expect("opened");
    rustix::io::fcntl_setfd(&careless, rustix::io::FdFlags::empty()).expect("set");
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let mut spec = spec("checks descriptors", 1);
    spec.fds.push(PassedFd { flag: "--fd".into(), fd: writer.into() });
    let (sink, mut events) = mpsc::channel(1);
    let child = spawner.spawn(spec, sink).expect("started");
    let features = SidecarFeatures::PROGRESS;
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(next(&mut events), EventKind::Ready { features, jail: Vec::new() });
    child.stop(PATIENCE);
    let said = std::io::read_to_string(reader).expect("it ends with the child");
    assert_eq!(said, "6 1", "3 streams, sidecar, file, the listing itself; one variable");
    assert_eq!(exit(&mut events).status, ExitStatus::Code(0));
}

/// The VMM is killed with SIGKILL while two backends run: both are gone.
#[test]
fn children_die_with_a_killed_vmm() {
    if std::env::var(PART).as_deref() == Ok("vmm") {
        return play_vmm();
    }
    let mut vmm = Command::new(std::env::current_exe().expect("this binary"))
        .args(["backend::tests::children_die_with_a_killed_vmm", "--exact", "--nocapture"])
        .env(PART, "vmm")
        .stdout(Stdio::piped())
        .spawn()
        .expect("started");
    let output = BufReader::new(vmm.stdout.take().expect("piped"));
    let pids = output.lines().map_while(Result::ok).find_map(|line| {
        let (_, pids) = line.split_once("children ")?;
        Some(pids.split(' ').map(|pid| pid.parse::<i32>().expect("a number")).collect::<Vec<_>>())
    });
    let pids = pids.expect("it names its children");
    assert_eq!(pids.len(), 2);
    let handles: Vec<_> = pids
        .iter()
        .map(|pid| {
            let pid = rustix::process::Pid::from_raw(*pid).expect("positive");
            rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).expect("it lives")
        })
        .collect();
    vmm.kill().expect("killed");
    vmm.wait().expect("reaped");
    for handle in &handles {
        let mut wait = [rustix::event::PollFd::new(handle, rustix::event::PollFlags::IN)];
        let limit = rustix::event::Timespec { tv_sec: 20, tv_nsec: 0 };
        assert_eq!(rustix::event::poll(&mut wait, Some(&limit)), Ok(1), "a child outlives its VMM");
    }
}

#[allow(clippy::print_stdout, reason = "it plays a process whose children another one must know")]
fn play_vmm() {
    let spawner = spawner();
    // A short-lived thread asks, as tokio's blocking threads are: its end must not end the children.
    let pids: Vec<String> = ["serves", "silent"]
        .map(|part| {
            let spawner = spawner.clone();
            let (sink, _) = mpsc::channel(1);
            let start = move || spawner.spawn(spec(part, 1), sink).expect("started").pid().to_string();
            std::thread::spawn(start).join().expect("no panic")
        })
        .to_vec();
    std::thread::sleep(Duration::from_millis(100));
    println!("children {}", pids.join(" "));
    loop {
        std::thread::park();
    }
}

/// Processes whose command line has `token` in it. One between fork and exec has its parent's.
fn processes_with(token: &str) -> Vec<String> {
    let all = std::fs::read_dir("/proc").expect("processes").flatten();
    all.filter(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        line.windows(token.len()).any(|part| part == token.as_bytes())
    })
    .map(|entry| entry.file_name().to_string_lossy().into_owned())
    .collect()
}

/// The VMM is killed while it does nothing but start children: at any moment between a fork and the end of its exec. However
/// far a child has come, it goes too.
#[test]
fn a_vmm_killed_between_fork_and_exec_leaves_nobody() {
    const NAME: &str = "backend::tests::a_vmm_killed_between_fork_and_exec_leaves_nobody";
    let part = std::env::var(PART).unwrap_or_default();
    if let Some(token) = part.strip_prefix("vmm ") {
        return spawn_for_ever(token);
    }
    for round in 0..25_u32 {
        let token = format!("fork-and-exec-{}-{round}", std::process::id());
        let mut vmm = Command::new(std::env::current_exe().expect("this binary"))
            .args([NAME, "--exact", "--nocapture", "--", &token])
            .env(PART, format!("vmm {token}"))
            .stdout(Stdio::piped())
            .spawn()
            .expect("started");
        let output = BufReader::new(vmm.stdout.take().expect("piped"));
        assert!(output.lines().map_while(Result::ok).any(|line| line.contains("spawning")), "it begins");
        std::thread::sleep(Duration::from_micros(u64::from(round) * 797 % 9000));
        vmm.kill().expect("killed");
        vmm.wait().expect("reaped");
        let deadline = Instant::now() + Duration::from_secs(60);
        while let left @ [_, ..] = &*processes_with(&token) {
            assert!(Instant::now() < deadline, "they outlive their VMM: {left:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

#[allow(clippy::print_stdout, reason = "it plays a process that another one waits for")]
fn spawn_for_ever(token: &str) {
    let spawner = spawner();
    println!("spawning");
    let mut children = Vec::new();
    for generation in 1..200 {
        let mut spec = spec("silent", generation);
        spec.args.push(token.into());
        let (sink, events) = mpsc::channel(1);
        children.push((spawner.spawn(spec, sink).expect("started"), events));
    }
    std::thread::park();
}

/// The end of the VMM in order: everybody is asked, who does not go is killed, nobody is left, nobody new is started.
#[test]
fn shutdown_leaves_nobody() {
    let spawner = spawner();
    let (sink, mut events) = mpsc::channel(1024);
    let children: Vec<_> = [("serves", 1), ("ignores exit", 2)]
        .map(|(part, generation)| spawner.spawn(spec(part, generation), sink.clone()).expect("started"))
        .to_vec();
    let mut ready = 0;
    while ready < 2 {
        ready += u32::from(matches!(next(&mut events), EventKind::Ready { .. }));
    }
    let start = Instant::now();
    spawner.shutdown(Duration::from_millis(300));
    assert!(start.elapsed() >= Duration::from_millis(300));
    for child in &children {
        let gone = rustix::process::pidfd_send_signal(&**child.pidfd(), rustix::process::Signal::KILL);
        assert_eq!(gone, Err(rustix::io::Errno::SRCH));
    }
    assert!(matches!(spawner.spawn(spec("serves", 3), sink), Err(SpawnError::Ending { .. })));
}

#[derive(Default)]
struct Diary {
    lines: Vec<String>,
    child: Option<Child>,
}

/// Restarts as the supervisor says, and writes down what it was told.
struct Restart {
    spawner: Spawner,
    sink: crate::actor::Address<SupervisorMail>,
    diary: Arc<Mutex<Diary>>,
    part: &'static str,
}

impl Restart {
    fn note(&self, line: String) {
        self.diary.lock().expect("no panic").lines.push(line);
    }
}

impl Recovery for Restart {
    fn start(&mut self, generation: Generation) {
        self.note(format!("start {}", generation.0));
        let child = self.spawner.spawn(spec(self.part, generation.0), self.sink.clone()).expect("started");
        self.diary.lock().expect("no panic").child = Some(child);
    }
    fn lost(&mut self, generation: Generation, exit: &BackendExit) -> bool {
        self.note(format!("lost {} by {}", generation.0, exit.status));
        false
    }
    fn quarantine(&mut self, reason: &QuarantineReason) {
        self.note(format!("quarantine {reason:?}"));
    }
    fn stalled(&mut self, _: Generation, _: Option<QueueIndex>) {}
}

/// A backend is killed again and again while it completes requests: each time its successor runs, one generation on, at
/// once. Then it gets a configuration that cannot work: quarantine.
#[test]
fn supervisor_restarts_what_crashes() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
    let clock: Arc<dyn crate::actor::Clock> = Arc::new(RealClock::new());
    let tree = Tree::new("vm", runtime.handle().clone(), |_| {});
    let spawner = Spawner::new(Arc::clone(&clock)).expect("a thread");
    let (supervisor, story) = Supervisor::start(&tree, runtime.handle(), clock);
    let mut story = story.subscribe();
    let diary = Arc::new(Mutex::new(Diary::default()));
    let recovery =
        |part| Restart { spawner: spawner.clone(), sink: supervisor.clone(), diary: Arc::clone(&diary), part };
    let mut first = recovery("serves");
    let config = PolicyConfig { intensity: 2, ..PolicyConfig::default() };
    let adopt = SupervisorMail::Adopt {
        device: DeviceId(1),
        generation: Generation::FIRST,
        config,
        recovery: Box::new(recovery("serves")),
    };
    runtime.block_on(supervisor.tell(adopt)).expect("room");
    first.start(Generation::FIRST);
    let wait_ready = |story: &mut tokio::sync::broadcast::Receiver<_>, generation| {
        use atoll_protocol::lifecycle::LifecycleEvent::DeviceReady;
        while story.blocking_recv().expect("a story") != (DeviceReady { device: DeviceId(1), generation }) {}
    };
    for generation in 1..=4 {
        wait_ready(&mut story, Generation(generation));
        // Let it complete something: more crashes than the intensity allows are forgiven then.
        std::thread::sleep(Duration::from_millis(100));
        let child = diary.lock().expect("no panic").child.take().expect("it runs");
        assert_eq!(child.generation(), Generation(generation));
        child.kill();
    }
    wait_ready(&mut story, Generation(5));
    runtime.block_on(tree.shutdown(Duration::from_secs(5)));
    spawner.shutdown(Duration::from_secs(5));
    let lines = std::mem::take(&mut diary.lock().expect("no panic").lines);
    let expected: Vec<_> = (1..=4)
        .flat_map(|generation| [format!("start {generation}"), format!("lost {generation} by signal 9")])
        .chain(["start 5".to_owned()])
        .collect();
    assert_eq!(lines, expected);
}
