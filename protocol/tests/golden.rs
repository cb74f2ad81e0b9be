//! The wire, pinned: one example of every word as bytes, and the hash of all of them in README.md.
//!
//! A change that is meant raises `PROTOCOL_VERSION`, then `ATOLL_BLESS=1 cargo test -p atoll-protocol` writes golden.txt
//! anew and says the new hash for README.md.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;

use atoll_protocol::access::ExitRecord;
use atoll_protocol::bus::{BusAnswer, BusCall, BusEvent, BusRequest, Refusal, Region};
use atoll_protocol::display::control::{DisplayOrder, DisplayReport, HeadInfo};
use atoll_protocol::frame::{self, HEADER_LEN};
use atoll_protocol::input::InputKind;
use atoll_protocol::jail::{JailLayer, JailOutcome, JailedLayer};
use atoll_protocol::lifecycle::LifecycleEvent;
use atoll_protocol::operator::{DeviceInfo, DeviceState, OperatorReply, OperatorRequest, Route, Signal, VmState};
use atoll_protocol::saved::{Saved, SavedType, save};
use atoll_protocol::sidecar::{
    DeviceClass, GoodbyeReason, LogLevel, QueueProgress, SidecarFeatures, SidecarOrder, SidecarReport,
};
use atoll_protocol::stats::{self, QueueStats};
use atoll_protocol::{
    Access, AccessKind, CauseId, DeviceId, Exit, Generation, Idempotence, Kind, LineIndex, Message, MsiMessage,
    PROTOCOL_VERSION, ProcessId, QueueIndex, RegionIndex, RequestId, Space, VcpuIndex, VmId, Width,
};
use sha2::{Digest, Sha256};

const DEVICE: DeviceId = DeviceId(0x1234);
const GENERATION: Generation = Generation(0x0102_0304_0506_0708);
const CAUSE: CauseId = CauseId(300);
const VM: VmId = VmId(7);
const QUEUE: QueueIndex = QueueIndex(513);
const CLASSES: [DeviceClass; 6] = [
    DeviceClass::Block,
    DeviceClass::Net,
    DeviceClass::Gpu,
    DeviceClass::Uart,
    DeviceClass::Other(99),
    DeviceClass::Display,
];

fn bus_requests() -> Vec<BusRequest> {
    let (region, offset) = (RegionIndex(2), 0x3f8);
    let mut calls =
        vec![BusCall::Attach { device: DEVICE, generation: GENERATION }, BusCall::Reset, BusCall::Ping, BusCall::Lane];
    for width in Width::ALL {
        calls.push(BusCall::Read { region, offset, width });
        calls.push(BusCall::Write { region, offset, width, value: width.all_ones() });
    }
    let request =
        |call| BusRequest { id: RequestId(70_000), cause: CAUSE, generation: GENERATION, budget_us: 250_000, call };
    calls.into_iter().map(request).collect()
}

fn bus_events() -> Vec<BusEvent> {
    let classes = CLASSES;
    let regions = vec![Region { space: Space::Pio, length: 8 }, Region { space: Space::Mmio, length: 4096 }];
    let attached = classes.map(|class| BusAnswer::Attached { class, regions: regions.clone(), lines: 3 });
    let refusals = [Refusal::OutOfRange, Refusal::Width, Refusal::Generation, Refusal::NotAttached, Refusal::NoLane];
    let answers = attached
        .into_iter()
        .chain([BusAnswer::Value(u64::MAX), BusAnswer::Done])
        .chain(refusals.map(BusAnswer::Refused));
    let mut events: Vec<_> = answers
        .map(|answer| BusEvent::Answer { id: RequestId(70_000), cause: CAUSE, generation: GENERATION, answer })
        .collect();
    events.push(BusEvent::Line { generation: GENERATION, cause: CAUSE, line: LineIndex(31), level: true });
    let message = MsiMessage { address: 0xfee0_1000, data: 0x4031 };
    events.push(BusEvent::Msi { generation: GENERATION, cause: CAUSE, message });
    events
}

