//! curl, as people's scripts call it.

use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use super::fake::{House, config};

/// Runs curl against the house; gives what it prints, the status last.
fn curl(house: &House, arguments: &[&str]) -> (String, u16) {
    let output = Command::new("curl")
        .args(["--silent", "--show-error", "--max-time", "30", "--write-out", "\n%{http_code}", "--unix-socket"])
        .arg(house.socket())
        .args(arguments)
        .stderr(Stdio::inherit())
        .output()
        .expect("curl runs: apt-get install curl");
    let text = String::from_utf8(output.stdout).unwrap();
    let (body, status) = text.rsplit_once('\n').expect("a status");
    (body.to_owned(), status.parse().unwrap())
}

#[test]
fn a_script_drives_a_machine() {
    let house = House::new();
    let (body, status) = curl(&house, &["http://localhost/api/v1/vmm.ping"]);
    assert_eq!(status, 200);
    let ping: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(ping["pid"], std::process::id());
    let json = "Content-Type: application/json";
    let create = config().to_string();
    let create = ["-X", "PUT", "-H", json, "-d", &create, "http://localhost/api/v1/vm.create"];
    assert_eq!(curl(&house, &create), (String::new(), 204));
    let (body, status) = curl(&house, &create);
    assert_eq!((status, serde_json::from_str::<Vec<String>>(&body).unwrap().len()), (500, 1));
    // Several on one connection, one of them refused.
    let put = ["-X", "PUT", "http://localhost/api/v1/vm.boot", "http://localhost/api/v1/vm.boot"];
    let (body, status) = curl(&house, &put);
    assert!(body.starts_with("\n204[") && status == 500, "{body} {status}");
    let (body, status) = curl(&house, &["-i", "http://localhost/api/v1/vm.info"]);
    assert!(status == 200 && body.contains(r#""state":"Running""#), "{body}");
    let (_, status) = curl(&house, &["-X", "DELETE", "http://localhost/api/v1/vm.info"]);
    assert_eq!(status, 400);
    let (_, status) = curl(&house, &["http://localhost/api/v1/nothing?at=all"]);
    assert_eq!(status, 404);
    let (body, status) = curl(&house, &["http://localhost/metrics"]);
    assert!(status == 200 && body.contains("atoll_up 1"));
    house.close();
}

/// curl asks before it sends much, and sends in chunks what it does not know the length of.
#[test]
fn long_bodies_are_announced() {
    let house = House::new();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("body");
    let mut long = config().to_string();
    for (length, expected) in [(4 << 20, 204), ((4 << 20) + 1, 400)] {
        long.truncate(config().to_string().len());
        long.extend(std::iter::repeat_n(' ', length - long.len()));
        std::fs::write(&file, &long).unwrap();
        let data = format!("@{}", file.display());
        let headers = ["-H", "Expect: 100-continue", "-X", "PUT", "--data-binary", &data];
        let (body, status) = curl(&house, &[&headers[..], &["http://localhost/api/v1/vm.create"]].concat());
        assert_eq!(status, expected, "{body}");
    }
    let chunks = ["-H", "Transfer-Encoding: chunked", "-X", "PUT", "-d", "{}", "http://localhost/api/v1/vm.create"];
    let (body, status) = curl(&house, &chunks);
    assert!(status == 400 && body.contains("Content-Length"), "{body}");
    house.close();
}

#[test]
fn events_are_lines() {
    let house = House::new();
    let story = house.story.clone();
    let teller = std::thread::spawn(move || {
        // Whoever subscribes hears what is told from then on.
        for number in 0..200 {
            story.tell("device", "restarted", [("generation", number.to_string()), ("id", "gr\u{fc}n".to_owned())]);
            std::thread::sleep(Duration::from_millis(20));
        }
        story.close();
    });
    let (body, status) = curl(&house, &["--no-buffer", "http://localhost/api/v1/events"]);
    teller.join().unwrap();
    assert_eq!(status, 200);
    assert!(body.is_ascii() && body.contains(r"gr\u00fcn"));
    let events: Vec<Value> = body.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(events.len() > 10, "{}", events.len());
    assert_eq!(events.last().unwrap()["properties"]["generation"], "199", "the end comes after the last event");
    house.close();
}
