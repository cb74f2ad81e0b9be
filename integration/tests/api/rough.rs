//! Clients that go in the middle of a request, never finish one, come in crowds, or send noise.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use atoll_vmm::lifecycle::VmState;
use serde_json::json;

use super::fake::{House, config};
use super::strict::Strict;

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What comes back on a connection of its own, which may be one too many.
fn answered(house: &House, request: &str) -> String {
    let mut socket = UnixStream::connect(house.socket()).unwrap();
    let _ = socket.write_all(request.as_bytes());
    let mut text = String::new();
    let _ = socket.read_to_string(&mut text);
    text
}

/// Half a request is never begun, a whole one is carried out to its end whether or not anybody waits for the answer.
#[test]
fn a_client_that_goes_leaves_a_machine_that_is_whole() {
    let house = House::new();
    let body = config().to_string();
    let whole = format!("PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    for cut in [1, 20, 50, whole.len() - body.len(), whole.len() - 1] {
        UnixStream::connect(house.socket()).unwrap().write_all(&whole.as_bytes()[..cut]).unwrap();
    }
    let mut witness = Strict::connect(&house.socket());
    assert_eq!(witness.get("/api/v1/vm.info").status, 404, "half a request made a machine");
    UnixStream::connect(house.socket()).unwrap().write_all(whole.as_bytes()).unwrap();
    until("a whole request is carried out", || house.fake.book().state == Some(VmState::Created));
    UnixStream::connect(house.socket()).unwrap().write_all(b"PUT /api/v1/vm.boot HTTP/1.1\r\n\r\n").unwrap();
    until("a whole request is carried out", || house.fake.book().state == Some(VmState::Running));
    assert_eq!(witness.get("/api/v1/vm.info").json()["state"], "Running");
    house.close();
}

