//! All connections, by the ports of both ends; and what the guest is owed.
//!
//! The thread of the transmit queue brings what the guest says ([`Hub::hear`]); the thread of the receive queue asks what
//! there is for the guest ([`Hub::look`], [`Hub::next`]). The latter waits on one epoll set, in which are the listening
//! socket, clients that have not said what they want, the streams, and a bell that the former rings.
//!
//! Whatever a guest or a client does: connections, clients without a wish, bytes for each and unsolicited answers are
//! bounded.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use crate::client::{Client, Wish};
use crate::connection::{Broken, Connection, ROOM, Stage};
use crate::header::{HOST_CID, Header, LEN, Op, STREAM};

/// Most connections.
pub(crate) const CONNECTIONS_MAX: usize = 192;
/// Most clients that have not said yet which port they want; the one that has been silent longest makes way.
const CLIENTS_MAX: usize = 32;
/// Most answers to packets of no connection.
const REFUSALS_MAX: usize = 256;
/// Most bytes of a packet for the guest.
const PACKET_MAX: usize = 64 << 10;
/// Ports of the host's ends of connections that clients ask for begin here.
const FIRST_PORT: u32 = 1 << 30;
const EVENTS: usize = 64;
const LISTENER: u64 = 0;
const BELL: u64 = 1;

/// Does not wait.
const NOW: rustix::event::Timespec = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };

/// Both ends of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Ports {
    host: u32,
    guest: u32,
}

#[derive(Debug)]
pub(crate) struct Hub {
    cid: u64,
    /// Where programs of the host listen for the guest: in this folder, by this name, an underscore and the port. The jail's
    /// root is empty, so it is entered by its descriptor.
    folder: OwnedFd,
    name: OsString,
    listener: OwnedFd,
    epoll: OwnedFd,
    bell: OwnedFd,
    serial: u64,
    port: u32,
    clients: BTreeMap<u64, Client>,
    connections: HashMap<u64, (Ports, Connection)>,
    serials: HashMap<Ports, u64>,
    /// Those that owe the guest a packet, each once.
    owing: VecDeque<u64>,
    /// Those whose streams have bytes, or an end.
    readable: VecDeque<u64>,
    refusals: VecDeque<Header>,
}

impl Hub {
    pub(crate) fn new(cid: u64, path: &Path, listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let name = path.file_name().ok_or(io::ErrorKind::InvalidFilename)?.to_owned();
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let folder = rustix::fs::open(folder, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let listener = OwnedFd::from(listener);
        for (fd, name) in [(&listener, LISTENER), (&bell, BELL)] {
            epoll::add(&epoll, fd, epoll::EventData::new_u64(name), epoll::EventFlags::IN)?;
        }
        Ok(Self {
            cid,
            folder,
            name,
            listener,
            epoll,
            bell,
            serial: BELL,
            port: FIRST_PORT,
            clients: BTreeMap::new(),
            connections: HashMap::new(),
            serials: HashMap::new(),
            owing: VecDeque::new(),
            readable: VecDeque::new(),
            refusals: VecDeque::new(),
        })
    }

    /// A second descriptor of the set that says that there is something for the guest.
    pub(crate) fn source(&self) -> io::Result<OwnedFd> {
        self.epoll.try_clone()
    }

    /// Whose context id the guest has.
    pub(crate) fn cid(&self) -> u64 {
        self.cid
    }

    /// No driver, no connections.
    pub(crate) fn reset(&mut self) {
        self.connections.clear();
        self.serials.clear();
        self.owing.clear();
        self.readable.clear();
        self.refusals.clear();
    }

    /// A packet of the guest's.
    pub(crate) fn hear(&mut self, header: &Header, data: &[u8]) {
        if header.src_cid != self.cid || header.dst_cid != HOST_CID {
            return;
        }
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        let known = self.serials.get(&ports).copied().filter(|_| header.kind == STREAM);
        match (known, header.op) {
            (None, Op::Request) if header.kind == STREAM => self.request(ports, header),
            (None, Op::Reset) => {}
            (None, _) => self.refuse(header),
            (Some(serial), op) => {
                if self.obey(serial, op, header, data).is_err() {
                    self.end(serial, op != Op::Reset);
                } else {
                    self.settle(serial);
                }
            }
        }
        if !self.owing.is_empty() || !self.refusals.is_empty() {
            let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
        }
    }

    /// The guest wants a program of the host's.
    fn request(&mut self, ports: Ports, header: &Header) {
        let opened = (self.connections.len() < CONNECTIONS_MAX).then(|| self.dial(ports.host)).and_then(Result::ok);
        let Some(stream) = opened else { return self.refuse(header) };
        let mut connection = Connection::new(stream, Stage::Open);
        connection.room_of_guest(header.buf_alloc, header.fwd_cnt);
        connection.owed.response = true;
        self.enter(ports, connection);
    }

    fn dial(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.name.clone();
        path.push(format!("_{port}"));
        rustix::process::fchdir(&self.folder)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &SocketAddrUnix::new(PathBuf::from(path))?)?;
        Ok(socket.into())
    }

