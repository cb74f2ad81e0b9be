//! A browser that says whatever it likes: a request's head, and frames on a WebSocket. Nothing may panic, nobody gets in
//! without the token, and what comes out of a WebSocket is never more than what went in.
#![no_main]

use atoll_display::secret::Secret;
use atoll_display::web::request::{Denied, Wanted, decide};
use atoll_display::web::socket::{self, bridge};
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Uri};
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const TOKEN: &str = "s3cret";

fn request(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut lines = text.split('\n');
    let Some(Ok(uri)) = lines.next().map(str::parse::<Uri>) else { return };
    let mut headers = HeaderMap::new();
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), HeaderValue::from_str(value)) {
            headers.append(name, value);
        }
    }
    let secret = Secret::new(TOKEN.as_bytes()).expect("a secret");
    let decided = decide(&Method::GET, &uri, &headers, Some(&secret));
    assert!(text.contains(TOKEN) || decided == Err(Denied::Unknown));
    if let Ok(Wanted::View(head, _) | Wanted::Screenshot(head)) = decided {
        assert!(head < 16);
    }
}

fn frames(data: &[u8], piece: usize) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let (mut browser, server) = tokio::io::duplex(1 << 20);
        let (mut viewer, bridged) = tokio::io::duplex(1 << 20);
        let socket = socket::with_limits(server).await;
        let talk = tokio::spawn(bridge(socket, bridged));
        for piece in data.chunks(piece) {
            if browser.write_all(piece).await.is_err() {
                break;
            }
            tokio::task::yield_now().await;
        }
        drop(browser);
        let _ = talk.await.expect("no panic");
        let mut heard = Vec::new();
        let _ = viewer.read_to_end(&mut heard).await;
        assert!(heard.len() <= data.len());
    });
}

fuzz_target!(|data: &[u8]| {
    let Some((first, rest)) = data.split_first() else { return };
    if first & 1 == 0 {
        request(rest);
    } else {
        frames(rest, usize::from(first >> 1) + 1);
    }
});
