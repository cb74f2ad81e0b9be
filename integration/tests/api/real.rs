//! The same clients against a process: `atoll` without a kernel waits for `vm.create`, lives through its requests and ends
//! with `vmm.shutdown`. One process, many requests; the guest does nothing.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use atoll_integration::guests::idle;
use atoll_integration::processes;
use cloud_hypervisor_client::apis::DefaultApi;
use cloud_hypervisor_client::{models, socket_based_api_client};
use serde_json::{Value, json};
use xtask::place;

use super::strict::{Answer, Strict};

/// What clients allow: libvirt half a second for a card, Kata one for what is quick, five for hotplug, ten for create and
/// boot, three for the end.
const QUICK: Duration = Duration::from_secs(1);
const HOTPLUG: Duration = Duration::from_secs(5);
const BOOT: Duration = Duration::from_secs(10);
const STOP: Duration = Duration::from_secs(3);

/// The process, killed when a test fails.
struct Process {
    child: Child,
    socket: PathBuf,
    events: Option<JoinHandle<Vec<Value>>>,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Process {
    fn start(folder: &Path) -> Result<Self> {
        let socket = folder.join("api.sock");
        let fifo = folder.join("events");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)?;
        let log = std::fs::File::create(folder.join("log"))?;
        let child = Command::new(place::program("atoll")?)
            .args(["run", "-v", "--api-socket"])
            .arg(format!("path={}", socket.display()))
            .args(["--event-monitor", &format!("path={}", fifo.display())])
            .env("XDG_RUNTIME_DIR", folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            // Signals of the terminal in which the tests run are not meant.
            .process_group(0)
            .spawn()?;
        let events = std::thread::spawn(move || {
            let file = std::fs::File::open(fifo).expect("the FIFO");
            serde_json::Deserializer::from_reader(file).into_iter().map(|event| event.expect("whole objects")).collect()
        });
        let process = Self { child, socket, events: Some(events) };
        let deadline = Instant::now() + Duration::from_secs(20);
        while !process.socket.exists() {
            ensure!(Instant::now() < deadline, "no socket: {}", std::fs::read_to_string(folder.join("log"))?);
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(process)
    }

    fn threads(&self) -> Result<Vec<String>> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id()))?;
        let names = tasks.map(|task| Ok(std::fs::read_to_string(task?.path().join("comm"))?.trim().to_owned()));
        names.collect()
    }

    /// Its end, which must be a good one and in time.
    fn ended(&mut self) -> Result<Vec<Value>> {
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            ensure!(begun.elapsed() < STOP, "it did not end in {STOP:?}");
            std::thread::sleep(Duration::from_millis(5));
        };
        ensure!(status.success(), "it ended with {status}");
        let events = self.events.take().context("events are read once")?;
        Ok(events.join().expect("the reader of events"))
    }
}

fn within(budget: Duration, status: u16, answer: Answer) -> Answer {
    assert_eq!(answer.status, status, "{answer:?}");
    assert!(answer.took < budget, "{:?} is more than {budget:?}", answer.took);
    answer
}

#[test]
fn a_process_lives_by_its_socket() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (kernel, image) = (folder.path().join("guest"), folder.path().join("disk"));
    std::fs::write(&kernel, idle::halt()?)?;
    std::fs::File::create(&image)?.set_len(1 << 20)?;
    let mut process = Process::start(folder.path())?;
    let mut client = Strict::connect(&process.socket);
    let ping = within(QUICK, 200, client.get("/api/v1/vmm.ping")).json();
    assert_eq!(ping["pid"], process.child.id());
    within(QUICK, 404, client.get("/api/v1/vm.info")).why();

    half_a_request(&process);
    let created = Instant::now();
    let config = json!({
        "cpus": { "boot_vcpus": 1, "max_vcpus": 1 },
        "memory": { "size": 64 << 20, "shared": true },
        "payload": { "kernel": kernel, "cmdline": "quiet" },
        "disks": [{ "path": image, "id": "root" }],
        "serial": { "mode": "Pty" },
        "console": { "mode": "Off" },
        "platform": { "cpu": "soft", "iommu_segments": [1] },
    });
    within(BOOT, 204, client.put("/api/v1/vm.create", &config.to_string()));
    within(QUICK, 500, client.put("/api/v1/vm.create", &config.to_string())).why();
    within(BOOT, 204, client.act("/api/v1/vm.boot"));
    assert!(created.elapsed() < BOOT, "create and boot took {:?}", created.elapsed());
    let threads = process.threads()?;
    assert!(threads.iter().any(|thread| thread == "vcpu0"), "clients pin threads by name: {threads:?}");
    let info = within(QUICK, 200, client.get("/api/v1/vm.info")).json();
    assert_eq!((&info["state"], &info["memory_actual_size"]), (&json!("Running"), &json!(64 << 20)));
    assert_eq!(info["config"]["payload"], config["payload"]);
    assert_eq!(info["config"]["disks"][0]["path"], config["disks"][0]["path"]);
    let pty = info["config"]["serial"]["file"].as_str().context("the terminal is named")?;
    assert!(Path::new(pty).exists() && pty.starts_with("/dev/pts/"), "{pty}");

    states(&mut client);
    devices(&mut client, folder.path())?;
    by_the_crate(&process.socket);
    crowd(&process.socket, folder.path());
    by_curl(&process.socket)?;

    within(STOP, 204, client.act("/api/v1/vm.shutdown"));
    within(QUICK, 500, client.act("/api/v1/vm.pause")).why();
    within(BOOT, 204, client.act("/api/v1/vm.boot"));
    within(STOP, 204, client.act("/api/v1/vm.delete"));
    within(QUICK, 404, client.get("/api/v1/vm.info")).why();
    let children = processes::children(process.child.id());
    within(QUICK, 204, client.act("/api/v1/vmm.shutdown"));
    let events = process.ended()?;
    assert!(!process.socket.exists(), "the socket's file goes with the process");
    for child in children {
        processes::wait_gone(child, Duration::from_secs(5))?;
    }
    told(&events);
    Ok(())
}

