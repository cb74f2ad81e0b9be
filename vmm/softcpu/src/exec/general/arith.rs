//! Integer arithmetic with flags: pure functions from values to value and RFLAGS.
//!
//! Each takes operands zero-extended to 64 bits, the operand size in bytes and the flags before, and returns the result
//! (zero-extended) and the flags after. Flags that the architecture leaves undefined get one fixed, documented value
//! here, so that runs are identical on every host: AF is cleared by logic, shifts and multiplications; OF of a shift by
//! more than one is computed as if by the last step; SF, ZF and PF of MUL and IMUL follow the low half of the result;
//! DIV and IDIV leave all as they were.

/// Carry.
pub(crate) const CF: u64 = 1;
/// Parity of the low byte.
pub(crate) const PF: u64 = 1 << 2;
/// Carry out of bit 3.
pub(crate) const AF: u64 = 1 << 4;
/// Zero.
pub(crate) const ZF: u64 = 1 << 6;
/// Sign.
pub(crate) const SF: u64 = 1 << 7;
/// Trap (single step).
pub(crate) const TF: u64 = 1 << 8;
/// Interrupts enabled.
pub(crate) const IF: u64 = 1 << 9;
/// Direction of string instructions.
pub(crate) const DF: u64 = 1 << 10;
/// Signed overflow.
pub(crate) const OF: u64 = 1 << 11;
/// The six arithmetic flags.
pub(crate) const ARITH: u64 = CF | PF | AF | ZF | SF | OF;

/// Mask of an operand of `size` bytes.
pub(crate) const fn mask(size: u32) -> u64 {
    if size >= 8 { u64::MAX } else { (1 << (size * 8)) - 1 }
}
/// Its sign bit.
pub(crate) const fn sign_bit(size: u32) -> u64 {
    1 << (size * 8 - 1)
}
/// Sign extension from `size` bytes to 64 bits.
pub(crate) const fn sign_extend(value: u64, size: u32) -> u64 {
    let shift = 64 - size * 8;
    (((value << shift) as i64) >> shift) as u64
}

/// SF, ZF and PF of a result.
pub(crate) const fn szp(result: u64, size: u32) -> u64 {
    let mut flags = 0;
    if result & mask(size) == 0 {
        flags |= ZF;
    }
    if result & sign_bit(size) != 0 {
        flags |= SF;
    }
    if (result as u8).count_ones().is_multiple_of(2) {
        flags |= PF;
    }
    flags
}
const fn bit(condition: bool, flag: u64) -> u64 {
    if condition { flag } else { 0 }
}

/// ADD and ADC.
pub(crate) const fn add(a: u64, b: u64, carry: bool, size: u32, flags: u64) -> (u64, u64) {
    let result = a.wrapping_add(b).wrapping_add(carry as u64) & mask(size);
    let carries = (a & b) | ((a | b) & !result);
    let overflow = (a ^ result) & (b ^ result);
    let out = szp(result, size)
        | bit(carries & sign_bit(size) != 0, CF)
        | bit(carries & 8 != 0, AF)
        | bit(overflow & sign_bit(size) != 0, OF);
    (result, (flags & !ARITH) | out)
}
/// SUB, SBB and CMP.
pub(crate) const fn sub(a: u64, b: u64, borrow: bool, size: u32, flags: u64) -> (u64, u64) {
    let result = a.wrapping_sub(b).wrapping_sub(borrow as u64) & mask(size);
    let borrows = (!a & b) | ((!a | b) & result);
    let overflow = (a ^ b) & (a ^ result);
    let out = szp(result, size)
        | bit(borrows & sign_bit(size) != 0, CF)
        | bit(borrows & 8 != 0, AF)
        | bit(overflow & sign_bit(size) != 0, OF);
    (result, (flags & !ARITH) | out)
}
/// Flags of AND, OR, XOR and TEST.
pub(crate) const fn logic(result: u64, size: u32, flags: u64) -> (u64, u64) {
    (result, (flags & !ARITH) | szp(result, size))
}
/// INC: CF stays.
pub(crate) const fn inc(a: u64, size: u32, flags: u64) -> (u64, u64) {
    let (result, out) = add(a, 1, false, size, flags);
    (result, (out & !CF) | (flags & CF))
}
/// DEC: CF stays.
pub(crate) const fn dec(a: u64, size: u32, flags: u64) -> (u64, u64) {
    let (result, out) = sub(a, 1, false, size, flags);
    (result, (out & !CF) | (flags & CF))
}

