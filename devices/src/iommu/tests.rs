//! The virtual IOMMU without queues: what the specification's examples and status codes say, the life of a driver, and any
//! sequence of requests beside a map of single bytes that keeps no ranges.

use std::collections::HashMap;

use proptest::collection::vec;
use proptest::prelude::{Strategy, any};
use proptest::sample::select;
use proptest::{prop_assert, prop_assert_eq, prop_oneof, proptest};

use super::wire::{
    ATTACH_BYPASS, CONFIG_BYPASS, F_BYPASS_CONFIG, F_MAP_UNMAP, F_PROBE, MAP_READ, MAP_WRITE, PROBE_LEN, Request,
    TAIL_LEN,
};
use super::{
    Access, Change, Fault, FaultReason, Iommu, IommuParts, IovaMap, IovaRange, MapError, Mapping, Outcome,
    ReservedKind, ReservedRegion, Rights, Status,
};

const MSI: IovaRange = IovaRange::new(0xfee0_0000, 0xfeef_ffff).unwrap();
const NET: u32 = 8;
const DISK: u32 = 16;
const ABSENT: u32 = 24;
const MAPPINGS_MAX: usize = 4;

fn parts() -> IommuParts {
    IommuParts {
        input: IovaRange::new(0, (1 << 48) - 1).unwrap(),
        gpa_last: (1 << 40) - 1,
        domain_last: 9,
        mappings_max: MAPPINGS_MAX,
        reserved: vec![ReservedRegion { range: MSI, kind: ReservedKind::Msi }],
        bypass: true,
    }
}

fn iommu() -> Iommu {
    let mut iommu = Iommu::new(parts());
    iommu.add_endpoint(NET);
    iommu.add_endpoint(DISK);
    iommu.activate(Iommu::FEATURES);
    iommu
}

fn attach(domain: u32, endpoint: u32, flags: u32) -> Request {
    Request::Attach { domain, endpoint, flags, reserved: 0 }
}

fn map(domain: u32, virt_start: u64, virt_end: u64, phys_start: u64) -> Request {
    Request::Map { domain, virt_start, virt_end, phys_start, flags: MAP_READ | MAP_WRITE }
}

fn unmap(domain: u32, virt_start: u64, virt_end: u64) -> Request {
    Request::Unmap { domain, virt_start, virt_end, reserved: 0 }
}

fn ask(iommu: &mut Iommu, request: Request) -> Outcome {
    iommu.request(&request.encode(), TAIL_LEN)
}

#[track_caller]
fn expect(iommu: &mut Iommu, request: Request, status: Status) {
    let outcome = ask(iommu, request);
    assert_eq!(outcome.answer, [status as u8, 0, 0, 0], "{request:x?}");
    assert!(status == Status::Ok || outcome.changes.is_empty(), "{request:x?} failed and changed something");
}

/// The examples of 5.13.6.6.
#[test]
fn unmapping_as_the_specification_shows_it() {
    let range = |first, last| IovaRange::new(first, last).unwrap();
    for (mapped, unmapped, gone) in [
        (&[][..], (0, 4), Some(0)),
        (&[(0, 9)], (0, 9), Some(1)),
        (&[(0, 4), (5, 9)], (0, 9), Some(2)),
        (&[(0, 9)], (0, 4), None),
        (&[(0, 4), (5, 9)], (0, 4), Some(1)),
        (&[(0, 4)], (0, 9), Some(1)),
        (&[(0, 4), (10, 14)], (0, 14), Some(2)),
    ] {
        let mut map = IovaMap::new(8);
        for (first, last) in mapped {
            map.map(Mapping::new(range(*first, *last), 0x100, Rights::ALL).unwrap()).unwrap();
        }
        assert_eq!(map.unmap(range(unmapped.0, unmapped.1)).ok(), gone);
        assert_eq!(map.len(), mapped.len() - gone.unwrap_or(0));
    }
}

