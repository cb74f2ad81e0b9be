//! The process between a GPU's end of its socket and viewers: what all tests need.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use atoll_display::rfb::auth;
use atoll_display::rfb::encoding;
use atoll_kit::driver::process::{command, with_fds};
use atoll_protocol::display::control::{DisplayOrder, DisplayReport};
use atoll_protocol::display::{Channel, Features, REPLY_MAX, Rect, Reply, Request};
use atoll_protocol::{Frame, FrameSocket};
use flate2::{Decompress, FlushDecompress};

pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_atoll-display");
pub(crate) const SECRET: &str = "s3cret-and-more";

/// A running process.
pub(crate) struct Screen {
    pub(crate) child: Child,
    pub(crate) gpu: Gpu,
    pub(crate) control: FrameSocket,
    /// Where viewers who need no password arrive, and those who do.
    pub(crate) unix: std::path::PathBuf,
    pub(crate) tcp: std::net::SocketAddr,
    pub(crate) web: std::net::SocketAddr,
    pub(crate) folder: tempfile::TempDir,
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Screen {
    pub(crate) fn start(args: &[&str], fds: Vec<(&str, OwnedFd)>) -> Result<Self> {
        Self::start_with(true, args, fds)
    }

    /// Without a secret there is only the UNIX socket.
    pub(crate) fn start_with(secret: bool, args: &[&str], mut fds: Vec<(&str, OwnedFd)>) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let unix = folder.path().join("vnc.sock");
        let (tcp, web) = (TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?);
        let addresses = (tcp.local_addr()?, web.local_addr()?);
        let (ours, theirs) = UnixStream::pair()?;
        let (control, controlled) = UnixStream::pair()?;
        fds.extend([("--display-fd", theirs.into()), ("--control-fd", controlled.into())]);
        if secret {
            let path = folder.path().join("secret");
            std::fs::write(&path, format!("{SECRET}\n"))?;
            fds.extend([("--secret-fd", std::fs::File::open(path)?.into())]);
            fds.extend([("--vnc-fd", tcp.into()), ("--web-fd", web.into())]);
        } else {
            fds.push(("--vnc-fd", UnixListener::bind(&unix)?.into()));
        }
        let mut command = command(PROGRAM);
        command.args(["--jail=strict"]).args(args);
        let child = with_fds(&mut command, &fds).spawn()?;
        drop(fds);
        let control = FrameSocket::new(control.into());
        let mut screen = Self { child, gpu: Gpu::new(ours), control, unix, tcp: addresses.0, web: addresses.1, folder };
        screen.gpu.greet(Features::CHANGES)?;
        Ok(screen)
    }

    pub(crate) fn ask(&mut self, order: &DisplayOrder, fd: Option<OwnedFd>) -> Result<(DisplayReport, Frame)> {
        let beside: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
        self.control.writer.send(order, &beside, PATIENCE)?;
        drop(fd);
        let frame = self.control.reader.receive(Some(PATIENCE))?;
        Ok((frame.decode()?, frame))
    }

    /// A PNG of a head, decoded: its size, and red, green, blue of each pixel.
    pub(crate) fn screenshot(&mut self, head: u32) -> Result<((u32, u32), Vec<u8>)> {
        let (report, frame) = self.ask(&DisplayOrder::Screenshot { head }, None)?;
        let DisplayReport::Screenshot { width, height, .. } = report else { bail!("{report:?}") };
        let mut file = std::fs::File::from(frame.descriptors.into_iter().next().context("no picture")?);
        ensure!(file.write(&[0]).is_err(), "not sealed");
        let mut bytes = Vec::new();
        std::io::Seek::rewind(&mut file)?;
        file.read_to_end(&mut bytes)?;
        let (size, pixels) = decode_png(&bytes)?;
        ensure!(size == (width, height));
        Ok((size, pixels))
    }

    pub(crate) fn viewer(&self) -> Result<Viewer<UnixStream>> {
        let stream = UnixStream::connect(&self.unix)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Viewer::open(stream, None)
    }

