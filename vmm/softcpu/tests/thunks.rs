//! Native thunks, one at a time: what they load, store, report and leave alone.
#![allow(unsafe_code, reason = "calls thunks")]

use atoll_softcpu::native::{MemAccess, ThunkRef, Thunks, Unit, Unsupported};
use atoll_softcpu::{FpState, Regs};
use iced_x86::code_asm::{
    CodeAssembler, ah, ax, cl, cx, dword_ptr, ecx, edx, mm1, mm2, mm3, ptr, qword_ptr, r9, r13, rax, rbp, rbx, rdi,
    st0, st1, tbyte_ptr, word_ptr, xmm0, xmm1, xmm2, xmm7, xmm9, xmm15, xmmword_ptr,
};
use iced_x86::{Decoder, DecoderOptions, IcedError, Instruction};

fn decode(build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Instruction {
    let mut a = CodeAssembler::new(64).unwrap();
    build(&mut a).unwrap();
    let bytes = a.assemble(0x1000).unwrap();
    Decoder::with_ip(64, &bytes, 0x1000, DecoderOptions::NONE).decode()
}

#[repr(C, align(64))]
struct Memory([u8; 512]);

struct Bench {
    thunks: Thunks,
    regs: Box<Regs>,
    memory: Box<Memory>,
}

impl Bench {
    fn new() -> Self {
        let mut regs = Box::new(Regs::default());
        for (index, gpr) in regs.gpr.iter_mut().enumerate() {
            *gpr = 0x1111_1111_1111_1111 * index as u64;
        }
        regs.rflags = 0x202;
        Self { thunks: Thunks::new(), regs, memory: Box::new(Memory([0; 512])) }
    }

    fn compile(&mut self, build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> ThunkRef {
        let instruction = decode(build);
        self.thunks.compile(&instruction).unwrap_or_else(|error| panic!("{instruction}: {error}"))
    }

    fn run(&mut self, build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> u64 {
        let thunk = self.compile(build);
        // SAFETY: registers and memory belong to this value, memory is as large and aligned as any operand.
        unsafe { (thunk.entry)(&raw mut *self.regs, self.memory.0.as_mut_ptr()) }
    }

    fn set_double(&mut self, xmm: usize, value: f64) {
        self.regs.fp.xmm[xmm] = u128::from(value.to_bits());
    }

    fn double(&self, xmm: usize) -> f64 {
        f64::from_bits(self.regs.fp.xmm[xmm] as u64)
    }
}

#[test]
fn sse_moves_touch_their_operands_only() {
    let mut bench = Bench::new();
    bench.regs.fp.xmm[9] = 0x0123_4567_89ab_cdef_0011_2233_4455_6677;
    let before = bench.regs.clone();
    assert_eq!(bench.run(|a| a.movdqa(xmm15, xmm9)), 0);
    let mut expected = before.clone();
    expected.fp.xmm[15] = expected.fp.xmm[9];
    assert_eq!(*bench.regs, *expected);

    assert_eq!(bench.run(|a| a.movups(xmmword_ptr(r13 + rbx * 8 + 77), xmm9)), 0);
    assert_eq!(bench.memory.0[..16], before.fp.xmm[9].to_le_bytes());
    assert_eq!(bench.memory.0[16..32], [0; 16]);
    assert_eq!(*bench.regs, *expected);

    // A partial write keeps the rest of the register.
    bench.regs.fp.xmm[1] = u128::MAX;
    bench.run(|a| a.movlps(xmm1, qword_ptr(rdi)));
    assert_eq!(bench.regs.fp.xmm[1], u128::MAX << 64 | u128::from(before.fp.xmm[9] as u64));
}

#[test]
fn operands_are_described_as_the_caller_needs_them() {
    let mut bench = Bench::new();
    let thunk = bench.compile(|a| a.movaps(xmm1, xmmword_ptr(rax)));
    assert_eq!((thunk.mem, thunk.mem_size, thunk.mem_align, thunk.unit), (MemAccess::Read, 16, 16, Unit::Sse));
    let thunk = bench.compile(|a| a.movdqu(xmmword_ptr(rax), xmm1));
    assert_eq!((thunk.mem, thunk.mem_size, thunk.mem_align), (MemAccess::Write, 16, 1));
    let thunk = bench.compile(|a| a.paddb(mm1, qword_ptr(rax)));
    assert_eq!((thunk.mem, thunk.mem_size, thunk.mem_align, thunk.unit), (MemAccess::Read, 8, 1, Unit::Mmx));
    let thunk = bench.compile(|a| a.fstp(tbyte_ptr(rax)));
    assert_eq!((thunk.mem, thunk.mem_size, thunk.unit), (MemAccess::ReadWrite, 10, Unit::X87));
    let thunk = bench.compile(|a| a.fxsave64(ptr(rax)));
    assert_eq!((thunk.mem, thunk.mem_size, thunk.mem_align), (MemAccess::Write, 416, 16));
    let thunk = bench.compile(|a| a.maskmovdqu(xmm1, xmm2));
    assert_eq!((thunk.mem, thunk.mem_size, thunk.mem_align, thunk.implicit_rdi), (MemAccess::ReadWrite, 16, 1, true));
    let thunk = bench.compile(|a| a.ucomisd(xmm1, xmm2));
    assert!(thunk.writes_flags && !thunk.reads_flags);
    let thunk = bench.compile(|a| a.crc32(ecx, ah));
    assert_eq!((thunk.mem, thunk.unit, thunk.writes_flags), (MemAccess::None, Unit::Integer, false));
}

#[test]
fn identical_instructions_share_a_thunk_whatever_their_address_form() {
    let mut bench = Bench::new();
    let first = bench.compile(|a| a.movaps(xmm1, xmmword_ptr(rax)));
    let bytes = bench.thunks.bytes();
    let second = bench.compile(|a| a.movaps(xmm1, xmmword_ptr(rbp + r9 * 4 - 0x1234)));
    assert!(std::ptr::fn_addr_eq(first.entry, second.entry));
    assert_eq!(bench.thunks.bytes(), bytes);
    let other = bench.compile(|a| a.movd(ecx, xmm1));
    let another = bench.compile(|a| a.movd(edx, xmm1));
    assert!(!std::ptr::fn_addr_eq(other.entry, another.entry));
}

#[test]
fn general_registers_are_renamed_and_extended() {
    let mut bench = Bench::new();
    bench.regs.fp.xmm[7] = 0xffff_ffff_8765_4321;
    // Four-byte results clear the upper half; RSP and RBP are as good as any.
    bench.run(|a| a.movd(iced_x86::code_asm::esp, xmm7));
    assert_eq!(bench.regs.gpr[4], 0x8765_4321);
    bench.run(|a| a.cvttsd2si(rbp, xmm0));
    assert_eq!(bench.regs.gpr[5], 0);
    // Two-byte results keep the rest.
    bench.regs.gpr[1] = 0xdead_beef_dead_f00f;
    bench.regs.gpr[0] = 7;
    bench.regs.rflags = 0x8d5 | 0x202;
    bench.run(|a| a.popcnt(ax, cx));
    assert_eq!(bench.regs.gpr[0], 8);
    assert_eq!(bench.regs.rflags, 0x202);
    bench.regs.gpr[0] = 0x1234;
    bench.regs.gpr[1] = 0;
    bench.run(|a| a.crc32(ecx, ah));
    let from_high = bench.regs.gpr[1];
    bench.regs.gpr[1] = 0x12;
    bench.regs.gpr[2] = 0;
    bench.run(|a| a.crc32(edx, cl));
    assert_eq!(bench.regs.gpr[2], from_high);
}

#[test]
fn implicit_operands_of_string_compares_and_masked_stores() {
    let mut bench = Bench::new();
    bench.regs.fp.xmm[1] = u128::from_le_bytes(*b"e\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    bench.regs.fp.xmm[2] = u128::from_le_bytes(*b"needle in needle");
    bench.regs.gpr[0] = 1;
    bench.regs.gpr[2] = 16;
    bench.run(|a| a.pcmpestri(xmm1, xmm2, 0));
    assert_eq!(bench.regs.gpr[1], 1);
    assert_eq!(bench.regs.rflags & 1, 1);

    let mut mask = [0u8; 16];
    mask[3] = 0x80;
    mask[10] = 0xff;
    bench.regs.fp.xmm[1] = u128::from_le_bytes(mask);
    bench.memory.0[..16].fill(b'.');
    bench.run(|a| a.maskmovdqu(xmm2, xmm1));
    assert_eq!(&bench.memory.0[..16], b"...d......n.....");
}

#[test]
fn rounding_and_flags_are_the_guests() {
    let mut bench = Bench::new();
    bench.set_double(1, 1.0);
    bench.set_double(2, 3.0);
    assert_eq!(bench.run(|a| a.divsd(xmm1, xmm2)), 0);
    assert_eq!(bench.regs.fp.mxcsr, 0x1fa0);
    let nearest = bench.double(1);
    bench.set_double(1, 1.0);
    bench.regs.fp.mxcsr = 0x5f80;
    assert_eq!(bench.run(|a| a.divsd(xmm1, xmm2)), 0);
    assert_eq!(bench.regs.fp.mxcsr, 0x5fa0);
    assert_eq!(bench.double(1).to_bits(), nearest.to_bits() + 1);
    // Nothing of it stays on the host.
    assert_eq!(std::hint::black_box(1.0) / std::hint::black_box(3.0), nearest);
}

#[test]
fn an_unmasked_exception_is_reported_before_anything_is_written() {
    let mut bench = Bench::new();
    bench.set_double(1, 1.0);
    bench.regs.fp.mxcsr = 0x1f80 & !(1 << 9);
    let before = bench.regs.clone();
    assert_eq!(bench.run(|a| a.divsd(xmm1, xmm2)), 19);
    assert_eq!(bench.regs.fp.mxcsr, before.fp.mxcsr | 4);
    assert_eq!(bench.regs.fp.xmm, before.fp.xmm);
    // Unmasked underflow is raised for an exact tiny result too.
    bench.regs.fp.mxcsr = 0x1f80 & !(1 << 11);
    bench.set_double(1, f64::MIN_POSITIVE);
    bench.set_double(2, 0.5);
    assert_eq!(bench.run(|a| a.mulsd(xmm1, xmm2)), 19);
    assert_eq!(bench.regs.fp.mxcsr & 0x3f, 0x10);
    assert_eq!(bench.double(1), f64::MIN_POSITIVE);
    bench.regs.fp.mxcsr = 0x1f80;
    assert_eq!(bench.run(|a| a.mulsd(xmm1, xmm2)), 0);
    assert_eq!(bench.regs.fp.mxcsr, 0x1f80);
}

#[test]
fn ldmxcsr_refuses_reserved_bits() {
    let mut bench = Bench::new();
    bench.memory.0[..4].copy_from_slice(&0x0001_1f80u32.to_le_bytes());
    assert_eq!(bench.run(|a| a.ldmxcsr(dword_ptr(rax))), 13);
    assert_eq!(bench.regs.fp.mxcsr, 0x1f80);
    assert_eq!(ThunkRef::exception(13), atoll_softcpu::Exception::gp(0));
}

#[test]
fn x87_computes_in_extended_precision_and_leaves_no_host_address() {
    let mut bench = Bench::new();
    assert_eq!(bench.run(|a| a.fldpi()), 0);
    assert_eq!(bench.run(|a| a.fld1()), 0);
    assert_eq!(bench.run(|a| a.faddp(st1, st0)), 0);
    assert_eq!(bench.run(|a| a.fstp(tbyte_ptr(rax))), 0);
    assert_eq!(bench.memory.0[..10], [0x1a, 0x61, 0xb4, 0x10, 0x51, 0xed, 0x87, 0x84, 0x01, 0x40]);
    let fp = &bench.regs.fp;
    assert_eq!((fp.fip, fp.fdp, fp.fop, fp.ftw, fp.fsw & 0x3800), (0, 0, 0, 0, 0));
    assert_eq!(fp.mxcsr_mask, 0xffff);
}

#[test]
fn a_pending_x87_exception_fires_at_the_next_waiting_instruction() {
    let mut bench = Bench::new();
    bench.memory.0[..2].copy_from_slice(&0x037bu16.to_le_bytes());
    assert_eq!(bench.run(|a| a.fldcw(word_ptr(rax))), 0);
    bench.run(|a| a.fld1());
    bench.run(|a| a.fldz());
    // 1 / 0 with zero-divide unmasked: operands stay, nothing is raised yet.
    assert_eq!(bench.run(|a| a.fdivp(st1, st0)), 0);
    assert_eq!(bench.regs.fp.fsw & 0x84, 0x84);
    assert_eq!(bench.run(|a| a.fnstsw(ax)), 0);
    assert_eq!(bench.regs.gpr[0] & 0x84, 0x84);
    assert_eq!(bench.run(|a| a.fld1()), 16);
    assert_eq!(bench.run(|a| a.paddb(mm1, mm2)), 16);
    assert_eq!(bench.run(|a| a.wait()), 16);
    assert_eq!(bench.run(|a| a.fnclex()), 0);
    assert_eq!(bench.run(|a| a.fld1()), 0);
}

#[test]
fn mmx_registers_are_the_x87_registers_by_number_not_by_stack_position() {
    let mut bench = Bench::new();
    // Three pushes: TOP is 5, so physical register 5 holds the last one.
    bench.run(|a| a.fldz());
    bench.run(|a| a.fldz());
    bench.run(|a| a.fld1());
    assert_eq!(bench.run(|a| a.movq(mm3, iced_x86::code_asm::mm5)), 0);
    assert_eq!(bench.regs.fp.st[3] as u64, 1 << 63);
    assert_eq!(bench.regs.fp.st[3] >> 64, 0xffff);
    assert_eq!((bench.regs.fp.fsw, bench.regs.fp.ftw), (0, 0xff));
    bench.regs.gpr[7] = 0;
    bench.regs.fp.ftw = 0;
    assert_eq!(bench.run(|a| a.maskmovq(mm1, mm2)), 0);
    assert_eq!((bench.regs.fp.fsw, bench.regs.fp.ftw), (0, 0xff));
    assert_eq!(bench.run(|a| a.emms()), 0);
    assert_eq!((bench.regs.fp.fsw, bench.regs.fp.ftw), (0, 0));
}

#[test]
fn fcmov_and_fcomi_exchange_flags_with_the_guest() {
    let mut bench = Bench::new();
    bench.run(|a| a.fldz());
    bench.run(|a| a.fld1());
    bench.regs.rflags = 0x0006_0202;
    assert_eq!(bench.run(|a| a.fcomi(st0, st1)), 0);
    assert_eq!(bench.regs.rflags, 0x0006_0202);
    bench.regs.rflags = 0x0006_0243;
    assert_eq!(bench.run(|a| a.fcmovb(st0, st1)), 0);
    assert_eq!(bench.regs.fp.st[0], 0);
    assert_eq!(bench.regs.rflags, 0x0006_0243);
}

/// Control instructions are written by hand, so the host's own are their oracle.
#[test]
fn environment_and_fxsave_images_match_the_hosts() {
    let mut bench = Bench::new();
    let mut expected = Box::new(Memory([0x55; 512]));
    let fcw = 0x0f7fu16;
    // Host: -0, 1 and a denormal on the stack, then both images.
    let denormal = 3u64;
    // SAFETY: writes into `expected` only, and leaves the x87 unit as it found it (empty, default control word).
    unsafe {
        std::arch::asm!(
            "fninit", "fldcw [{cw}]", "fldz", "fchs", "fld1", "fld qword ptr [{den}]", "fld st(0)",
            "fxsave64 [{out}]", "fnstenv [{out} + 464]", "fninit",
            cw = in(reg) &raw const fcw, den = in(reg) &raw const denormal, out = in(reg) expected.0.as_mut_ptr(),
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _, out("st(4)") _, out("st(5)") _,
            out("st(6)") _, out("st(7)") _,
        );
    }
    bench.memory.0[..2].copy_from_slice(&fcw.to_le_bytes());
    bench.run(|a| a.fldcw(word_ptr(rax)));
    bench.run(|a| a.fldz());
    bench.run(|a| a.fchs());
    bench.run(|a| a.fld1());
    bench.memory.0[..8].copy_from_slice(&denormal.to_le_bytes());
    bench.run(|a| a.fld(qword_ptr(rax)));
    bench.run(|a| a.fld(st0));
    bench.memory.0.fill(0x55);
    bench.run(|a| a.fxsave64(ptr(rax)));
    let mask_pointers = |memory: &mut Memory| {
        memory.0[6..24].fill(0);
        // Which bits MXCSR has: AMD's have one more (misaligned SSE) than the model.
        memory.0[28..32].fill(0);
        memory.0[160..416].fill(0);
        memory.0[464 + 12..464 + 28].fill(0);
    };
    let mut image = Memory(bench.memory.0);
    let thunk = bench.compile(|a| a.fnstenv(ptr(rax)));
    assert_eq!(thunk.mem_size, 28);
    // SAFETY: the operand of 28 bytes lies within `image`.
    assert_eq!(unsafe { (thunk.entry)(&raw mut *bench.regs, image.0[464..].as_mut_ptr()) }, 0);
    mask_pointers(&mut image);
    mask_pointers(&mut expected);
    assert_eq!(image.0, expected.0);

    // And back: FNINIT, then FXRSTOR64 of the image gives the same state again.
    let state = bench.regs.fp.clone();
    bench.run(|a| a.fxsave64(ptr(rax)));
    bench.regs.fp = FpState::default();
    assert_eq!(bench.run(|a| a.fxrstor64(ptr(rax))), 0);
    assert_eq!(bench.regs.fp.st, state.st);
    assert_eq!((bench.regs.fp.ftw, bench.regs.fp.fsw), (state.ftw, state.fsw));
    // FNSAVE empties the unit, FRSTOR fills it.
    assert_eq!(bench.run(|a| a.fnsave(ptr(rax))), 0);
    assert_eq!((bench.regs.fp.ftw, bench.regs.fp.fcw), (0, 0x37f));
    assert_eq!(bench.run(|a| a.frstor(ptr(rax))), 0);
    assert_eq!((bench.regs.fp.ftw, bench.regs.fp.fsw), (state.ftw, state.fsw));
    assert_eq!(bench.regs.fp.st, state.st);
}

#[test]
fn only_listed_families_are_encoded() {
    let mut thunks = Thunks::new();
    for (name, bytes) in [
        ("syscall", &[0x0f, 0x05][..]),
        ("int 0x80", &[0xcd, 0x80]),
        ("add rax, rbx", &[0x48, 0x01, 0xd8]),
        ("call rax", &[0xff, 0xd0]),
        ("mov cr3, rax", &[0x0f, 0x22, 0xd8]),
        ("xsave [rax]", &[0x0f, 0xae, 0x20]),
        ("vpxor xmm0, xmm0, xmm0", &[0xc5, 0xf9, 0xef, 0xc0]),
        ("rdtsc", &[0x0f, 0x31]),
        ("monitor", &[0x0f, 0x01, 0xc8]),
        ("cmove eax, ecx", &[0x0f, 0x44, 0xc1]),
        ("invalid", &[0x0f, 0x0b]),
        ("nop", &[0x90]),
        ("wrpkru", &[0x0f, 0x01, 0xef]),
        ("rdfsbase eax", &[0xf3, 0x0f, 0xae, 0xc0]),
    ] {
        let instruction = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
        assert!(matches!(thunks.compile(&instruction), Err(Unsupported::Family(_))), "{name}");
    }
    assert_eq!(thunks.bytes(), 0);
}

#[test]
fn a_full_buffer_is_reported_and_can_be_reset() {
    let mut bench = Bench::new();
    let mut made = 0u32;
    'fill: for prefix in 0..=u8::MAX {
        for modrm in 0xc0..=u8::MAX {
            for immediate in [prefix, !prefix] {
                // pshufd, pshuflw and pshufhw with every immediate: more than the buffer holds in several rounds.
                for mandatory in [0x66, 0xf2, 0xf3] {
                    let bytes = [mandatory, 0x0f, 0x70, modrm, immediate];
                    let instruction = Decoder::new(64, &bytes, DecoderOptions::NONE).decode();
                    match bench.thunks.compile(&instruction) {
                        Ok(_) => made += 1,
                        Err(Unsupported::Full) => break 'fill,
                        Err(error) => panic!("{error}"),
                    }
                }
            }
        }
    }
    assert!(made > 20_000);
    bench.thunks.reset();
    bench.regs.fp.xmm[1] = 5;
    assert_eq!(bench.run(|a| a.paddq(xmm1, xmm1)), 0);
    assert_eq!(bench.regs.fp.xmm[1], 10);
}