/// Ranges that end with the address space, and one that is all of it.
#[test]
fn the_last_address_is_an_address() {
    assert_eq!(IovaRange::of_len(u64::MAX, 1), IovaRange::new(u64::MAX, u64::MAX));
    assert_eq!(IovaRange::of_len(u64::MAX, 2), None);
    assert_eq!(IovaRange::of_len(5, 0), None);
    assert!(Mapping::new(IovaRange::ALL, 1, Rights::ALL).is_none());
    let all = Mapping::new(IovaRange::ALL, 0, Rights { read: true, write: false }).unwrap();
    let mut map = IovaMap::new(2);
    map.map(all).unwrap();
    assert_eq!(map.map(all), Err(MapError::Taken));
    let pieces = map.translate(0, u64::MAX, Access::Read).unwrap();
    assert_eq!((pieces[0].gpa, pieces[0].len, pieces.len()), (0, u64::MAX, 1));
    assert_eq!(map.translate(u64::MAX, 1, Access::Read).unwrap()[0].gpa, u64::MAX);
    assert_eq!(map.translate(u64::MAX, 2, Access::Read).unwrap_err().address, u64::MAX);
    assert_eq!(map.translate(7, 1, Access::Write).unwrap_err().address, 7);
    assert_eq!(map.unmap(IovaRange::ALL), Ok(1));
    assert!(map.is_empty());
}

/// What Linux does at its start: probe, attach, map, use, unmap, detach.
#[test]
fn a_drivers_life() {
    let mut iommu = iommu();
    let probe = iommu.request(&Request::Probe { endpoint: DISK }.encode(), PROBE_LEN + TAIL_LEN);
    assert_eq!(probe.answer.len(), PROBE_LEN + TAIL_LEN);
    assert_eq!(probe.answer[..8], [1, 0, 20, 0, 1, 0, 0, 0], "one region for messages");
    assert_eq!(probe.answer[8..24], [0xfee0_0000_u64.to_le_bytes(), 0xfeef_ffff_u64.to_le_bytes()].concat());
    assert!(probe.answer[24..].iter().all(|byte| *byte == 0), "the end of the list, and success");

    let before = iommu.find(DISK, 0x1234, Access::Write).unwrap();
    assert_eq!((before.translate(0x1234), before.iova().last()), (Some(0x1234), 0xfedf_ffff), "bypass");
    let all = IovaRange::ALL;
    let lost = |range| Change::Lost { endpoint: DISK, range };
    let gained = |range| Change::Gained { endpoint: DISK, range };
    assert_eq!(ask(&mut iommu, attach(1, DISK, 0)).changes, [lost(all)]);
    let page = IovaRange::new(0x1000, 0x1fff).unwrap();
    let fault = Fault { reason: FaultReason::Mapping, endpoint: DISK, address: 0x1000, access: Access::Read };
    assert_eq!(iommu.find(DISK, 0x1000, Access::Read), Err(fault));
    assert_eq!(ask(&mut iommu, map(1, 0x1000, 0x1fff, 0x7000)).changes, [gained(page)]);
    assert_eq!(iommu.find(DISK, 0x1fff, Access::Read).unwrap().translate(0x1fff), Some(0x7fff));
    assert_eq!(iommu.mappings(DISK, page).len(), 1);
    assert_eq!(ask(&mut iommu, unmap(1, 0, 0xffff)).changes, [lost(IovaRange::new(0, 0xffff).unwrap())]);
    assert_eq!(iommu.find(DISK, 0x1fff, Access::Read).unwrap_err().reason, FaultReason::Mapping);
    assert_eq!(ask(&mut iommu, unmap(1, 0, 0xffff)).changes, [], "nothing was there");
    let detach = Request::Detach { domain: 1, endpoint: DISK };
    assert_eq!(ask(&mut iommu, detach).changes, [lost(all), gained(all)]);
    assert!(iommu.state().domains.is_empty(), "nobody is in it");
    expect(&mut iommu, detach, Status::Invalid);
}

