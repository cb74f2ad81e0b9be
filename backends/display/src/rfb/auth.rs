//! A viewer's password (RFC 6143, 7.2.2): it encrypts 16 bytes by DES with the password's first eight. That is weak, and all
//! that viewers have in common: it keeps neighbours on a host out, not somebody who listens on a network.

use des::Des;
use des::cipher::{BlockCipherEncrypt, KeyInit};

/// Bytes of the question, and of the answer.
pub const CHALLENGE: usize = 16;
/// Bytes of a password that count.
pub const SIGNIFICANT: usize = 8;

/// What a viewer that knows the password answers.
#[must_use]
pub fn response(password: &[u8], challenge: &[u8; CHALLENGE]) -> [u8; CHALLENGE] {
    let mut key = [0; SIGNIFICANT];
    // The first who wrote this had the bits of each byte the other way round.
    key.iter_mut().zip(password).for_each(|(to, byte)| *to = byte.reverse_bits());
    let cipher = Des::new(&key.into());
    let mut answer = *challenge;
    for block in answer.as_chunks_mut::<8>().0 {
        let mut bytes = (*block).into();
        cipher.encrypt_block(&mut bytes);
        *block = bytes.into();
    }
    answer
}

/// Whether both are the same; how long that takes does not say where they differ.
#[must_use]
pub fn is_same(a: &[u8], b: &[u8]) -> bool {
    let differs = a.iter().zip(b).fold(0, |differs, (a, b)| differs | (a ^ b));
    a.len() == b.len() && std::hint::black_box(differs) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of FIPS 81, whose key a viewer has with its bits turned round.
    #[test]
    fn it_is_the_des_of_viewers() {
        let key = [0x01_u8, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef].map(u8::reverse_bits);
        let mut challenge = [0; CHALLENGE];
        challenge[..8].copy_from_slice(b"Now is t");
        challenge[8..].copy_from_slice(b"he time ");
        let answer = response(&key, &challenge);
        assert_eq!(answer[..8], [0x3f, 0xa4, 0x0e, 0x8a, 0x98, 0x4d, 0x48, 0x15]);
        assert_eq!(answer[8..], [0x6a, 0x27, 0x17, 0x87, 0xab, 0x88, 0x83, 0xf9]);
        assert_eq!(response(b"12345678", &challenge), response(b"123456789", &challenge));
        assert_ne!(response(b"1234567", &challenge), response(b"12345678", &challenge));
    }

    #[test]
    fn secrets_are_compared_as_a_whole() {
        assert!(is_same(b"abc", b"abc") && is_same(b"", b""));
        assert!(!is_same(b"abc", b"abd") && !is_same(b"abc", b"ab") && !is_same(b"", b"a"));
    }
}
