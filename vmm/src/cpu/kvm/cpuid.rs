//! KVM masked down to a CPU model: the guest sees the model's table, less what this host cannot do. Or, as the model
//! `host`, all that KVM supports here: the fastest, and bound to hosts like this one.

use std::sync::Once;

use atoll_softcpu::{CpuModel, CpuidLeaf, UnknownModel, VcpuTopology};
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

use super::failed;
use crate::cpu::{CpuError, HOST_MODEL};

/// Bits of leaf 1's ECX that KVM's own chips provide whatever the host has: x2APIC, TSC deadline timer, hypervisor.
const LEAF1_ECX_OF_KVM: u32 = 1 << 21 | 1 << 24 | 1 << 31;

/// Leaves that hold the extended topology and the x2APIC id (SDM vol. 2, CPUID).
const TOPOLOGY_LEAVES: [u32; 2] = [0xb, 0x1f];

/// What a vCPU of the named model sees. With `tell`, what the host lacks of it is named in the log, once.
pub(super) fn table(kvm: &Kvm, name: &str, vcpu: VcpuTopology, tell: bool) -> Result<CpuId, CpuError> {
    if name == HOST_MODEL { host(kvm, vcpu) } else { masked(kvm, &CpuModel::named(name, vcpu)?, tell) }
}

/// Whether [`table`] knows the name.
pub(super) fn check(name: &str) -> Result<(), UnknownModel> {
    if name == HOST_MODEL { Ok(()) } else { CpuModel::named(name, VcpuTopology::SINGLE).map(drop) }
}

/// Everything that KVM supports, with this vCPU's APIC id where the architecture shows it.
fn host(kvm: &Kvm, vcpu: VcpuTopology) -> Result<CpuId, CpuError> {
    let mut table = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("reading what CPUID supports"))?;
    for entry in table.as_mut_slice() {
        match entry.function {
            1 => {
                entry.ebx = (entry.ebx & 0xffff) | (vcpu.count & 0xff) << 16 | vcpu.index << 24;
                entry.ecx |= LEAF1_ECX_OF_KVM;
            }
            leaf if TOPOLOGY_LEAVES.contains(&leaf) => entry.edx = vcpu.index,
            _ => {}
        }
    }
    Ok(table)
}

/// What KVM supports for a row of the model.
fn supported(host: &CpuId, row: &CpuidLeaf) -> [u32; 4] {
    let found = host
        .as_slice()
        .iter()
        .find(|entry| entry.function == row.leaf && row.subleaf.is_none_or(|subleaf| subleaf == entry.index));
    let mut registers = found.map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx]);
    if row.leaf == 1 {
        registers[2] |= LEAF1_ECX_OF_KVM;
    }
    registers
}

/// The model's table for KVM_SET_CPUID2. With `tell`, what the host lacks is named in the log, once.
fn masked(kvm: &Kvm, model: &CpuModel, tell: bool) -> Result<CpuId, CpuError> {
    static TOLD: Once = Once::new();
    let host = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("reading what CPUID supports"))?;
    let mut entries = Vec::new();
    let mut missing = Vec::new();
    for row in model.leaves() {
        let mut registers = row.registers;
        let limits = supported(&host, row).into_iter().zip(row.feature_registers());
        for (index, (register, (limit, is_features))) in registers.iter_mut().zip(limits).enumerate() {
            if is_features {
                let lost = *register & !limit;
                *register &= limit;
                if lost != 0 {
                    missing.push(format!("{:#x}.{}:{lost:#x}", row.leaf, ["eax", "ebx", "ecx", "edx"][index]));
                }
            }
        }
        let [eax, ebx, ecx, edx] = registers;
        entries.push(kvm_cpuid_entry2 {
            function: row.leaf,
            index: row.subleaf.unwrap_or(0),
            flags: row.subleaf.map_or(0, |_| KVM_CPUID_FLAG_SIGNIFCANT_INDEX),
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        });
    }
    if tell && !missing.is_empty() {
        TOLD.call_once(|| {
            let (model, missing) = (model.name(), missing.join(" "));
            tracing::warn!(model, missing, "this host lacks features of the CPU model; the guest does not see them");
        });
    }
    CpuId::from_entries(&entries).map_err(|error| {
        CpuError::Unsupported(format!("CPU model {}: its table is too long ({error:?})", model.name()))
    })
}
