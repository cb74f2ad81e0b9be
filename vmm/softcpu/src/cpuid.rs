//! CPU models: named, versioned tables of what CPUID answers.
//!
//! A model is frozen once released, because a guest that has seen it may be resumed on another host, or on the other
//! kind of CPU. The same table drives the software CPU and masks KVM, so it holds nothing that only one of them can do.
//!
//! The vendor is AMD and the family 15, as in the generic 64-bit models of other machine monitors: kernels know that
//! this family needs no page-table isolation. Nothing here speculates, so leaf 0x8000_0021 says Automatic IBRS (EFER bit
//! 21 is accepted), upon which kernels leave indirect branches alone. The time base is KVM's clock for every vendor.

use bitflags::bitflags;
use thiserror::Error;

/// Which logical processor of how many a table is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuTopology {
    /// Number of this vCPU, which is its APIC id.
    pub index: u32,
    /// Number of vCPUs that the machine can have.
    pub count: u32,
}

impl VcpuTopology {
    /// The only vCPU of a machine.
    pub const SINGLE: Self = Self { index: 0, count: 1 };

    /// Bits of an APIC id needed to tell the vCPUs apart.
    fn id_bits(self) -> u32 {
        self.count.max(1).next_power_of_two().trailing_zeros()
    }
}

bitflags! {
    /// What a model offers beyond the baseline that every model has.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Features: u32 {
        /// SSE3.
        const SSE3 = 1;
        /// SSSE3.
        const SSSE3 = 1 << 1;
        /// SSE4.1.
        const SSE4_1 = 1 << 2;
        /// SSE4.2.
        const SSE4_2 = 1 << 3;
        /// POPCNT.
        const POPCNT = 1 << 4;
    }
}

/// One row: the answer to CPUID for a leaf (and subleaf).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidLeaf {
    /// EAX asked for.
    pub leaf: u32,
    /// ECX asked for; `None` where the leaf does not look at it.
    pub subleaf: Option<u32>,
    /// EAX, EBX, ECX, EDX answered.
    pub registers: [u32; 4],
}

impl CpuidLeaf {
    /// Which of the four registers are sets of feature bits, which a host that lacks one must clear or refuse; the
    /// others are plain values.
    pub fn feature_registers(&self) -> [bool; 4] {
        match self.leaf {
            1 => [false, false, true, true],
            7 => [false, true, true, true],
            0x4000_0001 => [true, false, false, true],
            0x8000_0001 => [false, false, true, true],
            0x8000_0007 => [false, false, false, true],
            0x8000_0008 => [false, true, false, false],
            0x8000_0021 => [true, false, false, false],
            _ => [false; 4],
        }
    }
}

/// No model of this name.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("there is no CPU model '{0}': choose one of {names}", names = CpuModel::NAMES.join(", "))]
pub struct UnknownModel(pub String);

/// A CPU model for one vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuModel {
    name: &'static str,
    features: Features,
    leaves: Vec<CpuidLeaf>,
}

/// Leaf 1, EDX: FPU DE PSE TSC MSR PAE CX8 APIC SEP MTRR PGE CMOV PAT PSE36 CLFLUSH MMX FXSR SSE SSE2.
const LEAF1_EDX: u32 = 1
    | 1 << 2
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 9
    | 1 << 11
    | 1 << 12
    | 1 << 13
    | 1 << 15
    | 1 << 16
    | 1 << 17
    | 1 << 19
    | 1 << 23
    | 1 << 24
    | 1 << 25
    | 1 << 26;
/// Leaf 1, ECX: CX16, x2APIC, TSC deadline, hypervisor.
const LEAF1_ECX: u32 = 1 << 13 | 1 << 21 | 1 << 24 | 1 << 31;
/// The bits of leaf 1's EDX that AMD repeats in leaf 0x8000_0001.
const REPEATED: u32 = 0x0183_f3ff;
/// Leaf 0x8000_0001, EDX beside the repeated ones: SYSCALL, NX, 1 GiB pages, RDTSCP, long mode.
const EXTENDED_EDX: u32 = 1 << 11 | 1 << 20 | 1 << 26 | 1 << 27 | 1 << 29;
/// Family 15, model 107, stepping 1.
const SIGNATURE: u32 = 0x0006_0fb1;
/// Guest-physical address bits.
const PHYSICAL_BITS: u32 = 40;
/// KVM paravirtual features: both sets of clock MSRs, no need of I/O delays, clock stable across vCPUs.
const KVM_FEATURES: u32 = 1 | 1 << 1 | 1 << 3 | 1 << 24;

