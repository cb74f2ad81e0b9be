//! QEMU's monitor, as far as pictures of its screen need it.

use crate::picture::{self, Picture};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// The monitor.
pub(super) struct Monitor {
    reader: BufReader<UnixStream>,
}

impl Monitor {
    /// What makes QEMU listen at `path`.
    pub(super) fn arguments(path: &Path) -> [String; 2] {
        ["-qmp".to_owned(), format!("unix:{},server=on,wait=off", path.display())]
    }

    pub(super) fn connect(path: &Path) -> Result<Self> {
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
    /// What the screen shows, by way of `file`.
    pub(super) fn picture(&mut self, file: &Path) -> Result<Picture> {
        self.ask(&json!({ "execute": "screendump", "arguments": { "filename": file } }))?;
        picture::of_ppm(&std::fs::read(file)?)
    }
}