/// Two endpoints of one domain, one that moves to another, and one that goes.
#[test]
fn endpoints_share_domains_and_move() {
    let mut iommu = iommu();
    for endpoint in [NET, DISK] {
        expect(&mut iommu, attach(1, endpoint, 0), Status::Ok);
    }
    let mapped = ask(&mut iommu, map(1, 0, 0xfff, 0x3000));
    let range = IovaRange::new(0, 0xfff).unwrap();
    assert_eq!(mapped.changes, [NET, DISK].map(|endpoint| Change::Gained { endpoint, range }));
    expect(&mut iommu, attach(1, NET, ATTACH_BYPASS), Status::Invalid);
    expect(&mut iommu, attach(2, NET, ATTACH_BYPASS), Status::Ok);
    expect(&mut iommu, attach(2, DISK, 0), Status::Invalid);
    assert_eq!(iommu.find(NET, 0x5000, Access::Read).unwrap().translate(0x5000), Some(0x5000));
    assert!(iommu.find(NET, MSI.first(), Access::Write).is_err(), "no memory is there");
    assert_eq!(iommu.find(DISK, 0, Access::Read).unwrap().gpa(), 0x3000);
    expect(&mut iommu, map(2, 0, 0xfff, 0), Status::Invalid);
    expect(&mut iommu, unmap(2, 0, 0xfff), Status::Invalid);
    let state = iommu.state();
    let mut other = Iommu::new(IommuParts { bypass: false, ..parts() });
    assert!(other.restore(&state) && other.state() == state);
    iommu.remove_endpoint(DISK);
    expect(&mut iommu, map(1, 0, 0xfff, 0), Status::NoEntry);
    assert_eq!(iommu.find(DISK, 0, Access::Read).unwrap_err().reason, FaultReason::Domain);
    // A reset of the device ends all of that, and keeps the field.
    assert_eq!(iommu.reset().len(), 2);
    assert_eq!(iommu.config()[CONFIG_BYPASS as usize], 1);
}

/// The field of the configuration decides about those in no domain.
#[test]
fn bypass_can_be_switched_off() {
    let mut iommu = iommu();
    expect(&mut iommu, attach(3, NET, 0), Status::Ok);
    assert_eq!(iommu.set_bypass(2), [], "no such value");
    assert_eq!(iommu.set_bypass(0), [Change::Lost { endpoint: DISK, range: IovaRange::ALL }]);
    assert_eq!(iommu.find(DISK, 0, Access::Read).unwrap_err().reason, FaultReason::Domain);
    assert_eq!(iommu.mappings(DISK, IovaRange::ALL), []);
    assert_eq!(iommu.config()[CONFIG_BYPASS as usize], 0);
    assert_eq!(iommu.set_bypass(1), [Change::Gained { endpoint: DISK, range: IovaRange::ALL }]);
    let around: Vec<_> = iommu.mappings(DISK, IovaRange::ALL).iter().map(|mapping| mapping.iova()).collect();
    let last = (1 << 40) - 1;
    assert_eq!(around, [(0, MSI.first() - 1), (MSI.last() + 1, last)].map(|(a, b)| IovaRange::new(a, b).unwrap()));
}

