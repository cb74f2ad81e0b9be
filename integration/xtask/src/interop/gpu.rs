//! `atoll-gpu` behind QEMU's vhost-user-gpu front end, and QEMU's own device in its place: a stock guest's picture, pixel by pixel.

use crate::console::Console;
use crate::painting::Painting;
use crate::qemu::Qemu;
use crate::{full_kernel, painting, place};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use super::{BOOT_LIMIT, Device, STEP_LIMIT, machine};

/// What is painted.
const PICTURE: Painting = Painting::USUAL;
/// How long a picture may take to be there.
const PICTURE_LIMIT: Duration = Duration::from_secs(60);
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// QEMU's monitor.
struct Monitor {
    reader: BufReader<UnixStream>,
}

impl Monitor {
    fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).with_context(|| format!("no monitor at {}", path.display()))?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        let mut monitor = Self { reader: BufReader::new(stream) };
        monitor.answer()?;
        monitor.ask(&json!({ "execute": "qmp_capabilities" }))?;
        Ok(monitor)
    }
    fn answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        ensure!(self.reader.read_line(&mut line)? > 0, "the monitor has hung up");
        Ok(serde_json::from_str(&line)?)
    }
    fn ask(&mut self, question: &Value) -> Result<Value> {
        writeln!(self.reader.get_mut(), "{question}")?;
        loop {
            let answer = self.answer()?;
            // Events come in between.
            if answer.get("error").is_some() {
                bail!("{question}: {answer}");
            }
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
        }
    }
    /// The pixels of the screen, and how wide and high it is.
    fn picture(&mut self, file: &Path) -> Result<(usize, usize, Vec<u8>)> {
        self.ask(&json!({ "execute": "screendump", "arguments": { "filename": file } }))?;
        let bytes = std::fs::read(file)?;
        let mut words = bytes.splitn(4, |byte| byte.is_ascii_whitespace());
        let mut word = || words.next().context("a PPM has a header of four words");
        ensure!(word()? == b"P6", "no PPM");
        let (width, height) = (text(word()?)?, text(word()?)?);
        let rest = word()?;
        let at = rest.iter().position(u8::is_ascii_whitespace).context("a PPM says its depth")?;
        Ok((width, height, rest[at + 1..].to_vec()))
    }
}

fn text(word: &[u8]) -> Result<usize> {
    Ok(std::str::from_utf8(word)?.parse()?)
}

/// A guest on QEMU paints; milliseconds until all of the picture is there.
fn painted(qemu: &Qemu, ours: bool) -> Result<u64> {
    let folder = tempfile::tempdir()?;
    let (socket, monitor) = (folder.path().join("gpu.sock"), folder.path().join("qmp.sock"));
    let _device = if ours { Some(Device::start("atoll-gpu", &socket, &[])?) } else { None };
    let archive = PICTURE.initramfs(folder.path())?;
    let mut command = machine(qemu);
    command
        .args([
            "-append",
            "console=ttyS0 panic=-1 quiet",
            "-qmp",
            &format!("unix:{},server=on,wait=off", monitor.display()),
        ])
        .arg("-kernel")
        .arg(full_kernel::image()?)
        .arg("-initrd")
        .arg(&archive);
    if ours {
        command
            .args(["-chardev", &format!("socket,id=gpu,path={}", socket.display())])
            .args(["-device", "vhost-user-gpu-pci,chardev=gpu"]);
    } else {
        command.args(["-device", "virtio-gpu-pci"]);
    }
    let mut console = Console::spawn(&mut command)?;
    console.prompt(BOOT_LIMIT)?;
    PICTURE.ready(&mut console)?;
    let begin = Instant::now();
    painting::paint(&mut console, 0)?;
    let mut monitor = Monitor::connect(&monitor)?;
    let file = folder.path().join("screen.ppm");
    let shown = loop {
        let (width, height, pixels) = monitor.picture(&file)?;
        let left = PICTURE.wrong(0, (width, height), &pixels);
        if left == 0 {
            break begin.elapsed();
        }
        ensure!(begin.elapsed() < PICTURE_LIMIT, "{left} pixels of {width}x{height} are not the guest's");
        std::thread::sleep(Duration::from_millis(20));
    };
    painting::nobody_complains(&mut console)?;
    console.send("poweroff -f\n")?;
    let (status, errors) = console.wait(STEP_LIMIT)?;
    ensure!(status.success(), "QEMU ended with {status}: {errors}");
    Ok(shown.as_millis() as u64)
}

/// A stock guest with Debian's full kernel paints its frame buffer; QEMU's screen is that picture, with QEMU's own device and with
/// `atoll-gpu`. One line of JSON.
///
/// # Errors
/// When it is not so, or QEMU cannot be had.
pub fn run() -> Result<()> {
    let qemu = Qemu::newest()?;
    place::build_programs()?;
    let theirs = painted(&qemu, false).context("QEMU's own device")?;
    let ours = painted(&qemu, true).context("atoll-gpu")?;
    let report = json!({
        "interop": "gpu", "ok": true, "front_end": format!("QEMU {} vhost-user-gpu-pci", qemu.version()?),
        "pixels": PICTURE.width * PICTURE.height, "wrong": 0, "shown_ms": { "atoll-gpu": ours, "qemu": theirs },
    });
    println!("{report}");
    Ok(())
}
