//! Stories of interrupts through the whole chip: line or message in, vector at a CPU out.

use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::interrupt::{MsiMessage, Wire};
use std::sync::Arc;

/// Counts kicks: the number of CPU n is in byte n.
#[derive(Default)]
struct Kicks(AtomicU32);
impl CpuSink for Kicks {
    fn kick(&self, cpu: usize) {
        self.0.fetch_or(1 << cpu, Ordering::Relaxed);
    }
}
impl Kicks {
    /// CPUs kicked since the last call, one bit each.
    fn take(&self) -> u32 {
        self.0.swap(0, Ordering::Relaxed)
    }
}

const SVR: u64 = 0xf0;
const EOI: u64 = 0xb0;
const TPR: u64 = 0x80;
const ICR: u64 = 0x300;
const ICR_HIGH: u64 = 0x310;
const LVT_TIMER: u64 = 0x320;

fn write(chip: &mut IrqChip, cpu: usize, register: u64, value: u32) {
    chip.lapic_write(cpu, register, &value.to_le_bytes(), 0);
}

fn read(chip: &mut IrqChip, cpu: usize, register: u64, now_ns: u64) -> u32 {
    let mut data = [0; 4];
    chip.lapic_read(cpu, register, &mut data, now_ns);
    u32::from_le_bytes(data)
}

/// A chip whose local APICs are enabled by software, all inputs quiet.
fn running(cpus: usize) -> (IrqChip, Arc<Kicks>) {
    let kicks = Arc::new(Kicks::default());
    let mut chip = IrqChip::new(cpus, Arc::clone(&kicks) as Arc<dyn CpuSink>);
    for cpu in 0..cpus {
        write(&mut chip, cpu, SVR, 0x1ff);
    }
    kicks.take();
    (chip, kicks)
}

fn ioapic_entry(chip: &mut IrqChip, pin: u8, entry: u64) {
    for (select, value) in [(0x11 + 2 * pin, entry >> 32), (0x10 + 2 * pin, entry & 0xffff_ffff)] {
        chip.ioapic_write(0, &[select]);
        chip.ioapic_write(0x10, &(value as u32).to_le_bytes());
    }
}

/// A PCI device holds its level line until its driver has served it: the interrupt comes again after each EOI, and no more
/// once the line is low.
#[test]
fn level_interrupt_comes_again_after_eoi() {
    let (mut chip, kicks) = running(1);
    ioapic_entry(&mut chip, 17, 1 << 15 | 0x61);
    chip.set_line(17, true);
    assert_eq!(kicks.take(), 1);
    for _ in 0..2 {
        assert_eq!(chip.acknowledge(0), Some(0x61));
        assert_eq!(chip.acknowledge(0), None, "in service");
        write(&mut chip, 0, EOI, 0);
        assert_eq!(kicks.take(), 1, "the line is still high");
    }
    assert_eq!(chip.acknowledge(0), Some(0x61));
    chip.set_line(17, false);
    write(&mut chip, 0, EOI, 0);
    assert!(!chip.deliverable(0));
    assert_eq!(kicks.take(), 0);
}

/// The timer's line 0 is the 8259's input 0 and, as on every PC, pin 2 of the I/O APIC.
#[test]
fn timer_line_is_pin_two() {
    let (mut chip, _) = running(1);
    write(&mut chip, 0, 0x350, 0x1_0000);
    ioapic_entry(&mut chip, 2, 0x30);
    let shared = SharedIrqChip::new(chip);
    Wire::new(Arc::new(shared.clone()), 0).pulse();
    assert_eq!(shared.lock().acknowledge(0), Some(0x30));
}

