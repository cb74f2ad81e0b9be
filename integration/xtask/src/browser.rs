//! A real browser without a window: Chromium, asked over its debugging pipe (the DevTools protocol: JSON, each message ended
//! by a zero byte).

use std::io::{BufRead as _, BufReader, ErrorKind, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use crate::place;
use anyhow::{Context, Result, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};

/// How long an answer may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// How often a condition is asked about.
const LOOK: Duration = Duration::from_millis(100);
/// Messages that wait to be read.
const MESSAGES_MAX: usize = 4096;

/// A browser with one page.
pub struct Browser {
    child: Child,
    requests: ChildStdin,
    messages: Receiver<Value>,
    session: Value,
    next: u64,
    _profile: tempfile::TempDir,
}

fn program() -> Result<PathBuf> {
    let found = ["chromium", "chromium-browser", "google-chrome"].iter().find_map(|name| place::on_path(name));
    found.context("no Chromium on PATH: install `chromium`")
}

/// Writes all of it to a pipe that does not wait by itself.
fn write_until(mut pipe: impl Write + AsFd, mut bytes: &[u8], deadline: Instant) -> Result<()> {
    while !bytes.is_empty() {
        match pipe.write(bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let left = deadline.saturating_duration_since(Instant::now());
                ensure!(!left.is_zero(), "nothing reads what is written");
                match poll(&mut [PollFd::new(&pipe, PollFlags::OUT)], Some(&left.try_into()?)) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(errno) => return Err(errno.into()),
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

impl Browser {
    /// Opens `url` in a window of this size.
    ///
    /// # Errors
    /// There is no browser, or it does not start.
    pub fn open(url: &str, (width, height): (u32, u32)) -> Result<Self> {
        let profile = tempfile::tempdir()?;
        // The browser reads its orders from descriptor 3 and answers on 4.
        let mut command = Command::new("sh");
        command
            .args(["-c", "exec \"$@\" 3<&0 4>&1 </dev/null >/dev/null 2>&1", "browser"])
            .arg(program()?)
            .args(["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"])
            .args(["--hide-scrollbars", "--force-device-scale-factor=1", "--remote-debugging-pipe"])
            .args(["--disable-background-networking", "--disable-component-update", "--disable-extensions"])
            .arg(format!("--window-size={width},{height}"))
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg("about:blank")
            .env("HOME", profile.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0);
        let mut child = command.spawn().context("cannot start the browser")?;
        let (requests, answers) = (child.stdin.take(), child.stdout.take());
        let (requests, answers) = requests.zip(answers).context("a browser without pipes")?;
        // Our end alone: the browser's is another open file.
        rustix::io::ioctl_fionbio(&requests, true)?;
        let (tell, messages) = sync_channel(MESSAGES_MAX);
        std::thread::spawn(move || {
            let mut answers = BufReader::new(answers);
            let mut message = Vec::new();
            while answers.read_until(0, &mut message).is_ok_and(|read| read > 0) {
                message.pop();
                let Ok(value) = serde_json::from_slice(&message) else { return };
                if tell.send(value).is_err() {
                    return;
                }
                message.clear();
            }
        });
        let mut browser = Self { child, requests, messages, session: Value::Null, next: 0, _profile: profile };
        let page = browser.ask("Target.createTarget", &json!({ "url": "about:blank" }))?;
        let attached =
            browser.ask("Target.attachToTarget", &json!({ "targetId": page["targetId"], "flatten": true }))?;
        browser.session = attached["sessionId"].clone();
        let size = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        browser.ask("Emulation.setDeviceMetricsOverride", &size)?;
        browser.ask("Page.navigate", &json!({ "url": url }))?;
        Ok(browser)
    }

    fn ask(&mut self, method: &str, parameters: &Value) -> Result<Value> {
        self.next += 1;
        let id = self.next;
        let mut request = json!({ "id": id, "method": method, "params": parameters });
        if !self.session.is_null() {
            request["sessionId"] = self.session.clone();
        }
        let mut bytes = serde_json::to_vec(&request)?;
        bytes.push(0);
        let deadline = Instant::now() + ANSWER_LIMIT;
        write_until(&self.requests, &bytes, deadline).with_context(|| format!("the browser does not take {method}"))?;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let message = self.messages.recv_timeout(left);
            let message = message.with_context(|| format!("the browser does not answer {method}"))?;
            if message["id"] != id {
                continue;
            }
            ensure!(message["error"].is_null(), "{method}: {}", message["error"]);
            return Ok(message["result"].clone());
        }
    }

    /// What an expression is in the page.
    ///
    /// # Errors
    /// It throws.
    pub fn evaluate(&mut self, expression: &str) -> Result<Value> {
        let asked = json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let answer = self.ask("Runtime.evaluate", &asked)?;
        if let Some(thrown) = answer.get("exceptionDetails") {
            bail!("{expression}: {thrown}");
        }
        Ok(answer["result"]["value"].clone())
    }

    /// Waits until an expression is true in the page.
    ///
    /// # Errors
    /// It does not become that.
    pub fn until(&mut self, expression: &str, limit: Duration) -> Result<()> {
        let begin = Instant::now();
        while self.evaluate(expression).ok() != Some(Value::Bool(true)) {
            ensure!(begin.elapsed() < limit, "the page does not come to {expression} within {limit:?}");
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Size of the page's first canvas, and red, green and blue of its pixels.
    ///
    /// # Errors
    /// There is none.
    pub fn canvas(&mut self) -> Result<((usize, usize), Vec<u8>)> {
        const READ: &str = "(() => { const c = document.querySelector('canvas'); \
            const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let s = ''; \
            for (let i = 0; i < d.length; i += 32768) s += String.fromCharCode(...d.subarray(i, i + 32768)); \
            return [c.width, c.height, btoa(s)]; })()";
        let read = self.evaluate(READ)?;
        let side = |at: usize| read[at].as_u64().and_then(|side| usize::try_from(side).ok());
        let (size, text) = (side(0).zip(side(1)), read[2].as_str());
        let (size, text) = size.zip(text).context("the canvas has no pixels")?;
        let pixels = STANDARD.decode(text)?.chunks_exact(4).flat_map(|pixel| pixel[..3].to_vec()).collect();
        Ok((size, pixels))
    }

    /// Presses and releases the key of a character.
    ///
    /// # Errors
    /// The browser is gone.
    pub fn press(&mut self, key: char) -> Result<()> {
        let text = if key == '\n' { "\r".to_owned() } else { key.to_string() };
        let (name, code, number) = match key {
            '\n' => ("Enter".to_owned(), "Enter".to_owned(), 13),
            ' ' => (text.clone(), "Space".to_owned(), 32),
            digit if digit.is_ascii_digit() => (text.clone(), format!("Digit{digit}"), u32::from(digit)),
            letter if letter.is_ascii_alphabetic() => {
                let upper = letter.to_ascii_uppercase();
                (text.clone(), format!("Key{upper}"), u32::from(upper))
            }
            // Where it is depends on the keyboard.
            _ => (text.clone(), String::new(), 0),
        };
        for kind in ["keyDown", "keyUp"] {
            let mut event = json!({ "type": kind, "key": name, "code": code, "windowsVirtualKeyCode": number });
            if kind == "keyDown" {
                event["text"] = Value::String(text.clone());
            }
            self.ask("Input.dispatchKeyEvent", &event)?;
        }
        Ok(())
    }

    /// Types a text.
    ///
    /// # Errors
    /// The browser is gone.
    pub fn enter(&mut self, text: &str) -> Result<()> {
        text.chars().try_for_each(|key| self.press(key))
    }

    /// The page as a PNG.
    ///
    /// # Errors
    /// The browser is gone.
    pub fn picture(&mut self) -> Result<Vec<u8>> {
        let taken = self.ask("Page.captureScreenshot", &json!({ "format": "png" }))?;
        Ok(STANDARD.decode(taken["data"].as_str().context("no picture")?)?)
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Its children are in its group.
        if let Some(group) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = rustix::process::kill_process_group(group, Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A browser that reads no more keeps nobody for ever, and one that is slow gets all of it.
    #[test]
    fn writing_has_an_end() {
        let (reader, writer) = std::io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&writer, true).unwrap();
        let bytes = vec![7; 4 << 20];
        let stuck = write_until(&writer, &bytes, Instant::now() + Duration::from_millis(100));
        assert!(stuck.unwrap_err().to_string().contains("nothing reads"));
        let read = std::thread::spawn(move || BufReader::new(reader).lines().count());
        write_until(&writer, &bytes, Instant::now() + ANSWER_LIMIT).unwrap();
        drop(writer);
        read.join().unwrap();
    }
}
