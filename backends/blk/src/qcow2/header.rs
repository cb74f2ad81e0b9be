//! The header of a qcow2 image (docs/interop/qcow2.txt of QEMU), read as hostile input.
//!
//! imago has a parser of its own, which checks less than we need: it takes encrypted images for plain ones and believes
//! all sizes. So the header is decoded here first, with limits, and imago sees only what has passed. It is also what a
//! probe tells: the names of other files that an image wants, without anything else of it being touched.

use std::fs::File;
use std::io;

use thiserror::Error;

use super::file::{Align, read_at};

/// "QFI\xfb".
pub const MAGIC: [u8; 4] = [0x51, 0x46, 0x49, 0xfb];

/// Bytes of the header of version 2, and least bytes of one of version 3.
const V2_BYTES: usize = 72;
const V3_BYTES: usize = 104;
/// Most bytes of a table of tables, which is held in memory as long as the image is open: QEMU's limits.
const L1_BYTES_MAX: u64 = 32 << 20;
const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;
/// Most bytes of second-level tables and refcount blocks that imago holds at a time: 128 and 32 clusters, or all of them
/// where the disk has fewer.
const CACHED_BYTES_MAX: u64 = 96 << 20;
const L2_TABLES_CACHED: u64 = 128;
const REFCOUNT_BLOCKS_CACHED: u64 = 32;
/// Most bytes of a file name in a header.
const NAME_BYTES_MAX: u32 = 1023;
const EXTENSIONS_MAX: usize = 64;

const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;

const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
/// What is served: the dirty bit is honoured by [`Header::writable`].
const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE;
const NAMES: [&str; 5] = ["dirty", "corrupt", "external data file", "compression type", "extended L2 entries"];

/// Why an image is not served. Each says what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum HeaderError {
    /// No qcow2 at all.
    #[error("it has no qcow2 header: is it raw?")]
    Magic,
    /// A version that nobody writes.
    #[error("it is qcow2 of version {0}: convert it with `qemu-img convert -O qcow2`")]
    Version(u32),
    /// A field that cannot be so.
    #[error("its header is damaged ({0}): see `qemu-img check`")]
    Damaged(String),
    /// Encryption is not served.
    #[error("it is encrypted (method {0}), which is not served: decrypt it with `qemu-img convert`")]
    Encrypted(u32),
    /// Incompatible features that are not served.
    #[error("it needs {0}, which is not served: convert it with `qemu-img convert -O qcow2`")]
    Features(String),
    /// Marked as corrupt.
    #[error("it is marked as corrupt: repair it with `qemu-img check -r all`")]
    Corrupt,
    /// Its reference counts are not valid (lazy_refcounts).
    #[error(
        "it was not closed in order and its reference counts are out of date: repair it with `qemu-img check -r all`"
    )]
    Dirty,
    /// Its tables are larger than is allowed.
    #[error(
        "its {what} would take {bytes} bytes of memory, and {max} are allowed: convert it with another cluster size"
    )]
    TooLarge {
        /// Which tables.
        what: &'static str,
        /// What they take.
        bytes: u64,
        /// What is allowed.
        max: u64,
    },
    /// No disk of that size.
    #[error(
        "its disk has {0} bytes, which is no whole number of 512-byte sectors or none: resize it with `qemu-img resize`"
    )]
    Size(u64),
}

/// Another image that an image stands on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// As it is written in the header: relative to the image's folder, or absolute.
    pub name: String,
    /// "raw", "qcow2" or something else; older tools leave it out.
    pub format: Option<String>,
}

/// A header that has been checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Logarithm of the bytes of a cluster: 9 to 21.
    pub cluster_bits: u32,
    /// Bytes of the disk.
    pub bytes: u64,
    /// Where the first-level table is, and its entries.
    pub l1: (u64, u32),
    /// Where the refcount table is, and its clusters.
    pub refcount_table: (u64, u32),
    /// Logarithm of the bits of a reference count.
    pub refcount_order: u32,
    /// Reference counts are out of date.
    pub dirty: bool,
    /// The image that shows where this one has nothing.
    pub backing: Option<Backing>,
    /// Data lies in another file; its name, if the image tells.
    pub data_file: Option<Option<String>>,
}