/// At boot nothing but the 8259 pair is programmed: its interrupt reaches the boot CPU through LINT0, though no software
/// has enabled the local APIC yet.
#[test]
fn boot_interrupt_passes_lint0() {
    let kicks = Arc::new(Kicks::default());
    let mut chip = IrqChip::new(2, Arc::clone(&kicks) as Arc<dyn CpuSink>);
    for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 1), (0x21, 0xfe)] {
        chip.pic_write(port, value);
    }
    chip.set_line(0, true);
    assert_eq!(kicks.take(), 1, "only the boot CPU passes it");
    assert!(chip.deliverable(0) && !chip.deliverable(1));
    assert_eq!(chip.acknowledge(0), Some(0x30));
    assert!(!chip.deliverable(0));
    chip.set_line(0, false);
    chip.pic_write(0x20, 0x20);
    // Linux masks LINT0 when it takes the I/O APIC into use.
    write(&mut chip, 0, SVR, 0x1ff);
    write(&mut chip, 0, 0x350, 0x1_0700);
    chip.set_line(0, true);
    assert!(!chip.deliverable(0));
}

/// A kernel arms an absolute TSC value: nothing before it, one interrupt at it, nothing after it until armed again.
#[test]
fn tsc_deadline_fires_once() {
    let (mut chip, kicks) = running(1);
    write(&mut chip, 0, LVT_TIMER, 2 << 17 | 0xec);
    assert!(chip.write_msr(0, 0x6e0, 5_000_000, 1_000));
    assert_eq!(chip.next_deadline_ns(), Some(5_000_000));
    chip.expire(4_999_999);
    assert!(!chip.deliverable(0));
    assert_eq!(chip.read_msr(0, 0x6e0, 1_000), Some(5_000_000));
    chip.expire(5_000_000);
    assert_eq!(kicks.take(), 1);
    assert_eq!((chip.next_deadline_ns(), chip.read_msr(0, 0x6e0, 0)), (None, Some(0)));
    assert_eq!(chip.acknowledge(0), Some(0xec));
    write(&mut chip, 0, EOI, 0);
    chip.expire(u64::MAX);
    assert!(!chip.deliverable(0));
    // A deadline in the past fires at once; a guest that moved its TSC is understood.
    assert!(chip.write_msr(0, 0x6e0, 1, 7_000_000));
    assert_eq!(chip.acknowledge(0), Some(0xec));
    chip.set_tsc_offset(0, -1_000_000);
    assert!(chip.write_msr(0, 0x6e0, 8_000_000, 7_000_000));
    assert_eq!(chip.next_deadline_ns(), Some(9_000_000));
    assert!(chip.write_msr(0, 0x6e0, 0, 7_000_000));
    assert_eq!(chip.next_deadline_ns(), None, "zero disarms");
}

/// Divide by 16, 1000 counts: 16 µs. The current count runs down, and periodic mode keeps its phase.
#[test]
fn counting_timer() {
    let (mut chip, _) = running(1);
    write(&mut chip, 0, 0x3e0, 3);
    write(&mut chip, 0, LVT_TIMER, 0xec);
    chip.lapic_write(0, 0x380, &1000u32.to_le_bytes(), 100_000);
    assert_eq!(read(&mut chip, 0, 0x390, 108_000), 500);
    assert_eq!(chip.next_deadline_ns(), Some(116_000));
    chip.expire(116_000);
    assert_eq!(chip.acknowledge(0), Some(0xec));
    assert_eq!((read(&mut chip, 0, 0x390, 120_000), chip.next_deadline_ns()), (0, None));
    write(&mut chip, 0, LVT_TIMER, 1 << 17 | 0xec);
    chip.lapic_write(0, 0x380, &100_000u32.to_le_bytes(), 0);
    for expected in [1_600_000, 3_200_000] {
        assert_eq!(chip.next_deadline_ns(), Some(expected));
        chip.expire(expected + 10);
    }
    chip.expire(16_000_001);
    assert_eq!(chip.next_deadline_ns(), Some(17_600_000), "what was missed is one tick, and the phase stays");
    // One count of one nanosecond, over and over: bounded.
    write(&mut chip, 0, 0x3e0, 0xb);
    chip.lapic_write(0, 0x380, &1u32.to_le_bytes(), 20_000_000);
    chip.expire(20_000_001);
    assert!(chip.next_deadline_ns().unwrap() >= 20_000_001 + lapic::PERIOD_NS_MIN);
}