    fn enter(&mut self, ports: Ports, connection: Connection) {
        self.serial += 1;
        self.serials.insert(ports, self.serial);
        self.connections.insert(self.serial, (ports, connection));
        self.settle(self.serial);
    }

    fn obey(&mut self, serial: u64, op: Op, header: &Header, data: &[u8]) -> Result<(), Broken> {
        let (ports, connection) = self.connections.get_mut(&serial).ok_or(Broken)?;
        connection.room_of_guest(header.buf_alloc, header.fwd_cnt);
        match op {
            Op::Response if connection.stage == Stage::Asked => {
                connection.stage = Stage::Open;
                connection.greet(&format!("OK {}\n", ports.host))
            }
            Op::Data => connection.take(data),
            Op::Shutdown => connection.guest_shuts(header.flags),
            Op::CreditUpdate => Ok(()),
            Op::CreditRequest => {
                connection.owed.credit = true;
                Ok(())
            }
            Op::Request | Op::Response | Op::Reset | Op::Unknown(_) => Err(Broken),
        }
    }

    /// Answers a packet of no connection.
    fn refuse(&mut self, header: &Header) {
        if self.refusals.len() < REFUSALS_MAX {
            self.refusals.push_back(Header {
                src_cid: header.dst_cid,
                dst_cid: header.src_cid,
                src_port: header.dst_port,
                dst_port: header.src_port,
                len: 0,
                kind: header.kind,
                op: Op::Reset,
                flags: 0,
                buf_alloc: 0,
                fwd_cnt: 0,
            });
        }
    }

    /// Forgets a connection, and tells the guest where it does not know.
    fn end(&mut self, serial: u64, tell: bool) {
        if let Some((ports, connection)) = self.connections.remove(&serial) {
            self.unwatch(&connection);
            self.serials.remove(&ports);
            if tell {
                let reset = self.header(ports, Op::Reset);
                // As many of these as there are connections, besides what a guest provokes.
                if self.refusals.len() < REFUSALS_MAX + CONNECTIONS_MAX {
                    self.refusals.push_back(reset);
                }
            }
        }
    }

