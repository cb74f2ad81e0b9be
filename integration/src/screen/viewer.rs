//! As little of a VNC viewer as types and points (RFB 3.8 without a password).

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

/// How long anything may take.
const STEP: Duration = Duration::from_secs(60);

/// The viewer.
pub struct Viewer(UnixStream);

impl Viewer {
    /// Connects to the UNIX socket at `path`, whose screen has this size.
    ///
    /// # Errors
    /// Nobody is there, or not let in.
    pub fn connect(path: &Path, size: (usize, usize)) -> Result<Self> {
        let deadline = Instant::now() + STEP;
        let mut stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
                Err(error) => return Err(error.into()),
            }
        };
        stream.set_read_timeout(Some(STEP))?;
        let mut version = [0; 12];
        stream.read_exact(&mut version)?;
        stream.write_all(b"RFB 003.008\n")?;
        let mut count = [0];
        stream.read_exact(&mut count)?;
        let mut kinds = vec![0; count[0].into()];
        stream.read_exact(&mut kinds)?;
        ensure!(kinds.contains(&1), "a password is asked for at a UNIX socket: {kinds:?}");
        stream.write_all(&[1])?;
        let mut result = [0; 4];
        stream.read_exact(&mut result)?;
        ensure!(result == [0; 4], "the viewer is not let in");
        stream.write_all(&[1])?;
        let mut init = [0; 24];
        stream.read_exact(&mut init)?;
        let (width, height) = (u16::from_be_bytes([init[0], init[1]]), u16::from_be_bytes([init[2], init[3]]));
        ensure!((usize::from(width), usize::from(height)) == size, "the screen is {width}x{height}");
        let mut name = vec![0; u32::from_be_bytes([init[20], init[21], init[22], init[23]]) as usize];
        stream.read_exact(&mut name)?;
        Ok(Self(stream))
    }

    /// Presses a key, or lets it go.
    ///
    /// # Errors
    /// The display is gone.
    pub fn key(&mut self, symbol: u32, down: bool) -> Result<()> {
        let mut message = vec![4, u8::from(down), 0, 0];
        message.extend(symbol.to_be_bytes());
        Ok(self.0.write_all(&message)?)
    }

    /// Says where the pointer is, and which buttons are down.
    ///
    /// # Errors
    /// The display is gone.
    pub fn point(&mut self, x: u16, y: u16, buttons: u8) -> Result<()> {
        let mut message = vec![5, buttons];
        message.extend(x.to_be_bytes());
        message.extend(y.to_be_bytes());
        Ok(self.0.write_all(&message)?)
    }
}