/// A lowest-priority message goes to the CPU that does the least important work, and in turn among equals.
#[test]
fn lowest_priority_picks_the_idle_cpu() {
    let (mut chip, kicks) = running(3);
    for cpu in 0..3 {
        write(&mut chip, cpu, 0xd0, 1 << (24 + cpu));
    }
    write(&mut chip, 0, TPR, 0x40);
    write(&mut chip, 2, TPR, 0x40);
    let message = MsiMessage { address: 0xfee0_7004, data: 0x171 };
    chip.fire_msi(message);
    assert_eq!(kicks.take(), 0b010);
    write(&mut chip, 1, TPR, 0x40);
    kicks.take();
    chip.fire_msi(message);
    chip.fire_msi(message);
    assert_eq!(kicks.take(), 0b101);
    assert_eq!(chip.acknowledge(0), Some(0x71));
    // A CPU whose APIC is off takes nothing, however idle.
    write(&mut chip, 1, TPR, 0);
    write(&mut chip, 1, SVR, 0xff);
    kicks.take();
    chip.fire_msi(message);
    assert_eq!(kicks.take() & 0b010, 0);
}

/// Task priority holds interrupts of its class and below back; lowering it lets them through.
#[test]
fn task_priority_holds_back() {
    let (mut chip, kicks) = running(1);
    chip.set_cr8(0, 6);
    chip.fire_msi(MsiMessage { address: 0xfee0_0000, data: 0x6f });
    assert!(!chip.deliverable(0));
    assert_eq!(kicks.take(), 0);
    chip.fire_msi(MsiMessage { address: 0xfee0_0000, data: 0x70 });
    assert_eq!(chip.acknowledge(0), Some(0x70));
    kicks.take();
    chip.set_cr8(0, 5);
    assert!(!chip.deliverable(0), "0x70 is in service");
    write(&mut chip, 0, EOI, 0);
    assert_eq!(kicks.take(), 1);
    assert_eq!((chip.acknowledge(0), read(&mut chip, 0, 0xa0, 0)), (Some(0x6f), 0x60));
}

/// How a kernel starts its second CPU: INIT, then two start-up messages, of which the second does nothing.
#[test]
fn init_and_startup() {
    let (mut chip, kicks) = running(2);
    assert!(!chip.has_signal(1));
    write(&mut chip, 0, ICR_HIGH, 1 << 24);
    write(&mut chip, 0, ICR, 0xc500);
    assert_eq!(kicks.take(), 0b10);
    assert_eq!(chip.take_signal(1), Some(CpuSignal::Init));
    write(&mut chip, 0, ICR, 0x8500);
    write(&mut chip, 0, ICR, 0x0699);
    write(&mut chip, 0, ICR, 0x0698);
    assert_eq!(chip.take_signal(1), Some(CpuSignal::Startup { page: 0x99 }));
    assert_eq!(chip.take_signal(1), None);
    // NMI to all but the sender.
    write(&mut chip, 0, ICR, 0xc0400);
    assert_eq!((chip.take_signal(0), chip.take_signal(1)), (None, Some(CpuSignal::Nmi)));
    assert_eq!(read(&mut chip, 1, 0x20, 0), 1 << 24, "INIT keeps the id");
}

