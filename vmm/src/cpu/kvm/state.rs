//! Architectural state to and from KVM's structures.

use atoll_softcpu::state::{Segment, SegmentName, System, Table};
use kvm_bindings::{Msrs, kvm_dtable, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use super::failed;
use crate::cpu::{CpuError, CpuState};

/// MSRs that are fields of [`System`] and not of KVM's special registers, in the order of [`msr_fields`].
const MSRS: [u32; 13] = [
    0xc000_0081, // STAR
    0xc000_0082, // LSTAR
    0xc000_0083, // CSTAR
    0xc000_0084, // SFMASK
    0xc000_0102, // KERNEL_GS_BASE
    0xc000_0103, // TSC_AUX
    0x174,       // SYSENTER_CS
    0x175,       // SYSENTER_ESP
    0x176,       // SYSENTER_EIP
    0x277,       // PAT
    0x2ff,       // MTRRdefType
    0x4b56_4d00, // KVM wall clock
    0x4b56_4d01, // KVM system time
];

fn msr_fields(system: &mut System) -> [&mut u64; MSRS.len()] {
    let [cs, esp, eip] = &mut system.sysenter;
    [
        &mut system.star,
        &mut system.lstar,
        &mut system.cstar,
        &mut system.sfmask,
        &mut system.kernel_gs_base,
        &mut system.tsc_aux,
        cs,
        esp,
        eip,
        &mut system.pat,
        &mut system.stored.mtrr_default,
        &mut system.kvm_wall_clock,
        &mut system.kvm_system_time,
    ]
}

fn segment_to_kvm(segment: &Segment) -> kvm_segment {
    let bit = |position: u32| (segment.attributes >> position & 1) as u8;
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: (segment.attributes & 0xf) as u8,
        s: bit(4),
        dpl: (segment.attributes >> 5 & 3) as u8,
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        unusable: bit(7) ^ 1,
        padding: 0,
    }
}

fn segment_from_kvm(segment: &kvm_segment) -> Segment {
    let present = u16::from(segment.present != 0 && segment.unusable == 0);
    let attributes = u16::from(segment.type_ & 0xf)
        | u16::from(segment.s & 1) << 4
        | u16::from(segment.dpl & 3) << 5
        | present << 7
        | u16::from(segment.avl & 1) << 12
        | u16::from(segment.l & 1) << 13
        | u16::from(segment.db & 1) << 14
        | u16::from(segment.g & 1) << 15;
    Segment { selector: segment.selector, base: segment.base, limit: segment.limit, attributes }
}

fn table_to_kvm(table: Table) -> kvm_dtable {
    kvm_dtable { base: table.base, limit: table.limit, ..Default::default() }
}

fn special_to_kvm(system: &System, sregs: &mut kvm_sregs) {
    let segment = |name: SegmentName| segment_to_kvm(&system.segments[name as usize]);
    sregs.cs = segment(SegmentName::Cs);
    sregs.ds = segment(SegmentName::Ds);
    sregs.es = segment(SegmentName::Es);
    sregs.fs = segment(SegmentName::Fs);
    sregs.gs = segment(SegmentName::Gs);
    sregs.ss = segment(SegmentName::Ss);
    sregs.tr = segment_to_kvm(&system.tr);
    sregs.ldt = segment_to_kvm(&system.ldtr);
    sregs.gdt = table_to_kvm(system.gdtr);
    sregs.idt = table_to_kvm(system.idtr);
    sregs.cr0 = system.cr0;
    sregs.cr2 = system.cr2;
    sregs.cr3 = system.cr3;
    sregs.cr4 = system.cr4;
    sregs.efer = system.efer;
}

