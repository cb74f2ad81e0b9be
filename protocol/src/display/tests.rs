//! What is said over the wire comes back as it was; whatever a peer leaves out of it or puts into it is an error.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use proptest::prelude::*;

use super::*;

const SOON: Duration = Duration::from_secs(60);
const PICTURE: [u8; CURSOR_BYTES] = [7; CURSOR_BYTES];

fn requests() -> Vec<Request<'static>> {
    let position = CursorPosition { scanout: 1, x: 3, y: u32::MAX };
    let rect = Rect { x: 1, y: 2, width: 3, height: 2 };
    vec![
        Request::GetFeatures,
        Request::SetFeatures(Features::EDID | Features::CHANGES),
        Request::GetDisplayInfo,
        Request::CursorPosition(position),
        Request::CursorHide(position),
        Request::CursorUpdate { position, hot_x: 4, hot_y: 5, picture: &PICTURE },
        Request::Scanout { scanout: 15, width: 640, height: 480 },
        Request::Scanout { scanout: 0, width: 0, height: 0 },
        Request::Update { scanout: 0, rect, pixels: &PICTURE[..24] },
        Request::GetEdid { scanout: 2 },
        Request::FrameMemory { len: PIXELS_MAX as u64 },
        Request::Frame { scanout: 3, rect },
    ]
}

fn replies() -> Vec<Reply> {
    let mut info = DisplayInfo::default();
    info.screens[1] =
        Screen { rect: Rect { x: 640, y: 0, width: 1280, height: 800 }, enabled: true, ..Screen::default() };
    vec![
        Reply::Features(Features::EDID),
        Reply::DisplayInfo(Box::new(info)),
        Reply::Edid(Edid::new((0..128).collect())),
        Reply::Changed,
        Reply::Taken,
    ]
}

fn split(bytes: &[u8]) -> (Header, &[u8]) {
    let (head, payload) = bytes.split_first_chunk().unwrap();
    let header = Header::decode(head, REQUEST_MAX).unwrap();
    assert_eq!(header.payload as usize, payload.len());
    (header, payload)
}

#[test]
fn every_word_comes_back_as_it_went_and_is_refused_when_it_is_cut() {
    for request in requests() {
        let mut bytes = Vec::new();
        request.put(&mut bytes);
        let (header, payload) = split(&bytes);
        assert_eq!((header.code, header.reply), (request.code(), false));
        assert_eq!(Request::decode(header.code, payload), Ok(request));
        let refused = |payload: &[u8]| matches!(Request::decode(header.code, payload), Err(WireError::Size { .. }));
        assert!((0..payload.len()).all(|len| refused(&payload[..len])), "{request:?}");
        assert!(refused(&[payload, &[0]].concat()), "{request:?} and a byte");
    }
    for reply in replies() {
        let mut bytes = Vec::new();
        reply.put(&mut bytes);
        let (header, payload) = split(&bytes);
        assert!(header.payload <= REPLY_MAX);
        assert_eq!(Reply::decode(&header, payload), Ok(reply.clone()));
        assert!((0..payload.len()).all(|len| Reply::decode(&header, &payload[..len]).is_err()), "{reply:?}");
        assert!(Reply::decode(&Header { reply: !header.reply, ..header }, payload).is_err(), "{reply:?}");
    }
}

/// The bytes of the document's structures: a number of another end's that moves here is not understood there.
#[test]
fn numbers_stand_where_other_ends_look_for_them() {
    let mut bytes = Vec::new();
    Request::Scanout { scanout: 1, width: 0x280, height: 0x1e0 }.put(&mut bytes);
    assert_eq!(bytes, [7, 0, 0, 0, 0, 0, 0, 0, 12, 0, 0, 0, 1, 0, 0, 0, 0x80, 2, 0, 0, 0xe0, 1, 0, 0]);
    bytes.clear();
    let rect = Rect { x: 1, y: 2, width: 1, height: 1 };
    Request::Update { scanout: 3, rect, pixels: &[9, 8, 7, 6] }.put(&mut bytes);
    let expected = [8, 0, 24, 3, 1, 2, 1, 1, 0x0607_0809_u32].map(u32::to_le_bytes).concat();
    assert_eq!(bytes, expected);
    bytes.clear();
    replies()[1].put(&mut bytes);
    assert_eq!(bytes.len(), HEADER_LEN + 24 + 16 * 24);
    assert_eq!(bytes[..16], [3_u32, 4, 408, 0x1101].map(u32::to_le_bytes).concat());
    bytes.clear();
    replies()[2].put(&mut bytes);
    assert_eq!(bytes.len(), HEADER_LEN + 24 + 8 + 1024);
}

