//! A driver that writes whatever it likes to an IOMMU's request queue. Nothing may panic or grow without bound; what an
//! endpoint cannot reach any longer is always told; no mapping lies where none may; an answer fits its buffer.
#![no_main]

use atoll_devices::iommu::{
    Access, Change, Iommu, IommuParts, IovaRange, Outcome, ReservedKind, ReservedRegion, wire::PROBE_LEN,
};
use libfuzzer_sys::fuzz_target;

const ENDPOINTS: [u32; 3] = [8, 16, 24];
const MAPPINGS_MAX: usize = 16;
const MSI: IovaRange = IovaRange::new(0xfee0_0000, 0xfeef_ffff).unwrap();

/// Where each endpoint reaches from some addresses.
fn reach(iommu: &Iommu) -> Vec<(u32, u64, Option<u64>)> {
    let addresses = [0, 0xfff, 0x1000, 0x2000, 0xfee0_0000, 0xfef0_0000, 1 << 40, u64::MAX];
    let places = ENDPOINTS.into_iter().flat_map(|endpoint| addresses.map(|address| (endpoint, address)));
    let led = |endpoint, address| iommu.find(endpoint, address, Access::Read).ok()?.translate(address);
    places.map(|(endpoint, address)| (endpoint, address, led(endpoint, address))).collect()
}

fuzz_target!(|data: &[u8]| {
    let parts = IommuParts {
        input: IovaRange::new(0, (1 << 48) - 1).unwrap(),
        gpa_last: (1 << 40) - 1,
        domain_last: 7,
        mappings_max: MAPPINGS_MAX,
        reserved: vec![ReservedRegion { range: MSI, kind: ReservedKind::Msi }],
        bypass: true,
    };
    let mut iommu = Iommu::new(parts.clone());
    ENDPOINTS.iter().for_each(|endpoint| iommu.add_endpoint(*endpoint));
    iommu.activate(Iommu::FEATURES);
    let mut rest = data;
    // A step: what, how long, and its bytes; half of the requests are made likely ones.
    while let [kind, len, more @ ..] = rest {
        let (bytes, next) = more.split_at(more.len().min(usize::from(*len) % 80));
        rest = next;
        let mut bytes = bytes.to_vec();
        let before = reach(&iommu);
        let Outcome { changes, answer } = match kind % 16 {
            14 => Outcome { changes: iommu.set_bypass(*len), answer: Vec::new() },
            15 => {
                let changes = iommu.reset();
                iommu.activate(Iommu::FEATURES);
                Outcome { changes, answer: Vec::new() }
            }
            kind => {
                if kind < 8
                    && let [first, _, _, _, domain, a, b, c, ..] = bytes.as_mut_slice()
                {
                    *first = 1 + *first % 5;
                    (*domain, *a, *b, *c) = (*domain % 32, 0, 0, 0);
                }
                let writable = if kind & 1 == 0 { PROBE_LEN + 4 } else { usize::from(*len) };
                let outcome = iommu.request(&bytes, writable);
                assert!(outcome.answer.len() <= writable);
                outcome
            }
        };
        assert!(answer.len() <= PROBE_LEN + 4 && changes.len() <= 2 * ENDPOINTS.len());
        for ((of, address, was), (_, _, is)) in before.iter().zip(reach(&iommu)) {
            let lost = changes.iter().any(
                |change| matches!(change, Change::Lost { endpoint, range } if endpoint == of && range.contains(*address)),
            );
            assert!(was.is_none() || *was == is || lost, "{of} lost {address:#x} and nobody knows");
        }
    }
    let state = iommu.state();
    assert!(state.domains.len() <= ENDPOINTS.len());
    for domain in &state.domains {
        assert!(domain.mappings.len() <= MAPPINGS_MAX);
        assert!(domain.mappings.iter().all(|mapping| !mapping.iova().overlaps(MSI)));
        assert!(domain.mappings.windows(2).all(|pair| pair[0].iova().last() < pair[1].iova().first()));
    }
    let mut restored = Iommu::new(parts);
    assert!(restored.restore(&state) && restored.state() == state);
});