    pub(crate) fn viewer_with(&self, password: &str) -> Result<Viewer<TcpStream>> {
        let stream = TcpStream::connect(self.tcp)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Viewer::open(stream, Some(password))
    }
}

pub(crate) fn decode_png(bytes: &[u8]) -> Result<((u32, u32), Vec<u8>)> {
    let mut reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info()?;
    let mut pixels = vec![0; reader.output_buffer_size().context("a size")?];
    let info = reader.next_frame(&mut pixels)?;
    ensure!(info.color_type == png::ColorType::Rgb && info.bit_depth == png::BitDepth::Eight);
    Ok(((info.width, info.height), pixels))
}

/// Red, green and blue of a picture.
pub(crate) fn rgb(pixels: &[u8]) -> Vec<u8> {
    pixels.as_chunks::<4>().0.iter().flat_map(|[blue, green, red, _]| [*red, *green, *blue]).collect()
}

/// A picture in which no two neighbours are the same, in many colours.
pub(crate) fn picture(width: u32, height: u32, seed: u32) -> Vec<u8> {
    let pixel = |at: u32| (at ^ seed.wrapping_mul(0x0101_4321)).wrapping_mul(0x9e37_79b1).to_le_bytes();
    (0..width * height).flat_map(pixel).collect()
}

/// A picture of few colours: what a text looks like.
pub(crate) fn text(width: u32, height: u32, colours: u32) -> Vec<u8> {
    let pixel = |at: u32| ((at / 3 * 7 % colours) * 0x0012_4567).to_le_bytes();
    (0..width * height).flat_map(pixel).collect()
}

/// The device's end.
pub(crate) struct Gpu {
    pub(crate) channel: Channel,
}

impl Gpu {
    pub(crate) fn new(socket: UnixStream) -> Self {
        Self { channel: Channel::new(socket, REPLY_MAX) }
    }
    pub(crate) fn say(&mut self, request: Request<'_>) -> Result<()> {
        let mut bytes = Vec::new();
        request.put(&mut bytes);
        Ok(self.channel.send(&bytes, PATIENCE)?)
    }
    pub(crate) fn hear(&mut self) -> Result<Reply> {
        let message = self.channel.receive(PATIENCE)?;
        Ok(Reply::decode(&message.header, &message.payload)?)
    }
    pub(crate) fn ask(&mut self, request: Request<'_>) -> Result<Reply> {
        self.say(request)?;
        self.hear()
    }
    pub(crate) fn greet(&mut self, features: Features) -> Result<()> {
        let Reply::Features(offered) = self.ask(Request::GetFeatures)? else { bail!("no features") };
        ensure!(offered.contains(features | Features::EDID), "{offered:?}");
        self.say(Request::SetFeatures(features))
    }
    /// Shows a whole picture.
    pub(crate) fn show(&mut self, scanout: u32, (width, height): (u32, u32), pixels: &[u8]) -> Result<()> {
        self.say(Request::Scanout { scanout, width, height })?;
        self.say(Request::Update { scanout, rect: Rect { x: 0, y: 0, width, height }, pixels })?;
        self.settle()
    }
    /// What was said is done.
    pub(crate) fn settle(&mut self) -> Result<()> {
        match self.ask(Request::GetDisplayInfo)? {
            Reply::DisplayInfo(_) => Ok(()),
            other => bail!("{other:?}"),
        }
    }
}

/// What a viewer was told beside pixels.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Told {
    pub(crate) sizes: Vec<(u16, u16, u16, u16)>,
    pub(crate) keys: bool,
    pub(crate) cursors: Vec<(u16, u16, Vec<u8>, Vec<u8>)>,
    pub(crate) rects: usize,
}

/// A viewer.
pub(crate) struct Viewer<S> {
    pub(crate) stream: S,
    pub(crate) size: (u32, u32),
    pub(crate) pixels: Vec<u8>,
    pub(crate) name: String,
    streams: [Decompress; 4],
}