/// Shifts and rotates by CL or an immediate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shift {
    Shl,
    Shr,
    Sar,
    Rol,
    Ror,
    Rcl,
    Rcr,
}

/// A shift or rotate of `a` by `count` (not yet masked).
pub(crate) fn shift(kind: Shift, a: u64, count: u64, size: u32, flags: u64) -> (u64, u64) {
    let count = (count & if size == 8 { 63 } else { 31 }) as u32;
    if count == 0 {
        return (a, flags);
    }
    let bits = size * 8;
    let top = sign_bit(size);
    match kind {
        Shift::Shl => {
            let wide = u128::from(a) << count;
            let result = wide as u64 & mask(size);
            let carry = (wide >> bits) & 1 != 0;
            let out = szp(result, size) | bit(carry, CF) | bit((result & top != 0) != carry, OF);
            (result, (flags & !ARITH) | out)
        }
        Shift::Shr => {
            let result = if count < 64 { a >> count } else { 0 };
            let before_last = if count - 1 < 64 { a >> (count - 1) } else { 0 };
            let out = szp(result, size) | bit(before_last & 1 != 0, CF) | bit(before_last & top != 0, OF);
            (result, (flags & !ARITH) | out)
        }
        Shift::Sar => {
            let wide = sign_extend(a, size) as i64;
            let result = (wide >> count.min(63)) as u64 & mask(size);
            let carry = (wide >> (count - 1).min(63)) & 1 != 0;
            (result, (flags & !ARITH) | szp(result, size) | bit(carry, CF))
        }
        Shift::Rol => {
            let by = count % bits;
            let result = if by == 0 { a } else { ((a << by) | (a >> (bits - by))) & mask(size) };
            let carry = result & 1 != 0;
            (result, (flags & !(CF | OF)) | bit(carry, CF) | bit((result & top != 0) != carry, OF))
        }
        Shift::Ror => {
            let by = count % bits;
            let result = if by == 0 { a } else { ((a >> by) | (a << (bits - by))) & mask(size) };
            let overflow = (result ^ (result << 1)) & top != 0;
            (result, (flags & !(CF | OF)) | bit(result & top != 0, CF) | bit(overflow, OF))
        }
        Shift::Rcl => {
            let by = count % (bits + 1);
            if by == 0 {
                // A full turn through carry: the value stays; OF as of a finished rotate.
                let overflow = (a & top != 0) != (flags & CF != 0);
                return (a, (flags & !OF) | bit(overflow, OF));
            }
            let ring = u128::from(a) | (u128::from(flags & CF) << bits);
            let turned = (ring << by) | (ring >> (bits + 1 - by));
            let result = turned as u64 & mask(size);
            let carry = (turned >> bits) & 1 != 0;
            (result, (flags & !(CF | OF)) | bit(carry, CF) | bit((result & top != 0) != carry, OF))
        }
        Shift::Rcr => {
            let by = count % (bits + 1);
            let ring = u128::from(a) | (u128::from(flags & CF) << bits);
            let turned = if by == 0 { ring } else { (ring >> by) | (ring << (bits + 1 - by)) };
            let result = turned as u64 & mask(size);
            let carry = (turned >> bits) & 1 != 0;
            let overflow = (result ^ (result << 1)) & top != 0;
            (result, (flags & !(CF | OF)) | bit(carry, CF) | bit(overflow, OF))
        }
    }
}