/// Each request that cannot be granted gets the answer that the specification names, and changes nothing.
#[test]
fn wrong_requests_are_answered_as_specified() {
    let mut iommu = iommu();
    expect(&mut iommu, attach(1, DISK, 0), Status::Ok);
    expect(&mut iommu, map(1, 0x1_0000, 0x1_ffff, 0), Status::Ok);
    let state = iommu.state();
    let flags = |flags| Request::Map { domain: 1, virt_start: 0, virt_end: 0xfff, phys_start: 0, flags };
    for (request, status) in [
        (attach(1, ABSENT, 0), Status::NoEntry),
        (attach(10, DISK, 0), Status::Range),
        (attach(1, NET, 2), Status::Invalid),
        (Request::Attach { domain: 1, endpoint: NET, flags: 0, reserved: 1 }, Status::Invalid),
        (Request::Detach { domain: 1, endpoint: ABSENT }, Status::NoEntry),
        (Request::Detach { domain: 1, endpoint: NET }, Status::Invalid),
        (Request::Detach { domain: 7, endpoint: DISK }, Status::Invalid),
        (map(2, 0, 0xfff, 0), Status::NoEntry),
        (map(1, 0x800, 0xfff, 0), Status::Range),
        (map(1, 0, 0xffe, 0), Status::Range),
        (map(1, 0, 0xfff, 0x10), Status::Range),
        (map(1, 0x2000, 0xfff, 0), Status::Invalid),
        (map(1, 0, u64::MAX, 0), Status::Range),
        (map(1, 0, 0xfff, 1 << 40), Status::Range),
        (map(1, 0, 0x1fff, u64::MAX - 0xfff), Status::Range),
        (map(1, 1 << 48, (1 << 48) + 0xfff, 0), Status::Range),
        (map(1, 0x1_f000, 0x2_0fff, 0), Status::Invalid),
        (map(1, 0xfeee_f000, 0xfeef_0fff, 0), Status::Invalid),
        (flags(4), Status::Invalid),
        (flags(1 << 31), Status::Invalid),
        (unmap(2, 0, 0xfff), Status::NoEntry),
        (unmap(1, 0x1_0000, 0x1_0fff), Status::Range),
        (unmap(1, 0x1_f000, u64::MAX), Status::Range),
        (unmap(1, 5, 4), Status::Invalid),
        (Request::Unmap { domain: 1, virt_start: 0, virt_end: u64::MAX, reserved: 1 }, Status::Invalid),
    ] {
        expect(&mut iommu, request, status);
    }
    // Of a request that is cut off, or of no known type, nothing is answered.
    for request in [attach(1, DISK, 0), map(1, 0, 0xfff, 0), unmap(1, 0, 0xfff), Request::Probe { endpoint: DISK }] {
        let bytes = request.encode();
        assert_eq!(iommu.request(&bytes[..bytes.len() - 1], TAIL_LEN), Outcome::default());
        assert_eq!(iommu.request(&bytes, TAIL_LEN - 1), Outcome::default());
        let unknown = [&[6_u8], &bytes[1..]].concat();
        assert_eq!(iommu.request(&unknown, TAIL_LEN), Outcome::default());
    }
    let probe = Request::Probe { endpoint: DISK }.encode();
    let short = iommu.request(&probe, PROBE_LEN).answer;
    assert_eq!((short.len(), short[PROBE_LEN - TAIL_LEN]), (PROBE_LEN, Status::Invalid as u8));
    let absent = iommu.request(&Request::Probe { endpoint: ABSENT }.encode(), PROBE_LEN + TAIL_LEN).answer;
    assert_eq!(absent[PROBE_LEN], Status::NoEntry as u8);
    assert_eq!(iommu.state(), state);
    for page in 0..MAPPINGS_MAX as u64 - 1 {
        expect(&mut iommu, map(1, page << 12, page << 12 | 0xfff, 0), Status::Ok);
    }
    expect(&mut iommu, map(1, 0x8000, 0x8fff, 0), Status::NoMemory);
}

/// A driver that accepts little gets no more than that.
#[test]
fn what_was_not_negotiated_is_not_there() {
    let mut iommu = iommu();
    iommu.activate(F_PROBE);
    expect(&mut iommu, attach(1, DISK, ATTACH_BYPASS), Status::Invalid);
    expect(&mut iommu, attach(1, DISK, 0), Status::Ok);
    assert_eq!(ask(&mut iommu, map(1, 0, 0xfff, 0)), Outcome::default());
    iommu.activate(F_PROBE | F_MAP_UNMAP | F_BYPASS_CONFIG);
    expect(&mut iommu, map(1, 0, 0xfff, 0), Status::Ok);
}

/// Faults wait for buffers, so many and no more; a short buffer loses none.
#[test]
fn faults_are_told_in_order() {
    let mut iommu = iommu();
    let fault = |address| Fault { reason: FaultReason::Mapping, endpoint: DISK, address, access: Access::Write };
    for address in 0..100 {
        iommu.report(fault(address));
    }
    assert_eq!(iommu.take_fault(23), None);
    let record = iommu.take_fault(24).unwrap();
    assert_eq!(record[..12], [2, 0, 0, 0, 2, 1, 0, 0, DISK as u8, 0, 0, 0]);
    let told = std::iter::from_fn(|| iommu.take_fault(64)).map(|record| record[16]).collect::<Vec<_>>();
    assert_eq!(told, (1..64).collect::<Vec<u8>>());
    assert_eq!(iommu.faults_lost(), 36);
    iommu.reset();
    iommu.report(fault(0));
    assert!(!iommu.has_faults(), "there is no driver");
}

