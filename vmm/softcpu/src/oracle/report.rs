//! What a person needs to see of a disagreement: the smallest case that still shows it.

use super::generate::{Slot, Start, decode};
use super::layout::{DATA, STACK, TAKEN};
use super::outcome::flags;
use super::undefined::flow;
use super::{Family, Pair};
use iced_x86::{Encoder, Formatter, Instruction, Mnemonic, NasmFormatter};
use std::fmt;

/// A case on which the CPU and its oracle disagree, shrunk.
#[derive(Debug)]
pub struct Mismatch {
    /// The three numbers that make it again.
    pub seed: u64,
    /// Family of the generator.
    pub family: Family,
    /// Number of the case.
    pub case: u64,
    pub(super) text: String,
    pub(super) mnemonics: Vec<Mnemonic>,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "mismatch in {} case {} of seed {:#x}\n{}",
            self.family.name(),
            self.case,
            self.seed,
            self.text
        )
    }
}

impl Mismatch {
    /// Whether the same instructions disagree in `other`.
    pub fn alike(&self, other: &Self) -> bool {
        self.mnemonics == other.mnemonics
    }
}

/// Bytes and disassembly, one instruction a line.
pub(super) fn listing(slot: &Slot) -> String {
    let mut formatter = NasmFormatter::new();
    let mut text = String::new();
    for instruction in &slot.instructions {
        let at = (instruction.ip() - slot.address) as usize;
        let bytes = &slot.bytes[at..at + instruction.len()];
        let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut line = String::new();
        formatter.format(instruction, &mut line);
        text.push_str(&format!("  {:x}: {:<36} {line}\n", instruction.ip(), hex.join(" ")));
    }
    text
}

/// Registers at the start, those that are not zero.
pub(super) fn beginning(start: &Start) -> String {
    let names =
        ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];
    let registers: Vec<String> = names
        .iter()
        .zip(start.gpr)
        .filter(|(_, value)| *value != 0)
        .map(|(name, value)| format!("{name}={value:x}"))
        .collect();
    let mut text = format!("  start: {} rflags={}\n", registers.join(" "), flags(start.rflags));
    if let Some(fp) = &start.fp {
        text.push_str(&format!(
            "         fcw={:04x} fsw={:04x} ftw={:02x} mxcsr={:04x}\n",
            fp.fcw, fp.fsw, fp.ftw, fp.mxcsr
        ));
        for (name, registers) in [("xmm", &fp.xmm[..]), ("st", &fp.st[..])] {
            for (index, value) in registers.iter().enumerate().filter(|(_, value)| **value != 0) {
                text.push_str(&format!("         {name}{index}={value:032x}\n"));
            }
        }
    }
    text
}

/// Makes the case smaller while the two sides of `pair` still disagree, and describes it.
pub(super) fn shrink(pair: &mut Pair, slot: &Slot, start: &Start, case: u64) -> Mismatch {
    let mut slot = copy(slot, &slot.instructions).unwrap_or_else(|| same(slot));
    let mut start = start.clone();
    let mut index = 0;
    while slot.instructions.len() > 1 && index < slot.instructions.len() {
        let mut fewer = slot.instructions.clone();
        fewer.remove(index);
        match copy(&slot, &fewer) {
            Some(smaller) if disagree(pair, &smaller, &start) => slot = smaller,
            _ => index += 1,
        }
    }
    for register in 0..16 {
        let mut simpler = start.clone();
        simpler.gpr[register] = 0;
        if !slot.pinned.contains_key(&register) && disagree(pair, &slot, &simpler) {
            start = simpler;
        }
    }
    for rflags in [0x202, 0x202 | start.rflags & 0x400] {
        let simpler = Start { rflags, ..start.clone() };
        if disagree(pair, &slot, &simpler) {
            start = simpler;
            break;
        }
    }
    if start.fp.is_some() {
        for register in 0..24 {
            let mut simpler = start.clone();
            if let Some(fp) = &mut simpler.fp {
                let value = if register < 16 { &mut fp.xmm[register] } else { &mut fp.st[register - 16] };
                *value = 0;
            }
            if disagree(pair, &slot, &simpler) {
                start = simpler;
            }
        }
    }
    describe(pair, &slot, &start, case)
}

fn same(slot: &Slot) -> Slot {
    Slot {
        address: slot.address,
        instructions: slot.instructions.clone(),
        bytes: slot.bytes.clone(),
        pinned: slot.pinned.clone(),
        patches: slot.patches.clone(),
        undefined: slot.undefined,
        runs: Vec::new(),
    }
}

/// The slot with other instructions, encoded one after the other; `None` if one would now read an undefined flag.
fn copy(slot: &Slot, instructions: &[Instruction]) -> Option<Slot> {
    let mut bytes = Vec::new();
    let mut placed = Vec::new();
    let mut undefined = 0;
    for instruction in instructions {
        let ip = slot.address + bytes.len() as u64;
        let at = (instruction.ip() - slot.address) as usize;
        let original = slot.bytes.get(at..at + instruction.len())?;
        // The original bytes keep prefixes that the encoder would drop, but branches must be aimed anew.
        let again = if instruction.is_ip_rel_memory_operand() || instruction.near_branch_target() != 0 {
            let mut encoder = Encoder::new(64);
            encoder.encode(instruction, ip).ok()?;
            encoder.take_buffer()
        } else {
            original.to_vec()
        };
        let again_decoded = decode(&again, ip)?;
        // The instruction before it cleared the bits that must not be popped.
        let pops_flags = matches!(again_decoded.mnemonic(), Mnemonic::Popf | Mnemonic::Popfq);
        if pops_flags && placed.last().is_none_or(|before: &Instruction| before.mnemonic() != Mnemonic::And) {
            return None;
        }
        undefined = flow(undefined, &again_decoded)?;
        placed.push(again_decoded);
        bytes.extend_from_slice(&again);
    }
    let smaller = Slot { instructions: placed, bytes, undefined, ..same(slot) };
    Some(smaller)
}

fn disagree(pair: &mut Pair, slot: &Slot, start: &Start) -> bool {
    pair.load(std::slice::from_ref(slot));
    !pair.agree(slot, start)
}

fn describe(pair: &mut Pair, slot: &Slot, start: &Start, case: u64) -> Mismatch {
    pair.load(std::slice::from_ref(slot));
    let [host, soft] = pair.outcomes(slot, start);
    let mut text = listing(slot);
    text.push_str(&beginning(start));
    for &(address, value) in &start.patches {
        text.push_str(&format!("  memory: [{address:x}]={value:x}\n"));
    }
    text.push_str(&host.difference(&soft, ["host", "cpu"]));
    let host_memory = pair.host.memory();
    let soft_memory = pair.soft.memory();
    for ((base, host), soft) in [DATA, STACK].into_iter().zip(host_memory).zip(soft_memory) {
        let different = host.iter().zip(soft.iter()).enumerate().filter(|(_, (host, soft))| host != soft);
        for (offset, (host, soft)) in different.take(24) {
            text.push_str(&format!("  [{:x}] host {host:02x}  cpu {soft:02x}\n", base + offset as u64));
        }
    }
    text.push_str(&format!(
        "  ends: {:x} behind, {:x} taken; undefined flags {:x}\n",
        slot.address + slot.bytes.len() as u64,
        slot.address + TAKEN,
        slot.undefined(start, host.rip)
    ));
    pair.rewind();
    let mnemonics = slot.instructions.iter().map(Instruction::mnemonic).collect();
    Mismatch { seed: pair.generator.seed(), family: pair.generator.family(), case, text, mnemonics }
}