/// Reads everything.
pub(super) fn read(fd: &VcpuFd) -> Result<CpuState, CpuError> {
    let regs = fd.get_regs().map_err(failed("reading registers"))?;
    let sregs = fd.get_sregs().map_err(failed("reading special registers"))?;
    let fpu = fd.get_fpu().map_err(failed("reading floating-point registers"))?;
    let debug = fd.get_debug_regs().map_err(failed("reading debug registers"))?;
    let events = fd.get_vcpu_events().map_err(failed("reading pending events"))?;
    let mut state = CpuState { regs: Default::default(), system: super::super::state::reset_system() };
    state.regs.gpr = [
        regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi, regs.r8, regs.r9, regs.r10,
        regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ];
    state.regs.rip = regs.rip;
    state.regs.rflags = regs.rflags;
    let fp = &mut state.regs.fp;
    (fp.fcw, fp.fsw, fp.ftw, fp.fop) = (fpu.fcw, fpu.fsw, fpu.ftwx, fpu.last_opcode);
    (fp.fip, fp.fdp, fp.mxcsr) = (fpu.last_ip, fpu.last_dp, fpu.mxcsr);
    fp.st = fpu.fpr.map(u128::from_le_bytes);
    fp.xmm = fpu.xmm.map(u128::from_le_bytes);

    let system = &mut state.system;
    let segments = [&sregs.es, &sregs.cs, &sregs.ss, &sregs.ds, &sregs.fs, &sregs.gs];
    system.segments = segments.map(segment_from_kvm);
    system.tr = segment_from_kvm(&sregs.tr);
    system.ldtr = segment_from_kvm(&sregs.ldt);
    system.gdtr = Table { base: sregs.gdt.base, limit: sregs.gdt.limit };
    system.idtr = Table { base: sregs.idt.base, limit: sregs.idt.limit };
    (system.cr0, system.cr2, system.cr3, system.cr4) = (sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4);
    system.efer = sregs.efer;
    let [dr0, dr1, dr2, dr3] = debug.db;
    system.dr = [dr0, dr1, dr2, dr3, 0, 0, debug.dr6, debug.dr7];
    system.interrupt_shadow = events.interrupt.shadow != 0;
    let entries = MSRS.map(|index| kvm_msr_entry { index, ..Default::default() });
    let mut msrs = msr_list(&entries)?;
    let read = fd.get_msrs(&mut msrs).map_err(failed("reading MSRs"))?;
    for (field, entry) in msr_fields(system).into_iter().zip(msrs.as_slice().iter().take(read)) {
        *field = entry.data;
    }
    Ok(state)
}

fn msr_list(entries: &[kvm_msr_entry]) -> Result<Msrs, CpuError> {
    Msrs::from_entries(entries).map_err(|error| CpuError::Unsupported(format!("a list of MSRs: {error:?}")))
}

/// Writes everything. CPUID must have been set: KVM checks against it.
pub(super) fn write(fd: &VcpuFd, state: &CpuState) -> Result<(), CpuError> {
    let mut sregs = fd.get_sregs().map_err(failed("reading special registers"))?;
    special_to_kvm(&state.system, &mut sregs);
    fd.set_sregs(&sregs).map_err(failed("setting special registers"))?;
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = state.regs.gpr;
    let (rip, rflags) = (state.regs.rip, state.regs.rflags);
    let regs = kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags };
    fd.set_regs(&regs).map_err(failed("setting registers"))?;
    let fp = &state.regs.fp;
    let fpu = kvm_fpu {
        fpr: fp.st.map(u128::to_le_bytes),
        fcw: fp.fcw,
        fsw: fp.fsw,
        ftwx: fp.ftw,
        last_opcode: fp.fop,
        last_ip: fp.fip,
        last_dp: fp.fdp,
        xmm: fp.xmm.map(u128::to_le_bytes),
        mxcsr: fp.mxcsr,
        ..Default::default()
    };
    fd.set_fpu(&fpu).map_err(failed("setting floating-point registers"))?;
    let mut debug = fd.get_debug_regs().map_err(failed("reading debug registers"))?;
    let [dr0, dr1, dr2, dr3, _, _, dr6, dr7] = state.system.dr;
    (debug.db, debug.dr6, debug.dr7) = ([dr0, dr1, dr2, dr3], dr6, dr7);
    fd.set_debug_regs(&debug).map_err(failed("setting debug registers"))?;
    if state.system.interrupt_shadow {
        let mut events = fd.get_vcpu_events().map_err(failed("reading pending events"))?;
        events.interrupt.shadow = 1;
        fd.set_vcpu_events(&events).map_err(failed("setting pending events"))?;
    }
    let mut system = state.system.clone();
    let entries: Vec<kvm_msr_entry> = msr_fields(&mut system)
        .into_iter()
        .zip(MSRS)
        // The clocks' MSRs start something when they are written: only if the guest has.
        .filter(|(data, index)| **data != 0 || *index < 0x4b56_4d00)
        .map(|(data, index)| kvm_msr_entry { index, data: *data, ..Default::default() })
        .collect();
    // KVM stops at the first one that it refuses. One that was never used may be missing on this host.
    let mut rest = entries.as_slice();
    while !rest.is_empty() {
        let written = fd.set_msrs(&msr_list(rest)?).map_err(failed("setting MSRs"))?;
        match rest.get(written) {
            Some(refused) if refused.data != 0 => {
                return Err(CpuError::Unsupported(format!("KVM refused MSR {:#x}", refused.index)));
            }
            Some(_) => rest = rest.get(written + 1..).unwrap_or_default(),
            None => break,
        }
    }
    Ok(())
}