impl<S: Read + Write> Viewer<S> {
    pub(crate) fn open(mut stream: S, password: Option<&str>) -> Result<Self> {
        let mut version = [0; 12];
        stream.read_exact(&mut version)?;
        ensure!(&version == b"RFB 003.008\n");
        stream.write_all(&version)?;
        let mut offered = [0; 2];
        stream.read_exact(&mut offered)?;
        ensure!(offered == [1, if password.is_some() { 2 } else { 1 }], "{offered:?}");
        stream.write_all(&offered[1..])?;
        if let Some(password) = password {
            let mut challenge = [0; 16];
            stream.read_exact(&mut challenge)?;
            stream.write_all(&auth::response(password.as_bytes(), &challenge))?;
        }
        let mut result = [0; 4];
        stream.read_exact(&mut result)?;
        if result != [0; 4] {
            let mut reason = vec![0; 4];
            stream.read_exact(&mut reason)?;
            reason.resize(u32::from_be_bytes([reason[0], reason[1], reason[2], reason[3]]) as usize, 0);
            stream.read_exact(&mut reason)?;
            bail!("refused: {}", String::from_utf8(reason)?);
        }
        stream.write_all(&[1])?;
        let mut init = [0; 24];
        stream.read_exact(&mut init)?;
        let side = |at: usize| u32::from(u16::from_be_bytes([init[at], init[at + 1]]));
        let size = (side(0), side(2));
        let mut name = vec![0; u32::from_be_bytes([init[20], init[21], init[22], init[23]]) as usize];
        stream.read_exact(&mut name)?;
        ensure!(init[4..8] == [32, 24, 0, 1], "pixels as they are: {init:?}");
        let pixels = vec![0; (size.0 * size.1 * 4) as usize];
        let streams = [(); 4].map(|()| Decompress::new(true));
        Ok(Self { stream, size, pixels, name: String::from_utf8(name)?, streams })
    }

    pub(crate) fn encodings(&mut self, list: &[i32]) -> Result<()> {
        let mut bytes = vec![2, 0, 0, list.len() as u8];
        bytes.extend(list.iter().flat_map(|number| number.to_be_bytes()));
        Ok(self.stream.write_all(&bytes)?)
    }

    pub(crate) fn request(&mut self, incremental: bool) -> Result<()> {
        let mut bytes = vec![3, u8::from(incremental), 0, 0, 0, 0];
        bytes.extend([self.size.0 as u16, self.size.1 as u16].iter().flat_map(|side| side.to_be_bytes()));
        Ok(self.stream.write_all(&bytes)?)
    }