/// A change that nobody confirmed is not reported as done.
#[test]
fn an_unconfirmed_change_fails() {
    let mut outcome = ask(&mut iommu(), attach(1, DISK, 0));
    outcome.fail();
    assert_eq!(outcome.answer, [Status::DeviceError as u8, 0, 0, 0]);
    let mut none = Outcome::default();
    none.fail();
    assert!(none.answer.is_empty());
}

/// The addresses of the model: some at either end of the address space.
const CELLS: [u64; 24] = {
    let mut cells = [0; 24];
    let mut at = 0;
    while at < 12 {
        cells[at] = at as u64;
        cells[at + 12] = u64::MAX - 11 + at as u64;
        at += 1;
    }
    cells
};

#[derive(Clone, Copy, Debug)]
enum Step {
    Map(usize, usize, u64, bool),
    Unmap(usize, usize),
}

fn step() -> impl Strategy<Value = Step> {
    let gpa = prop_oneof![0..64_u64, u64::MAX - 8..=u64::MAX, any::<u64>()];
    prop_oneof![
        (0..24_usize, 0..4_usize, gpa, any::<bool>()).prop_map(|(at, len, gpa, write)| Step::Map(at, len, gpa, write)),
        (0..24_usize, 0..24_usize).prop_map(|(at, len)| Step::Unmap(at, len)),
    ]
}

