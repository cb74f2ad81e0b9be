//! How many bytes the pixels of a 3D format take. It is for a budget: a format that is not known is reckoned at the most that
//! any has.

/// A block of pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Texel {
    /// Its columns.
    pub columns: u32,
    /// Its rows.
    pub rows: u32,
    /// Its bytes.
    pub bytes: u32,
}

/// What the pixels of a format take, by its number (virgl's, which are those of virtio where both have one).
pub fn of(format: u32) -> Texel {
    let plain = |bytes| Texel { columns: 1, rows: 1, bytes };
    let block = |bytes| Texel { columns: 4, rows: 4, bytes };
    match format {
        1..=4 | 8 | 14..=15 | 17..=22 | 67..=68 | 72 | 77 | 85 => plain(4),
        5..=7 | 12..=13 | 16 | 65 | 71 | 75 | 83 | 91 | 122 | 135 => plain(2),
        9..=11 | 23 | 64 | 69 | 74 | 82 | 177 | 181 => plain(1),
        28 | 32 | 36 | 40 | 44 | 92 | 98..=104 | 121 | 123..=125 | 128..=129 | 131..=134 => plain(4),
        136..=137 | 180 | 184 | 193 | 197 | 225 | 230..=233 | 253 => plain(4),
        48 | 52 | 56 | 60 | 178 | 182 | 185 | 189 => plain(2),
        49 | 53 | 57 | 61 | 186 | 190 => plain(4),
        29 | 33 | 51 | 55 | 59 | 63 | 94 | 126 | 138 | 188 | 192 | 194 | 198 | 234..=238 => plain(8),
        // The smaller and the larger half of block compression.
        105..=106 | 109..=110 | 113..=114 | 226 | 269..=272 | 275..=276 => block(8),
        107..=108 | 111..=112 | 115..=116 | 255..=258 | 273..=274 | 277..=306 => block(16),
        _ => plain(32),
    }
}
