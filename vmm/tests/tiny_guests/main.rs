//! Tiny guests, written with an assembler, on both CPUs: the whole seam is exercised with code that any KVM can run, also
//! one that interprets. Where `/dev/kvm` is missing its half fails, unless ATOLL_ALLOW_SKIP=1 says that this is known.

mod guests;
mod interrupts;
mod lab;
mod lifetimes;
