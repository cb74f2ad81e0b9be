//! Every resource, its good case and each of its refusals, through the strict reader; then the rules of the wire that are
//! about more than one reply.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use atoll_vmm::api::{Method, openapi_document, routes};
use atoll_vmm::config::DeviceConfig;
use atoll_vmm::lifecycle::ErrorKind;
use serde_json::{Value, json};

use super::fake::{House, config};
use super::strict::{Answer, Strict};

const V1: &str = "/api/v1";

/// A client that keeps a list of what it has seen.
struct Tour {
    house: House,
    client: Strict,
    seen: BTreeSet<(String, u16)>,
}

impl Tour {
    fn new() -> Self {
        let house = House::new();
        let client = Strict::connect(&house.socket());
        Self { house, client, seen: BTreeSet::new() }
    }

    fn note(&mut self, path: &str, status: u16, answer: Answer) -> Answer {
        assert_eq!(answer.status, status, "{path}: {answer:?}");
        // Kata gives info, pause, resize and ping a second, libvirt gives add-net half of one.
        let budget = Duration::from_millis(if path.ends_with("vm.add-net") { 500 } else { 1000 });
        assert!(answer.took < budget, "{path} took {:?}", answer.took);
        let trees = ["/api/v1/inspect/", "/api/v1/vm.screenshot/"].into_iter().find(|tree| path.starts_with(tree));
        let path = &trees.map_or_else(|| path.to_owned(), |tree| format!("{tree}{{path}}"));
        self.seen.insert((path.clone(), status));
        answer
    }

    fn get(&mut self, path: &str, status: u16) -> Answer {
        let answer = self.client.get(path);
        self.note(path, status, answer)
    }

    fn act(&mut self, name: &str, status: u16) -> Answer {
        let path = format!("{V1}/{name}");
        let answer = self.client.act(&path);
        self.note(&path, status, answer)
    }

    fn put(&mut self, name: &str, body: &Value, status: u16) -> Answer {
        let path = format!("{V1}/{name}");
        let answer = self.client.put(&path, &body.to_string());
        self.note(&path, status, answer)
    }
}

/// What needs a machine, and no body.
const ACTIONS: [&str; 8] =
    ["vm.boot", "vm.pause", "vm.resume", "vm.reboot", "vm.power-button", "vm.nmi", "vmm.nmi", "vm.shutdown"];
const READS: [&str; 6] =
    ["vm.display", "vm.info", "vm.counters", "devices", "inspect", "inspect/devices/gr%C3%BCn%2F1"];

