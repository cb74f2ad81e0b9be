//! One client's requests, one after the other.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use atoll_protocol::vfio_user::reply::{self, DeviceInfo, IrqInfo, RegionInfo, RegionIoFds};
use atoll_protocol::vfio_user::{
    Capabilities, Channel, ChannelError, DATA_MAX, DESCRIPTORS_MAX, DmaMap, DmaUnmap, Header, IrqAction, IrqSet, Kind,
    Message, RegionAccess, Request, Version, irq, region,
};
use thiserror::Error;
use vhost::vhost_user::message::VhostUserMemoryRegion;

use super::{DeviceError, PciDevice};
use crate::dirty::DirtyLog;
use crate::memory::{MemoryTable, REGIONS_MAX};
use crate::step::{Step, step};

/// How long a client may take to take an answer.
const SEND_MAX: Duration = Duration::from_secs(5);
/// Mappings that are taken note of and cannot be reached: without a descriptor, or not to be written.
const OTHERS_MAX: usize = 256;

/// Why a conversation ended.
#[derive(Debug, Error)]
pub(super) enum End {
    /// The client has gone.
    #[error("the client has hung up")]
    HungUp,
    /// It is wrong, or slow to take its answers.
    #[error("the client is given up: {0}")]
    Client(ChannelError),
    /// The device cannot go on.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl From<ChannelError> for End {
    fn from(error: ChannelError) -> Self {
        if error.is_hang_up() { Self::HungUp } else { Self::Client(error) }
    }
}

/// An answer that says no.
#[derive(Clone, Copy, Debug)]
struct Refused(i32);

const INVALID: Refused = Refused(libc::EINVAL);

/// What a request leads to.
enum Answer {
    Plain(Vec<u8>),
    With(Vec<u8>, Vec<std::os::fd::OwnedFd>),
}

fn copies(descriptors: &[BorrowedFd<'_>]) -> Result<Vec<std::os::fd::OwnedFd>, Refused> {
    descriptors.iter().map(|fd| fd.try_clone_to_owned().map_err(|_| Refused(libc::EMFILE))).collect()
}

/// A conversation with one client.
pub(super) struct Session<'a, D> {
    device: &'a mut D,
    channel: Channel,
    memory: MemoryTable,
    /// Mappings without memory behind them.
    others: Vec<(u64, u64)>,
    log: Arc<DirtyLog>,
    client_descriptors: usize,
}

impl<'a, D: PciDevice> Session<'a, D> {
    pub(super) fn new(device: &'a mut D, channel: Channel) -> Self {
        let (memory, log) = (MemoryTable::default(), Arc::default());
        Self { device, channel, memory, others: Vec::new(), log, client_descriptors: 1 }
    }

    /// Serves until the client goes; then the device has no memory and no vectors any more.
    pub(super) fn run(mut self) -> End {
        let end = self.serve().err().unwrap_or(End::HungUp);
        if let Err(error) = self.rest() {
            return error.into();
        }
        end
    }

    fn rest(&mut self) -> Result<(), DeviceError> {
        self.device.quiesce()?;
        self.device.set_memory(None);
        self.memory.clear();
        (0..self.device.vectors()).for_each(|vector| self.device.set_vector(vector, None));
        Ok(())
    }

    fn serve(&mut self) -> Result<(), End> {
        self.device.attend(self.channel.as_fd())?;
        loop {
            while let Some(message) = self.channel.try_receive()? {
                self.answer(message)?;
            }
            self.device.turn()?;
        }
    }

    fn answer(&mut self, message: Message) -> Result<(), End> {
        let Message { header, payload, descriptors } = message;
        step(Step::Handshake);
        let Kind::Command { reply } = header.kind else {
            // This end asks nothing, so nothing is an answer.
            tracing::warn!(command = header.command, "the client answers what nobody has asked");
            return Err(End::Client(ChannelError::Closed));
        };
        let outcome = match Request::decode(header.command, &payload) {
            Ok(request) => self.carry_out(request, descriptors)?,
            Err(error) => {
                tracing::debug!(%error, "a request is refused");
                Err(INVALID)
            }
        };
        if !reply {
            return Ok(());
        }
        let (kind, payload, beside) = match outcome {
            Ok(Answer::Plain(payload)) => (Kind::Reply, payload, Vec::new()),
            Ok(Answer::With(payload, beside)) => (Kind::Reply, payload, beside),
            Err(Refused(errno)) => (Kind::Failed(errno.unsigned_abs()), Vec::new(), Vec::new()),
        };
        let beside: Vec<BorrowedFd<'_>> = beside.iter().map(AsFd::as_fd).take(self.client_descriptors).collect();
        self.channel.send(Header { kind, ..header }, &payload, &beside, SEND_MAX)?;
        Ok(())
    }

