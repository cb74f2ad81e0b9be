//! From a viewer's keys to the guest's (Linux, `input-event-codes.h`): by the number of the key on a PC's keyboard where a
//! viewer says it, else by what is printed on a keyboard of the United States.

/// Keys with a prefix (scan codes of set 1), sorted.
const PREFIXED: [(u8, u16); 49] = [
    (0x10, 165), // previous song
    (0x19, 163), // next song
    (0x1c, 96),  // Enter of the number pad
    (0x1d, 97),  // right Ctrl
    (0x20, 113), // mute
    (0x21, 140), // calculator
    (0x22, 164), // play, pause
    (0x24, 166), // stop
    (0x2e, 114), // softer
    (0x30, 115), // louder
    (0x32, 172), // home page
    (0x35, 98),  // slash of the number pad
    (0x37, 99),  // Print
    (0x38, 100), // right Alt
    (0x45, 69),  // Num Lock, as some say it
    (0x46, 119), // Pause
    (0x47, 102), // Home
    (0x48, 103), // up
    (0x49, 104), // page up
    (0x4b, 105), // left
    (0x4d, 106), // right
    (0x4f, 107), // End
    (0x50, 108), // down
    (0x51, 109), // page down
    (0x52, 110), // Insert
    (0x53, 111), // Delete
    (0x5b, 125), // left logo
    (0x5c, 126), // right logo
    (0x5d, 127), // menu
    (0x5e, 116), // power
    (0x5f, 142), // sleep
    (0x63, 143), // wake up
    (0x65, 217), // search
    (0x66, 156), // bookmarks
    (0x67, 173), // refresh
    (0x68, 128), // stop
    (0x69, 159), // forward
    (0x6a, 158), // back
    (0x6b, 157), // computer
    (0x6c, 155), // mail
    (0x6d, 226), // media
    (0x70, 133), // copy
    (0x71, 137), // cut
    (0x72, 135), // paste
    (0x73, 131), // undo
    (0x74, 129), // again
    (0x75, 138), // help
    (0x76, 134), // open
    (0x77, 136), // find
];

/// Keys beyond those whose numbers are the same, sorted.
const UNLIKE: [(u8, u16); 22] = [
    (0x54, 99),  // Print, with Alt
    (0x59, 117), // equals sign of the number pad
    (0x5c, 95),  // comma of some number pads
    (0x64, 183), // F13
    (0x65, 184),
    (0x66, 185),
    (0x67, 186),
    (0x68, 187),
    (0x69, 188),
    (0x6a, 189),
    (0x6b, 190),
    (0x6c, 191),
    (0x6d, 192),
    (0x6e, 193), // F23
    (0x70, 93),  // Katakana, Hiragana
    (0x73, 89),  // Ro
    (0x76, 194), // F24
    (0x77, 91),  // Hiragana
    (0x78, 90),  // Katakana
    (0x79, 92),  // Henkan
    (0x7b, 94),  // Muhenkan
    (0x7d, 124), // Yen
];

fn find<K: Ord + Copy>(table: &[(K, u16)], key: K) -> Option<u16> {
    let at = table.binary_search_by_key(&key, |(key, _)| *key).ok()?;
    table.get(at).map(|(_, code)| *code)
}

/// The key of a scan code of set 1, whose prefix 0xe0 is its highest bit, or stands before it.
#[must_use]
pub fn of_scancode(scancode: u32) -> Option<u16> {
    let low = (scancode & 0x7f) as u8;
    match scancode {
        0x80..=0xff | 0xe000..=0xe07f => find(&PREFIXED, low),
        // Linux took the numbers of its keys from here.
        0x01..=0x53 | 0x56..=0x58 => Some(scancode as u16),
        0x7e => Some(121),
        0x00..=0x7f => find(&UNLIKE, low),
        _ => None,
    }
}

/// What is printed on the keys that print something, without and with Shift, beginning with key 2.
const PRINTED: [(&str, &str, u16); 4] = [
    ("1234567890-=", "!@#$%^&*()_+", 2),
    ("qwertyuiop[]", "QWERTYUIOP{}", 16),
    ("asdfghjkl;'`", "ASDFGHJKL:\"~", 30),
    ("\\zxcvbnm,./", "|ZXCVBNM<>?", 43),
];

