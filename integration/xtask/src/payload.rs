//! The kernel inside a bzImage: Linux's boot protocol (Documentation/arch/x86/boot.rst) says where the payload lies.

use anyhow::{Context, Result, bail};
use std::io::Read as _;

const HEADER_MAGIC: usize = 0x202;
const SETUP_SECTORS: usize = 0x1f1;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const LZ4_LEGACY: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// An LZ4 legacy block never unpacks to more.
const LZ4_BLOCK: usize = 8 << 20;

fn word(bytes: &[u8], at: usize) -> Result<usize> {
    let field = bytes.get(at..at + 4).context("the image ends inside its header")?;
    Ok(u32::from_le_bytes([field[0], field[1], field[2], field[3]]) as usize)
}

/// Unpacks the ELF kernel of a bzImage whose payload is LZ4 or zstd.
pub fn vmlinux(bzimage: &[u8]) -> Result<Vec<u8>> {
    if bzimage.get(HEADER_MAGIC..HEADER_MAGIC + 4) != Some(b"HdrS".as_slice()) {
        bail!("not a bzImage: no HdrS at 0x202");
    }
    let setup = (usize::from(bzimage[SETUP_SECTORS]) + 1) * 512;
    let start = setup + word(bzimage, PAYLOAD_OFFSET)?;
    let length = word(bzimage, PAYLOAD_LENGTH)?;
    let payload = bzimage.get(start..start + length).context("the payload lies outside the image")?;
    // The build appends the unpacked size.
    let packed = payload.get(..payload.len().saturating_sub(4)).unwrap_or_default();
    let elf = if packed.starts_with(&LZ4_LEGACY) {
        lz4_legacy(&packed[4..])?
    } else if packed.starts_with(&ZSTD) {
        let mut elf = Vec::new();
        ruzstd::decoding::StreamingDecoder::new(packed)?.read_to_end(&mut elf)?;
        elf
    } else {
        bail!("the payload is neither LZ4 nor zstd");
    };
    if !elf.starts_with(b"\x7fELF") {
        bail!("the payload is not an ELF kernel");
    }
    Ok(elf)
}

fn lz4_legacy(mut packed: &[u8]) -> Result<Vec<u8>> {
    let mut elf = Vec::new();
    while packed.len() >= 4 {
        let size = word(packed, 0)?;
        let block = packed.get(4..4 + size).context("an LZ4 block lies outside the payload")?;
        elf.extend(lz4_flex::block::decompress(block, LZ4_BLOCK)?);
        packed = &packed[4 + size..];
    }
    Ok(elf)
}
