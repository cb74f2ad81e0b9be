//! The requests of a front end, as the `vhost` crate delivers them: each is checked here, and refused in words where it cannot be right.

use std::fs::File;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error as VhostError, GpuBackend, Result as VhostResult, VhostUserBackendReqHandlerMut};

use super::{Addresses, CONFIG_BYTES, Conversation, LOG_ALL, PROTOCOL, QueueState, RING_RESET, event_fd};
use crate::bad_build::{self, Bad};
use crate::device::Device;
use crate::inflight::{self, Region};
use crate::iotlb::ACCESS_PLATFORM;
use crate::memory::REGIONS_MAX;
use crate::refused::Refused;
use crate::ring::RingError;
use crate::step::{Step, step};

impl<D: Device> VhostUserBackendReqHandlerMut for Conversation<D> {
    fn set_owner(&mut self) -> VhostResult<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> VhostResult<()> {
        Ok(self.stop_all().map_err(Refused::from)?)
    }

    fn reset_device(&mut self) -> VhostResult<()> {
        self.stop_all().map_err(Refused::from)?;
        for queue in &mut self.queues {
            *queue = QueueState::default();
        }
        self.features = 0;
        self.log.switch(false);
        self.device.reset();
        Ok(())
    }

    fn get_features(&mut self) -> VhostResult<u64> {
        Ok(self.offered())
    }

