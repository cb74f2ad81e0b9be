//! Both of ours together: a guest's commands to the device of `atoll-gpu`, and what a viewer of `atoll-display` sees of them.

mod screen;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use atoll_display::rfb::encoding;
use atoll_gpu::record::{ARENA_MIN, Record};
use atoll_gpu::shared::Shared;
use atoll_gpu::state::{Gpu, Wishes};
use atoll_kit::back_channel::BackChannel;
use atoll_kit::memory::{Segment, Segments};
use atoll_protocol::display::control::{DisplayOrder, DisplayReport};
use screen::{PATIENCE, Screen, picture, rgb};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const SIDES: (u32, u32) = (320, 200);
const PICTURE: u64 = 1 << 16;

/// A guest and its device, whose thread speaks with the screen.
struct Device {
    ram: GuestMemoryMmap<()>,
    shared: Arc<Shared>,
}

impl Device {
    fn new(record: Record) -> Result<Self> {
        let wishes = Wishes { modes: vec![(640, 480)], enabled: 1 };
        let mut gpu = Gpu::new(record, &wishes);
        gpu.load();
        let shared = Arc::new(Shared::new(gpu)?);
        atoll_gpu::display::start(Arc::clone(&shared), BackChannel::default())?;
        Ok(Self { ram: GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)])?, shared })
    }

    fn command(&self, kind: u32, body: &[u32]) -> Result<()> {
        let words = [&[kind, 0, 0, 0, 0, 0], body].concat();
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.ram.write_slice(&bytes, GuestAddress(0))?;
        let segments = [Segment { addr: GuestAddress(0), len: bytes.len() as u32 }];
        let mut desk = self.shared.lock();
        let done = desk.gpu.control(&self.ram, Segments(&segments), false);
        self.shared.has_changed(&mut desk);
        ensure!(done.answer.kind() == 0x1100, "command {kind:#x}: {:#x}", done.answer.kind());
        Ok(())
    }

    fn draw(&self, pixels: &[u8]) -> Result<()> {
        let (width, height) = SIDES;
        self.ram.write_slice(pixels, GuestAddress(PICTURE))?;
        self.command(0x105, &[0, 0, width, height, 0, 0, 1, 0])?;
        self.command(0x104, &[0, 0, width, height, 1, 0])
    }

    fn set_up(&self) -> Result<()> {
        let (width, height) = SIDES;
        self.command(0x101, &[1, 2, width, height])?;
        self.command(0x106, &[1, 1, PICTURE as u32, 0, width * height * 4, 0])?;
        self.command(0x103, &[0, 0, width, height, 0, 1])
    }
}

fn hand_over(screen: &mut Screen, device: &Device) -> Result<()> {
    let (ours, theirs) = UnixStream::pair()?;
    device.shared.hand_over(Some(ours.into()));
    ensure!(screen.ask(&DisplayOrder::NewDisplay, Some(theirs.into()))?.0 == DisplayReport::Done);
    Ok(())
}

/// What the guest flushes is what a viewer sees; the viewer's window is what the guest hears of; the picture is there without
/// a gap when the device's process is exchanged.
#[test]
fn a_guest_is_seen_and_hears_of_windows() -> Result<()> {
    let mut screen = Screen::start_with(false, &["--size", "800x600"], Vec::new())?;
    let record = Record::new(ARENA_MIN)?;
    let copy = record.try_clone()?;
    let device = Device::new(record)?;
    hand_over(&mut screen, &device)?;
    device.set_up()?;
    let mut viewer = screen.viewer()?;
    viewer.encodings(&[encoding::TIGHT, encoding::EXTENDED_DESKTOP_SIZE])?;
    let mut slowest = Duration::ZERO;
    for seed in 0..30 {
        let pixels = picture(320, 200, seed);
        let begun = Instant::now();
        device.draw(&pixels)?;
        viewer.sees(SIDES, &pixels)?;
        slowest = slowest.max(begun.elapsed());
    }
    ensure!(slowest < Duration::from_secs(5), "{slowest:?}");
    ensure!(device.shared.lock().gpu.events() == 1, "the screen's size is not the device's own");
    device.shared.lock().gpu.clear_events(1);
    let mut bytes = vec![251, 0, 4, 0, 3, 0, 1, 0];
    bytes.extend([0; 16]);
    viewer.stream.write_all(&bytes)?;
    let deadline = Instant::now() + PATIENCE;
    while device.shared.lock().gpu.events() != 1 {
        ensure!(Instant::now() < deadline, "the guest hears nothing");
        std::thread::sleep(Duration::from_millis(2));
    }
    // Another process takes over: it has the record.
    device.shared.hand_over(None);
    let last = picture(320, 200, 29);
    ensure!(screen.screenshot(0)?.1 == rgb(&last));
    let successor = Device::new(Record::map(copy)?)?;
    hand_over(&mut screen, &successor)?;
    viewer.sees(SIDES, &last)?;
    let pixels = picture(320, 200, 99);
    successor.draw(&pixels)?;
    viewer.sees(SIDES, &pixels)
}