impl CpuModel {
    /// Names of all models, oldest first.
    pub const NAMES: [&'static str; 2] = ["atoll-v1", "atoll-v2"];

    /// The table of the named model for one vCPU.
    pub fn named(name: &str, vcpu: VcpuTopology) -> Result<Self, UnknownModel> {
        match name {
            "atoll-v1" => Ok(Self::build(Self::NAMES[0], Features::empty(), *b"Atoll virtual CPU, level 1", vcpu)),
            "atoll-v2" => Ok(Self::build(Self::NAMES[1], Features::all(), *b"Atoll virtual CPU, level 2", vcpu)),
            other => Err(UnknownModel(other.to_owned())),
        }
    }

    fn build(name: &'static str, features: Features, brand: [u8; 26], vcpu: VcpuTopology) -> Self {
        let mut leaves = Vec::with_capacity(32);
        let mut put = |leaf: u32, registers: [u32; 4]| leaves.push(CpuidLeaf { leaf, subleaf: None, registers });
        let word =
            |bytes: &[u8; 12], at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);

        let vendor = b"AuthenticAMD";
        let [vendor_b, vendor_d, vendor_c] = [word(vendor, 0), word(vendor, 4), word(vendor, 8)];
        put(0, [0xb, vendor_b, vendor_c, vendor_d]);
        let several = vcpu.count > 1;
        // CLFLUSH line of 8 quadwords; logical processors and APIC id saturate at eight bits.
        let brief = vcpu.index.min(255) << 24 | vcpu.count.clamp(1, 255) << 16 | 8 << 8;
        let sse = [
            (Features::SSE3, 0),
            (Features::SSSE3, 9),
            (Features::SSE4_1, 19),
            (Features::SSE4_2, 20),
            (Features::POPCNT, 23),
        ];
        let leaf1_ecx = sse
            .into_iter()
            .filter(|(feature, _)| features.contains(*feature))
            .fold(LEAF1_ECX, |bits, (_, bit)| bits | 1 << bit);
        put(1, [SIGNATURE, brief, leaf1_ecx, LEAF1_EDX | u32::from(several) << 28]);
        // The local APIC's timer never stops.
        put(6, [1 << 2, 0, 0, 0]);

        put(0x4000_0000, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x0000_004d]);
        put(0x4000_0001, [KVM_FEATURES, 0, 0, 0]);

        put(0x8000_0000, [0x8000_0021, vendor_b, vendor_c, vendor_d]);
        // LAHF in 64-bit mode; several cores are legacy cores, not threads.
        put(0x8000_0001, [SIGNATURE, 0, 1 | u32::from(several) << 1, LEAF1_EDX & REPEATED | EXTENDED_EDX]);
        let mut text = [0u8; 48];
        text[..brand.len()].copy_from_slice(&brand);
        for (leaf, part) in (0x8000_0002..).zip(text.chunks_exact(16)) {
            let mut registers = [0; 4];
            for (register, bytes) in registers.iter_mut().zip(part.chunks_exact(4)) {
                *register = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            }
            put(leaf, registers);
        }
        // Caches as kernels like to hear of them: 64 KiB first level, 2-way, lines of 64; 512 KiB second level, 16-way.
        put(0x8000_0005, [0x01ff_01ff, 0x01ff_01ff, 0x4002_0140, 0x4002_0140]);
        put(0x8000_0006, [0, 0x4200_4200, 0x0200_8140, 0]);
        // The TSC counts at one rate for ever.
        put(0x8000_0007, [0, 0, 0, 1 << 8]);
        put(0x8000_0008, [48 << 8 | PHYSICAL_BITS, 0, vcpu.id_bits() << 12 | (vcpu.count.clamp(1, 256) - 1), 0]);
        // LFENCE serialises; loading a null selector clears the base; Automatic IBRS.
        put(0x8000_0021, [1 << 2 | 1 << 6 | 1 << 8, 0, 0, 0]);

