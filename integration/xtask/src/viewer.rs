//! As little of a VNC viewer as types, points and looks (RFB 3.8 without a password).

use std::io::{BufReader, ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

/// How long anything may take.
const STEP: Duration = Duration::from_secs(60);

/// Words of the protocol.
const SET_PIXEL_FORMAT: u8 = 0;
const SET_ENCODINGS: u8 = 2;
const REQUEST: u8 = 3;
const UPDATE: u8 = 0;
const RAW: i32 = 0;
const CURSOR: i32 = -239;
/// 32 bits, of which 24 count; little endian; true colour; 255 each; red, green and blue above each other.
const FORMAT: [u8; 16] = [32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0, 0, 0, 0];
const PIXEL: usize = 4;
/// Bytes that are read together.
const CHUNK: usize = 256 << 10;

/// The viewer.
pub struct Viewer(BufReader<UnixStream>);

/// What a viewer has seen: four bytes a pixel (blue, green, red, nothing).
#[derive(Clone, Debug)]
pub struct Seen {
    size: (usize, usize),
    /// Row by row.
    pub pixels: Vec<u8>,
    /// What the viewer was told last of the pointer, if it was told of one.
    pub pointer: Option<Pointer>,
}

/// What a pointer looks like; one without pixels is not shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pointer {
    /// Columns and rows.
    pub size: (usize, usize),
    /// The pixel that points.
    pub hot: (usize, usize),
    /// Blue, green and red of each pixel, row by row.
    pub colours: Vec<[u8; 3]>,
    /// Which pixels are there.
    pub mask: Vec<bool>,
}

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
        Ok(Self(BufReader::with_capacity(CHUNK, stream)))
    }

    /// Presses a key, or lets it go.
    ///
    /// # Errors
    /// The display is gone.
    pub fn key(&mut self, symbol: u32, down: bool) -> Result<()> {
        let mut message = vec![4, u8::from(down), 0, 0];
        message.extend(symbol.to_be_bytes());
        Ok(self.0.get_mut().write_all(&message)?)
    }

    /// Says where the pointer is, and which buttons are down.
    ///
    /// # Errors
    /// The display is gone.
    pub fn point(&mut self, x: u16, y: u16, buttons: u8) -> Result<()> {
        let mut message = vec![5, buttons];
        message.extend(x.to_be_bytes());
        message.extend(y.to_be_bytes());
        Ok(self.0.get_mut().write_all(&message)?)
    }

    /// Wants plain pixels, and all of them at first.
    ///
    /// # Errors
    /// The display is gone.
    pub fn look(&mut self, size: (usize, usize)) -> Result<Seen> {
        self.look_for(size, &[RAW])
    }

    /// The same, and wants to be told of the pointer.
    ///
    /// # Errors
    /// The display is gone.
    pub fn look_with_pointer(&mut self, size: (usize, usize)) -> Result<Seen> {
        self.look_for(size, &[RAW, CURSOR])
    }

    fn look_for(&mut self, size: (usize, usize), encodings: &[i32]) -> Result<Seen> {
        let mut message = vec![SET_PIXEL_FORMAT, 0, 0, 0];
        message.extend(FORMAT);
        message.extend([SET_ENCODINGS, 0]);
        message.extend(u16::try_from(encodings.len())?.to_be_bytes());
        message.extend(encodings.iter().flat_map(|number| number.to_be_bytes()));
        self.0.get_mut().write_all(&message)?;
        self.request(size, false)?;
        Ok(Seen { size, pixels: vec![0; size.0 * size.1 * PIXEL], pointer: None })
    }

    fn request(&mut self, (width, height): (usize, usize), changed_only: bool) -> Result<()> {
        let mut message = vec![REQUEST, u8::from(changed_only), 0, 0, 0, 0];
        message.extend(u16::try_from(width)?.to_be_bytes());
        message.extend(u16::try_from(height)?.to_be_bytes());
        Ok(self.0.get_mut().write_all(&message)?)
    }

    fn take<const COUNT: usize>(&mut self) -> Result<[u8; COUNT]> {
        let mut bytes = [0; COUNT];
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Waits for what is new, at most `within`, puts it into `seen` and asks for what comes after it; `false` if nothing came.
    ///
    /// # Errors
    /// The display is gone, or says what was not asked for.
    pub fn update(&mut self, seen: &mut Seen, within: Duration) -> Result<bool> {
        self.0.get_ref().set_read_timeout(Some(within))?;
        let mut kind = [0];
        match self.0.read(&mut kind) {
            Ok(1) => {}
            Ok(_) => bail!("the display has hung up"),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        self.0.get_ref().set_read_timeout(Some(STEP))?;
        ensure!(kind == [UPDATE], "the display says {kind:?}");
        let [_, high, low] = self.take()?;
        for _ in 0..u16::from_be_bytes([high, low]) {
            let header: [u8; 12] = self.take()?;
            let number = |at: usize| usize::from(u16::from_be_bytes([header[at], header[at + 1]]));
            let (x, y, width, height) = (number(0), number(2), number(4), number(6));
            if header[8..] == CURSOR.to_be_bytes() {
                seen.pointer = Some(self.pointer((x, y), (width, height))?);
                continue;
            }
            ensure!(header[8..] == RAW.to_be_bytes(), "a rectangle in another encoding: {header:?}");
            ensure!(x + width <= seen.size.0 && y + height <= seen.size.1, "a rectangle outside the screen");
            for row in y..y + height {
                let at = (row * seen.size.0 + x) * PIXEL;
                self.0.read_exact(&mut seen.pixels[at..at + width * PIXEL])?;
            }
        }
        self.request(seen.size, true)?;
        Ok(true)
    }

    /// What follows the header of a pointer: its pixels, then a bit for each, of which rows begin with a byte.
    fn pointer(&mut self, hot: (usize, usize), size: (usize, usize)) -> Result<Pointer> {
        let (width, height) = size;
        let (mut pixels, row) = (vec![0; width * height * PIXEL], width.div_ceil(8));
        self.0.read_exact(&mut pixels)?;
        let mut bits = vec![0; row * height];
        self.0.read_exact(&mut bits)?;
        let colours = pixels.as_chunks::<PIXEL>().0.iter().map(|[blue, green, red, _]| [*blue, *green, *red]).collect();
        let places = (0..height).flat_map(|y| (0..width).map(move |x| (x, y)));
        let mask = places.map(|(x, y)| bits[y * row + x / 8] & (0x80 >> (x % 8)) != 0).collect();
        Ok(Pointer { size, hot, colours, mask })
    }
}