    fn word<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }
    fn short(&mut self) -> Result<u16> {
        Ok(u16::from_be_bytes(self.word()?))
    }
    fn bytes(&mut self, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Takes one update.
    pub(crate) fn update(&mut self) -> Result<Told> {
        let [kind, _] = self.word()?;
        ensure!(kind == 0, "message {kind}");
        let mut told = Told::default();
        for _ in 0..self.short()? {
            let (x, y, width, height) = (self.short()?, self.short()?, self.short()?, self.short()?);
            match i32::from_be_bytes(self.word()?) {
                encoding::DESKTOP_SIZE => {
                    told.sizes.push((x, y, width, height));
                    self.resize(width, height);
                }
                encoding::EXTENDED_DESKTOP_SIZE => {
                    let [screens, ..] = self.word::<4>()?;
                    ensure!(screens == 1);
                    let screen = self.bytes(16)?;
                    let sides = [width.to_be_bytes(), height.to_be_bytes()].concat();
                    ensure!(screen[..8] == [0; 8] && screen[8..12] == sides, "{screen:?}");
                    told.sizes.push((x, y, width, height));
                    self.resize(width, height);
                }
                encoding::CURSOR => {
                    let pixels = self.bytes(usize::from(width) * usize::from(height) * 4)?;
                    let mask = self.bytes(usize::from(width).div_ceil(8) * usize::from(height))?;
                    told.cursors.push((x, y, pixels, mask));
                }
                encoding::QEMU_KEY => told.keys = true,
                encoding::RAW => {
                    let pixels = self.bytes(usize::from(width) * usize::from(height) * 4)?;
                    self.draw((x, y, width, height), &pixels)?;
                    told.rects += 1;
                }
                encoding::TIGHT => {
                    let pixels = self.tight(usize::from(width), usize::from(height))?;
                    self.draw((x, y, width, height), &pixels)?;
                    told.rects += 1;
                }
                other => bail!("encoding {other}"),
            }
        }
        Ok(told)
    }

    fn resize(&mut self, width: u16, height: u16) {
        if self.size != (u32::from(width), u32::from(height)) {
            self.size = (width.into(), height.into());
            self.pixels = vec![0; usize::from(width) * usize::from(height) * 4];
        }
    }

    fn draw(&mut self, (x, y, width, height): (u16, u16, u16, u16), pixels: &[u8]) -> Result<()> {
        ensure!(u32::from(x) + u32::from(width) <= self.size.0 && u32::from(y) + u32::from(height) <= self.size.1);
        for (row, from) in pixels.chunks_exact(usize::from(width) * 4).enumerate() {
            let at = ((usize::from(y) + row) * self.size.0 as usize + usize::from(x)) * 4;
            self.pixels[at..at + from.len()].copy_from_slice(from);
        }
        Ok(())
    }

    /// A rectangle in Tight, as another program would read it.
    fn tight(&mut self, width: usize, height: usize) -> Result<Vec<u8>> {
        let [control] = self.word()?;
        ensure!(control & 15 == 0, "no stream begins anew");
        let wide = |colours: &[u8]| -> Vec<[u8; 4]> {
            colours.as_chunks::<3>().0.iter().map(|[red, green, blue]| [*blue, *green, *red, 0]).collect()
        };
        if control == 0x80 {
            let colour = self.bytes(3)?;
            return Ok(wide(&colour)[0].repeat(width * height));
        }
        ensure!(control & 0x80 == 0, "neither fill nor basic: {control:#x}");
        let mut palette = Vec::new();
        if control & 0x40 != 0 {
            let [filter] = self.word()?;
            ensure!(filter == 1);
            let [last] = self.word()?;
            palette = wide(&self.bytes(3 * (usize::from(last) + 1))?);
        }
        let len = match palette.len() {
            0 => width * height * 3,
            2 => width.div_ceil(8) * height,
            _ => width * height,
        };
        let data = if len < 12 { self.bytes(len)? } else { self.inflate(usize::from(control >> 4 & 3), len)? };
        Ok(match palette.len() {
            0 => wide(&data).concat(),
            2 => data
                .chunks(width.div_ceil(8))
                .flat_map(|row| (0..width).map(|at| usize::from(row[at / 8] >> (7 - at % 8) & 1)).collect::<Vec<_>>())
                .flat_map(|index| palette[index])
                .collect(),
            _ => data.iter().flat_map(|index| palette[usize::from(*index)]).collect(),
        })
    }

    fn inflate(&mut self, stream: usize, len: usize) -> Result<Vec<u8>> {
        let mut count = 0_usize;
        for shift in [0, 7, 14] {
            let [byte] = self.word()?;
            count |= usize::from(if shift == 14 { byte } else { byte & 0x7f }) << shift;
            if byte & 0x80 == 0 {
                break;
            }
        }
        let packed = self.bytes(count)?;
        let mut data = Vec::with_capacity(len + 64);
        let stream = &mut self.streams[stream];
        let begun = stream.total_in();
        stream.decompress_vec(&packed, &mut data, FlushDecompress::Sync)?;
        ensure!(stream.total_in() - begun == count as u64 && data.len() == len, "{} of {len} bytes", data.len());
        Ok(data)
    }

    /// Asks until the picture is this one, without the fourth bytes.
    pub(crate) fn sees(&mut self, size: (u32, u32), pixels: &[u8]) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.size != size || rgb(&self.pixels) != rgb(pixels) {
            ensure!(Instant::now() < deadline, "another picture, of {:?}", self.size);
            self.request(true)?;
            self.update()?;
        }
        Ok(())
    }
}