/// A field of big-endian bytes at a fixed place.
fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk::<N>().copied()
}

fn damaged(what: impl Into<String>) -> HeaderError {
    HeaderError::Damaged(what.into())
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, HeaderError> {
    field(bytes, at).map(u32::from_be_bytes).ok_or_else(|| damaged("it is cut short"))
}

fn u64_at(bytes: &[u8], at: usize) -> Result<u64, HeaderError> {
    field(bytes, at).map(u64::from_be_bytes).ok_or_else(|| damaged("it is cut short"))
}

/// A name in a header, without anything that could confuse the one who reads or opens it.
fn name(bytes: &[u8], what: &str) -> Result<String, HeaderError> {
    let text = std::str::from_utf8(bytes).map_err(|_| damaged(format!("the name of its {what} is not UTF-8")))?;
    if text.is_empty() || text.len() > NAME_BYTES_MAX as usize || text.chars().any(char::is_control) {
        return Err(damaged(format!("the name of its {what} is no name")));
    }
    Ok(text.to_owned())
}

/// What the header extensions say.
#[derive(Debug, Default)]
struct Extensions {
    backing_format: Option<String>,
    data_file: Option<String>,
    features: Vec<(u8, u8, String)>,
}

impl Extensions {
    /// Decodes the extensions from `at` on; `bytes` is the first cluster.
    fn decode(bytes: &[u8], mut at: usize, end: usize) -> Result<Self, HeaderError> {
        let mut out = Self::default();
        for _ in 0..EXTENSIONS_MAX {
            // No room for another one: older images end so.
            if at.saturating_add(8) > end {
                return Ok(out);
            }
            let (kind, len) = (u32_at(bytes, at)?, u32_at(bytes, at + 4)? as usize);
            at += 8;
            let data = at.checked_add(len).filter(|data_end| *data_end <= end).and_then(|to| bytes.get(at..to));
            let data = data.ok_or_else(|| damaged("an extension reaches beyond the first cluster"))?;
            match kind {
                EXTENSION_END => return Ok(out),
                EXTENSION_BACKING_FORMAT => out.backing_format = Some(name(data, "backing format")?),
                EXTENSION_DATA_FILE => out.data_file = Some(name(data, "data file")?),
                EXTENSION_FEATURE_NAMES => {
                    for entry in data.chunks_exact(48) {
                        let [class, bit, text @ ..] = entry else { continue };
                        let text: String = String::from_utf8_lossy(text)
                            .chars()
                            .take_while(|c| *c != '\0')
                            .map(|c| if c.is_control() { '?' } else { c })
                            .collect();
                        out.features.push((*class, *bit, text));
                    }
                }
                _ => {}
            }
            at += len.next_multiple_of(8);
        }
        Err(damaged("it has more extensions than any tool writes"))
    }

    fn name_of(&self, bit: u32) -> String {
        let told = self.features.iter().find(|(class, at, _)| *class == 0 && u32::from(*at) == bit);
        let known = NAMES.get(bit as usize).map(|name| (*name).to_owned());
        let text = known.or_else(|| told.map(|(_, _, text)| text.clone())).filter(|text| !text.is_empty());
        text.map_or_else(|| format!("incompatible feature {bit}"), |text| format!("\"{text}\" (feature bit {bit})"))
    }
}

/// A range of whole clusters within the file, for a table that is there.
fn table(what: &'static str, at: u64, bytes: u64, max: u64, cluster: u64, file_bytes: u64) -> Result<(), HeaderError> {
    if bytes > max {
        return Err(HeaderError::TooLarge { what, bytes, max });
    }
    let end = at.checked_add(bytes).ok_or_else(|| damaged(format!("its {what} lies nowhere")))?;
    if at == 0 || !at.is_multiple_of(cluster) || end > file_bytes {
        return Err(damaged(format!("its {what} of {bytes} bytes at {at:#x} is not within the file")));
    }
    Ok(())
}

impl Header {
    /// Decodes the first cluster of an image, or as much of it as there is. `file_bytes` is the length of the file.
    ///
    /// # Errors
    /// All of [`HeaderError`] but [`HeaderError::Dirty`].
    pub fn decode(bytes: &[u8], file_bytes: u64) -> Result<Self, HeaderError> {
        if field::<4>(bytes, 0) != Some(MAGIC) {
            return Err(HeaderError::Magic);
        }
        let version = u32_at(bytes, 4)?;
        if !matches!(version, 2 | 3) {
            return Err(HeaderError::Version(version));
        }
        let cluster_bits = u32_at(bytes, 20)?;
        if !(9..=21).contains(&cluster_bits) {
            return Err(damaged(format!("clusters of 2^{cluster_bits} bytes")));
        }
        let cluster = 1_u64 << cluster_bits;
        let (incompatible, order, header_bytes) = match version {
            2 => (0, 4, V2_BYTES),
            _ => (u64_at(bytes, 72)?, u32_at(bytes, 96)?, u32_at(bytes, 100)? as usize),
        };
        if version == 3 && (header_bytes < V3_BYTES || header_bytes as u64 > cluster || header_bytes % 8 != 0) {
            return Err(damaged(format!("a header of {header_bytes} bytes")));
        }
        if order > 6 {
            return Err(damaged(format!("reference counts of 2^{order} bits")));
        }
        let end = bytes.len().min(cluster as usize);
        let backing_at = u64_at(bytes, 8)?;
        // A backing file's name follows the extensions.
        let extensions_end = if backing_at == 0 { end } else { usize::try_from(backing_at).unwrap_or(end).min(end) };
        let extensions = Extensions::decode(bytes, header_bytes, extensions_end)?;
        let unknown: Vec<String> =
            (0..64).filter(|bit| incompatible & !KNOWN & 1 << bit != 0).map(|bit| extensions.name_of(bit)).collect();
        if !unknown.is_empty() {
            return Err(HeaderError::Features(unknown.join(", ")));
        }
        if incompatible & CORRUPT != 0 {
            return Err(HeaderError::Corrupt);
        }
        match u32_at(bytes, 32)? {
            0 => {}
            method => return Err(HeaderError::Encrypted(method)),
        }
        let disk_bytes = u64_at(bytes, 24)?;
        if disk_bytes == 0 || !disk_bytes.is_multiple_of(512) {
            return Err(HeaderError::Size(disk_bytes));
        }
        let l1 = (u64_at(bytes, 40)?, u32_at(bytes, 36)?);
        table("first-level table", l1.0, u64::from(l1.1) * 8, L1_BYTES_MAX, cluster, file_bytes)?;
        let l2_tables = disk_bytes.div_ceil(cluster * (cluster / 8));
        if u64::from(l1.1) < l2_tables {
            return Err(damaged(format!("a first-level table of {} entries, {l2_tables} are needed", l1.1)));
        }
        let refcount_table = (u64_at(bytes, 48)?, u32_at(bytes, 56)?);
        // imago would look for room for its first block until the stack is full.
        if refcount_table.1 == 0 {
            return Err(damaged("it has no refcount table"));
        }
        let refcount_bytes = u64::from(refcount_table.1) * cluster;
        table("refcount table", refcount_table.0, refcount_bytes, REFCOUNT_TABLE_BYTES_MAX, cluster, file_bytes)?;
        let blocks = file_bytes.div_ceil(cluster * ((cluster * 8) >> order)) + 1;
        let cached = (l2_tables.min(L2_TABLES_CACHED) + blocks.min(REFCOUNT_BLOCKS_CACHED)) * cluster;
        if cached > CACHED_BYTES_MAX {
            return Err(HeaderError::TooLarge { what: "tables", bytes: cached, max: CACHED_BYTES_MAX });
        }
        let backing = (backing_at != 0).then(|| backing_name(bytes, backing_at, cluster)).transpose()?;
        let has_data_file = incompatible & DATA_FILE != 0;
        Ok(Self {
            version,
            cluster_bits,
            bytes: disk_bytes,
            l1,
            refcount_table,
            refcount_order: order,
            dirty: incompatible & DIRTY != 0,
            backing: backing.map(|name| Backing { name, format: extensions.backing_format }),
            data_file: has_data_file.then_some(extensions.data_file),
        })
    }

    /// Bytes of a cluster.
    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Whether it may be written as it is.
    ///
    /// # Errors
    /// [`HeaderError::Dirty`]: free clusters cannot be told from used ones.
    pub fn writable(&self) -> Result<(), HeaderError> {
        if self.dirty { Err(HeaderError::Dirty) } else { Ok(()) }
    }

    /// Reads and decodes the header of an open image of `file_bytes`.
    ///
    /// # Errors
    /// What the file says, and what is wrong with the header.
    pub fn read(file: &File, align: Align, file_bytes: u64) -> io::Result<Result<Self, HeaderError>> {
        let mut start = vec![0; file_bytes.min(512) as usize];
        read_at(file, &mut start, 0, align)?;
        let bits = u32_at(&start, 20).unwrap_or(0);
        if (10..=21).contains(&bits) && field::<4>(&start, 0) == Some(MAGIC) {
            start = vec![0; file_bytes.min(1 << bits) as usize];
            read_at(file, &mut start, 0, align)?;
        }
        Ok(Self::decode(&start, file_bytes))
    }
}

fn backing_name(bytes: &[u8], at: u64, cluster: u64) -> Result<String, HeaderError> {
    let len = u32_at(bytes, 16)?;
    let end = at.checked_add(u64::from(len)).filter(|end| *end <= cluster && len <= NAME_BYTES_MAX);
    let range = end.and_then(|end| bytes.get(usize::try_from(at).ok()?..usize::try_from(end).ok()?));
    name(range.ok_or_else(|| damaged("the name of its backing file lies outside the first cluster"))?, "backing file")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{ProptestConfig, any, proptest};

    use super::*;

    const FILE: u64 = 1 << 20;

    /// A header as `qemu-img create` writes it: 64 KiB clusters, a disk of 64 MiB.
    fn plain() -> Vec<u8> {
        let mut out = vec![0; 65536];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC);
        put(4, &3_u32.to_be_bytes());
        put(20, &16_u32.to_be_bytes());
        put(24, &(64_u64 << 20).to_be_bytes());
        put(36, &1_u32.to_be_bytes());
        put(40, &0x3_0000_u64.to_be_bytes());
        put(48, &0x1_0000_u64.to_be_bytes());
        put(56, &1_u32.to_be_bytes());
        put(96, &4_u32.to_be_bytes());
        put(100, &104_u32.to_be_bytes());
        out
    }

    fn with(at: usize, bytes: &[u8]) -> Result<Header, HeaderError> {
        let mut header = plain();
        header[at..at + bytes.len()].copy_from_slice(bytes);
        Header::decode(&header, FILE)
    }

    #[test]
    fn a_plain_header_is_understood() {
        let header = Header::decode(&plain(), FILE).unwrap();
        assert_eq!((header.version, header.cluster(), header.bytes), (3, 65536, 64 << 20));
        assert_eq!((header.backing, header.data_file, header.dirty), (None, None, false));
    }

    #[test]
    fn what_is_not_served_is_named() {
        let cases: &[(usize, &[u8], &str)] = &[
            (0, b"RAW!", "no qcow2 header"),
            (4, &4_u32.to_be_bytes(), "version 4"),
            (20, &8_u32.to_be_bytes(), "2^8 bytes"),
            (20, &22_u32.to_be_bytes(), "2^22 bytes"),
            (20, &u32::MAX.to_be_bytes(), "2^4294967295 bytes"),
            (32, &1_u32.to_be_bytes(), "encrypted (method 1)"),
            (32, &2_u32.to_be_bytes(), "encrypted (method 2)"),
            (72, &(1_u64 << 1).to_be_bytes(), "marked as corrupt"),
            (72, &(1_u64 << 3).to_be_bytes(), "compression type"),
            (72, &(1_u64 << 4).to_be_bytes(), "extended L2 entries"),
            (72, &(1_u64 << 63).to_be_bytes(), "incompatible feature 63"),
            (24, &0_u64.to_be_bytes(), "0 bytes"),
            (24, &513_u64.to_be_bytes(), "513 bytes"),
            (24, &(1_u64 << 62).to_be_bytes(), "are needed"),
            (36, &u32::MAX.to_be_bytes(), "first-level table would take"),
            (40, &0_u64.to_be_bytes(), "not within the file"),
            (40, &0x3_0200_u64.to_be_bytes(), "not within the file"),
            (40, &(u64::MAX - 0xffff).to_be_bytes(), "not within the file"),
            (48, &0_u64.to_be_bytes(), "not within the file"),
            (56, &u32::MAX.to_be_bytes(), "refcount table would take"),
            // Found by the fuzzer: the first write recursed without end.
            (56, &0_u32.to_be_bytes(), "no refcount table"),
            (56, &0x40_u32.to_be_bytes(), "not within the file"),
            (96, &7_u32.to_be_bytes(), "2^7 bits"),
            (100, &96_u32.to_be_bytes(), "header of 96 bytes"),
            (100, &105_u32.to_be_bytes(), "header of 105 bytes"),
            (8, &[0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 5], "outside the first cluster"),
            (8, &[0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 4, 0], "outside the first cluster"),
            (8, &[0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0], "is no name"),
        ];
        for (at, bytes, says) in cases {
            let text = with(*at, bytes).map_err(|e| e.to_string()).expect_err(says);
            assert!(text.contains(says), "{at}: {text}");
        }
        let dirty = with(72, &1_u64.to_be_bytes()).unwrap();
        assert_eq!((dirty.dirty, dirty.writable()), (true, Err(HeaderError::Dirty)));
    }

    /// Names come out as they are, and never with something in them that a terminal or a shell could take for more.
    #[test]
    fn names_of_other_files_are_told_and_checked() {
        let mut header = plain();
        header[8..16].copy_from_slice(&512_u64.to_be_bytes());
        header[16..20].copy_from_slice(&9_u32.to_be_bytes());
        header[512..521].copy_from_slice(b"base.img\n");
        assert!(matches!(Header::decode(&header, FILE), Err(HeaderError::Damaged(_))));
        header[520] = b'g';
        header[104..108].copy_from_slice(&EXTENSION_BACKING_FORMAT.to_be_bytes());
        header[108..112].copy_from_slice(&5_u32.to_be_bytes());
        header[112..117].copy_from_slice(b"qcow2");
        let backing = Header::decode(&header, FILE).unwrap().backing.unwrap();
        assert_eq!((backing.name.as_str(), backing.format.as_deref()), ("base.imgg", Some("qcow2")));
        header[72..80].copy_from_slice(&DATA_FILE.to_be_bytes());
        assert_eq!(Header::decode(&header, FILE).unwrap().data_file, Some(None));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]
        /// Whatever is in it: an answer, and what is accepted keeps its promises.
        #[test]
        fn any_header_is_answered(changes in proptest::collection::vec((0_usize..600, any::<u8>()), 0..12), cut in 0_usize..70000) {
            let mut header = plain();
            for (at, byte) in changes {
                header[at] = byte;
            }
            header.truncate(cut.max(4));
            if let Ok(header) = Header::decode(&header, FILE) {
                assert!(header.bytes > 0 && header.l1.0 + u64::from(header.l1.1) * 8 <= FILE);
                assert!(u64::from(header.l1.1) << (2 * header.cluster_bits - 3) >= header.bytes);
            }
        }
    }
}
