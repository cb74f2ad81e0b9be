//! The page, without a browser: who gets in, what is served, and both WebSockets.

mod screen;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, ensure};
use atoll_display::rfb::encoding;
use screen::{PATIENCE, SECRET, Screen, Viewer, decode_png, picture, rgb};

const SIZE: (u32, u32) = (640, 480);

/// Asks, on a connection of its own; the head of the answer, and what follows it.
fn ask(screen: &Screen, path: &str, headers: &[&str]) -> Result<(String, Vec<u8>)> {
    let mut stream = open(screen, path, headers, "Connection: close")?;
    let head = head(&mut stream)?;
    let mut body = Vec::new();
    stream.read_to_end(&mut body)?;
    Ok((head, body))
}

fn open(screen: &Screen, path: &str, headers: &[&str], last: &str) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(screen.web)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut request = format!("GET {path} HTTP/1.1\r\nHost: {}\r\n{last}\r\n", screen.web);
    headers.iter().for_each(|header| request += &format!("{header}\r\n"));
    stream.write_all(format!("{request}\r\n").as_bytes())?;
    Ok(stream)
}

fn head(stream: &mut TcpStream) -> Result<String> {
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        bytes.push(byte[0]);
    }
    Ok(String::from_utf8(bytes)?)
}

fn cookie() -> String {
    format!("Cookie: atoll_token={SECRET}")
}

/// A WebSocket, spoken by hand: bytes in frames of a client, bytes out of frames of a server.
struct Socket {
    stream: TcpStream,
    heard: Vec<u8>,
}