        let mut put = |leaf: u32, subleaf: u32, registers: [u32; 4]| {
            leaves.push(CpuidLeaf { leaf, subleaf: Some(subleaf), registers });
        };
        // SMEP, fast REP MOVSB/STOSB; fast short REP MOVSB.
        put(7, 0, [0, 1 << 7 | 1 << 9, 0, 1 << 4]);
        // One thread a core, all cores in one package.
        put(0xb, 0, [0, 1, 1 << 8, vcpu.index]);
        put(0xb, 1, [vcpu.id_bits(), vcpu.count.max(1), 2 << 8 | 1, vcpu.index]);
        leaves.sort_by_key(|row| (row.leaf, row.subleaf));
        Self { name, features, leaves }
    }

    /// Name and version.
    pub fn name(&self) -> &'static str {
        self.name
    }
    /// What may be executed beyond the baseline.
    pub fn features(&self) -> Features {
        self.features
    }
    /// Width of guest-physical addresses in bits.
    pub fn physical_bits(&self) -> u32 {
        PHYSICAL_BITS
    }
    /// Every row that is not all zeroes, in order of leaf and subleaf.
    pub fn leaves(&self) -> impl Iterator<Item = &CpuidLeaf> {
        self.leaves.iter()
    }
    /// What CPUID answers: EAX, EBX, ECX, EDX. Unknown leaves answer zeroes, as AMD's do.
    pub fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        // Beyond the last level of the topology, ECX still echoes the level and EDX the APIC id.
        let fallback = || match leaf {
            0xb => [0, 0, subleaf & 0xff, self.apic_id()],
            _ => [0; 4],
        };
        self.leaves
            .iter()
            .find(|row| row.leaf == leaf && row.subleaf.is_none_or(|wanted| wanted == subleaf))
            .map_or_else(fallback, |row| row.registers)
    }
    fn apic_id(&self) -> u32 {
        self.leaves.iter().find(|row| row.leaf == 0xb).map_or(0, |row| row.registers[3])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(name: &str) -> CpuModel {
        CpuModel::named(name, VcpuTopology::SINGLE).expect("a known model")
    }

    /// The tables are frozen: a guest that has seen one may be resumed with it years later.
    #[test]
    fn tables_are_pinned() {
        let rows = |name: &str| -> Vec<(u32, Option<u32>, [u32; 4])> {
            model(name).leaves().map(|row| (row.leaf, row.subleaf, row.registers)).collect()
        };
        let v1 = rows("atoll-v1");
        assert_eq!(v1[0], (0, None, [0xb, 0x6874_7541, 0x444d_4163, 0x6974_6e65]));
        assert_eq!(v1[1], (1, None, [0x0006_0fb1, 0x0001_0800, 0x8120_2000, 0x078b_bb7d]));
        assert_eq!(v1[3], (7, Some(0), [0, 0x280, 0, 0x10]));
        assert_eq!(model("atoll-v1").cpuid(0x8000_0001, 0), [0x0006_0fb1, 0, 1, 0x2d93_bb7d]);
        assert_eq!(model("atoll-v1").cpuid(0x4000_0001, 0), [0x0100_000b, 0, 0, 0]);
        let v2 = rows("atoll-v2");
        assert_eq!(v2[1].2[2], 0x8120_2000 | 1 | 1 << 9 | 1 << 19 | 1 << 20 | 1 << 23);
        let differing: Vec<u32> = v1.iter().zip(&v2).filter(|(a, b)| a != b).map(|(a, _)| a.0).collect();
        assert_eq!(differing, [1, 0x8000_0003], "the models differ in features and in their name only");
    }

    #[test]
    fn topology_is_filled_in() {
        let last = CpuModel::named("atoll-v1", VcpuTopology { index: 5, count: 6 }).expect("a known model");
        assert_eq!(last.cpuid(1, 0)[1], 5 << 24 | 6 << 16 | 8 << 8);
        assert_eq!(last.cpuid(0xb, 0), [0, 1, 0x100, 5]);
        assert_eq!(last.cpuid(0xb, 1), [3, 6, 0x201, 5]);
        assert_eq!(last.cpuid(0xb, 7), [0, 0, 7, 5]);
        assert_eq!(last.cpuid(0x8000_0008, 0)[2], 3 << 12 | 5);
    }

    #[test]
    fn unknown_names_and_leaves_are_answered() {
        let error = CpuModel::named("pentium", VcpuTopology::SINGLE).expect_err("no such model");
        assert_eq!(error.to_string(), "there is no CPU model 'pentium': choose one of atoll-v1, atoll-v2");
        for leaf in [2, 0xd, 0x15, 0x4000_0002, 0x8000_0022, 0xffff_ffff] {
            assert_eq!(model("atoll-v2").cpuid(leaf, 0), [0; 4]);
        }
        assert_eq!(model("atoll-v2").cpuid(7, 1), [0; 4]);
    }
}