/// x2APIC: entered once and left only by disabling; registers by MSR, 32-bit destinations, self IPI.
#[test]
fn x2apic_mode() {
    let (mut chip, _) = running(2);
    assert_eq!(chip.read_msr(0, 0x802, 0), None, "no MSRs in xAPIC mode");
    for cpu in 0..2 {
        let base = chip.read_msr(cpu, 0x1b, 0).unwrap();
        assert_eq!(base & 0x100 != 0, cpu == 0, "boot flag");
        assert!(chip.write_msr(cpu, 0x1b, base | 0x400, 0));
        assert!(!chip.write_msr(cpu, 0x1b, base, 0), "x2APIC cannot be left for xAPIC");
        assert!(!chip.write_msr(cpu, 0x1b, (base + 0x1000) | 0x400, 0), "the page does not move");
    }
    assert_eq!((chip.read_msr(1, 0x802, 0), chip.read_msr(1, 0x80d, 0)), (Some(1), Some(2)));
    let mut data = [0; 4];
    chip.lapic_read(1, 0x20, &mut data, 0);
    assert_eq!(data, [0xff; 4], "the page is gone");
    assert!(chip.write_msr(0, 0x830, 1 << 32 | 0x41, 0));
    assert_eq!(chip.acknowledge(1), Some(0x41));
    assert!(chip.write_msr(1, 0x80b, 0, 0));
    assert!(!chip.write_msr(1, 0x80b, 1, 0), "EOI takes only zero");
    assert!(!chip.write_msr(1, 0x808, 0x100, 0), "reserved bits");
    assert!(!chip.write_msr(1, 0x802, 0, 0), "the id is fixed");
    assert!(chip.write_msr(1, 0x83f, 0x55, 0));
    assert_eq!(chip.acknowledge(1), Some(0x55));
    // Logical destination: cluster 0, CPU 1.
    assert!(chip.write_msr(0, 0x830, 2 << 32 | 0x800 | 0x66, 0));
    assert_eq!((chip.acknowledge(1), chip.acknowledge(0)), (Some(0x66), None));
    assert!(chip.write_msr(0, 0x830, 0xffff_ffff << 32 | 0x77, 0));
    assert_eq!((chip.acknowledge(1), chip.acknowledge(0)), (Some(0x77), Some(0x77)));
}

/// Vectors below 16 cannot be sent: the error register says so, after it was written, and the error interrupt comes once.
#[test]
fn illegal_vector_is_reported() {
    let (mut chip, _) = running(1);
    write(&mut chip, 0, 0x370, 0xfe);
    write(&mut chip, 0, ICR, 0x4_0003);
    assert_eq!(read(&mut chip, 0, 0x280, 0), 0);
    write(&mut chip, 0, 0x280, 0);
    assert_eq!(read(&mut chip, 0, 0x280, 0), 1 << 5);
    assert_eq!(chip.acknowledge(0), Some(0xfe));
    // An error entry whose own vector is illegal must not call itself for ever.
    write(&mut chip, 0, 0x370, 0x02);
    write(&mut chip, 0, ICR, 0x4_0003);
    assert_eq!(chip.acknowledge(0), None);
}

/// Switching the APIC off by software drops what comes, but not NMI; the board's NMI reaches the boot CPU by LINT1.
#[test]
fn disabled_apic_still_takes_nmi() {
    let kicks = Arc::new(Kicks::default());
    let mut chip = IrqChip::new(1, Arc::clone(&kicks) as Arc<dyn CpuSink>);
    chip.fire_msi(MsiMessage { address: 0xfee0_0000, data: 0x41 });
    write(&mut chip, 0, SVR, 0x1ff);
    assert_eq!(chip.acknowledge(0), None);
    chip.raise_nmi();
    assert_eq!(chip.take_signal(0), Some(CpuSignal::Nmi));
    chip.fire_msi(MsiMessage { address: 0xfee0_0000, data: 0x400 });
    assert_eq!(kicks.take(), 1);
    assert_eq!(chip.take_signal(0), Some(CpuSignal::Nmi));
}

/// A state that is put back delivers what was pending.
#[test]
fn state_returns() {
    let (mut chip, _) = running(2);
    ioapic_entry(&mut chip, 17, 1 << 15 | 0x61);
    chip.set_line(17, true);
    let state = chip.state();
    let (mut other, kicks) = running(2);
    assert!(other.restore(state.clone()));
    assert_eq!(kicks.take(), 0b11);
    assert_eq!(other.acknowledge(0), Some(0x61));
    write(&mut other, 0, EOI, 0);
    assert_eq!(other.acknowledge(0), Some(0x61), "the line's level came along");
    assert!(!running(1).0.restore(state));
}

