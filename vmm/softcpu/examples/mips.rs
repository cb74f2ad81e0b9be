//! Speed of the software CPU on five loops, in guest instructions a second: `cargo run --release --example mips`.
//!
//! The loops are this program's own machine code, copied into the guest, so the host runs the same instructions.
#![allow(unsafe_code, reason = "copies its own functions into guest memory")]
#![allow(clippy::print_stdout, reason = "the program's output")]

#[path = "../tests/flat/mod.rs"]
mod flat;

use std::hint::black_box;

use flat::{CODE, DATA, Machine, STACK};
use iced_x86::code_asm::{CodeAssembler, CodeLabel, qword_ptr, r8, r9, r10, r11, rax, rcx, rdi, rdx};

type Loop = unsafe extern "sysv64" fn(*mut u8, u64) -> u64;

#[inline(never)]
unsafe extern "sysv64" fn crc(table: *mut u8, rounds: u64) -> u64 {
    // SAFETY: 4 KiB of table, then 4 KiB of data.
    unsafe {
        let words = table.cast::<u32>();
        let mut crc = !0u32;
        for _ in 0..rounds {
            for n in 0..4096 {
                let byte = table.add(4096 + n).read_volatile();
                crc = words.add(((crc ^ u32::from(byte)) & 255) as usize).read_volatile() ^ (crc >> 8);
            }
        }
        u64::from(crc)
    }
}
#[inline(never)]
unsafe extern "sysv64" fn sieve(flags: *mut u8, rounds: u64) -> u64 {
    const N: u64 = 65536;
    let mut count = 0;
    // SAFETY: 64 KiB of flags.
    unsafe {
        for _ in 0..rounds {
            for n in 0..N {
                flags.add(n as usize).write_volatile(1);
            }
            count = 0;
            for n in 2..N {
                if flags.add(n as usize).read_volatile() != 0 {
                    count += 1;
                    let mut at = n * n;
                    while at < N {
                        flags.add(at as usize).write_volatile(0);
                        at += n;
                    }
                }
            }
        }
    }
    count
}
#[inline(never)]
unsafe extern "sysv64" fn fib(_: *mut u8, n: u64) -> u64 {
    if n < 2 {
        return n;
    }
    // SAFETY: no memory but the stack.
    unsafe { black_box(fib(std::ptr::null_mut(), n - 1)) + fib(std::ptr::null_mut(), n - 2) }
}
#[inline(never)]
unsafe extern "sysv64" fn matmul(data: *mut u8, rounds: u64) -> u64 {
    // SAFETY: three matrices of 64 by 64 words.
    unsafe {
        let (a, b) = (data.cast::<u64>(), data.cast::<u64>().add(4096));
        let c = data.cast::<u64>().add(8192);
        for _ in 0..rounds {
            for i in 0..64 {
                for j in 0..64 {
                    let mut sum = 0u64;
                    for k in 0..64 {
                        sum = sum.wrapping_add(
                            a.add(i * 64 + k).read_volatile().wrapping_mul(b.add(k * 64 + j).read_volatile()),
                        );
                    }
                    c.add(i * 64 + j).write_volatile(sum);
                }
            }
        }
        c.read_volatile()
    }
}