    fn set_features(&mut self, features: u64) -> VhostResult<()> {
        // QEMU's display says this one of itself without having been offered it. Its meaning is the front end's affair, which
        // stops a ring and starts it again.
        let features = if self.device.has_display() { features & !RING_RESET } else { features };
        let foreign = features & !self.offered();
        if foreign != 0 {
            return Err(Refused::Features(foreign).into());
        }
        if (self.features ^ features) & ACCESS_PLATFORM != 0 {
            self.iotlb.clear();
        }
        self.features = features;
        self.log.switch(features & LOG_ALL != 0);
        if self.hold.is_none() {
            self.device.features_acked(features);
        }
        if features & PROTOCOL == 0 {
            // Without the protocol's own features rings are enabled from the start.
            for (queue, worker) in self.queues.iter_mut().zip(&self.workers) {
                queue.enabled = true;
                worker.set_enabled(true).map_err(Refused::from)?;
            }
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> VhostResult<Option<Vec<VhostUserMemoryRegionBase>>> {
        bad_build::fail(None, Some(Bad::HangsAfterHandshake));
        self.table.replace(regions, files, &self.log).map_err(Refused::from)?;
        self.memory_changed()?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> VhostResult<()> {
        let size_max = self.device.layout().size_max;
        let (queue, ..) = self.queue(index)?;
        match u16::try_from(num) {
            Ok(size) if size.is_power_of_two() && size <= size_max => {
                queue.size = size;
                Ok(())
            }
            _ => Err(Refused::QueueSize(num, size_max).into()),
        }
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> VhostResult<()> {
        // The used ring is logged at its own guest address, which is what `log` names.
        let (queue, _, index) = self.queue(index)?;
        let addresses = Addresses { desc: descriptor, avail: available, used };
        if queue.running && queue.addresses != Some(addresses) {
            return Err(Refused::AddressesOfRunning(index).into());
        }
        queue.addresses = Some(addresses);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> VhostResult<()> {
        let (queue, ..) = self.queue(index)?;
        queue.base = base as u16;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> VhostResult<VhostUserVringState> {
        step(Step::Reset);
        let (queue, worker, _) = self.queue(index)?;
        if std::mem::take(&mut queue.running)
            && let Some(base) = worker.stop().map_err(Refused::from)?
        {
            queue.base = base;
        }
        Ok(VhostUserVringState::new(index, u32::from(queue.base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let (_, _, index) = self.queue(u32::from(index))?;
        let kick = fd.ok_or(Refused::NoKick(index))?;
        Ok(self.start(index, kick.into())?)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let (queue, worker, index) = self.queue(u32::from(index))?;
        queue.call = fd;
        if queue.running {
            let call = queue.call.as_ref().map(event_fd).transpose();
            let call = call.map_err(|e| Refused::Ring(RingError::Broken { index, reason: e.to_string() }))?;
            worker.set_call(call).map_err(Refused::from)?;
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> VhostResult<()> {
        // Used from the ring's next start on.
        let (queue, ..) = self.queue(u32::from(index))?;
        queue.err = fd;
        Ok(())
    }

    fn get_protocol_features(&mut self) -> VhostResult<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::DEVICE_STATE)
    }

    fn set_protocol_features(&mut self, features: u64) -> VhostResult<()> {
        // The `vhost` crate checks each message against them.
        self.protocol = VhostUserProtocolFeatures::from_bits_truncate(features);
        self.iotlb.set_acknowledge(self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK));
        Ok(())
    }

    fn get_queue_num(&mut self) -> VhostResult<u64> {
        Ok(self.workers.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> VhostResult<()> {
        let (queue, worker, _) = self.queue(index)?;
        queue.enabled = enable;
        worker.set_enabled(enable).map_err(Refused::from)?;
        Ok(())
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> VhostResult<Vec<u8>> {
        if offset.checked_add(size).is_none_or(|end| end > CONFIG_BYTES) {
            return Err(VhostError::InvalidParam);
        }
        let mut out = vec![0; size as usize];
        self.device.read_config(offset, &mut out);
        Ok(out)
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> VhostResult<()> {
        step(Step::ConfigWrite);
        Ok(self.device.write_config(offset, buf).map_err(Refused::from)?)
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> VhostResult<()> {
        Err(VhostError::InvalidOperation("this device has no display"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> VhostResult<File> {
        Err(VhostError::InvalidOperation("this device shares no objects"))
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> VhostResult<(VhostUserInflight, File)> {
        let (queues, size) = (wanted.num_queues, wanted.queue_size);
        let layout = self.device.layout();
        if queues > layout.queues || size > layout.size_max {
            let (have, size_max) = (layout.queues, layout.size_max);
            return Err(Refused::Inflight { queues, size, have, size_max }.into());
        }
        let file = inflight::create(queues, size).map_err(Refused::from)?;
        Ok((VhostUserInflight::new(inflight::region_bytes(queues, size), 0, queues, size), file))
    }

    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> VhostResult<()> {
        let region = Region::map(file, given.mmap_offset, given.mmap_size, given.num_queues, given.queue_size);
        self.inflight = Some(region.map_err(Refused::from)?);
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> VhostResult<u64> {
        Ok(REGIONS_MAX as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy_listening: Option<bool>,
    ) -> VhostResult<Option<VhostUserMemoryRegionBase>> {
        self.table.add(region, fd, &self.log).map_err(Refused::from)?;
        self.memory_changed()?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> VhostResult<()> {
        let (gpa, size) = (region.guest_phys_addr, region.memory_size);
        self.table.remove(gpa, size).map_err(Refused::from)?;
        self.memory_changed()?;
        Ok(())
    }

    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        phase: VhostTransferStatePhase,
        _fd: File,
    ) -> VhostResult<Option<File>> {
        // The one phase that there is.
        let VhostTransferStatePhase::STOPPED = phase;
        Ok(self.begin_transfer(direction).map(Some).map_err(Refused::from)?)
    }

    fn check_device_state(&mut self) -> VhostResult<()> {
        Ok(self.end_transfer().map_err(Refused::from)?)
    }

    fn get_shmem_config(&mut self) -> VhostResult<VhostUserShMemConfig> {
        Err(VhostError::InvalidOperation("this device has no shared memory regions"))
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> VhostResult<()> {
        self.log.set_base(file, log.mmap_offset, log.mmap_size).map_err(Refused::from)?;
        Ok(())
    }
}