fn sidecar_reports() -> Vec<SidecarReport> {
    let features =
        SidecarFeatures::PROGRESS | SidecarFeatures::QUIESCE | SidecarFeatures::INFLIGHT | SidecarFeatures::MEASURE;
    let text = "three words, naïve".to_owned();
    let queues = vec![
        QueueProgress { queue: QueueIndex(0), completed: 0, in_flight: 0 },
        QueueProgress { queue: QUEUE, completed: 1 << 40, in_flight: 128 },
    ];
    let reasons = [
        GoodbyeReason::Asked,
        GoodbyeReason::Config(text.clone()),
        GoodbyeReason::Resource(text.clone()),
        GoodbyeReason::Peer(text.clone()),
    ];
    let levels = [LogLevel::Error, LogLevel::Warn, LogLevel::Info, LogLevel::Debug, LogLevel::Trace];
    let outcomes = [JailOutcome::Applied, JailOutcome::KernelLacks, JailOutcome::NotPermitted, JailOutcome::Off];
    let hello = SidecarReport::Hello {
        version: PROTOCOL_VERSION,
        class: DeviceClass::Block,
        pid: ProcessId(4_000_000),
        features,
    };
    [hello, SidecarReport::Ready { generation: GENERATION }, SidecarReport::Progress { queues }]
        .into_iter()
        .chain(levels.map(|level| SidecarReport::Log { level, text: text.clone() }))
        .chain([SidecarReport::Pong { nonce: u64::MAX }, SidecarReport::Quiesced])
        .chain(reasons.map(|reason| SidecarReport::Goodbye { reason }))
        .chain([SidecarReport::Measured { bytes: 5 << 30 }])
        .chain(outcomes.map(|outcome| {
            let layers = JailLayer::ALL.into_iter().map(|layer| JailedLayer { layer, outcome }).collect();
            SidecarReport::Jailed { layers }
        }))
        .collect()
}

fn sidecar_orders() -> Vec<SidecarOrder> {
    vec![
        SidecarOrder::Start { generation: GENERATION, progress_ms: 1000 },
        SidecarOrder::Ping { nonce: u64::MAX },
        SidecarOrder::Quiesce,
        SidecarOrder::Exit,
        SidecarOrder::Measure,
        SidecarOrder::StartBeside { generation: GENERATION, progress_ms: 1000 },
    ]
}

fn operator_requests() -> Vec<OperatorRequest> {
    let route = |signal, route| OperatorRequest::SetRoute { device: DEVICE, queue: QUEUE, signal, route };
    vec![
        OperatorRequest::Info,
        OperatorRequest::Devices,
        OperatorRequest::Pause,
        OperatorRequest::Resume,
        OperatorRequest::Reset,
        OperatorRequest::PowerButton,
        OperatorRequest::PowerOff,
        route(Signal::Doorbell, Route::Direct),
        route(Signal::Call, Route::Interposed),
        OperatorRequest::RestartDevice { device: DEVICE, generation: GENERATION },
    ]
}

fn operator_replies() -> Vec<OperatorReply> {
    let states = [DeviceState::Starting, DeviceState::Running, DeviceState::Recovering, DeviceState::Quarantined];
    let devices = states
        .into_iter()
        .map(|state| DeviceInfo { device: DEVICE, name: "disk0".into(), generation: GENERATION, state })
        .collect();
    [VmState::Created, VmState::Running, VmState::Paused, VmState::Ended]
        .into_iter()
        .map(|state| OperatorReply::Info { vm: VM, state })
        .chain([
            OperatorReply::Done,
            OperatorReply::Devices { devices },
            OperatorReply::Failed { reason: "no such device: list them with devices".into() },
            OperatorReply::PeerDied { device: DEVICE, successor: GENERATION },
        ])
        .collect()
}

fn lifecycle_events() -> Vec<LifecycleEvent> {
    let (device, generation) = (DEVICE, GENERATION);
    vec![
        LifecycleEvent::Started { vm: VM },
        LifecycleEvent::Paused { vm: VM },
        LifecycleEvent::Resumed { vm: VM },
        LifecycleEvent::Reset { vm: VM },
        LifecycleEvent::PoweredOff { vm: VM },
        LifecycleEvent::DeviceReady { device, generation },
        LifecycleEvent::DeviceStalled { device, generation, cause: CAUSE },
        LifecycleEvent::QueueStalled { device, generation, queue: QUEUE },
        LifecycleEvent::DeviceDied { device, generation },
        LifecycleEvent::DeviceRecovering { device, generation },
        LifecycleEvent::DeviceQuarantined { device },
    ]
}

