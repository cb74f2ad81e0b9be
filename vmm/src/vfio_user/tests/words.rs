//! One conversation: every answer is true, or an error in time; memory is lent as far as it goes.

use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

use atoll_protocol::vfio_user::{Channel, Command, Header, Kind, Request, reply::encode_access};
use vm_memory::{Bytes, GuestAddress};

use super::super::conversation::{Conversation, TalkError};
use super::super::greeting::Shape;
use super::fake::{LIES, Lie, serve};
use crate::machine::layout::ram;
use crate::memory::GuestMemory;
use crate::vhost::Ending;

/// How long a server may take to answer here.
const STEP: Duration = Duration::from_millis(150);
/// Nothing of this takes longer, on however busy a machine.
const WHOLE: Duration = Duration::from_secs(60);

/// Greets a server that lies at one command.
fn greet(command: Command, lie: Lie) -> Result<(), TalkError> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || serve(theirs, 1, Some((command, lie)), &AtomicU32::new(0)));
    let mut talk = Conversation::new(ours, STEP, &Ending::default());
    let outcome = talk.greet().and_then(|()| {
        let shape = Shape::ask(&mut talk).map_err(|error| match error {
            super::super::greeting::ShapeError::Talk(error) => error,
            other => panic!("{command:?}, {lie:?}: {other}"),
        })?;
        shape.ask_doorbells(&mut talk).map(drop)
    });
    talk.hang_up();
    drop(talk);
    server.join().unwrap();
    outcome
}

#[test]
fn a_lie_in_the_greeting_is_an_error_in_time() {
    let commands = [Command::Version, Command::DeviceInfo, Command::RegionInfo, Command::IrqInfo, Command::RegionIoFds];
    for (command, lie) in commands.into_iter().flat_map(|command| LIES.map(|lie| (command, lie))) {
        let began = Instant::now();
        let outcome = greet(command, lie);
        assert!(began.elapsed() < WHOLE, "{command:?}, {lie:?}");
        match outcome {
            Ok(()) => assert!(lie.is_harmless_at(command), "{command:?}, {lie:?} went by"),
            Err(error) => {
                // Who says nonsense would say it again; who is gone or slow may have a better successor.
                let waits = matches!(error, TalkError::Channel { .. } | TalkError::Late { .. });
                assert_eq!(error.is_hopeless(), !waits, "{command:?}, {lie:?}: {error}");
            }
        }
    }
}

/// What a server is answered that asks for memory while it is asked for a register.
fn ask_back(memory: Option<GuestMemory>, question: Request) -> Result<Vec<u8>, u32> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || {
        let mut channel = Channel::new(theirs);
        let asked = channel.receive(WHOLE).unwrap();
        let command = question.command() as u16;
        let header = Header { id: 7, command, payload: 0, kind: Kind::Command { reply: true } };
        channel.send(header, &question.encode(), &[], WHOLE).unwrap();
        let told = channel.receive(WHOLE).unwrap();
        let Ok(Request::RegionRead(access)) = Request::decode(asked.header.command, &asked.payload) else { panic!() };
        let answer = Header { kind: Kind::Reply, ..asked.header };
        channel.send(answer, &encode_access(&access, &[1, 2, 3, 4]), &[], WHOLE).unwrap();
        assert_eq!((told.header.id, told.header.command), (7, command));
        match told.header.kind {
            Kind::Reply => Ok(told.payload),
            Kind::Failed(errno) => Err(errno),
            Kind::Command { .. } => panic!("a question instead of an answer"),
        }
    });
    let mut talk = Conversation::new(ours, WHOLE, &Ending::default());
    talk.lend(memory);
    let mut data = [0; 4];
    talk.read(0, 0, &mut data).unwrap();
    assert_eq!(data, [1, 2, 3, 4]);
    server.join().unwrap()
}

#[test]
fn a_server_reaches_the_memory_that_is_lent_to_it_and_no_other() {
    let memory = GuestMemory::new(&ram(16 << 20).unwrap()).unwrap();
    let end = 16 << 20;
    memory.mapped().write_slice(b"lent", GuestAddress(0x1000)).unwrap();
    let read = |address, count| Request::DmaRead { address, count };
    let write = |address| Request::DmaWrite { address, data: b"made".to_vec() };
    let told = ask_back(Some(memory.clone()), read(0x1000, 4)).unwrap();
    assert!(told.ends_with(b"lent"), "{told:?}");
    ask_back(Some(memory.clone()), write(0x2000)).unwrap();
    let mut made = [0; 4];
    memory.mapped().read_slice(&mut made, GuestAddress(0x2000)).unwrap();
    assert_eq!(&made, b"made");
    let fault = libc::EFAULT.unsigned_abs();
    for address in [end - 2, end, u64::MAX - 1, u64::MAX - 3, 1 << 63] {
        assert_eq!(ask_back(Some(memory.clone()), read(address, 4)), Err(fault), "{address:#x}");
        assert_eq!(ask_back(Some(memory.clone()), write(address)), Err(fault), "{address:#x}");
    }
    assert_eq!(ask_back(None, read(0x1000, 4)), Err(fault));
    assert_eq!(ask_back(None, write(0x1000)), Err(fault));
    // Questions that are for the other direction.
    assert_eq!(ask_back(Some(memory), Request::Reset), Err(libc::EINVAL.unsigned_abs()));
}
