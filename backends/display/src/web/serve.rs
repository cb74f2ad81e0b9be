//! The page's port: connections, and the answers that `request` has decided on.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{
    CACHE_CONTROL, CONNECTION, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, HeaderValue, LOCATION,
    REFERRER_POLICY, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_PROTOCOL, SET_COOKIE, UPGRADE, X_CONTENT_TYPE_OPTIONS,
};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::Semaphore;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::novnc::{Novnc, media_type};
use super::request::{COOKIE_NAME, Denied, Wanted, decide};
use super::socket;
use crate::listen::{Arrival, Place};
use crate::rfb::hello::Security;
use crate::secret::Secret;
use crate::serial::Serial;
use crate::shot;
use crate::stage::Stage;
use crate::{viewer, visits};

/// Connections of browsers at a time: each opens several.
const CONNECTIONS_MAX: usize = 64;
/// How long the head of a request may take.
const HEAD_MAX: Duration = Duration::from_secs(10);
/// How long nobody is let in when the kernel has no descriptors.
const PAUSE: Duration = Duration::from_millis(100);
/// Bytes of a request's head, at most.
const HEAD_BYTES: usize = 16 << 10;

const PAGE: &str = include_str!("page.html");
const SCRIPT: &str = include_str!("page.js");
const DOOR: &str = include_str!("door.html");

/// What the page shows, and to whom.
pub struct Site {
    /// What there is to see.
    pub stage: Arc<Stage>,
    /// The serial console.
    pub serial: Option<Arc<Serial>>,
    /// noVNC, or why it is not there.
    pub novnc: Result<Novnc, String>,
    /// Who knows it may look.
    pub secret: Option<Secret>,
    /// Places for viewers.
    pub seats: Arc<Semaphore>,
}

type Answer = Response<Full<Bytes>>;

/// Lets browsers in, one after the other.
pub async fn receive(place: Place, site: Arc<Site>) {
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let arrival = match place.accept().await {
            Ok(arrival) => arrival,
            Err(error) => {
                tracing::debug!(%error, "a browser did not arrive");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&connections).try_acquire_owned() else { continue };
        let site = Arc::clone(&site);
        tokio::spawn(async move {
            match arrival {
                Arrival::Tcp(stream) => converse(stream, site).await,
                Arrival::Unix(stream) => converse(stream, site).await,
            }
            drop(permit);
        });
    }
}

async fn converse<S>(stream: S, site: Arc<Site>)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let answer = service_fn(move |request| {
        let site = Arc::clone(&site);
        async move { Ok::<_, Infallible>(answer(&site, request)) }
    });
    let mut server = http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(HEAD_MAX).max_buf_size(HEAD_BYTES);
    if let Err(error) = server.serve_connection(TokioIo::new(stream), answer).with_upgrades().await {
        tracing::debug!(%error, "a browser is gone");
    }
}

fn answer(site: &Arc<Site>, mut request: Request<Incoming>) -> Answer {
    let wanted = decide(request.method(), request.uri(), request.headers(), site.secret.as_ref());
    match wanted {
        Ok(Wanted::Page) => page(PAGE),
        Ok(Wanted::Script) => with_type("text/javascript; charset=utf-8", SCRIPT.into()),
        Ok(Wanted::State) => with_type("application/json", state(site).into()),
        Ok(Wanted::Novnc(name)) => match site.novnc.as_ref().ok().and_then(|novnc| novnc.file(&name)) {
            Some(file) => with_type(media_type(&name), Bytes::copy_from_slice(file)),
            None => denied(Denied::Nothing),
        },
        Ok(Wanted::Screenshot(head)) => {
            let picture = site.stage.lock().shown(head);
            match picture.map(|picture| shot::png(&picture)) {
                Some(Ok(png)) => with_type("image/png", png.into()),
                Some(Err(_)) | None => denied(Denied::Nothing),
            }
        }
        Ok(Wanted::View(head, _)) if site.stage.lock().size(head) == (0, 0) => denied(Denied::Nothing),
        Ok(Wanted::View(head, key)) => {
            let Ok(place) = Arc::clone(&site.seats).try_acquire_owned() else {
                return plain(StatusCode::SERVICE_UNAVAILABLE, "all places for viewers are taken: close one of them\n");
            };
            let stage = Arc::clone(&site.stage);
            let upgrade = hyper::upgrade::on(&mut request);
            let mut place = Some(place);
            tokio::spawn(async move {
                if let Ok(upgraded) = upgrade.await {
                    let (ours, theirs) = tokio::io::duplex(socket::BUFFER);
                    let socket = socket::accept(upgraded).await;
                    // Who got here has shown the cookie.
                    let looks = viewer::serve(stage, head, Security::Open, ours, move || place.take());
                    let (end, bridged) = tokio::join!(looks, socket::bridge(socket, theirs));
                    visits::farewell(end);
                    if let Err(error) = bridged {
                        tracing::debug!(%error, "a viewer's WebSocket has ended");
                    }
                }
            });
            upgraded(&request, &key)
        }
        Ok(Wanted::Serial(key)) => {
            let Some(serial) = site.serial.clone() else { return denied(Denied::Nothing) };
            let upgrade = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                if let Ok(upgraded) = upgrade.await
                    && let Err(error) = socket::console(socket::accept(upgraded).await, serial).await
                {
                    tracing::debug!(%error, "a console's WebSocket has ended");
                }
            });
            upgraded(&request, &key)
        }
        Ok(Wanted::Welcome) => welcome(site),
        Err(denial) => denied(denial),
    }
}