fn exit_records() -> Vec<ExitRecord> {
    let access = |space, kind| Exit::Access(Access { space, address: 0xd000_0000, width: Width::Dword, kind });
    [
        access(Space::Pio, AccessKind::Read),
        access(Space::Mmio, AccessKind::Write(0xdead_beef)),
        Exit::Halt,
        Exit::Shutdown,
        Exit::StopRequested,
        Exit::Failed { code: 1 },
    ]
    .into_iter()
    .map(|exit| ExitRecord { vcpu: VcpuIndex(300), cause: CAUSE, exit })
    .collect()
}

fn display_orders() -> Vec<DisplayOrder> {
    let inputs = InputKind::ALL.map(|kind| DisplayOrder::NewInput { kind });
    let others = [
        DisplayOrder::Screenshot { head: 1 },
        DisplayOrder::Record { head: 1 },
        DisplayOrder::StopRecord { head: 1 },
        DisplayOrder::NewDisplay,
        DisplayOrder::Resize { head: 1, width: 1920, height: 1080 },
        DisplayOrder::Info,
    ];
    others.into_iter().chain(inputs).collect()
}

fn display_reports() -> Vec<DisplayReport> {
    let head = HeadInfo {
        head: 1,
        width: 1280,
        height: 800,
        wanted_width: 1920,
        wanted_height: 1080,
        viewers: 2,
        recorded: true,
    };
    vec![
        DisplayReport::Screenshot { head: 1, width: 1280, height: 800 },
        DisplayReport::Recorded { head: 1, frames: 300 },
        DisplayReport::Done,
        DisplayReport::Info { heads: vec![head], connected: true },
        DisplayReport::Refused { reason: "head 3 shows nothing: wait for its guest".into() },
    ]
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Every example as a line, after checking that it survives the wire and that no word is without an example.
fn describe<M: Message + PartialEq + std::fmt::Debug>(text: &mut String, examples: &[M]) {
    let kind = M::KIND;
    let (number, ceiling, descriptors) = (kind.to_wire(), kind.ceiling(), kind.descriptors_max());
    writeln!(text, "\nkind {number} {kind:?}: body <= {ceiling} bytes, descriptors <= {descriptors}").unwrap();
    for (name, idempotence) in M::VARIANTS {
        let idempotence = match idempotence {
            Idempotence::Idempotent => "may be repeated",
            Idempotence::Once => "once",
        };
        writeln!(text, "word {name}: {idempotence}").unwrap();
    }
    let mut seen = BTreeSet::new();
    for example in examples {
        let bytes = frame::encode(example, 0).expect("an example fits");
        let (decoded, rest) = frame::decode::<M>(&bytes).expect("decodes").expect("is whole");
        assert_eq!((&decoded, rest.len()), (example, 0));
        assert_eq!(bytes.len() - HEADER_LEN, usize::from(bytes[8]) + (usize::from(bytes[9]) << 8));
        seen.insert(example.variant());
        writeln!(text, "{} {}", example.name(), hex(&bytes)).unwrap();
    }
    let all: BTreeSet<usize> = (0..M::VARIANTS.len()).collect();
    assert_eq!(seen, all, "{kind:?}: a word has no example");
}

/// Where each figure lies, which both sides of the page must agree on.
fn describe_page(text: &mut String) {
    let version = stats::VERSION;
    let magic = String::from_utf8(stats::MAGIC.to_le_bytes().to_vec()).expect("letters");
    let (header, queue) = (stats::HEADER_BYTES, stats::QUEUE_BYTES);
    writeln!(text, "\npage of figures: version {version}, magic {magic}, header {header} bytes, queue {queue} bytes")
        .unwrap();
    for (name, offset) in QueueStats::COUNTERS {
        writeln!(text, "{offset} {name}").unwrap();
    }
    writeln!(text, "{} class counters, {} of them", stats::CLASS_AT, stats::CLASS_COUNTERS).unwrap();
    for class in CLASSES {
        writeln!(text, "{}", format!("class {class}: {}", stats::class_counters(class).join(" ")).trim_end()).unwrap();
    }
    let ends: Vec<String> = (0..stats::BUCKETS).filter_map(stats::bucket_end).map(|end| end.to_string()).collect();
    writeln!(text, "{} latencies, {} of them, below {} ns", stats::LATENCY_AT, stats::BUCKETS, ends.join(" ")).unwrap();
}

#[derive(serde::Serialize, serde::Deserialize, PartialEq, Debug)]
struct SavedExample {
    count: u64,
    name: String,
}

impl Saved for SavedExample {
    const TYPE: SavedType = SavedType(0xa1b2_c3d4);
    const VERSION: u16 = 3;
}

fn description() -> String {
    let mut text = String::from("Atoll wire protocol: one example of every word. See README.md.\n");
    writeln!(text, "version {PROTOCOL_VERSION}, header {HEADER_LEN} bytes, magic {}", hex(&frame::MAGIC)).unwrap();
    describe(&mut text, &bus_requests());
    describe(&mut text, &bus_events());
    describe(&mut text, &sidecar_reports());
    describe(&mut text, &sidecar_orders());
    describe(&mut text, &operator_requests());
    describe(&mut text, &operator_replies());
    describe(&mut text, &lifecycle_events());
    describe(&mut text, &exit_records());
    describe(&mut text, &display_orders());
    describe(&mut text, &display_reports());
    let saved = save(&SavedExample { count: 300, name: "x".into() }, Vec::new()).expect("small");
    writeln!(text, "\nsaved state\nenvelope {}", hex(&saved)).unwrap();
    describe_page(&mut text);
    text
}

#[test]
fn wire_is_pinned() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let description = description();
    let hash = hex(&Sha256::digest(description.as_bytes()));
    if std::env::var_os("ATOLL_BLESS").is_some() {
        std::fs::write(here.join("golden.txt"), &description).expect("written");
    }
    let golden = std::fs::read_to_string(here.join("golden.txt")).expect("golden.txt is there");
    for (ours, pinned) in description.lines().zip(golden.lines()) {
        assert_eq!(ours, pinned, "the wire has changed: see the head of this file");
    }
    assert_eq!(description, golden, "words were added or taken away: see the head of this file");
    let readme = std::fs::read_to_string(here.join("README.md")).expect("README.md is there");
    assert!(readme.contains(&format!("sha256:{hash}")), "README.md must pin the protocol as sha256:{hash}");
}