/// Keysyms that print nothing, and dead ones that are on a key, sorted.
const NAMED: [(u32, u16); 98] = [
    (0xfe03, 100), // AltGr
    (0xfe20, 15),  // Tab, backwards
    (0xff08, 14),
    (0xff09, 15),
    (0xff0d, 28),
    (0xff13, 119),
    (0xff14, 70),
    (0xff15, 99),
    (0xff1b, 1),
    (0xff22, 94),
    (0xff23, 92),
    (0xff27, 93),
    (0xff50, 102),
    (0xff51, 105),
    (0xff52, 103),
    (0xff53, 106),
    (0xff54, 108),
    (0xff55, 104),
    (0xff56, 109),
    (0xff57, 107),
    (0xff61, 99),
    (0xff63, 110),
    (0xff67, 127),
    (0xff6a, 138),
    (0xff6b, 119),
    (0xff7e, 100),
    (0xff7f, 69),
    (0xff80, 57),
    (0xff8d, 96),
    (0xff95, 71),
    (0xff96, 75),
    (0xff97, 72),
    (0xff98, 77),
    (0xff99, 80),
    (0xff9a, 73),
    (0xff9b, 81),
    (0xff9c, 79),
    (0xff9d, 76),
    (0xff9e, 82),
    (0xff9f, 83),
    (0xffaa, 55),
    (0xffab, 78),
    (0xffac, 121),
    (0xffad, 74),
    (0xffae, 83),
    (0xffaf, 98),
    (0xffb0, 82),
    (0xffb1, 79),
    (0xffb2, 80),
    (0xffb3, 81),
    (0xffb4, 75),
    (0xffb5, 76),
    (0xffb6, 77),
    (0xffb7, 71),
    (0xffb8, 72),
    (0xffb9, 73),
    (0xffbd, 117),
    (0xffbe, 59), // F1
    (0xffbf, 60),
    (0xffc0, 61),
    (0xffc1, 62),
    (0xffc2, 63),
    (0xffc3, 64),
    (0xffc4, 65),
    (0xffc5, 66),
    (0xffc6, 67),
    (0xffc7, 68), // F10
    (0xffc8, 87),
    (0xffc9, 88), // F12
    (0xffca, 183),
    (0xffcb, 184),
    (0xffcc, 185),
    (0xffcd, 186),
    (0xffce, 187),
    (0xffcf, 188),
    (0xffd0, 189),
    (0xffd1, 190),
    (0xffd2, 191),
    (0xffd3, 192),
    (0xffd4, 193),
    (0xffd5, 194), // F24
    (0xffe1, 42),
    (0xffe2, 54),
    (0xffe3, 29),
    (0xffe4, 97),
    (0xffe5, 58),
    (0xffe7, 125),
    (0xffe8, 126),
    (0xffe9, 56),
    (0xffea, 100),
    (0xffeb, 125),
    (0xffec, 126),
    (0xffff, 111),
    (0x1008_ff11, 114),
    (0x1008_ff12, 113),
    (0x1008_ff13, 115),
    (0x1008_ff14, 164),
    (0x1008_ff2a, 116),
];

/// The key of a keysym.
#[must_use]
pub fn of_keysym(keysym: u32) -> Option<u16> {
    if keysym == 0x20 {
        return Some(57);
    }
    let Some(character) = u8::try_from(keysym).ok().filter(u8::is_ascii_graphic) else {
        return find(&NAMED, keysym);
    };
    PRINTED.iter().find_map(|(plain, shifted, first)| {
        let at =
            plain.bytes().position(|on| on == character).or_else(|| shifted.bytes().position(|on| on == character))?;
        Some(first + at as u16)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_can_be_searched() {
        assert!(PREFIXED.is_sorted_by(|a, b| a.0 < b.0));
        assert!(UNLIKE.is_sorted_by(|a, b| a.0 < b.0));
        assert!(NAMED.is_sorted_by(|a, b| a.0 < b.0));
        let codes = (0..0x1_0000).filter_map(of_scancode).chain((0..0x1_0000).filter_map(of_keysym));
        assert!(codes.into_iter().all(|code| (1..=248).contains(&code)));
    }

    /// Both ways lead to the same key.
    #[test]
    fn a_key_is_found_by_number_and_by_print() {
        let pairs = [
            (u32::from(b'a'), 0x1e, 30),
            (u32::from(b'Z'), 0x2c, 44),
            (u32::from(b'`'), 0x29, 41),
            (u32::from(b'\\'), 0x2b, 43),
            (u32::from(b'?'), 0x35, 53),
            (u32::from(b' '), 0x39, 57),
            (u32::from(b'0'), 0x0b, 11),
            (0xff0d, 0x1c, 28),
            (0xff8d, 0x9c, 96),
            (0xff52, 0xc8, 103),
            (0xffc9, 0x58, 88),
            (0xffea, 0xb8, 100),
            (0xffff, 0xe053, 111),
        ];
        for (keysym, scancode, code) in pairs {
            assert_eq!((of_keysym(keysym), of_scancode(scancode)), (Some(code), Some(code)), "{keysym:#x}");
        }
        assert_eq!((of_keysym(0x20ac), of_scancode(0), of_scancode(0x100)), (None, None, None));
    }
}