    fn carry_out(
        &mut self,
        request: Request,
        descriptors: Vec<std::os::fd::OwnedFd>,
    ) -> Result<Result<Answer, Refused>, DeviceError> {
        Ok(match request {
            Request::Version(version) => self.version(version),
            Request::DmaMap(map) => return self.map(map, descriptors),
            Request::DmaUnmap(unmap) => return self.unmap(unmap),
            Request::DeviceInfo => {
                let info = DeviceInfo { resets: true, pci: true, regions: region::COUNT, irqs: irq::COUNT };
                Ok(Answer::Plain(info.encode()))
            }
            Request::RegionInfo { index, room } => self.region_info(index, room),
            Request::RegionIoFds { index, room } => self.io_fds(index, room),
            Request::IrqInfo { index } => {
                let count = if index == irq::MSIX { self.device.vectors().into() } else { 0 };
                let info = IrqInfo { index, eventfd: true, count };
                if index < irq::COUNT { Ok(Answer::Plain(info.encode())) } else { Err(INVALID) }
            }
            Request::SetIrqs(set) => self.set_irqs(&set, descriptors),
            Request::RegionRead(access) => self.read(access),
            Request::RegionWrite(access, data) => self.write(access, &data),
            // Those are for the other direction.
            Request::DmaRead { .. } | Request::DmaWrite { .. } => Err(INVALID),
            Request::Reset => {
                self.device.quiesce()?;
                self.device.reset();
                self.device.config().reset();
                Ok(Answer::Plain(Vec::new()))
            }
        })
    }

    fn version(&mut self, version: Version) -> Result<Answer, Refused> {
        if version.major != Version::MAJOR {
            return Err(INVALID);
        }
        self.client_descriptors = version.capabilities.descriptors();
        let capabilities = Capabilities {
            max_msg_fds: Some(DESCRIPTORS_MAX as u32),
            max_data_xfer_size: Some(DATA_MAX),
            pgsizes: Some(4096),
            max_dma_maps: Some(REGIONS_MAX as u32),
        };
        let minor = version.minor.min(Version::MINOR);
        Ok(Answer::Plain(Version { major: Version::MAJOR, minor, capabilities }.encode()))
    }

    fn map(
        &mut self,
        map: DmaMap,
        descriptors: Vec<std::os::fd::OwnedFd>,
    ) -> Result<Result<Answer, Refused>, DeviceError> {
        let Some(file) = descriptors.into_iter().next().filter(|_| map.readable && map.writable) else {
            // A device that is told of it and does not reach it, takes it for no memory.
            if self.others.len() >= OTHERS_MAX {
                return Ok(Err(Refused(libc::ENOSPC)));
            }
            self.others.push((map.address, map.len));
            return Ok(Ok(Answer::Plain(Vec::new())));
        };
        self.device.quiesce()?;
        let region = VhostUserMemoryRegion::new(map.address, map.len, map.address, map.offset);
        let added = self.memory.add(&region, File::from(file), &self.log);
        self.device.set_memory(self.memory.ram().cloned());
        Ok(match added {
            Ok(()) => Ok(Answer::Plain(Vec::new())),
            Err(error) => {
                tracing::warn!(%error, "the client's memory is refused");
                Err(INVALID)
            }
        })
    }

    fn unmap(&mut self, unmap: DmaUnmap) -> Result<Result<Answer, Refused>, DeviceError> {
        let echo = Request::DmaUnmap(unmap).encode();
        let removed = match unmap {
            DmaUnmap::One { address, len } => {
                if let Some(at) = self.others.iter().position(|other| *other == (address, len)) {
                    self.others.swap_remove(at);
                    return Ok(Ok(Answer::Plain(echo)));
                }
                self.device.quiesce()?;
                self.memory.remove(address, len).is_ok()
            }
            DmaUnmap::All => {
                self.device.quiesce()?;
                self.others.clear();
                self.memory.clear();
                true
            }
        };
        self.device.set_memory(self.memory.ram().cloned());
        Ok(if removed { Ok(Answer::Plain(echo)) } else { Err(Refused(libc::ENOENT)) })
    }