    fn header(&self, ports: Ports, op: Op) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.cid,
            src_port: ports.host,
            dst_port: ports.guest,
            len: 0,
            kind: STREAM,
            op,
            flags: 0,
            buf_alloc: ROOM,
            fwd_cnt: 0,
        }
    }

    fn unwatch(&self, connection: &Connection) {
        if connection.watched.is_some() {
            let _ = epoll::delete(&self.epoll, connection.stream());
        }
    }

    /// After anything has happened to a connection: is it over, what is to be waited for, does it owe something?
    fn settle(&mut self, serial: u64) {
        let Some((_, connection)) = self.connections.get_mut(&serial) else { return };
        if connection.is_over() {
            return self.end(serial, true);
        }
        let wanted = connection.interest();
        let data = epoll::EventData::new_u64(serial);
        let changed = match (connection.watched, wanted) {
            (before, after) if before == after => Ok(()),
            (None, Some(flags)) => epoll::add(&self.epoll, connection.stream(), data, flags),
            (Some(_), Some(flags)) => epoll::modify(&self.epoll, connection.stream(), data, flags),
            (_, None) => epoll::delete(&self.epoll, connection.stream()),
        };
        connection.watched = wanted;
        if connection.owed.any() && !connection.listed {
            connection.listed = true;
            self.owing.push_back(serial);
        }
        if changed.is_err() {
            self.end(serial, true);
        }
    }

    /// Looks at what has happened on the host's side; true when there may be something for the guest.
    pub(crate) fn look(&mut self) -> bool {
        let mut events = Vec::with_capacity(EVENTS);
        if epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&NOW)).is_err() {
            events.clear();
        }
        for event in events {
            let (name, flags) = (event.data.u64(), event.flags);
            match name {
                LISTENER => self.accept(),
                BELL => {
                    let _ = rustix::io::read(&self.bell, &mut [0; 8]);
                }
                serial if self.clients.contains_key(&serial) => self.hear_client(serial),
                serial => self.stir(serial, flags),
            }
        }
        !self.owing.is_empty() || !self.refusals.is_empty() || !self.readable.is_empty()
    }

    fn accept(&mut self) {
        let Ok(stream) = rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) else {
            return;
        };
        self.serial += 1;
        let data = epoll::EventData::new_u64(self.serial);
        if epoll::add(&self.epoll, &stream, data, epoll::EventFlags::IN).is_err() {
            return;
        }
        if self.clients.len() >= CLIENTS_MAX {
            // Closing it takes it out of the set.
            self.clients.pop_first();
        }
        self.clients.insert(self.serial, Client::new(stream.into()));
    }

    /// A client says which port it wants, perhaps in pieces.
    fn hear_client(&mut self, serial: u64) {
        let Some(mut client) = self.clients.remove(&serial) else { return };
        let port = match client.hear() {
            Wish::Unfinished => {
                self.clients.insert(serial, client);
                return;
            }
            Wish::Port(port) if self.connections.len() < CONNECTIONS_MAX => port,
            Wish::Port(_) | Wish::Nonsense => return,
        };
        let stream = client.into_stream();
        let _ = epoll::delete(&self.epoll, &stream);
        let mut ports = Ports { host: self.port, guest: port };
        // There are far fewer connections than ports.
        while self.serials.contains_key(&ports) {
            ports.host = ports.host.wrapping_add(1).max(FIRST_PORT);
        }
        self.port = ports.host.wrapping_add(1).max(FIRST_PORT);
        let mut connection = Connection::new(stream, Stage::Asked);
        connection.owed.request = true;
        self.enter(ports, connection);
    }

    /// Something has happened to a stream.
    fn stir(&mut self, serial: u64, flags: epoll::EventFlags) {
        let Some((_, connection)) = self.connections.get_mut(&serial) else { return };
        let gone = flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR);
        if gone && connection.stage == Stage::Asked {
            return self.end(serial, true);
        }
        if flags.contains(epoll::EventFlags::OUT) && connection.flush().is_err() {
            return self.end(serial, true);
        }
        if gone {
            connection.hung_up();
        }
        if !connection.host_silent && flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::HUP) {
            self.readable.push_back(serial);
        }
        self.settle(serial);
    }

    /// The next packet for the guest, of at most `room` bytes, which are at least those of a header; empty when there is
    /// none after all.
    pub(crate) fn next(&mut self, room: usize, packet: &mut Vec<u8>) {
        packet.clear();
        if let Some(refusal) = self.refusals.pop_front() {
            packet.extend(refusal.encode());
            return;
        }
        if let Some(serial) = self.owing.pop_front() {
            return self.pay(serial, packet);
        }
        let Some(serial) = self.readable.pop_front() else { return };
        let Some((ports, connection)) = self.connections.get_mut(&serial) else { return };
        let ports = *ports;
        packet.resize(room.clamp(LEN, LEN + PACKET_MAX), 0);
        let given = connection.give(packet.get_mut(LEN..).unwrap_or_default());
        let taken = connection.tell_taken();
        match given {
            Ok(len @ 1..) => {
                packet.truncate(LEN + len);
                let header = Header { len: len as u32, fwd_cnt: taken, ..self.header(ports, Op::Data) };
                for (to, from) in packet.iter_mut().zip(header.encode()) {
                    *to = from;
                }
            }
            Ok(0) => packet.clear(),
            Err(Broken) => {
                packet.clear();
                return self.end(serial, true);
            }
        }
        self.settle(serial);
    }

    /// One of the packets that a connection owes.
    fn pay(&mut self, serial: u64, packet: &mut Vec<u8>) {
        let Some((ports, connection)) = self.connections.get_mut(&serial) else { return };
        let ports = *ports;
        connection.listed = false;
        let owed = &mut connection.owed;
        let op = if std::mem::take(&mut owed.request) {
            Op::Request
        } else if std::mem::take(&mut owed.response) {
            Op::Response
        } else if std::mem::take(&mut owed.credit) {
            Op::CreditUpdate
        } else if std::mem::take(&mut owed.credit_request) {
            Op::CreditRequest
        } else if std::mem::take(&mut owed.shutdown) {
            Op::Shutdown
        } else {
            return self.settle(serial);
        };
        let flags = if op == Op::Shutdown { connection.shutdown_flags() } else { 0 };
        let taken = connection.tell_taken();
        packet.extend(Header { flags, fwd_cnt: taken, ..self.header(ports, op) }.encode());
        self.settle(serial);
    }
}