proptest! {
    /// The map against one entry an address, which knows nothing of ranges.
    #[test]
    fn the_map_is_what_a_naive_one_is(steps in vec(step(), 1..60)) {
        let mut map = IovaMap::new(7);
        let mut naive: HashMap<u64, (u64, bool, u32)> = HashMap::new();
        let mut made = 0;
        for step in steps {
            let (at, len) = match step { Step::Map(at, len, ..) | Step::Unmap(at, len) => (at, len) };
            let (first, last) = (CELLS[at], CELLS[(at + len).min(23)]);
            let range = IovaRange::new(first, last).unwrap();
            let inside: Vec<u64> = CELLS.iter().copied().filter(|cell| range.contains(*cell)).collect();
            let count = naive.values().map(|entry| entry.2).collect::<std::collections::HashSet<_>>().len();
            match step {
                Step::Map(_, _, gpa, write) => {
                    let Some(mapping) = Mapping::new(range, gpa, Rights { read: true, write }) else {
                        prop_assert!(gpa.checked_add(last - first).is_none());
                        continue;
                    };
                    let taken = inside.iter().any(|cell| naive.contains_key(cell));
                    let expected = if taken { Err(MapError::Taken) } else if count >= 7 { Err(MapError::Full) } else { Ok(()) };
                    prop_assert_eq!(map.map(mapping), expected);
                    if expected.is_ok() {
                        made += 1;
                        naive.extend(inside.iter().map(|cell| (*cell, (gpa + (cell - first), write, made))));
                    }
                }
                Step::Unmap(..) => {
                    let hit = |id: u32| naive.iter().any(|(cell, entry)| entry.2 == id && range.contains(*cell));
                    let split = naive.iter().any(|(cell, entry)| !range.contains(*cell) && hit(entry.2));
                    let mut gone: Vec<u32> = inside.iter().filter_map(|cell| naive.get(cell)).map(|entry| entry.2).collect();
                    gone.sort_unstable();
                    gone.dedup();
                    prop_assert_eq!(map.unmap(range).ok(), (!split).then_some(gone.len()));
                    if !split {
                        naive.retain(|cell, _| !range.contains(*cell));
                    }
                }
            }
            for cell in CELLS {
                let found = map.find(cell).map(|mapping| (mapping.translate(cell).unwrap(), mapping.rights.write));
                prop_assert_eq!(found, naive.get(&cell).map(|entry| (entry.0, entry.1)));
            }
            // Byte by byte is what a stretch is translated to.
            for access in [Access::Read, Access::Write] {
                let want = inside.iter().take_while(|cell| naive.get(cell).is_some_and(|entry| access == Access::Read || entry.1));
                let want: Vec<u64> = want.map(|cell| naive[cell].0).collect();
                if last - first < 24 {
                    match map.translate(first, last - first + 1, access) {
                        Ok(pieces) => {
                            let bytes = pieces.iter().flat_map(|piece| (0..piece.len).map(|at| piece.gpa + at));
                            prop_assert_eq!(bytes.collect::<Vec<_>>(), want);
                        }
                        Err(unmapped) => {
                            prop_assert_eq!(Some(&unmapped.address), inside.get(want.len()));
                        }
                    }
                }
            }
        }
    }

    /// Whatever a driver sends: what an endpoint could reach and can reach no longer is always said, no mapping overlaps a
    /// reserved region, and state goes out and in.
    #[test]
    fn every_loss_is_told(
        requests in vec((select(vec![1_u8, 2, 3, 4, 5, 9]), 0..3_u32, select(vec![NET, DISK, ABSENT]), 0..6_u64, 0..3_u64, 0..4_u32), 1..40),
        bypass in any::<bool>(),
    ) {
        let mut iommu = iommu();
        iommu.set_bypass(bypass.into());
        let reach = |iommu: &Iommu| -> HashMap<(u32, u64), u64> {
            let found = |endpoint, page: u64| iommu.find(endpoint, page << 12, Access::Read).ok()?.translate(page << 12);
            let places = [NET, DISK].into_iter().flat_map(|endpoint| (0..10).map(move |page| (endpoint, page)));
            places.filter_map(|(endpoint, page)| Some(((endpoint, page), found(endpoint, page)?))).collect()
        };
        for (kind, domain, endpoint, page, pages, flags) in requests {
            let (first, last) = (page << 12, (page + pages) << 12 | 0xfff);
            let request = match kind {
                1 => attach(domain, endpoint, flags & 1),
                2 => Request::Detach { domain, endpoint },
                3 => Request::Map { domain, virt_start: first, virt_end: last, phys_start: last + 1, flags },
                4 => unmap(domain, first, last),
                5 => Request::Probe { endpoint },
                _ => map(domain, MSI.first() - first, MSI.last(), 0),
            };
            let before = reach(&iommu);
            let outcome = ask(&mut iommu, request);
            let after = reach(&iommu);
            let told = |lost: bool, of: u32, page: u64| outcome.changes.iter().any(|change| match change {
                Change::Lost { endpoint, range } => lost && *endpoint == of && range.contains(page << 12),
                Change::Gained { endpoint, range } => !lost && *endpoint == of && range.contains(page << 12),
            });
            for ((endpoint, page), gpa) in &before {
                prop_assert!(after.get(&(*endpoint, *page)) == Some(gpa) || told(true, *endpoint, *page));
            }
            for ((endpoint, page), gpa) in &after {
                prop_assert!(before.get(&(*endpoint, *page)) == Some(gpa) || told(false, *endpoint, *page));
            }
            let state = iommu.state();
            prop_assert!(state.domains.iter().all(|domain| domain.mappings.iter().all(|mapping| !mapping.iova().overlaps(MSI))));
            let mut restored = Iommu::new(parts());
            prop_assert!(restored.restore(&state));
            prop_assert_eq!(restored.state(), state);
        }
    }

    /// No bytes are too strange.
    #[test]
    fn any_bytes_are_a_request_or_none(bytes in vec(any::<u8>(), 0..80), writable in 0..600_usize) {
        let mut iommu = iommu();
        let outcome = iommu.request(&bytes, writable);
        prop_assert!(outcome.answer.len() <= writable);
        if let Some(request) = Request::decode(&bytes) {
            prop_assert_eq!(Request::decode(&request.encode()), Some(request));
        }
    }
}