/// A client that goes in the middle of a request has asked for nothing; one that goes behind it has.
fn half_a_request(process: &Process) {
    use std::io::Write;
    let mut half = Strict::connect(&process.socket);
    half.socket.write_all(b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 500\r\n\r\n{\"payload\":").unwrap();
    drop(half);
    let mut gone = Strict::connect(&process.socket);
    gone.socket.write_all(b"PUT /api/v1/vm.boot HTTP/1.1\r\n\r\n").unwrap();
    drop(gone);
    within(QUICK, 404, Strict::connect(&process.socket).get("/api/v1/vm.info")).why();
}

fn states(client: &mut Strict) {
    for (name, status) in [
        ("vm.boot", 500),
        ("vm.resume", 500),
        ("vm.pause", 204),
        ("vm.pause", 500),
        ("vm.resume", 204),
        ("vm.power-button", 204),
        ("vm.reboot", 204),
        // One that stands starts again, too, and runs.
        ("vm.pause", 204),
        ("vm.reboot", 204),
        ("vm.resume", 500),
    ] {
        let budget = if name == "vm.reboot" { BOOT } else { QUICK };
        within(budget, status, client.act(&format!("/api/v1/{name}")));
    }
    within(QUICK, 204, client.put("/api/v1/vm.resize", r#"{"desired_vcpus":1}"#));
    within(QUICK, 400, client.put("/api/v1/vm.resize", r#"{"desired_vcpus":4}"#)).why();
    let tree = within(QUICK, 200, client.get("/api/v1/inspect")).json();
    assert!(tree["devices"]["root"].is_object(), "{tree}");
    within(QUICK, 200, client.get("/api/v1/inspect/devices/root"));
    // Everybody who has a mailbox: whoever serves a device, talks to its process or hears of it, and the API itself.
    for actor in ["machine", "spawner", "vmm.supervisor", "device.root", "talk.root", "process.root", "api0", "api1"] {
        assert!(tree["actors"][actor]["capacity"].as_u64() > Some(0), "{actor}: {}", tree["actors"]);
        assert!(tree["actors"][actor]["generation"].is_u64() && tree["actors"][actor]["full"].is_u64(), "{actor}");
    }
    within(QUICK, 404, client.get("/api/v1/inspect/devices/nobody")).why();
    within(QUICK, 200, client.get("/api/v1/vm.counters"));
    assert!(within(QUICK, 200, client.get("/metrics")).body.contains("# TYPE "));
}

fn devices(client: &mut Strict, folder: &Path) -> Result<()> {
    let image = folder.join("second");
    std::fs::File::create(&image)?.set_len(1 << 20)?;
    let disk = json!({ "id": "second", "path": image }).to_string();
    let place = within(HOTPLUG, 200, client.put("/api/v1/vm.add-disk", &disk)).json();
    assert!(place["bdf"].as_str().is_some_and(|bdf| bdf.len() == 12 && bdf.starts_with("0000:00:")), "{place}");
    within(HOTPLUG, 409, client.put("/api/v1/vm.add-disk", &disk)).why();
    within(QUICK, 204, client.put("/api/v1/vm.resize-disk", r#"{"id":"second","desired_size":2097152}"#));
    within(QUICK, 400, client.put("/api/v1/vm.resize-disk", r#"{"id":"second","desired_size":1}"#)).why();
    // What would be lost is lost only if that is meant.
    let smaller = r#"{"id":"second","desired_size":1048576}"#;
    let told = within(QUICK, 400, client.put("/api/v1/vm.resize-disk", smaller)).why();
    assert!(told.contains("2097152 bytes") && told.contains("--shrink"), "{told}");
    assert_eq!(image.metadata()?.len(), 2 << 20);
    let meant = r#"{"id":"second","desired_size":1048576,"allow_shrink":true}"#;
    within(QUICK, 204, client.put("/api/v1/vm.resize-disk", meant));
    assert_eq!(image.metadata()?.len(), 1 << 20);
    within(QUICK, 404, client.put("/api/v1/vm.resize-disk", r#"{"id":"nobody","desired_size":1}"#)).why();
    within(QUICK, 404, client.put("/api/v1/vm.remove-device", r#"{"id":"nobody"}"#)).why();
    // Nothing is half there of what could not be made.
    let before = within(QUICK, 200, client.get("/api/v1/devices")).json();
    let nowhere = json!({ "path": folder.join("nothing/here") }).to_string();
    let failed = client.put("/api/v1/vm.add-disk", &nowhere);
    assert!([400, 500].contains(&failed.status) && failed.why().contains("nothing/here"), "{failed:?}");
    let nobody = json!({ "vhost_user": true, "vhost_socket": folder.join("nobody.sock") }).to_string();
    let failed = client.put("/api/v1/vm.add-net", &nobody);
    assert!([400, 500].contains(&failed.status) && !failed.why().is_empty(), "{failed:?}");
    let after = within(QUICK, 200, client.get("/api/v1/devices")).json();
    let names = |list: &Value| -> Vec<Value> {
        list.as_array().into_iter().flatten().map(|device| device["id"].clone()).collect()
    };
    assert_eq!(names(&before), names(&after));
    assert!(names(&after).contains(&json!("second")), "{after}");
    Ok(())
}

fn by_the_crate(socket: &Path) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let client = socket_based_api_client(socket);
        let info = client.vm_info_get().await.expect("an answer that the crate reads");
        assert_eq!(info.state, models::VmState::Running);
        client.pause_vm().await.unwrap();
        client.resume_vm().await.unwrap();
        client.vm_counters_get().await.unwrap();
        client.vm_add_device_put(models::DeviceConfig::default()).await.unwrap_err();
        let place = client.vm_remove_device_put(models::VmRemoveDevice { id: Some("second".into()) });
        place.await.expect("the guest is asked");
    });
}

/// Four at once; each answer is one that fits some order of the requests, and the machine is whole afterwards.
fn crowd(socket: &Path, folder: &Path) {
    std::thread::scope(|scope| {
        for client in 0..4usize {
            scope.spawn(move || {
                let mut strict = Strict::connect(socket);
                for round in 0..15usize {
                    let answer = match (client + round * 3) % 6 {
                        0 => strict.act("/api/v1/vm.pause"),
                        1 => strict.act("/api/v1/vm.resume"),
                        2 => strict.get("/api/v1/devices"),
                        3 => strict.put("/api/v1/vm.add-disk", &json!({ "path": folder.join("no") }).to_string()),
                        4 => strict.get("/api/v1/vm.counters"),
                        _ => strict.get("/api/v1/vm.info"),
                    };
                    assert!([200, 204, 400, 500].contains(&answer.status), "{answer:?}");
                }
            });
        }
    });
    let mut strict = Strict::connect(socket);
    if strict.get("/api/v1/vm.info").json()["state"] == "Paused" {
        within(QUICK, 204, strict.act("/api/v1/vm.resume"));
    }
    assert_eq!(strict.get("/api/v1/vm.info").json()["state"], "Running");
    assert_eq!(strict.get("/api/v1/inspect/vcpus").json().as_object().map(serde_json::Map::len), Some(1));
}

fn by_curl(socket: &Path) -> Result<()> {
    let output = Command::new("curl")
        .args(["--silent", "--show-error", "--fail", "--max-time", "10", "--unix-socket"])
        .arg(socket)
        .args(["-X", "PUT", "http://localhost/api/v1/vm.pause", "http://localhost/api/v1/vm.resume"])
        .output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// The event monitor has told the whole story, in order.
fn told(events: &[Value]) {
    let told: Vec<String> = events
        .iter()
        .map(|event| format!("{} {}", event["source"].as_str().unwrap_or("?"), event["event"].as_str().unwrap_or("?")))
        .collect();
    let wanted = [
        "vmm starting",
        "vm booting",
        "vm booted",
        "vm pausing",
        "vm paused",
        "vm resuming",
        "vm resumed",
        "vm rebooting",
        "vm rebooted",
        "vm shutdown",
        "vm booting",
        "vm booted",
        "vm deleted",
        "vmm shutdown",
    ];
    let mut rest = told.iter();
    for event in wanted {
        assert!(rest.any(|heard| heard == event), "'{event}' is missing, or is not in its place: {told:?}");
    }
}