mod hostile {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Page(u8, u16, u32),
        Msr(u8, u32, u64),
        Line(u32, bool),
        Message(u32, u32),
        Pic(u8, u8),
        IoApic(u8, u32),
        Acknowledge(u8),
        Time(u32),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (any::<u8>(), 0..0x400u16, any::<u32>()).prop_map(|(cpu, at, value)| Step::Page(cpu, at, value)),
            (any::<u8>(), 0..0x40u16, any::<u32>()).prop_map(|(cpu, at, value)| Step::Page(cpu, at << 4, value)),
            (any::<u8>(), 0x800..0x840u32, any::<u64>()).prop_map(|(cpu, msr, value)| Step::Msr(cpu, msr, value)),
            (any::<u8>(), 0x1b..0x1cu32, any::<u16>()).prop_map(|(cpu, msr, value)| Step::Msr(
                cpu,
                msr,
                0xfee0_0000 | u64::from(value)
            )),
            (any::<u8>(), 0x6e0..0x6e1u32, any::<u64>()).prop_map(|(cpu, msr, value)| Step::Msr(cpu, msr, value)),
            (0..40u32, any::<bool>()).prop_map(|(line, high)| Step::Line(line, high)),
            (any::<u32>(), any::<u32>()).prop_map(|(address, data)| Step::Message(address, data)),
            (any::<u8>(), any::<u8>()).prop_map(|(port, value)| Step::Pic(port, value)),
            (any::<u8>(), any::<u32>()).prop_map(|(select, value)| Step::IoApic(select, value)),
            any::<u8>().prop_map(Step::Acknowledge),
            any::<u32>().prop_map(Step::Time),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

        /// Whatever a guest writes in whatever order: no panic, a vector is never below 16 except from the 8259 pair, and
        /// `deliverable` tells what `acknowledge` then gives.
        #[test]
        fn random_writes_are_contained(steps in prop::collection::vec(step(), 1..300)) {
            let (mut chip, _) = running(3);
            let mut now = 0u64;
            for step in steps {
                match step {
                    Step::Page(cpu, offset, value) => {
                        chip.lapic_write(usize::from(cpu % 4), offset.into(), &value.to_le_bytes(), now);
                        let mut data = [0; 8];
                        chip.lapic_read(usize::from(cpu % 4), offset.into(), &mut data, now);
                    }
                    Step::Msr(cpu, msr, value) => {
                        let _ = chip.write_msr(usize::from(cpu % 4), msr, value, now);
                        let _ = chip.read_msr(usize::from(cpu % 4), msr, now);
                    }
                    Step::Line(line, high) => chip.set_line(line, high),
                    Step::Message(address, data) => {
                        let address = 0xfee0_0000 | u64::from(address & 0xf_ffff);
                        chip.fire_msi(MsiMessage { address, data });
                    }
                    Step::Pic(port, value) => {
                        let port = pic::DualPic::PORTS[usize::from(port) % 6];
                        chip.pic_write(port, value);
                        chip.pic_read(port);
                    }
                    Step::IoApic(select, value) => {
                        chip.ioapic_write(0, &[select]);
                        chip.ioapic_write(0x10, &value.to_le_bytes());
                        chip.ioapic_read(0x10, &mut [0; 8]);
                    }
                    Step::Acknowledge(cpu) => {
                        let cpu = usize::from(cpu % 4);
                        let expected = chip.deliverable(cpu);
                        let vector = chip.acknowledge(cpu);
                        prop_assert_eq!(vector.is_some(), expected);
                        chip.take_signal(cpu);
                    }
                    Step::Time(more) => {
                        now = now.saturating_add(u64::from(more) << 8);
                        chip.expire(now);
                        prop_assert!(chip.next_deadline_ns().is_none_or(|deadline| deadline > now));
                    }
                }
            }
        }
    }
}