/// What there is, for the page's script.
fn state(site: &Site) -> String {
    let (heads, connected) = {
        let heads = site.stage.lock();
        (heads.describe(), heads.connected)
    };
    let heads: Vec<_> = heads
        .iter()
        .map(|head| serde_json::json!({ "head": head.head, "width": head.width, "height": head.height }))
        .collect();
    let missing = site.novnc.as_ref().err();
    serde_json::json!({
        "heads": heads, "connected": connected, "serial": site.serial.is_some(),
        "novnc": missing.is_none(), "novnc_missing": missing,
    })
    .to_string()
}

fn with_header(mut answer: Answer, name: HeaderName, value: &str) -> Answer {
    if let Ok(value) = HeaderValue::from_str(value) {
        answer.headers_mut().insert(name, value);
    }
    answer
}

fn with_type(kind: &str, body: Bytes) -> Answer {
    let answer = with_header(Response::new(Full::new(body)), CONTENT_TYPE, kind);
    let answer = with_header(answer, CACHE_CONTROL, "no-store");
    let answer = with_header(answer, REFERRER_POLICY, "no-referrer");
    with_header(answer, X_CONTENT_TYPE_OPTIONS, "nosniff")
}

fn page(text: &'static str) -> Answer {
    let policy = "default-src 'self'; connect-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; \
                  object-src 'none'; base-uri 'none'; frame-ancestors 'none'";
    with_header(with_type("text/html; charset=utf-8", text.into()), CONTENT_SECURITY_POLICY, policy)
}

fn plain(status: StatusCode, text: &'static str) -> Answer {
    let mut answer = with_type("text/plain; charset=utf-8", text.into());
    *answer.status_mut() = status;
    answer
}

fn denied(denial: Denied) -> Answer {
    match denial {
        Denied::Unknown => {
            let mut answer = page(DOOR);
            *answer.status_mut() = StatusCode::UNAUTHORIZED;
            answer
        }
        Denied::Foreign => plain(StatusCode::FORBIDDEN, "this WebSocket is for the page of this address only\n"),
        Denied::Nothing => plain(StatusCode::NOT_FOUND, "there is nothing of this name: open /\n"),
        Denied::Method => plain(StatusCode::METHOD_NOT_ALLOWED, "everything here is read with GET\n"),
        Denied::NoSocket => plain(StatusCode::UPGRADE_REQUIRED, "a WebSocket (version 13) is expected here\n"),
    }
}

fn welcome(site: &Site) -> Answer {
    let token = site.secret.as_ref().map(Secret::text).unwrap_or_default();
    let mut answer = plain(StatusCode::SEE_OTHER, "");
    answer = with_header(answer, LOCATION, "/");
    with_header(answer, SET_COOKIE, &format!("{COOKIE_NAME}={token}; Path=/; HttpOnly; SameSite=Strict"))
}

fn upgraded(request: &Request<Incoming>, key: &str) -> Answer {
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let answer = with_header(answer, CONNECTION, "Upgrade");
    let answer = with_header(answer, UPGRADE, "websocket");
    let answer = with_header(answer, SEC_WEBSOCKET_ACCEPT, &derive_accept_key(key.as_bytes()));
    let offered = request.headers().get(SEC_WEBSOCKET_PROTOCOL).and_then(|value| value.to_str().ok());
    // Older ones of noVNC insist on it.
    let binary = offered.is_some_and(|list| list.split(',').any(|one| one.trim() == "binary"));
    if binary { with_header(answer, SEC_WEBSOCKET_PROTOCOL, "binary") } else { answer }
}