impl Socket {
    fn open(screen: &Screen, path: &str, headers: &[&str]) -> Result<std::result::Result<Self, String>> {
        let key = ["Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="];
        let headers: Vec<&str> = headers.iter().copied().chain(key).collect();
        let mut stream = open(screen, path, &headers, "Connection: Upgrade")?;
        let head = head(&mut stream)?;
        if !head.starts_with("HTTP/1.1 101") {
            return Ok(Err(head));
        }
        // The example of RFC 6455.
        ensure!(head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{head}");
        Ok(Ok(Self { stream, heard: Vec::new() }))
    }

    fn frame(&mut self, kind: u8, bytes: &[u8]) -> Result<()> {
        let mask = [1, 2, 3, 4];
        let mut frame = vec![0x80 | kind];
        match bytes.len() {
            len @ 0..126 => frame.push(0x80 | len as u8),
            len => {
                frame.push(0x80 | 126);
                frame.extend((len as u16).to_be_bytes());
            }
        }
        frame.extend(mask);
        frame.extend(bytes.iter().enumerate().map(|(at, byte)| byte ^ mask[at % 4]));
        Ok(self.stream.write_all(&frame)?)
    }

    /// The next frame: its kind, and what is in it.
    fn next(&mut self) -> std::io::Result<(u8, Vec<u8>)> {
        let mut head = [0; 2];
        self.stream.read_exact(&mut head)?;
        let mut len = u64::from(head[1]);
        if len == 126 {
            let mut more = [0; 2];
            self.stream.read_exact(&mut more)?;
            len = u16::from_be_bytes(more).into();
        } else if len == 127 {
            let mut more = [0; 8];
            self.stream.read_exact(&mut more)?;
            len = u64::from_be_bytes(more);
        }
        let mut bytes = vec![0; len as usize];
        self.stream.read_exact(&mut bytes)?;
        Ok((head[0] & 15, bytes))
    }
}

impl Read for Socket {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        while self.heard.is_empty() {
            match self.next()? {
                (2, bytes) => self.heard = bytes,
                (8, _) => return Ok(0),
                _ => {}
            }
        }
        let count = out.len().min(self.heard.len());
        out[..count].copy_from_slice(&self.heard[..count]);
        self.heard.drain(..count);
        Ok(count)
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.frame(2, bytes).map_err(std::io::Error::other)?;
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The token opens the door, once; everything behind it needs the cookie, and sockets are for this page only.
#[test]
fn who_knows_the_token_gets_in() -> Result<()> {
    let screen = Screen::start(&[], Vec::new())?;
    for path in ["/", "/page.js", "/state.json", "/screenshot.png", "/novnc/core/rfb.js", "/websockify", "/?token=no"] {
        let (head, body) = ask(&screen, path, &[])?;
        ensure!(
            head.starts_with("HTTP/1.1 401") && !String::from_utf8_lossy(&body).contains("page.js"),
            "{path}: {head}"
        );
    }
    let (head, _) = ask(&screen, &format!("/?token={SECRET}"), &[])?;
    ensure!(head.starts_with("HTTP/1.1 303") && head.contains("location: /\r\n"), "{head}");
    ensure!(head.contains(&format!("atoll_token={SECRET}; Path=/; HttpOnly; SameSite=Strict")), "{head}");
    let (head, body) = ask(&screen, "/", &[&cookie()])?;
    ensure!(head.starts_with("HTTP/1.1 200") && head.contains("frame-ancestors 'none'"), "{head}");
    ensure!(String::from_utf8(body)?.contains("/page.js"));
    ensure!(ask(&screen, "/../etc/passwd", &[&cookie()])?.0.starts_with("HTTP/1.1 404"));
    ensure!(ask(&screen, "/screenshot.png", &[&cookie()])?.0.starts_with("HTTP/1.1 404"), "nothing is shown");
    ensure!(ask(&screen, "/websockify", &[&cookie()])?.0.starts_with("HTTP/1.1 426"));
    let foreign = Socket::open(&screen, "/websockify", &[&cookie(), "Origin: http://evil.example"])?;
    ensure!(foreign.is_err_and(|head| head.starts_with("HTTP/1.1 403")));
    let unknown = Socket::open(&screen, "/websockify", &[])?;
    ensure!(unknown.is_err_and(|head| head.starts_with("HTTP/1.1 401")));
    Ok(())
}

/// A browser's viewer sees what the GPU shows, without a second password; noVNC is served where it is, and missed by name.
#[test]
fn a_browser_sees_the_picture() -> Result<()> {
    let novnc = tempfile::tempdir()?;
    std::fs::create_dir_all(novnc.path().join("core/util"))?;
    std::fs::write(novnc.path().join("core/rfb.js"), "export default class {}")?;
    std::fs::write(novnc.path().join("core/util/x.js"), "0")?;
    std::fs::write(novnc.path().join("secret.js"), "0")?;
    let folder = novnc.path().to_str().context("a name")?;
    let mut screen = Screen::start(&["--novnc", folder], Vec::new())?;
    let pixels = picture(640, 480, 1);
    screen.gpu.show(0, SIZE, &pixels)?;
    let origin = format!("Origin: http://{}", screen.web);
    let socket = Socket::open(&screen, "/websockify?head=0", &[&cookie(), &origin])?.map_err(anyhow::Error::msg)?;
    let mut viewer = Viewer::open(socket, None)?;
    viewer.encodings(&[encoding::TIGHT])?;
    viewer.sees(SIZE, &pixels)?;
    viewer.stream.frame(9, b"there?")?;
    ensure!(viewer.stream.next()? == (10, b"there?".to_vec()), "a ping is answered");
    let (_, png) = ask(&screen, "/screenshot.png?head=0", &[&cookie()])?;
    ensure!(decode_png(&png)? == (SIZE, rgb(&pixels)));
    let (head, body) = ask(&screen, "/novnc/core/rfb.js", &[&cookie()])?;
    ensure!(body == b"export default class {}" && head.contains("text/javascript"), "{head}");
    ensure!(ask(&screen, "/novnc/core/util/x.js", &[&cookie()])?.1 == b"0");
    for other in ["/novnc/secret.js", "/novnc/core/../secret.js", "/novnc/", "/novnc//etc/passwd"] {
        ensure!(ask(&screen, other, &[&cookie()])?.0.starts_with("HTTP/1.1 404"), "{other}");
    }
    let state = String::from_utf8(ask(&screen, "/state.json", &[&cookie()])?.1)?;
    ensure!(state.contains(r#""novnc":true"#) && state.contains(r#""width":640"#), "{state}");
    viewer.stream.frame(8, &[])?;
    drop(screen);

    let screen = Screen::start(&["--novnc", "/nowhere"], Vec::new())?;
    let state = String::from_utf8(ask(&screen, "/state.json", &[&cookie()])?.1)?;
    ensure!(state.contains(r#""novnc":false"#) && state.contains("/nowhere has no core/rfb.js"), "{state}");
    Ok(())
}

/// The serial console: what was printed before is shown, what is typed arrives, all who look see it.
#[test]
fn the_serial_console_is_beside_it() -> Result<()> {
    let (mut guest, theirs) = UnixStream::pair()?;
    guest.set_read_timeout(Some(PATIENCE))?;
    guest.write_all(b"login: ")?;
    let screen = Screen::start(&[], vec![("--serial-fd", theirs.into())])?;
    let connect = || Socket::open(&screen, "/serial", &[&cookie()])?.map_err(anyhow::Error::msg);
    let (mut one, mut two) = (connect()?, connect()?);
    for socket in [&mut one, &mut two] {
        let mut shown = [0; 7];
        socket.read_exact(&mut shown)?;
        ensure!(&shown == b"login: ");
    }
    one.write_all(b"root\r")?;
    let mut typed = [0; 5];
    guest.read_exact(&mut typed)?;
    ensure!(&typed == b"root\r");
    guest.write_all("# \u{1b}[1mé\n".as_bytes())?;
    for socket in [&mut one, &mut two] {
        let mut shown = [0; 9];
        socket.read_exact(&mut shown)?;
        ensure!(shown == "# \u{1b}[1mé\n".as_bytes());
    }
    // Nobody reads a megabyte: the guest is not kept waiting, and who comes later sees the end of it.
    for line in 0..16_384 {
        guest.write_all(format!("{line:062}\r\n").as_bytes())?;
    }
    let mut three = connect()?;
    let mut shown = Vec::new();
    while !shown.ends_with(format!("{:062}\r\n", 16_383).as_bytes()) {
        let mut piece = [0; 4096];
        let count = three.read(&mut piece)?;
        ensure!(count > 0, "it has hung up");
        shown.extend(&piece[..count]);
    }
    ensure!(shown.len() >= 64 << 10);
    Ok(())
}