/// Eight clients at once drive one machine through its states: every answer is one of those that the machine can give,
/// what was granted adds up, and the machine is in one of its states afterwards.
#[test]
fn clients_at_once_do_not_disturb_each_other() {
    const ROUNDS: usize = 60;
    let house = House::new();
    let (created, added, removed) = (AtomicU32::new(0), AtomicU32::new(0), AtomicU32::new(0));
    assert_eq!(Strict::connect(&house.socket()).put("/api/v1/vm.create", &config().to_string()).status, 204);
    std::thread::scope(|scope| {
        for client in 0..8usize {
            let (house, created, added, removed) = (&house, &created, &added, &removed);
            scope.spawn(move || {
                let mut strict = Strict::connect(&house.socket());
                for round in 0..ROUNDS {
                    let id = format!("d{client}-{round}");
                    let (status, count) = match (client * 7 + round * 3) % 10 {
                        0 => (strict.put("/api/v1/vm.create", &config().to_string()).status, Some(created)),
                        1 if round % 4 == 0 => (strict.act("/api/v1/vm.delete").status, None),
                        1 | 2 => (strict.act("/api/v1/vm.boot").status, None),
                        3 => (strict.act("/api/v1/vm.pause").status, None),
                        4 => (strict.act("/api/v1/vm.resume").status, None),
                        5 => (strict.act("/api/v1/vm.shutdown").status, None),
                        6 => {
                            let body = json!({ "id": id, "path": "/x" }).to_string();
                            let first = strict.put("/api/v1/vm.add-disk", &body).status;
                            if first < 300 {
                                added.fetch_add(1, Ordering::Relaxed);
                                let gone = strict.put("/api/v1/vm.remove-device", &json!({ "id": id }).to_string());
                                assert!([204, 404].contains(&gone.status), "{gone:?}");
                                removed.fetch_add(1, Ordering::Relaxed);
                            }
                            (first, None)
                        }
                        _ => {
                            let info = strict.get("/api/v1/vm.info");
                            if info.status == 200 {
                                assert_eq!(info.json()["config"]["cpus"]["boot_vcpus"], 2);
                            }
                            (info.status, None)
                        }
                    };
                    assert!([200, 204, 404, 409, 500].contains(&status), "{status}");
                    if let Some(count) = count.filter(|_| status == 204) {
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    assert_eq!(1 + created.into_inner(), house.fake.book().made, "each machine was granted to one client");
    assert_eq!(added.into_inner(), removed.into_inner());
    assert!(house.fake.book().devices.is_empty(), "a device was left behind");
    house.close();
}

/// Connections that are at rest give way to a new one, the one first that has been for longest. A request that is under
/// way is never cut: when there is nothing else, one connection too many hears so.
#[test]
fn silence_gives_way_and_work_does_not() {
    let house = House::new();
    let request = b"GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n";
    let mut first = Strict::connect(&house.socket());
    // This one has half a request on its way, and no other has been there for longer but the first.
    let mut half = Strict::connect(&house.socket());
    half.socket.write_all(&request[..9]).unwrap();
    let mut second = Strict::connect(&house.socket());
    let mut held: Vec<Strict> = (3..64).map(|_| Strict::connect(&house.socket())).collect();
    for client in &mut held {
        assert_eq!(client.get("/api/v1/vmm.ping").status, 200);
    }
    // All places are taken by now: two more take those of the two that have been silent for longest.
    let mut more = Strict::connect(&house.socket());
    assert_eq!(more.get("/api/v1/vmm.ping").status, 200);
    first.expect_end();
    let mut more_yet = Strict::connect(&house.socket());
    assert_eq!(more_yet.get("/api/v1/vmm.ping").status, 200);
    second.expect_end();
    half.socket.write_all(&request[9..]).unwrap();
    assert_eq!(half.receive(Instant::now()).status, 200);
    drop((half, more, more_yet, held));
    house.close();

    let house = House::new();
    let mut held: Vec<Strict> = (0..64).map(|_| Strict::connect(&house.socket())).collect();
    for client in &mut held {
        assert_eq!(client.get("/api/v1/vmm.ping").status, 200);
        client.socket.write_all(&request[..9]).unwrap();
    }
    let text = answered(&house, "");
    assert!(text.starts_with("HTTP/1.1 429 ") && text.contains("64 connections with a request under way"), "{text}");
    for client in &mut held {
        client.socket.write_all(&request[9..]).unwrap();
        assert_eq!(client.receive(Instant::now()).status, 200);
    }
    drop(held);
    house.close();
}

/// A request must come to an end in ten seconds, while silence between requests may be as long as it likes.
#[test]
fn half_a_request_is_not_waited_for() {
    let house = House::new();
    let mut silent = Strict::connect(&house.socket());
    assert_eq!(silent.get("/api/v1/vmm.ping").status, 200);
    let mut half = Strict::connect(&house.socket());
    half.socket.write_all(b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{").unwrap();
    let begun = Instant::now();
    let answer = half.receive(begun);
    assert_eq!(answer.status, 400);
    assert!(answer.why().contains("not whole after 10 s"));
    assert!(answer.took > Duration::from_secs(9));
    assert_eq!(silent.get("/api/v1/vmm.ping").status, 200);
    house.close();
}

/// The server ends although clients hold connections, listen to events and leave requests half sent; a request at hand is
/// answered first.
#[test]
fn an_end_is_an_end_for_all() {
    let house = House::new();
    let idle = Strict::connect(&house.socket());
    let mut half = Strict::connect(&house.socket());
    half.socket.write_all(b"PUT /api").unwrap();
    let mut listener = UnixStream::connect(house.socket()).unwrap();
    listener.write_all(b"GET /api/v1/events HTTP/1.1\r\n\r\n").unwrap();
    let mut head = [0; 512];
    assert!(listener.read(&mut head).unwrap() > 0);
    let socket = house.socket();
    let begun = Instant::now();
    house.close();
    assert!(begun.elapsed() < Duration::from_secs(5), "a client held the end up");
    for mut client in [idle.socket, half.socket, listener] {
        assert!(matches!(client.read(&mut head), Ok(0) | Err(_)));
    }
    assert!(UnixStream::connect(socket).is_err());
}

/// Noise of every kind on many connections, then an ordinary request: nothing hangs, nothing is carried out.
#[test]
fn noise_disturbs_nobody() {
    let house = House::new();
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let pieces: [&[u8]; 9] = [
        b"PUT /api/v1/vm.",
        b"GET ",
        b" HTTP/1.1\r\n",
        b"Content-Length: ",
        b"7\r\n",
        b"\r\n",
        b"\0\xff\xfe",
        b"{\"a\":",
        b": ",
    ];
    for _ in 0..400 {
        let mut socket = UnixStream::connect(house.socket()).unwrap();
        for _ in 0..random() % 12 {
            if socket.write_all(pieces[(random() % 9) as usize]).is_err() {
                break;
            }
        }
    }
    until("an ordinary request is answered once the noise has been refused", || {
        answered(&house, "GET /api/v1/vm.info HTTP/1.1\r\nConnection: close\r\n\r\n").starts_with("HTTP/1.1 404 ")
    });
    assert!(house.fake.book().done.iter().all(|done| *done == "info"), "noise was carried out");
    house.close();
}