#[test]
fn what_cannot_be_is_refused() {
    for code in [code::DMABUF_SCANOUT, code::DMABUF_UPDATE, code::DMABUF_SCANOUT2] {
        assert_eq!(Request::decode(code, &[0; 40]), Err(WireError::Dmabuf(code)));
    }
    assert_eq!(Request::decode(0, &[]), Err(WireError::Code(0)));
    let update = |words: [u32; 5], len: usize| {
        let mut bytes = words.map(u32::to_le_bytes).concat();
        bytes.resize(20 + len, 0);
        Request::decode(code::UPDATE, &bytes).is_ok()
    };
    assert!(update([0, 0, 0, 2, 2], 16) && !update([16, 0, 0, 2, 2], 16) && !update([0, 0, 0, 0, 2], 0));
    assert!(
        !update([0, u32::MAX, 0, 2, 2], 16) && !update([0, 0, 0, 1 << 30, 1 << 30], 0) && !update([0, 0, 0, 2, 2], 15)
    );
    assert!(!update([0, 0, 0, u32::MAX, u32::MAX], 4));
    let scanout = |words: [u32; 3]| Request::decode(code::SCANOUT, &words.map(u32::to_le_bytes).concat()).is_ok();
    assert!(scanout([0, 1, 1]) && !scanout([0, 0, 1]) && !scanout([99, 1, 1]));
    let head = |flags: u32, payload: u32| [1, flags, payload].map(u32::to_le_bytes).concat().try_into().unwrap();
    // QEMU's vhost-user-gpu does not write the flags of an update: whatever is there, it is heard.
    assert_eq!(Header::decode(&head(0x7fa2, 0), 9), Ok(Header { code: 1, reply: false, payload: 0 }));
    assert_eq!(Header::decode(&head(4, 10), 9), Err(WireError::Length(10, 9)));
    let mut bytes = Vec::new();
    replies()[2].put(&mut bytes);
    bytes[HEADER_LEN + 24..][..4].copy_from_slice(&1025_u32.to_le_bytes());
    let (header, payload) = split(&bytes);
    assert!(matches!(Reply::decode(&header, payload), Err(WireError::Value { what: "size", .. })));
}

/// What is given back is received into again; what was there before is not seen in a message that is shorter, or longer.
#[test]
fn room_is_kept_for_the_next_message() {
    let (a, b) = UnixStream::pair().unwrap();
    let (mut device, mut screen) = (Channel::new(a, REPLY_MAX), Channel::new(b, REQUEST_MAX));
    let mut room = std::ptr::null();
    for (side, value) in [(64, 1), (64, 2), (2, 3), (64, 4), (80, 5), (1, 6)] {
        let pixels = vec![value; (side * side) as usize * PIXEL_BYTES];
        let said =
            Request::Update { scanout: 1, rect: Rect { x: 0, y: 0, width: side, height: side }, pixels: &pixels };
        let mut bytes = Vec::new();
        said.put(&mut bytes);
        device.send(&bytes, SOON).unwrap();
        let message = screen.receive(SOON).unwrap();
        assert_eq!(Request::decode(message.header.code, &message.payload), Ok(said));
        if side == 64 {
            assert!(value == 1 || message.payload.as_ptr() == room, "it is the same room each time");
            room = message.payload.as_ptr();
        }
        screen.give_back(message.payload);
    }
}

/// A picture that is longer than any socket's buffer, in pieces; a peer that stops reading, one that stops speaking.
#[test]
fn messages_cross_a_socket() {
    let (a, b) = UnixStream::pair().unwrap();
    let (mut device, mut screen) = (Channel::new(a, REPLY_MAX), Channel::new(b, REQUEST_MAX));
    let pixels: Vec<u8> = (0..1024 * 768 * 4_u32).map(|i| (i % 251) as u8).collect();
    let rect = Rect { x: 0, y: 0, width: 1024, height: 768 };
    let mut bytes = Vec::new();
    Request::Update { scanout: 0, rect, pixels: &pixels }.put(&mut bytes);
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| device.send(&bytes, SOON).map(|()| device));
        let message = screen.receive(SOON).unwrap();
        let update = Request::decode(message.header.code, &message.payload).unwrap();
        assert_eq!(update, Request::Update { scanout: 0, rect, pixels: &pixels });
        device = sending.join().unwrap().unwrap();
        assert!(screen.try_receive().unwrap().is_none());
        let slow = device.send(&bytes, Duration::from_millis(20));
        assert!(matches!(slow, Err(ChannelError::Timeout(_))));
        assert!(matches!(device.send(&[1], SOON), Err(ChannelError::Torn)));
        screen.send(&[Header { code: 3, reply: true, payload: REPLY_MAX + 1 }.encode()].concat(), SOON).unwrap();
        assert!(matches!(device.receive(SOON), Err(ChannelError::Wire(WireError::Length(..)))));
        drop(device);
        assert!(screen.receive(SOON).unwrap_err().is_hang_up());
    });
}

proptest! {
    /// Whatever comes is refused or is a word that says the same when it is written again.
    #[test]
    fn anything_may_come(code in 0_u32..14, reply: bool, bytes in prop::collection::vec(any::<u8>(), 0..96), zeros in 0_usize..40) {
        let mut bytes = bytes;
        // Words of which much is zero get further.
        bytes.iter_mut().rev().take(zeros).for_each(|byte| *byte = 0);
        if let Ok(request) = Request::decode(code, &bytes) {
            let mut again = Vec::new();
            request.put(&mut again);
            prop_assert_eq!(Request::decode(code, &again[HEADER_LEN..]), Ok(request));
        }
        let header = Header { code, reply, payload: bytes.len() as u32 };
        if let Ok(answer) = Reply::decode(&header, &bytes) {
            let mut again = Vec::new();
            answer.put(&mut again);
            prop_assert_eq!(Reply::decode(&header, &again[HEADER_LEN..]), Ok(answer));
        }
    }
}