/// Processor time of this thread: a busy host disturbs it less than wall time.
fn cpu_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure is ours.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn run_loop(name: &str, body: Loop, argument: u64) {
    let mut machine = Machine::new();
    // SAFETY: the functions are shorter than this, and reading on in this program's text does no harm.
    let code = unsafe { std::slice::from_raw_parts(body as *const u8, 1024) }.to_vec();
    machine.write(CODE, &code);
    let noise: Vec<u8> = (0..65536u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    machine.write(DATA, &noise);
    // The return address leads to a HLT.
    machine.write(CODE + 0x2000, &[0xf4]);
    machine.write(STACK, &(CODE + 0x2000).to_le_bytes());
    machine.cpu.regs.gpr[7] = DATA;
    machine.cpu.regs.gpr[6] = argument;
    let start = cpu_seconds();
    machine.run();
    let elapsed = cpu_seconds() - start;
    let mut copy = noise;
    copy.resize(1 << 20, 0);
    let native_start = cpu_seconds();
    // SAFETY: the buffer is as large as the guest's.
    let expected = unsafe { body(copy.as_mut_ptr(), argument) };
    let native = cpu_seconds() - native_start;
    let instructions = machine.cpu.retired() as f64;
    assert_eq!(machine.gpr(0), expected, "{name}");
    report(name, instructions, elapsed, Some(native));
}

fn report(name: &str, instructions: f64, elapsed: f64, native: Option<f64>) {
    let mips = instructions / elapsed / 1e6;
    let native = native.map_or(String::new(), |native| format!(", native {:.0}", instructions / native / 1e6));
    println!("{name:8} {mips:6.0} MIPS ({:.1} M instructions, {elapsed:.3} s{native})", instructions / 1e6);
}

/// Thousands of functions, each run twice: decoding dominates.
fn run_wide(only_first: bool) {
    let mut machine = Machine::new();
    let base = 0x200_0000u64;
    let mut asm = CodeAssembler::new(64).expect("assembler");
    let mut seed = 12345u64;
    let mut random = move |n: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % n
    };
    let functions = 6000;
    let mut labels: Vec<CodeLabel> = (0..functions).map(|_| asm.create_label()).collect();
    let regs = [rax, rcx, rdx, r8, r9, r10, r11];
    let mut count = 0;
    for label in &mut labels {
        asm.set_label(label).expect("label");
        for _ in 0..4 {
            for _ in 0..8 {
                let (a, b) = (regs[random(7) as usize], regs[random(7) as usize]);
                match random(9) {
                    0 => asm.add(a, b),
                    1 => asm.xor(a, b),
                    2 => asm.mov(a, qword_ptr(rdi + (random(256) * 8) as i32)),
                    3 => asm.mov(qword_ptr(rdi + (random(256) * 8) as i32), a),
                    4 => asm.lea(a, qword_ptr(b + random(100) as i32)),
                    5 => asm.shl(a, 3),
                    6 => asm.sub(a, random(1000) as i32),
                    7 => asm.and(a, b),
                    _ => asm.imul_2(a, b),
                }
                .expect("instruction");
                count += 1;
            }
            let mut skip = asm.create_label();
            asm.test(rax, random(256) as i32).expect("test");
            asm.je(skip).expect("je");
            asm.inc(rcx).expect("inc");
            asm.set_label(&mut skip).expect("label");
            asm.nop().expect("nop");
            count += 4;
        }
        asm.ret().expect("ret");
        count += 1;
    }
    let mut main = asm.create_label();
    asm.set_label(&mut main).expect("label");
    for label in &labels {
        asm.call(*label).expect("call");
        count += 1;
    }
    asm.hlt().expect("hlt");
    let options = iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
    let result = asm.assemble_options(base, options).expect("assembles");
    let entry = result.label_ip(&main).expect("main");
    let mut first = 0.0;
    let mut retired = 0.0;
    let fresh = if only_first { 200 } else { 16 };
    for _ in 0..fresh {
        machine = Machine::new();
        machine.write(base, &result.inner.code_buffer);
        machine.cpu.regs.rip = entry;
        machine.cpu.regs.gpr[7] = DATA;
        let start = cpu_seconds();
        machine.run();
        first += cpu_seconds() - start;
        retired += machine.cpu.retired() as f64;
    }
    report("wide 1st", retired, first, None);
    first /= f64::from(fresh);
    if only_first {
        return;
    }
    let before = machine.cpu.retired();
    let start = cpu_seconds();
    for _ in 0..100 {
        machine.cpu.regs.rip = entry;
        machine.cpu.halted = false;
        machine.run();
    }
    let again = cpu_seconds() - start;
    report("wide +100", (machine.cpu.retired() - before) as f64, again, None);
    println!("{count} static instructions, {} MiB of decoded code", machine.cpu.cache_bytes() >> 20);
    report("wide all", machine.cpu.retired() as f64, first + again, None);
}

fn main() {
    let only = std::env::args().nth(1);
    let wanted = |name: &str| only.as_deref().is_none_or(|only| only == name);
    for (name, body, argument) in
        [("crc", crc as Loop, 10_000u64), ("sieve", sieve, 300), ("fib", fib, 34), ("matmul", matmul, 200)]
    {
        if wanted(name) {
            run_loop(name, body, argument);
        }
    }
    if wanted("wide") || only.as_deref() == Some("decode") {
        run_wide(only.as_deref() == Some("decode"));
    }
}
