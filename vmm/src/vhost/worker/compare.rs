//! What the guest was shown is frozen: a successor must offer at least that.

use atoll_devices::virtio::{DeviceOffer, device_class};
use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;

use crate::vhost::class::{changeable, too_few_queues};
use crate::vhost::error::ConversationError;
use crate::vhost::features::{feature_names, kept, protocol_feature_names};

/// What the guest was shown, and what it wrote.
pub(in crate::vhost) struct Shown<'a> {
    /// As it was shown.
    pub(in crate::vhost) offer: &'a DeviceOffer,
    /// Protocol features of the first backend.
    pub(in crate::vhost) protocol: Protocol,
    /// The configuration space with the driver's writes.
    pub(in crate::vhost) config: &'a [u8],
    /// Sectors that the operator gave it, if he did.
    pub(in crate::vhost) capacity: Option<u64>,
}

impl Shown<'_> {
    /// Checks a successor; more than was shown is masked.
    ///
    /// # Errors
    /// [`ConversationError::Lacks`], with what is missing.
    pub(in crate::vhost) fn compare(&self, protocol: Protocol, offer: &DeviceOffer) -> Result<(), ConversationError> {
        let lacks = |what: String| Err(ConversationError::Lacks { what });
        let shown = self.offer;
        let missing = shown.features & !offer.features;
        if missing != 0 {
            return lacks(feature_names(missing, shown.device_type));
        }
        let missing = self.protocol & kept() & !protocol;
        if !missing.is_empty() {
            return lacks(protocol_feature_names(missing.bits()));
        }
        if offer.queue_sizes.len() < shown.queue_sizes.len() {
            let has = u16::try_from(offer.queue_sizes.len()).unwrap_or(u16::MAX);
            return Err(too_few_queues(shown.queue_sizes.len(), has));
        }
        if offer.pages != shown.pages {
            return lacks("the pages of the configuration space that the guest was shown".into());
        }
        // What a device may change while its driver runs, it may have changed meanwhile; not what the guest's data is in.
        let block = shown.device_type == device_class::BLOCK;
        // The capacity that the operator gave it is the exception.
        let given = self.capacity.is_some_and(|sectors| offer.config.starts_with(&sectors.to_le_bytes()));
        let may_differ = if block && !given { 0..0 } else { changeable(shown.device_type) };
        // A backend that lived on behind its socket may still have what the driver wrote.
        let known = shown.config.iter().zip(self.config);
        let differing =
            (0..).zip(known.zip(&offer.config)).filter(|(_, ((shown, written), new))| new != shown && new != written);
        match differing.map(|(offset, _)| offset).find(|offset| !may_differ.contains(offset)) {
            // virtio 1.2, 5.2.4: what differs when an image was resized behind our back.
            Some(0..8) if block => lacks("the capacity that the guest was shown (was its image resized?)".into()),
            Some(offset) => lacks(format!("the configuration that the guest was shown (it differs at byte {offset})")),
            None => Ok(()),
        }
    }
}
