//! A peer that sends whatever it likes: a stream of frames, in the order in which a receiver takes it apart. Nothing may
//! panic, no body may be longer than its kind allows, and what is decoded must survive being sent on.
#![no_main]

use atoll_protocol::access::ExitRecord;
use atoll_protocol::bus::{BusEvent, BusRequest};
use atoll_protocol::display::control::{DisplayOrder, DisplayReport};
use atoll_protocol::frame::{FrameHeader, HEADER_LEN, decode, decode_body, encode};
use atoll_protocol::lifecycle::LifecycleEvent;
use atoll_protocol::operator::{OperatorReply, OperatorRequest};
use atoll_protocol::saved;
use atoll_protocol::sidecar::{SidecarOrder, SidecarReport};
use atoll_protocol::{Kind, Message};
use libfuzzer_sys::fuzz_target;

fn body<M: Message + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
    if let Ok(message) = decode_body::<M>(M::KIND, bytes) {
        let frame = encode(&message, 0).expect("what was decoded fits its kind");
        let (again, rest) = decode::<M>(&frame).expect("it is a frame").expect("it is whole");
        assert_eq!((again, rest.len()), (message, 0));
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut stream = bytes;
    while let Some((header, rest)) = stream.split_first_chunk::<HEADER_LEN>() {
        let Ok(header) = FrameHeader::decode(header) else { break };
        assert!(header.length() <= header.kind().ceiling());
        assert!(header.descriptors() <= header.kind().descriptors_max());
        let Some((bytes, rest)) = rest.split_at_checked(header.length()) else { break };
        match header.kind() {
            Kind::BusRequest => body::<BusRequest>(bytes),
            Kind::BusEvent => body::<BusEvent>(bytes),
            Kind::SidecarReport => body::<SidecarReport>(bytes),
            Kind::SidecarOrder => body::<SidecarOrder>(bytes),
            Kind::OperatorRequest => body::<OperatorRequest>(bytes),
            Kind::OperatorReply => body::<OperatorReply>(bytes),
            Kind::Lifecycle => body::<LifecycleEvent>(bytes),
            Kind::Exit => body::<ExitRecord>(bytes),
            Kind::DisplayOrder => body::<DisplayOrder>(bytes),
            Kind::DisplayReport => body::<DisplayReport>(bytes),
        }
        stream = rest;
    }
    // Bodies without the luck of a right header in front.
    if let Some((kind, bytes)) = bytes.split_first() {
        match kind % 10 {
            0 => body::<BusRequest>(bytes),
            1 => body::<BusEvent>(bytes),
            2 => body::<SidecarReport>(bytes),
            3 => body::<SidecarOrder>(bytes),
            4 => body::<OperatorRequest>(bytes),
            5 => body::<OperatorReply>(bytes),
            6 => body::<LifecycleEvent>(bytes),
            7 => body::<ExitRecord>(bytes),
            8 => body::<DisplayOrder>(bytes),
            _ => body::<DisplayReport>(bytes),
        }
    }
    let _ = saved::open(bytes);
});
