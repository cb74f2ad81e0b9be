//! What somebody at the page's port gets, decided from the head of a request alone.
//!
//! Who knows the token is given a cookie, which no page of another site can use: it is SameSite=Strict, and a WebSocket is only
//! opened for the site that it belongs to.

use atoll_protocol::display::SCANOUTS_MAX;
use hyper::header::{
    CONNECTION, COOKIE, HOST, HeaderMap, HeaderName, ORIGIN, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use hyper::{Method, Uri};

use crate::secret::Secret;

/// Name of the cookie.
pub const COOKIE_NAME: &str = "atoll_token";

/// What is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// The page.
    Page,
    /// Its script.
    Script,
    /// What there is: heads, viewer, console.
    State,
    /// A file of noVNC.
    Novnc(String),
    /// A picture of a head.
    Screenshot(usize),
    /// A viewer's conversation about a head, as a WebSocket with this key.
    View(usize, String),
    /// The serial console, likewise.
    Serial(String),
    /// A cookie, and the page without a token in its address.
    Welcome,
}

/// Why it is not given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied {
    /// Who asks does not know the token.
    Unknown,
    /// A WebSocket for a page of another site.
    Foreign,
    /// There is no such thing.
    Nothing,
    /// It can only be read.
    Method,
    /// No WebSocket was asked for where there is nothing else.
    NoSocket,
}

/// Decides.
///
/// # Errors
/// [`Denied`].
pub fn decide(method: &Method, uri: &Uri, headers: &HeaderMap, secret: Option<&Secret>) -> Result<Wanted, Denied> {
    if method != Method::GET && method != Method::HEAD {
        return Err(Denied::Method);
    }
    let query = |name: &str| -> Option<&str> {
        uri.query()?
            .split('&')
            .find_map(|pair| pair.split_once('=').filter(|(key, _)| *key == name))
            .map(|(_, value)| value)
    };
    if let Some(secret) = secret {
        let cookies = headers.get_all(COOKIE).iter().filter_map(|value| value.to_str().ok());
        let mut cookies = cookies.flat_map(|list| list.split(';')).filter_map(|pair| pair.trim().split_once('='));
        let known = cookies.any(|(name, value)| name == COOKIE_NAME && secret.is(value.as_bytes()));
        match (uri.path(), query("token")) {
            // A wrong token is not covered by a right cookie.
            ("/", Some(token)) if !secret.is(token.as_bytes()) => return Err(Denied::Unknown),
            ("/", Some(_)) => return Ok(Wanted::Welcome),
            _ if !known => return Err(Denied::Unknown),
            _ => {}
        }
    }
    let head = match query("head") {
        None => 0,
        Some(text) => text.parse().ok().filter(|head| *head < SCANOUTS_MAX).ok_or(Denied::Nothing)?,
    };
    match uri.path() {
        "/" => Ok(Wanted::Page),
        "/page.js" => Ok(Wanted::Script),
        "/state.json" => Ok(Wanted::State),
        "/screenshot.png" => Ok(Wanted::Screenshot(head)),
        "/websockify" => Ok(Wanted::View(head, socket_key(headers)?)),
        "/serial" => Ok(Wanted::Serial(socket_key(headers)?)),
        path => match path.strip_prefix("/novnc/") {
            Some(name) if !name.is_empty() => Ok(Wanted::Novnc(name.to_owned())),
            _ => Err(Denied::Nothing),
        },
    }
}

fn has_word(headers: &HeaderMap, name: HeaderName, word: &str) -> bool {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|list| list.split(',')).any(|one| one.trim().eq_ignore_ascii_case(word))
}

/// The key of a WebSocket that may be opened (RFC 6455, 4.2.1).
fn socket_key(headers: &HeaderMap) -> Result<String, Denied> {
    let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let asks = has_word(headers, UPGRADE, "websocket") && has_word(headers, CONNECTION, "upgrade");
    // A browser says on whose behalf it asks; who is no browser says nothing.
    if let Some(origin) = headers.get(ORIGIN) {
        let site = origin.to_str().ok().and_then(|origin| origin.strip_prefix("http://"));
        if site.is_none() || site != text(HOST) {
            return Err(Denied::Foreign);
        }
    }
    match text(SEC_WEBSOCKET_KEY) {
        Some(key) if asks && text(SEC_WEBSOCKET_VERSION) == Some("13") && key.len() == 24 => Ok(key.to_owned()),
        _ => Err(Denied::NoSocket),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(uri: &str, headers: &[(HeaderName, &str)]) -> Result<Wanted, Denied> {
        let secret = Secret::new(b"s3cret").unwrap();
        let headers = headers.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect();
        decide(&Method::GET, &uri.parse().unwrap(), &headers, Some(&secret))
    }

    #[test]
    fn the_token_opens_the_door_once() {
        let known = [(COOKIE, "a=b; atoll_token=s3cret")];
        assert_eq!(ask("/?token=s3cret", &[]), Ok(Wanted::Welcome));
        assert_eq!(ask("/?token=s3creT", &[]), Err(Denied::Unknown));
        assert_eq!(ask("/?token=", &[]), Err(Denied::Unknown));
        assert_eq!(ask("/", &[]), Err(Denied::Unknown));
        assert_eq!(ask("/websockify?token=s3cret", &[]), Err(Denied::Unknown), "only the page");
        assert_eq!(ask("/", &[(COOKIE, "atoll_token=s3cre")]), Err(Denied::Unknown));
        assert_eq!(ask("/", &known), Ok(Wanted::Page));
        assert_eq!(ask("/screenshot.png?head=2", &known), Ok(Wanted::Screenshot(2)));
        assert_eq!(ask("/screenshot.png?head=16", &known), Err(Denied::Nothing));
        assert_eq!(ask("/novnc/core/rfb.js", &known), Ok(Wanted::Novnc("core/rfb.js".into())));
        assert_eq!(ask("/etc/passwd", &known), Err(Denied::Nothing));
        let open = decide(&Method::GET, &"/".parse().unwrap(), &HeaderMap::new(), None);
        assert_eq!(open, Ok(Wanted::Page));
        assert_eq!(decide(&Method::POST, &"/".parse().unwrap(), &HeaderMap::new(), None), Err(Denied::Method));
    }

    /// A page of another site has the browser, but neither its cookie nor its permission.
    #[test]
    fn sockets_are_for_our_own_page() {
        let key = "dGhlIHNhbXBsZSBub25jZQ==";
        let asks = |origin: Option<&'static str>| {
            let mut headers = vec![
                (COOKIE, "atoll_token=s3cret"),
                (HOST, "127.0.0.1:6080"),
                (UPGRADE, "WebSocket"),
                (CONNECTION, "keep-alive, Upgrade"),
                (SEC_WEBSOCKET_VERSION, "13"),
                (SEC_WEBSOCKET_KEY, key),
            ];
            headers.extend(origin.map(|origin| (ORIGIN, origin)));
            ask("/websockify", &headers)
        };
        assert_eq!(asks(Some("http://127.0.0.1:6080")), Ok(Wanted::View(0, key.into())));
        assert_eq!(asks(None), Ok(Wanted::View(0, key.into())));
        for foreign in ["http://127.0.0.1:8080", "http://evil.example", "null", "https://127.0.0.1:6080"] {
            assert_eq!(asks(Some(foreign)), Err(Denied::Foreign), "{foreign}");
        }
        assert_eq!(ask("/serial", &[(COOKIE, "atoll_token=s3cret")]), Err(Denied::NoSocket));
    }
}