/// Whether a word may be repeated, by rule rather than by list: what a guest does is done once, and so is anything that
/// is an edge, a line of text, or a press of a button. Everything else can be asked of a new incarnation again.
#[test]
fn idempotence_follows_a_rule() {
    fn once<M: Message>() -> Vec<&'static str> {
        let marked = M::VARIANTS.iter().filter(|(_, idempotence)| *idempotence == Idempotence::Once);
        marked.map(|(name, _)| *name).collect()
    }
    assert_eq!(once::<BusRequest>(), ["BusCall::Read", "BusCall::Write"]);
    assert_eq!(once::<BusEvent>(), ["BusEvent::Answer", "BusEvent::Msi"]);
    assert_eq!(once::<SidecarReport>(), ["SidecarReport::Log"]);
    assert!(once::<SidecarOrder>().is_empty());
    assert_eq!(once::<OperatorRequest>(), ["OperatorRequest::Reset", "OperatorRequest::PowerButton"]);
    assert!(once::<OperatorReply>().is_empty());
    let events = ["LifecycleEvent::Reset", "LifecycleEvent::DeviceStalled", "LifecycleEvent::QueueStalled"];
    assert_eq!(once::<LifecycleEvent>(), events);
    assert_eq!(once::<DisplayOrder>(), ["DisplayOrder::Record"]);
    assert!(once::<DisplayReport>().is_empty());
    for request in bus_requests() {
        let accesses = matches!(request.call, BusCall::Read { .. } | BusCall::Write { .. });
        assert_eq!(request.idempotence() == Idempotence::Once, accesses, "{}", request.name());
    }
    assert_eq!(Kind::ALL.map(Kind::to_wire), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], "numbers are never reused");
}