/// SHLD (`left`) and SHRD. A count above the operand size (16-bit operands only) is undefined by the architecture; the
/// result then is that of rotating through the 48 bits of destination, source, destination.
pub(crate) fn double_shift(left: bool, a: u64, b: u64, count: u64, size: u32, flags: u64) -> (u64, u64) {
    let count = (count & if size == 8 { 63 } else { 31 }) as u32;
    if count == 0 {
        return (a, flags);
    }
    let bits = size * 8;
    let (result, carry) = if size == 2 {
        // a:b:a for SHLD, a:b:a seen from the other end for SHRD.
        let wide = (a << 32) | (b << 16) | a;
        if left {
            ((wide << count >> 32) & 0xffff, (wide << (count - 1) >> 47) & 1)
        } else {
            ((wide >> count) & 0xffff, (wide >> (count - 1)) & 1)
        }
    } else if left {
        (((a << count) | (b >> (bits - count))) & mask(size), (a >> (bits - count)) & 1)
    } else {
        (((a >> count) | (b << (bits - count))) & mask(size), (a >> (count - 1)) & 1)
    };
    let overflow = (a ^ result) & sign_bit(size) != 0;
    (result, (flags & !ARITH) | szp(result, size) | carry | bit(overflow, OF))
}

/// MUL: low half, high half, flags.
pub(crate) fn mul(a: u64, b: u64, size: u32, flags: u64) -> (u64, u64, u64) {
    let wide = u128::from(a) * u128::from(b);
    let low = wide as u64 & mask(size);
    let high = (wide >> (size * 8)) as u64 & mask(size);
    (low, high, (flags & !ARITH) | szp(low, size) | bit(high != 0, CF | OF))
}
/// IMUL: low half, high half, flags.
pub(crate) fn imul(a: u64, b: u64, size: u32, flags: u64) -> (u64, u64, u64) {
    let wide = i128::from(sign_extend(a, size) as i64) * i128::from(sign_extend(b, size) as i64);
    let low = wide as u64 & mask(size);
    let high = (wide >> (size * 8)) as u64 & mask(size);
    let fits = wide == i128::from(sign_extend(low, size) as i64);
    (low, high, (flags & !ARITH) | szp(low, size) | bit(!fits, CF | OF))
}
/// DIV of high:low by `divisor`: quotient and remainder, or `None` for #DE.
pub(crate) fn div(high: u64, low: u64, divisor: u64, size: u32) -> Option<(u64, u64)> {
    if divisor == 0 {
        return None;
    }
    let value = (u128::from(high) << (size * 8)) | u128::from(low);
    let quotient = value / u128::from(divisor);
    (quotient <= u128::from(mask(size))).then_some((quotient as u64, (value % u128::from(divisor)) as u64))
}
/// IDIV of high:low by `divisor`.
pub(crate) fn idiv(high: u64, low: u64, divisor: u64, size: u32) -> Option<(u64, u64)> {
    let divisor = i128::from(sign_extend(divisor, size) as i64);
    if divisor == 0 {
        return None;
    }
    let value = ((i128::from(sign_extend(high, size) as i64)) << (size * 8)) | i128::from(low);
    let quotient = value.checked_div(divisor)?;
    let low_quotient = quotient as u64 & mask(size);
    (i128::from(sign_extend(low_quotient, size) as i64) == quotient)
        .then_some((low_quotient, (value % divisor) as u64 & mask(size)))
}

/// The sixteen conditions of Jcc, SETcc and CMOVcc, by the low four bits of the opcode.
pub(crate) const fn condition(code: u8, flags: u64) -> bool {
    let base = match code >> 1 & 7 {
        0 => flags & OF != 0,
        1 => flags & CF != 0,
        2 => flags & ZF != 0,
        3 => flags & (CF | ZF) != 0,
        4 => flags & SF != 0,
        5 => flags & PF != 0,
        6 => (flags & SF != 0) != (flags & OF != 0),
        _ => flags & ZF != 0 || (flags & SF != 0) != (flags & OF != 0),
    };
    base != (code & 1 != 0)
}
