//! What guests are offered on top of backends that have little, much, or what cannot be.

use atoll_devices::virtio::input_config::Pages;
use std::path::Path;
use std::sync::Arc;

use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;

use crate::actor::RealClock;
use crate::backend::Household;
use crate::config::{
    ConsoleConfig, ConsoleMode, DeviceConfig, DiskConfig, FsConfig, GenericVhostUserConfig, NetConfig, OnFailure,
    RngConfig, VsockConfig,
};
use crate::lifecycle::Story;
use crate::vhost::kinds::{Console, ConsoleLine, Disk, Fs, Generic, Kind, Net, Vsock};
use crate::vhost::{Capabilities, DeviceFactory, FactoryParts};

const V1: u64 = 1 << 32;

fn backend(features: u64, queues: Option<u16>, config: Vec<u8>) -> Capabilities {
    Capabilities { features: features | V1, protocol: Protocol::empty(), queues, config, pages: Pages::default() }
}

fn net(change: impl FnOnce(&mut NetConfig)) -> Net {
    let mac = Some("52:54:00:00:00:01".into());
    let mut words = NetConfig { mac, vhost_user: true, vhost_socket: Some("/s".into()), ..NetConfig::default() };
    change(&mut words);
    Net::new(&words, "vm", "_net0", Path::new("/run")).unwrap()
}

fn ours(words: &mut NetConfig) {
    (words.vhost_user, words.vhost_socket, words.tap) = (false, None, Some("tap0".into()));
}

/// A network backend that cannot tell its configuration gets one from here; a control queue is believed of our own only;
/// more queues than both have are not shown.
#[test]
fn network_cards() {
    const CTRL: u64 = 1 << 17;
    const MQ: u64 = 1 << 22;
    let mac = [0x52, 0x54, 0, 0, 0, 1];
    let bare = net(|_| {}).class().offer(&backend(CTRL | MQ | 1 << 16 | 1, None, vec![])).unwrap();
    assert_eq!(bare.features, V1 | 1 | 1 << 5, "checksums, and the address");
    assert_eq!(bare.queue_sizes, [256, 256]);
    assert_eq!(bare.config[..6], mac);
    let told = [[7; 6].as_slice(), &[1, 0], &[4, 0], &[0, 0]].concat();
    let sized = net(|words| (words.mtu, words.queue_size) = (Some(1400), Some(64)));
    let offer = sized.class().offer(&backend(1 << 16, Some(8), told.clone())).unwrap();
    assert_eq!((offer.features, offer.queue_sizes), (V1 | 1 << 16 | 1 << 5 | 1 << 3, vec![64, 64]));
    assert_eq!(offer.config, [mac.as_slice(), &[1, 0], &[1, 0], &1400_u16.to_le_bytes()].concat());
    // Ours, with two pairs where four are there, and four where two are.
    for (asked, has, pairs) in [(4, 4_u16, 2), (8, 2, 2), (2, 4, 1)] {
        let card = net(|words| {
            ours(words);
            words.num_queues = Some(asked);
        });
        let config = [[7; 6].as_slice(), &[1, 0], &has.to_le_bytes(), &[0, 0]].concat();
        let offer = card.class().offer(&backend(CTRL | MQ, Some(2 * has + 1), config)).unwrap();
        assert_eq!(offer.queue_sizes.len(), 2 * pairs + 1);
        assert_eq!(offer.features & MQ != 0, pairs > 1);
        assert_eq!(offer.config[8..10], (pairs as u16).to_le_bytes());
    }
    // A switch's port learns its address from here; a process of ours was told, and others do not want to know.
    let port = net(|words| (words.vhost_user, words.vhost_socket, words.switch) = (false, None, Some("lan".into())));
    assert_eq!(port.shown(), "--net switch=/run/switches/lan.sock");
    assert_eq!(port.class().imprint(&backend(0, None, told.clone())), Some((0, mac.into())));
    assert_eq!(net(ours).class().imprint(&backend(0, None, told.clone())), None);
    assert_eq!(net(|_| {}).class().imprint(&backend(0, None, told)), None);
}