    fn region_info(&mut self, index: u32, room: u32) -> Result<Answer, Refused> {
        if index >= region::COUNT {
            return Err(INVALID);
        }
        if index == region::CONFIG {
            let info = RegionInfo { index, readable: true, writable: true, size: CONFIG_LEN, ..RegionInfo::default() };
            return Ok(Answer::Plain(info.encode(room)));
        }
        let Some(bar) = bar_of(index) else {
            return Ok(Answer::Plain(RegionInfo { index, ..RegionInfo::default() }.encode(room)));
        };
        let size = self.device.bar(bar);
        let there = size > 0;
        let info = RegionInfo { index, readable: there, writable: there, size, ..RegionInfo::default() };
        Ok(Answer::Plain(info.encode(room)))
    }

    fn io_fds(&mut self, index: u32, room: u32) -> Result<Answer, Refused> {
        let ways = bar_of(index).map(|bar| self.device.ways(bar)).unwrap_or_default();
        let answer = RegionIoFds { index, ways: ways.ways };
        // A client that cannot take the descriptors has no use for what names them.
        if ways.descriptors.len() > self.client_descriptors {
            return Ok(Answer::Plain(RegionIoFds { index, ways: Vec::new() }.encode(room)));
        }
        let beside = if answer.encoded_len() <= room { copies(&ways.descriptors)? } else { Vec::new() };
        Ok(Answer::With(answer.encode(room), beside))
    }

    fn set_irqs(&mut self, set: &IrqSet, descriptors: Vec<std::os::fd::OwnedFd>) -> Result<Answer, Refused> {
        let vectors = u32::from(self.device.vectors());
        let done = Ok(Answer::Plain(Vec::new()));
        let within = set.index == irq::MSIX && set.start.saturating_add(set.count) <= vectors;
        if !within {
            // Switching off what is not there is what clients do first.
            return if set.count == 0 { done } else { Err(INVALID) };
        }
        let range = || (set.start..set.start + set.count).map(|vector| vector as u16);
        match &set.action {
            IrqAction::Signals if descriptors.len() > set.count as usize => return Err(INVALID),
            IrqAction::Signals => {
                let mut events = descriptors.into_iter();
                range().for_each(|vector| self.device.set_vector(vector, events.next()));
            }
            IrqAction::Disable => (0..vectors as u16).for_each(|vector| self.device.set_vector(vector, None)),
            IrqAction::Raise(which) => {
                for (vector, at) in range().zip(0..) {
                    if which.as_ref().is_none_or(|which| which.get(at).copied().unwrap_or(false)) {
                        self.device.raise(vector);
                    }
                }
            }
            // The client has the table, and holds back what is masked in it.
            IrqAction::Mask(..) => return Err(Refused(libc::ENOTSUP)),
        }
        done
    }

    fn within(&mut self, access: RegionAccess) -> Result<Place, Refused> {
        let end = access.offset.checked_add(access.count.into()).ok_or(INVALID)?;
        if access.region == region::CONFIG {
            return if end <= CONFIG_LEN { Ok(Place::Config(access.offset as u16)) } else { Err(INVALID) };
        }
        let bar = bar_of(access.region).filter(|bar| end <= self.device.bar(*bar));
        bar.map(Place::Bar).ok_or(INVALID)
    }

    fn read(&mut self, access: RegionAccess) -> Result<Answer, Refused> {
        let place = self.within(access)?;
        let mut data = vec![0; access.count as usize];
        match place {
            Place::Config(offset) => self.device.config().read(offset, &mut data),
            Place::Bar(bar) => self.device.read(bar, access.offset, &mut data),
        }
        Ok(Answer::Plain(reply::encode_access(&access, &data)))
    }

    fn write(&mut self, access: RegionAccess, data: &[u8]) -> Result<Answer, Refused> {
        match self.within(access)? {
            Place::Config(offset) => self.device.config().write(offset, data),
            Place::Bar(bar) => self.device.write(bar, access.offset, data),
        }
        Ok(Answer::Plain(reply::encode_access(&access, &[])))
    }
}

/// Bytes of configuration space.
const CONFIG_LEN: u64 = 256;

enum Place {
    Config(u16),
    Bar(u8),
}

fn bar_of(index: u32) -> Option<u8> {
    u8::try_from(index).ok().filter(|_| index <= region::BAR_5)
}
