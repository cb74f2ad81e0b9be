//! What travels between interrupt controllers, and how a message-signalled write says it (SDM vol. 3, 11.11).

use crate::interrupt::MsiMessage;

/// How an interrupt is delivered (SDM vol. 3, 11.5.1 and 11.6.1; the codes are those of the registers).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryMode {
    /// The vector, to every CPU of the destination.
    Fixed,
    /// The vector, to one CPU of the destination.
    LowestPriority,
    /// System management interrupt.
    Smi,
    /// Non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up; the vector is the page where the CPU starts. Only between CPUs.
    Startup,
    /// The vector comes from the 8259 pair.
    ExtInt,
}

impl DeliveryMode {
    /// From the three-bit code; code 3 is reserved.
    pub fn from_bits(bits: u32) -> Option<Self> {
        match bits & 7 {
            0 => Some(Self::Fixed),
            1 => Some(Self::LowestPriority),
            2 => Some(Self::Smi),
            4 => Some(Self::Nmi),
            5 => Some(Self::Init),
            6 => Some(Self::Startup),
            7 => Some(Self::ExtInt),
            _ => None,
        }
    }
}

/// Which CPUs an interrupt goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// The CPU with this APIC id; [`Destination::EVERYONE`] is all of them.
    Physical(u32),
    /// The CPUs whose logical destination registers match.
    Logical(u32),
}

impl Destination {
    /// The physical destination that means all CPUs.
    pub const EVERYONE: u32 = u32::MAX;

    /// From an 8-bit field of an I/O APIC, a message or an xAPIC, in which 0xff is the physical broadcast.
    pub fn from_byte(id: u8, logical: bool) -> Self {
        match (logical, id) {
            (true, id) => Self::Logical(id.into()),
            (false, 0xff) => Self::Physical(Self::EVERYONE),
            (false, id) => Self::Physical(id.into()),
        }
    }
}

/// One interrupt on its way to the local APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApicMessage {
    /// Where to.
    pub destination: Destination,
    /// How.
    pub mode: DeliveryMode,
    /// Vector.
    pub vector: u8,
    /// Level-triggered: the EOI is broadcast to the I/O APIC.
    pub level: bool,
}

impl ApicMessage {
    /// Decodes a write to 0xfeex_xxxx. Bits 11 to 5 of the address are bits 14 to 8 of the destination, as hypervisors
    /// announce it (KVM_FEATURE_MSI_EXT_DEST_ID). `None` is a write that interrupts nobody: another address, the reserved
    /// delivery mode, a start-up (which only CPUs send), or a level de-assertion.
    pub fn from_msi(message: MsiMessage) -> Option<Self> {
        let address = u32::try_from(message.address).ok().filter(|address| address >> 20 == 0xfee)?;
        let mode = DeliveryMode::from_bits(message.data >> 8).filter(|mode| *mode != DeliveryMode::Startup)?;
        let level = message.data & 1 << 15 != 0;
        if level && message.data & 1 << 14 == 0 {
            return None;
        }
        let logical = address & 1 << 2 != 0;
        let extended = (address >> 5 & 0x7f) << 8;
        let id = (address >> 12) as u8;
        let destination = match extended {
            0 => Destination::from_byte(id, logical),
            _ if logical => Destination::Logical(extended | u32::from(id)),
            _ => Destination::Physical(extended | u32::from(id)),
        };
        // The redirection hint asks for one CPU of a logical destination.
        let mode = match mode {
            DeliveryMode::Fixed if address & 1 << 3 != 0 && logical => DeliveryMode::LowestPriority,
            mode => mode,
        };
        Some(Self { destination, mode, vector: message.data as u8, level })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_say_where_and_how() {
        let decode = |address, data| ApicMessage::from_msi(MsiMessage { address, data });
        let edge = |destination, mode, vector| Some(ApicMessage { destination, mode, vector, level: false });
        let cases = [
            (0xfee0_0000, 0x0031, edge(Destination::Physical(0), DeliveryMode::Fixed, 0x31)),
            (0xfee0_3000, 0x0041, edge(Destination::Physical(3), DeliveryMode::Fixed, 0x41)),
            (0xfeef_f000, 0x0041, edge(Destination::Physical(Destination::EVERYONE), DeliveryMode::Fixed, 0x41)),
            (0xfee0_3004, 0x0141, edge(Destination::Logical(3), DeliveryMode::LowestPriority, 0x41)),
            (0xfee0_300c, 0x0041, edge(Destination::Logical(3), DeliveryMode::LowestPriority, 0x41)),
            (0xfee0_1020, 0x0041, edge(Destination::Physical(0x101), DeliveryMode::Fixed, 0x41)),
            (0xfee0_0000, 0x0400, edge(Destination::Physical(0), DeliveryMode::Nmi, 0)),
            (0xfee0_0000, 0x0341, None),
            (0xfee0_0000, 0x0641, None),
            (0xfee0_0000, 0x8041, None),
            (0xfed0_0000, 0x0041, None),
            (0x1_fee0_0000, 0x0041, None),
        ];
        for (address, data, expected) in cases {
            assert_eq!(decode(address, data), expected, "{address:#x} {data:#x}");
        }
        assert!(decode(0xfee0_0000, 0xc041).unwrap().level);
    }
}
