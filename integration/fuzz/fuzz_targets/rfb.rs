//! A viewer that says whatever it likes: to be let in, and once it is. Nothing may panic, pieces make no difference, and
//! what it asks for is told in as many bytes as its format needs.
#![no_main]

use atoll_display::rfb::hello::{Hello, Security};
use atoll_display::rfb::message::{Decoder, ViewerMessage};
use atoll_display::rfb::update::{self, Coding};
use atoll_display::{damage, keys};
use libfuzzer_sys::fuzz_target;

fn all(bytes: &[u8], piece: usize) -> (Vec<ViewerMessage>, bool) {
    let (mut decoder, mut heard) = (Decoder::default(), Vec::new());
    for piece in bytes.chunks(piece) {
        decoder.push(piece);
        loop {
            match decoder.take() {
                Ok(Some(message)) => heard.push(message),
                Ok(None) => break,
                Err(_) => return (heard, false),
            }
        }
        assert!(decoder.waiting() < 2048);
    }
    (heard, true)
}

fuzz_target!(|data: &[u8]| {
    let Some((first, rest)) = data.split_first() else { return };
    let security = match first & 1 {
        0 => Security::Open,
        _ => Security::Password { password: b"secret".to_vec(), challenge: [9; 16] },
    };
    let (mut hello, _) = Hello::new(security);
    let mut said = rest;
    while let Some(count) = hello.wants() {
        let Some((now, later)) = said.split_at_checked(count) else { break };
        said = later;
        if hello.hear(now, (640, 480), "guest").outcome.is_err() {
            break;
        }
    }
    let (messages, sound) = all(rest, rest.len().max(1));
    assert_eq!(all(rest, usize::from(first >> 1) + 1), (messages.clone(), sound));
    let (mut format, mut coding, mut out) = (Default::default(), Coding::default(), Vec::new());
    let pixels: Vec<u8> = rest.iter().copied().cycle().take(16 * 8 * 4 * usize::from(!rest.is_empty())).collect();
    for message in messages {
        match message {
            ViewerMessage::Format(wanted) => format = Some(wanted),
            ViewerMessage::Encodings(list) => coding.choose(&list),
            ViewerMessage::Update { area, .. } => {
                let Some(area) = damage::shared(area, damage::whole((16, 8))) else { continue };
                let format = format.unwrap_or(atoll_display::rfb::format::PixelFormat::NATIVE);
                for part in update::parts(&[area]) {
                    let len = part.width as usize * part.height as usize * 4;
                    let Some(pixels) = pixels.get(..len) else { continue };
                    out.clear();
                    coding.put(&format, part, pixels, &mut out);
                    assert!(out.len() > 12 && out.len() < len + 2048);
                }
            }
            ViewerMessage::Symbol { keysym, .. } => drop(keys::of_keysym(keysym)),
            ViewerMessage::Key { scancode, .. } => drop(keys::of_scancode(scancode)),
            ViewerMessage::Pointer { .. } | ViewerMessage::Resize { .. } | ViewerMessage::Ignored => {}
        }
    }
});