fn additions() -> [(&'static str, Value); 8] {
    [
        ("vm.add-disk", json!({ "path": "/a.img", "id": "d" })),
        ("vm.add-net", json!({ "tap": "tap0", "id": "n", "mac": "52:54:00:00:00:01" })),
        ("vm.add-fs", json!({ "tag": "t", "socket": "/fs.sock", "id": "f", "num_queues": 1, "queue_size": 1024 })),
        ("vm.add-vsock", json!({ "cid": 3, "socket": "/v.sock", "id": "v" })),
        ("vm.add-generic-vhost-user", json!({ "device_type": 4, "socket": "/g", "queue_sizes": [64], "id": "g" })),
        ("vm.add-device", json!({ "path": "/sys/bus/pci/devices/0000:01:00.0", "id": "p" })),
        ("vm.add-user-device", json!({ "socket": "/u", "id": "u", "pci_segment": 0, "pci_device_id": null })),
        ("vm.add-nvme", json!({ "path": "/n", "id": "m" })),
    ]
}

/// One client on one connection meets everything that the document promises, on the status that it promises.
#[test]
fn every_resource_and_every_refusal() {
    let mut tour = Tour::new();
    nothing_is_there(&mut tour);
    a_life(&mut tour);
    mistakes(&mut tour);
    faults(&mut tour);
    screens(&mut tour);
    too_many_listeners(&mut tour);
    let document = openapi_document();
    let mut promised = BTreeSet::new();
    for (path, operations) in document["paths"].as_object().unwrap() {
        for operation in operations.as_object().unwrap().values() {
            let responses = operation["responses"].as_object().unwrap();
            assert!(responses.contains_key("400") && responses.contains_key("429"), "{path}");
            // What can meet any request is met once, elsewhere.
            for (status, _) in responses.iter().filter(|(_, response)| response["$ref"].is_null()) {
                promised.insert((path.clone(), status.parse::<u16>().unwrap()));
            }
        }
    }
    // No machine is asked for these, so nothing can go wrong with it; vmm.shutdown's answer is sent before it is asked.
    for path in ["vmm.ping", "vmm.shutdown", "openapi.json", "events", "metrics"] {
        promised.remove(&(format!("{V1}/{path}"), 500));
    }
    promised.remove(&("/metrics".to_owned(), 500));
    let missing: Vec<_> = promised.difference(&tour.seen).collect();
    assert!(missing.is_empty(), "promised and not seen: {missing:?}");
    tour.house.close();
}

fn nothing_is_there(tour: &mut Tour) {
    let ping = tour.get("/api/v1/vmm.ping", 200).json();
    assert_eq!(ping["pid"], std::process::id());
    assert!(ping["version"].is_string() && ping["build_version"].is_string() && ping["features"].is_array(), "{ping}");
    for name in ACTIONS {
        assert!(tour.act(name, 404).why().contains("create one first"));
    }
    tour.act("vm.delete", 204);
    for name in READS {
        tour.get(&format!("{V1}/{name}"), 404).why();
    }
    for (name, body) in additions() {
        tour.put(name, &body, 404).why();
    }
    tour.put("vm.remove-device", &json!({ "id": "d" }), 404).why();
    tour.put("vm.resize-disk", &json!({ "id": "d", "desired_size": 1 }), 404).why();
    tour.put("vm.set-link", &json!({ "id": "d", "link": "down" }), 404).why();
    tour.put("vm.revive-device", &json!({ "id": "d" }), 404).why();
    tour.put("vm.upgrade-device", &json!({ "id": "d", "exe": "/bin/true" }), 404).why();
    tour.put("vm.fault-device", &json!({ "id": "d", "fault": "kill" }), 404).why();
    tour.put("vm.resize", &json!({ "desired_vcpus": 2 }), 404).why();
    let metrics = tour.get("/metrics", 200);
    assert_eq!(metrics.headers["Content-Type"], "text/plain; version=0.0.4");
    assert_eq!(tour.get("/api/v1/metrics", 200).body, metrics.body);
    assert_eq!(tour.get("/api/v1/openapi.json", 200).json(), openapi_document());
}

fn a_life(tour: &mut Tour) {
    let mut wanted = config();
    wanted["later"] = json!({ "unknown": [1, 2] });
    tour.put("vm.create", &wanted, 204);
    assert!(tour.put("vm.create", &config(), 500).why().contains("already"));
    // Before boot a device has no place yet.
    for (name, mut body) in additions() {
        body["id"] = json!(format!("early-{name}"));
        tour.put(name, &body, 204);
    }
    tour.act("vm.boot", 204);
    for (name, body) in additions() {
        let place = tour.put(name, &body, 200);
        assert!(place.body.len() < 700, "head and body stay under 1 KiB");
        assert_eq!(place.json()["id"], body["id"]);
        assert!(place.json()["bdf"].as_str().is_some_and(|bdf| bdf.starts_with("0000:00:") && bdf.ends_with(".0")));
        assert!(tour.put(name, &body, 409).why().contains("choose another"));
    }
    tour.act("vm.pause", 204);
    let info = tour.get("/api/v1/vm.info", 200).json();
    assert_eq!((&info["state"], &info["config"]["cpus"]["boot_vcpus"]), (&json!("Paused"), &json!(2)));
    assert_eq!(info["config"]["payload"], json!({ "kernel": "/boot/vmlinux" }), "no nulls in the echo");
    for name in ["vm.resume", "vm.reboot", "vm.power-button", "vm.nmi", "vmm.nmi"] {
        tour.act(name, 204);
    }
    tour.put("vm.resize", &json!({ "desired_vcpus": 2 }), 204);
    tour.put("vm.resize-disk", &json!({ "id": "d", "desired_size": 1 << 20 }), 204);
    tour.put("vm.set-link", &json!({ "id": "d", "link": "up" }), 204);
    tour.put("vm.revive-device", &json!({ "id": "d" }), 204);
    tour.put("vm.upgrade-device", &json!({ "id": "d", "exe": "/bin/true", "step_ms": 5 }), 200);
    tour.put("vm.fault-device", &json!({ "id": "d", "fault": "drop-kick", "seed": 7 }), 204);
    tour.put("vm.remove-device", &json!({ "id": "g" }), 204);
    for name in READS {
        tour.get(&format!("{V1}/{name}"), 200).json();
    }
    tour.get("/api/v1/inspect/nowhere", 404).why();
}

fn mistakes(tour: &mut Tour) {
    for (name, field, body) in [
        ("vm.create", "cpus.boot_vcpus", json!({ "cpus": { "boot_vcpus": "two" } })),
        ("vm.create", "disks[1].readonly", json!({ "disks": [{}, { "readonly": 1 }] })),
        ("vm.create", "kernel", json!({})),
        ("vm.create", "fds", json!({ "payload": { "kernel": "k" }, "net": [{ "fds": [3] }] })),
        ("vm.add-disk", "path", json!({ "path": 7 })),
        ("vm.add-disk", "image", json!({ "id": "x" })),
        ("vm.add-net", "mtu", json!({ "mtu": 1 << 20 })),
        ("vm.add-net", "fds", json!({ "fds": [3, 4] })),
        ("vm.add-fs", "tag", json!({ "socket": "/s" })),
        ("vm.add-vsock", "cid", json!({ "cid": -1, "socket": "/s" })),
        (
            "vm.add-generic-vhost-user",
            "queue_sizes",
            json!({ "device_type": 4, "socket": "/g", "queue_sizes": [70000] }),
        ),
        ("vm.add-device", "path", json!({ "id": "d" })),
        ("vm.add-user-device", "socket", json!({ "id": "d" })),
        ("vm.add-user-device", "num_queues", json!({ "socket": "/u", "num_queues": 4 })),
        ("vm.add-user-device", "pci_segment=1", json!({ "socket": "/u", "pci_segment": 1 })),
        ("vm.add-nvme", "path", json!({ "path": 7 })),
        ("vm.add-device", "0000:01:00.0", json!({ "path": "/dev/null" })),
        ("vm.remove-device", "id", json!({ "id": 7 })),
        ("vm.set-link", "link", json!({ "id": "d", "link": "sideways" })),
        ("vm.revive-device", "id", json!({})),
        ("vm.upgrade-device", "exe", json!({ "id": "d" })),
        ("vm.fault-device", "fault", json!({ "id": "d", "fault": "melt" })),
        ("vm.resize-disk", "desired_size", json!({ "id": "d" })),
        ("vm.resize", "desired_vcpus", json!({ "desired_vcpus": 3 })),
        ("vm.resize", "desired_ram", json!({ "desired_ram": 1 })),
        ("vm.resize", "desired_balloon", json!({ "desired_balloon": 1 })),
    ] {
        let why = tour.put(name, &body, 400).why();
        assert!(why.contains(field), "{name} {body}: {why}");
    }
    assert!(tour.act("vm.create", 400).why().contains("body"));
    let duplicate =
        json!({ "payload": { "kernel": "k" }, "disks": [{ "id": "a", "path": "p" }, { "id": "a", "path": "q" }] });
    assert!(tour.put("vm.create", &duplicate, 409).why().contains("'a'"));
    for refused in [
        "vm.snapshot",
        "vm.restore",
        "vm.coredump",
        "vm.add-vdpa",
        "vm.add-pmem",
        "vm.resize-zone",
        "vm.send-migration",
        "vm.receive-migration",
    ] {
        assert!(tour.put(refused, &json!({}), 400).why().contains("not supported"));
    }
    assert!(tour.get("/api/v1/vm.unknown", 404).why().contains("openapi.json"));
    assert!(tour.get("/api/v1/vm.boot", 400).why().contains("with PUT, not with GET"));
    assert!(tour.act("vm.info", 400).why().contains("with GET, not with PUT"));
    let answer = tour.client.exchange(b"DELETE /api/v1/vm.info HTTP/1.1\r\n\r\n");
    tour.note("/api/v1/vm.info", 400, answer).why();
}

/// What the machine cannot do at the moment, and what goes wrong on its side, is 500 with the reason.
fn faults(tour: &mut Tour) {
    for route in routes() {
        let name = route.path().trim_start_matches("/api/v1/");
        let kinds = [ErrorKind::Failed, ErrorKind::WrongState, ErrorKind::Late];
        let kind = kinds[name.len() % kinds.len()];
        let addition = additions().into_iter().find(|(other, _)| *other == name).map(|(_, body)| body);
        let body = match name {
            "vm.create" => Some(config()),
            "vm.remove-device" | "vm.revive-device" => Some(json!({ "id": "d" })),
            "vm.upgrade-device" => Some(json!({ "id": "d", "exe": "/bin/true" })),
            "vm.set-link" => Some(json!({ "id": "d", "link": "down" })),
            "vm.fault-device" => Some(json!({ "id": "d", "fault": "kill" })),
            "vm.resize-disk" => Some(json!({ "id": "d", "desired_size": 1 })),
            "vm.resize" => Some(json!({})),
            _ => addition,
        };
        let answer = match (body, route.method()) {
            (Some(body), _) => {
                tour.house.fake.book().fault = Some(kind);
                tour.put(name, &body, 500)
            }
            (None, Method::Put) if ACTIONS.contains(&name) || name == "vm.delete" => {
                tour.house.fake.book().fault = Some(kind);
                tour.act(name, 500)
            }
            (None, Method::Get) if READS.contains(&name) => {
                tour.house.fake.book().fault = Some(kind);
                tour.get(route.path(), 500)
            }
            _ => continue,
        };
        assert!(answer.why().contains("as the test wanted"));
    }
    tour.house.fake.book().fault = Some(ErrorKind::Failed);
    tour.get("/api/v1/inspect/devices", 500).why();
    // A refused device for which the machine itself says why.
    tour.house.fake.book().fault = Some(ErrorKind::Bad);
    assert!(tour.act("vm.boot", 400).why().contains("as the test wanted"));
    tour.act("vm.shutdown", 204);
    tour.act("vm.delete", 204);
    assert_eq!(tour.house.fake.book().fault, None, "every fault was met");
    tour.act("vmm.shutdown", 204);
    // It is asked when the answer has been sent; the next request is looked at after that.
    tour.get("/api/v1/vmm.ping", 200);
    assert_eq!(tour.house.fake.book().done.last(), Some(&"shutdown_vmm"));
}

/// What there is to see. A recording's file comes beside its request.
fn screens(tour: &mut Tour) {
    let file = std::fs::File::open("/dev/null").unwrap();
    let head = json!({ "head": 1 });
    let size = json!({ "width": 800, "height": 600 });
    let all = |tour: &mut Tour, [picture, resized, recorded, stopped]: [u16; 4]| {
        let answer = tour.get("/api/v1/vm.screenshot/0", picture);
        tour.put("vm.resize-display", &size, resized);
        let put = tour.client.put_with("/api/v1/vm.record", &head.to_string(), &[file.as_fd()]);
        tour.note("/api/v1/vm.record", recorded, put);
        tour.put("vm.stop-record", &head, stopped);
        answer
    };
    all(tour, [404; 4]);
    tour.put("vm.create", &config(), 204);
    let picture = all(tour, [200, 204, 204, 200]);
    assert_eq!((picture.headers["Content-Type"].as_str(), picture.body.as_str()), ("image/png", "a picture"));
    assert!(tour.get("/api/v1/vm.screenshot/first", 400).why().contains("vm.screenshot/0"));
    assert!(tour.put("vm.record", &head, 400).why().contains("SCM_RIGHTS"));
    assert!(tour.put("vm.resize-display", &json!({ "width": 800 }), 400).why().contains("height"));
    assert!(tour.put("vm.stop-record", &json!({ "haed": 1 }), 400).why().contains("haed"));
    for name in ["vm.screenshot/0", "vm.resize-display", "vm.record", "vm.stop-record"] {
        tour.house.fake.book().fault = Some(ErrorKind::Failed);
        let path = format!("{V1}/{name}");
        let answer = match name {
            "vm.screenshot/0" => tour.client.get(&path),
            "vm.resize-display" => tour.client.put(&path, &size.to_string()),
            _ => tour.client.put_with(&path, &head.to_string(), &[file.as_fd()]),
        };
        assert!(tour.note(&path, 500, answer).why().contains("as the test wanted"));
    }
    tour.act("vm.delete", 204);
}

fn too_many_listeners(tour: &mut Tour) {
    let listeners: Vec<Strict> = (0..16)
        .map(|_| {
            let mut listener = Strict::connect(&tour.house.socket());
            listener.socket.write_all(b"GET /api/v1/events HTTP/1.1\r\n\r\n").unwrap();
            let mut head = [0; 1024];
            let count = listener.socket.read(&mut head).unwrap();
            let head = std::str::from_utf8(&head[..count]).unwrap();
            assert!(head.starts_with("HTTP/1.1 200 \r\n") && head.contains("Connection: close\r\n"), "{head}");
            assert!(!head.contains("Content-Length"), "{head}");
            listener
        })
        .collect();
    tour.seen.insert(("/api/v1/events".into(), 200));
    tour.get("/api/v1/events", 429).why();
    drop(listeners);
    // Their places come back.
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let mut listener = Strict::connect(&tour.house.socket());
        listener.socket.write_all(b"GET /api/v1/events HTTP/1.1\r\n\r\n").unwrap();
        let mut head = [0; 15];
        listener.socket.read_exact(&mut head).unwrap();
        if &head == b"HTTP/1.1 200 \r\n" {
            break;
        }
        assert!(Instant::now() < deadline, "places of listeners that went are not given back");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// libvirt sends the card's TAPs beside the head, and numbers in the JSON that mean nothing here.
#[test]
fn descriptors_come_with_the_first_bytes() {
    let house = House::new();
    let mut client = Strict::connect(&house.socket());
    assert_eq!(client.put("/api/v1/vm.create", &config().to_string()).status, 204);
    let (first_read, first) = std::io::pipe().unwrap();
    let (second_read, second) = std::io::pipe().unwrap();
    let body = r#"{"id":"net0","fds":[40,41],"num_queues":4}"#;
    let answer = client.put_with("/api/v1/vm.add-net", body, &[first.as_fd(), second.as_fd()]);
    assert_eq!(answer.status, 204, "{answer:?}");
    assert!(answer.took < Duration::from_millis(500));
    let given = match &house.fake.book().devices.last().unwrap().1 {
        DeviceConfig::Net(net) => net.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(given.fds, Some(vec![40, 41]));
    drop((first, second));
    // In the order in which they were sent, and held open by the configuration alone.
    for (descriptor, (mut end, text)) in given.descriptors.0.iter().zip([(first_read, "one"), (second_read, "two")]) {
        rustix::io::write(descriptor, text.as_bytes()).unwrap();
        let mut read = [0; 3];
        end.read_exact(&mut read).unwrap();
        assert_eq!(read, text.as_bytes());
        assert!(rustix::io::fcntl_getfd(descriptor).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
    }
    // Without a place for them, with no numbers at all.
    let (_, third) = std::io::pipe().unwrap();
    assert_eq!(client.put_with("/api/v1/vm.add-net", "{}", &[third.as_fd()]).status, 204);
    let DeviceConfig::Net(net) = house.fake.book().devices.last().unwrap().1.clone() else { panic!("no card") };
    assert_eq!((net.fds, net.descriptors.0.len()), (Some(vec![-1]), 1));
    house.close();
}

/// What came and was not asked for is closed, and so is what came too much.
#[test]
fn descriptors_that_nobody_takes_are_closed() {
    let house = House::new();
    let is_closed = |mut end: std::io::PipeReader| assert_eq!(end.read(&mut [0]).unwrap(), 0, "somebody holds it");
    let mut client = Strict::connect(&house.socket());
    let (end, theirs) = std::io::pipe().unwrap();
    assert_eq!(client.put_with("/api/v1/vm.create", &config().to_string(), &[theirs.as_fd()]).status, 204);
    drop(theirs);
    is_closed(end);
    let (end, theirs) = std::io::pipe().unwrap();
    assert_eq!(client.put_with("/api/v1/vm.add-net", r#"{"mtu":"x"}"#, &[theirs.as_fd()]).status, 400);
    drop(theirs);
    is_closed(end);
    // Half a request and gone.
    let (end, theirs) = std::io::pipe().unwrap();
    let half = Strict::connect(&house.socket());
    half.send_with(b"PUT /api/v1/vm.add-net HTTP/1.1\r\nContent-Le", &[theirs.as_fd()]);
    drop((half, theirs));
    is_closed(end);
    // More than anybody has.
    let (end, theirs) = std::io::pipe().unwrap();
    let mut many = Strict::connect(&house.socket());
    many.send_with(b"PUT /api/v1/vm.add-net HTTP/1.1\r\n", &[theirs.as_fd(); 65]);
    let answer = many.receive(Instant::now());
    assert_eq!(answer.status, 400);
    assert!(answer.why().contains("descriptors"));
    drop(theirs);
    is_closed(end);
    // Beside bytes of two requests: whose they are cannot be told.
    let (end, theirs) = std::io::pipe().unwrap();
    let mut two = Strict::connect(&house.socket());
    two.send_with(b"GET /api/v1/vmm.ping HTTP/1.1\r\n\r\nPUT /api/v1/vm.add-net HTTP/1.1\r\n", &[theirs.as_fd()]);
    assert_eq!(two.receive(Instant::now()).status, 400);
    drop(theirs);
    is_closed(end);
    house.close();
}

/// A client that waits to be told, requests in one segment, a request in many, and a connection that is held for long.
#[test]
fn a_connection_is_held_for_as_long_as_the_machine_lives() {
    let house = House::new();
    let mut client = Strict::connect(&house.socket());
    let body = config().to_string();
    let head =
        format!("PUT /api/v1/vm.create HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: {}\r\n\r\n", body.len());
    client.socket.write_all(head.as_bytes()).unwrap();
    let mut invitation = [0; 64];
    let count = client.socket.read(&mut invitation).unwrap();
    assert_eq!(&invitation[..count], b"HTTP/1.1 100 \r\n\r\n");
    assert_eq!(client.exchange(body.as_bytes()).status, 204);
    // Its body was there already: nobody needs to be told.
    assert_eq!(client.exchange(format!("{head}{body}").as_bytes()).status, 500);
    for byte in b"GET /api/v1/vm.info HTTP/1.1\r\nHost: x\r\n\r" {
        client.socket.write_all(&[*byte]).unwrap();
    }
    assert_eq!(client.exchange(b"\n").status, 200);
    // Two in one segment are answered one after the other, in order.
    client
        .socket
        .write_all(b"GET /api/v1/vm.info HTTP/1.1\r\n\r\nGET /api/v1/nothing HTTP/1.1\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut text = String::new();
    client.socket.read_to_string(&mut text).unwrap();
    let (first, second) = (text.find("HTTP/1.1 200 ").unwrap(), text.find("HTTP/1.1 404 ").unwrap());
    assert!(first < second && text[second..].contains("Connection: close\r\n"), "{text}");
    house.close();
}

/// Whatever cannot be read is refused with a sentence and an end, and the machine hears nothing of it.
#[test]
fn what_cannot_be_read_ends_the_connection() {
    let house = House::new();
    let long_head = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(20_000));
    for (request, why) in [
        ("GET\r\n\r\n", "not an HTTP/1.1 request"),
        ("\u{16}\u{3}\u{1}\n\n", "not an HTTP/1.1 request"),
        ("GET / HTTP/2.0\r\n\r\n", "not an HTTP/1.1 request"),
        (long_head.as_str(), "longer than 16384 bytes"),
        ("PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 4194305\r\nExpect: 100-continue\r\n\r\n", "4 MiB"),
        ("PUT /api/v1/vm.create HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", "Content-Length"),
        ("PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}", "not one number"),
        ("PUT /api/v1/vm.create HTTP/1.1\r\nExpect: tea\r\n\r\n", "100-continue"),
    ] {
        let mut client = Strict::connect(&house.socket());
        let answer = client.exchange(request.as_bytes());
        assert_eq!(answer.status, 400, "{request}");
        assert!(answer.why().contains(why), "{request}: {}", answer.why());
        assert_eq!(answer.headers["Connection"], "close");
        client.expect_end();
    }
    assert!(house.fake.book().done.is_empty());
    house.close();
}