/// Shared folders, sockets, disks, consoles and others: the specification's configuration and queues, or an error that
/// says what the backend has.
#[test]
fn other_devices() {
    let fs = Fs(FsConfig { tag: "work".into(), num_queues: Some(2), ..FsConfig::default() }).class();
    let offer = fs.offer(&backend(1, Some(3), vec![])).unwrap();
    assert_eq!((offer.features, offer.queue_sizes), (V1, vec![1024; 3]));
    assert_eq!(offer.config, [b"work".as_slice(), &[0; 32], &[2, 0, 0, 0]].concat());
    assert_eq!(
        fs.offer(&backend(0, Some(2), vec![])).unwrap_err().to_string(),
        "the backend lacks 3 queues (it has 2); use one that has it"
    );
    assert!(fs.offer(&backend(0, None, vec![])).is_err());

    let vsock = Vsock(VsockConfig { cid: 5, ..VsockConfig::default() }).class();
    for told in [vec![], 5_u64.to_le_bytes().to_vec()] {
        let offer = vsock.offer(&backend(0, None, told)).unwrap();
        assert_eq!((offer.queue_sizes.len(), offer.config), (3, 5_u64.to_le_bytes().to_vec()));
    }
    assert_eq!((vsock.served(&backend(0, Some(2), vec![])), vsock.served(&backend(0, Some(9), vec![]))), (2, 3));
    let other = vsock.offer(&backend(0, None, 7_u64.to_le_bytes().to_vec())).unwrap_err().to_string();
    assert!(other.contains("cid 7, and cid=5"), "{other}");

    let disk = Disk(DiskConfig { num_queues: Some(4), queue_size: Some(128), ..DiskConfig::default() }).class();
    let mut config = vec![0; 60];
    config[34] = 3;
    let offer = disk.offer(&backend(1 << 12, Some(9), config.clone())).unwrap();
    assert_eq!((offer.queue_sizes, offer.config[34]), (vec![128; 3], 3));
    assert_eq!(disk.offer(&backend(1 << 12, None, config.clone())).unwrap().queue_sizes.len(), 1, "no MQ, one queue");
    assert_eq!(disk.offer(&backend(0, Some(9), config)).unwrap().queue_sizes.len(), 1);
    assert!(disk.offer(&backend(1 << 12, Some(9), vec![0; 60])).is_err(), "no queue at all");

    let console = Console { config: ConsoleConfig::default(), line: ConsoleLine::default() }.class();
    let mut config = vec![0; 12];
    config[4] = 2;
    assert_eq!(console.offer(&backend(2, Some(6), config.clone())).unwrap().queue_sizes.len(), 6);
    assert_eq!(console.offer(&backend(0, Some(6), config.clone())).unwrap().queue_sizes.len(), 2);
    assert!(console.offer(&backend(2, Some(4), config.clone())).is_err());
    config[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
    let error = console.offer(&backend(2, Some(16), config)).unwrap_err().to_string();
    assert!(error.contains("lacks 64 queues (it has 16)"), "{error}");

    let words =
        GenericVhostUserConfig { device_type: 4, queue_sizes: vec![64, 8], ..GenericVhostUserConfig::default() };
    let generic = Generic { config: words, device_type: 4 }.class();
    assert_eq!(generic.offer(&backend(7, None, vec![1])).unwrap().queue_sizes, [64, 8]);
    assert!(generic.offer(&backend(7, Some(1), vec![])).unwrap_err().to_string().contains("2 queues (it has 1)"));
}

/// What no backend could mend is refused before anything is opened, in one line that names the device.
#[test]
fn impossible_devices_are_refused() {
    let household = Arc::new(Household::new(Arc::new(RealClock::new())).unwrap());
    let factory = DeviceFactory::new(FactoryParts {
        household: Arc::clone(&household),
        backend_dir: None,
        runtime_dir: "/run".into(),
        vm: "vm".into(),
        story: Story::default(),
    });
    let net = |change: fn(&mut NetConfig)| {
        let mut words = NetConfig { id: Some("lan".into()), ..NetConfig::default() };
        change(&mut words);
        DeviceConfig::Net(words)
    };
    let generic = |device_type, queue_sizes: &[u16]| {
        let queue_sizes = queue_sizes.to_vec();
        let socket = "/s".into();
        DeviceConfig::Generic(GenericVhostUserConfig {
            device_type,
            queue_sizes,
            socket,
            ..GenericVhostUserConfig::default()
        })
    };
    let console = |mode| DeviceConfig::Console(ConsoleConfig { mode, ..ConsoleConfig::default() });
    let wrong = [
        (net(|words| words.mac = Some("01:00:00:00:00:01".into())), "mac=01:00:00:00:00:01"),
        (net(|words| words.num_queues = Some(18)), "num_queues=18"),
        (net(|words| words.fds = Some(vec![3])), "0 TAP descriptors came for 1 queue pairs"),
        (generic(64, &[8]), "device_type=64"),
        (generic(0, &[8]), "device_type=0"),
        (generic(4, &[3]), "a queue's size is a power of two"),
        (console(ConsoleMode::Socket), "needs socket=PATH"),
    ];
    for (config, expected) in wrong {
        let Err(error) = factory.builder(&config) else { panic!("{config:?} was accepted") };
        let text = error.to_string();
        assert!(text.contains(expected) && !text.contains('\n') && !error.is_unsupported(), "{config:?}: {text}");
    }
    let config = console(ConsoleMode::Tty);
    let Err(error) = factory.builder(&config) else { panic!("{config:?} was accepted") };
    assert!(error.is_unsupported() && error.to_string().contains("--serial"), "{error}");
    let rng = DeviceConfig::Rng(RngConfig {
        src: "/dev/urandom".into(),
        id: None,
        stall_timeout: None,
        start_attempts: None,
        on_failure: OnFailure::Error,
        iommu: false,
        isolation: Default::default(),
    });
    assert_eq!(factory.builder(&rng).unwrap().name(), "_rng0");
    assert_eq!(factory.builder(&rng).unwrap().name(), "_rng1");
    household.shutdown(std::time::Duration::from_secs(1));
}
