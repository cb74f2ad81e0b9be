//! Kernels of a few bytes: ELF files with a PVH note around 32-bit code.

use std::path::{Path, PathBuf};

use atoll_devices::acpi_pm::S5_SLEEP_TYPE;
use iced_x86::code_asm::{CodeAssembler, al, ax, bl, dx, eax, edx};

/// Where the code is loaded and entered.
pub(crate) const ENTRY: u32 = 0x10_0000;
const COM1: u32 = 0x3f8;
const LINE_STATUS: u32 = COM1 + 5;
const PM1_CONTROL: u32 = 0x604;
const RESET_PORT: u32 = 0xcf9;

/// Assembles a kernel and puts it into `folder`.
pub(crate) fn kernel(folder: &Path, write: impl FnOnce(&mut CodeAssembler)) -> PathBuf {
    let mut code = CodeAssembler::new(32).unwrap();
    write(&mut code);
    let code = code.assemble(u64::from(ENTRY)).unwrap();
    let path = folder.join("kernel");
    std::fs::write(&path, elf(&code)).unwrap();
    path
}

/// An ELF64 file with one loadable segment and the note that names the PVH entry point (XEN_ELFNOTE_PHYS32_ENTRY, 18).
fn elf(code: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 2 * 56;
    const NOTE: u64 = 20;
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let half = |file: &mut Vec<u8>, value: u16| file.extend(value.to_le_bytes());
    let word = |file: &mut Vec<u8>, value: u32| file.extend(value.to_le_bytes());
    let long = |file: &mut Vec<u8>, value: u64| file.extend(value.to_le_bytes());
    // Executable, x86-64, version, entry, program headers behind this one, no sections.
    half(&mut file, 2);
    half(&mut file, 62);
    word(&mut file, 1);
    long(&mut file, u64::from(ENTRY));
    long(&mut file, 64);
    long(&mut file, 0);
    word(&mut file, 0);
    for value in [64, 56, 2, 0, 0, 0] {
        half(&mut file, value);
    }
    for (kind, offset, len, at) in [(4, HEADERS, NOTE, 0), (1, HEADERS + NOTE, code.len() as u64, u64::from(ENTRY))] {
        word(&mut file, kind);
        word(&mut file, 7);
        long(&mut file, offset);
        long(&mut file, at);
        long(&mut file, at);
        long(&mut file, len);
        long(&mut file, len);
        long(&mut file, 4);
    }
    for value in [4, 4, 18] {
        word(&mut file, value);
    }
    file.extend(b"Xen\0");
    word(&mut file, ENTRY);
    file.extend(code);
    file
}

/// Prints a text.
pub(crate) fn print(code: &mut CodeAssembler, text: &str) {
    for byte in text.bytes() {
        let mut wait = code.create_label();
        code.mov(edx, LINE_STATUS).unwrap();
        code.set_label(&mut wait).unwrap();
        code.in_(al, dx).unwrap();
        code.test(al, 0x20).unwrap();
        code.je(wait).unwrap();
        code.mov(edx, COM1).unwrap();
        code.mov(al, i32::from(byte)).unwrap();
        code.out(dx, al).unwrap();
    }
}

/// Waits for a typed byte and leaves it in BL.
pub(crate) fn read_byte(code: &mut CodeAssembler) {
    let mut wait = code.create_label();
    code.mov(edx, LINE_STATUS).unwrap();
    code.set_label(&mut wait).unwrap();
    code.in_(al, dx).unwrap();
    code.test(al, 1).unwrap();
    code.je(wait).unwrap();
    code.mov(edx, COM1).unwrap();
    code.in_(al, dx).unwrap();
    code.mov(bl, al).unwrap();
}

/// Switches the machine off.
pub(crate) fn power_off(code: &mut CodeAssembler) {
    code.mov(edx, PM1_CONTROL).unwrap();
    code.mov(eax, u32::from(S5_SLEEP_TYPE) << 10 | 1 << 13).unwrap();
    code.out(dx, ax).unwrap();
    code.hlt().unwrap();
}

/// Resets it.
pub(crate) fn reset(code: &mut CodeAssembler) {
    code.mov(edx, RESET_PORT).unwrap();
    code.mov(al, 6).unwrap();
    code.out(dx, al).unwrap();
    code.hlt().unwrap();
}

/// Says hello, then does what is typed: `q` switches off, `r` resets, `t` triple-faults, `j` jumps to where nothing is.
pub(crate) fn obedient(folder: &Path) -> PathBuf {
    kernel(folder, |code| {
        print(code, "hello\n");
        let mut again = code.create_label();
        code.set_label(&mut again).unwrap();
        read_byte(code);
        let mut labels = Vec::new();
        for command in b"qrtj" {
            let label = code.create_label();
            code.cmp(bl, i32::from(*command)).unwrap();
            code.je(label).unwrap();
            labels.push(label);
        }
        code.jmp(again).unwrap();
        code.set_label(&mut labels[0]).unwrap();
        power_off(code);
        code.set_label(&mut labels[1]).unwrap();
        reset(code);
        code.set_label(&mut labels[2]).unwrap();
        code.ud2().unwrap();
        code.set_label(&mut labels[3]).unwrap();
        code.mov(eax, 0xd000_0000_u32).unwrap();
        code.jmp(eax).unwrap();
    })
}