impl AsFd for Hub {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    fn packet() -> impl Strategy<Value = (Header, usize)> {
        let small = (0..4_u32, 0..4_u32, 0..9_u16, 0..4_u32);
        (small, any::<u32>(), any::<u32>(), 0..1_usize << 12, prop::bool::weighted(0.05)).prop_map(
            |((host, guest, op, flags), buf_alloc, fwd_cnt, len, strange)| {
                let (src_cid, kind) = if strange { (9, 2) } else { (3, STREAM) };
                let ports = if host == 3 { FIRST_PORT } else { host };
                let op = Op::from(op);
                let (dst_cid, len32) = (HOST_CID, len as u32);
                let (src_port, dst_port) = (guest, ports);
                (Header { src_cid, dst_cid, src_port, dst_port, len: len32, kind, op, flags, buf_alloc, fwd_cnt }, len)
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever a guest says, what is kept of it is bounded, every packet for it is whole, and nothing is owed for ever.
        #[test]
        fn any_guest_is_borne(packets in prop::collection::vec(packet(), 1..200)) {
            let folder = tempfile::tempdir().unwrap();
            let prefix = folder.path().join("v");
            let listener = UnixListener::bind(&prefix).unwrap();
            let program = UnixListener::bind(folder.path().join("v_1")).unwrap();
            program.set_nonblocking(true).unwrap();
            let mut hub = Hub::new(3, &prefix, listener).unwrap();
            let mut client = UnixStream::connect(&prefix).unwrap();
            client.write_all(b"CONNECT 2\nhello").unwrap();
            let mut out = Vec::new();
            for (header, len) in &packets {
                hub.hear(header, &vec![0; *len]);
                let _ = program.accept();
                if hub.look() {
                    hub.next(4096, &mut out);
                    prop_assert!(out.is_empty() || (LEN..=4096).contains(&out.len()));
                }
            }
            prop_assert!(hub.connections.len() <= CONNECTIONS_MAX && hub.connections.len() == hub.serials.len());
            prop_assert!(hub.refusals.len() <= REFUSALS_MAX + CONNECTIONS_MAX);
            let mut rounds = 0;
            while hub.look() {
                hub.next(4096, &mut out);
                rounds += 1;
                prop_assert!(rounds < 4096, "there is no end of it");
            }
        }
    }
}
