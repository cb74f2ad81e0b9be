//! The smallest ELF that a PVH loader takes: one segment, one note (Xen's `XEN_ELFNOTE_PHYS32_ENTRY`).

/// Where the image is loaded and entered.
pub const LOAD: u64 = 0x10_0000;

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const TYPE_LOAD: u32 = 1;
const TYPE_NOTE: u32 = 4;
const NOTE_PHYS32_ENTRY: u32 = 18;

/// Wraps `image`, whose first byte is 32-bit code at [`LOAD`], into an ELF file.
pub fn with_pvh_note(image: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4_u32, 8, NOTE_PHYS32_ENTRY] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(LOAD.to_le_bytes());

    let note_at = HEADER + 2 * PROGRAM_HEADER;
    let image_at = 4096;
    let mut file = Vec::new();
    file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    file.extend(2_u16.to_le_bytes()); // executable
    file.extend(62_u16.to_le_bytes()); // x86-64
    file.extend(1_u32.to_le_bytes());
    file.extend(LOAD.to_le_bytes());
    file.extend((HEADER as u64).to_le_bytes());
    file.extend(0_u64.to_le_bytes()); // no sections
    file.extend(0_u32.to_le_bytes());
    for half in [HEADER as u16, PROGRAM_HEADER as u16, 2, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let mut program_header = |kind: u32, offset: usize, address: u64, length: usize, align: u64| {
        file.extend(kind.to_le_bytes());
        file.extend(7_u32.to_le_bytes());
        for word in [offset as u64, address, address, length as u64, length as u64, align] {
            file.extend(word.to_le_bytes());
        }
    };
    program_header(TYPE_LOAD, image_at, LOAD, image.len(), 4096);
    program_header(TYPE_NOTE, note_at, 0, note.len(), 4);
    file.extend(note);
    file.resize(image_at, 0);
    file.extend(image);
    file
}
