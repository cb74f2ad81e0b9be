//! The unmodified crate `cloud-hypervisor-client`, through all of its calls, and Atoll's own client.

use std::os::fd::AsFd;
use std::time::Duration;

use atoll_vmm::api::{Client, ClientError, Method};
use cloud_hypervisor_client::apis::{DefaultApi, Error as CrateError};
use cloud_hypervisor_client::{models, socket_based_api_client};
use serde_json::json;

use super::fake::{House, config};

/// The status with which a call was refused, its body being an array of sentences.
fn refused<T: std::fmt::Debug>(result: Result<T, CrateError>) -> u16 {
    match result {
        Err(CrateError::Api(error)) => {
            let why: Vec<String> = serde_json::from_str(&error.body).expect("an array of sentences");
            assert!(!why.is_empty());
            error.code.as_u16()
        }
        other => panic!("not refused: {other:?}"),
    }
}

/// Every call of the crate, where it succeeds and where it is refused.
#[tokio::test]
async fn the_crate_knows_a_cloud_hypervisor_when_it_sees_one() {
    let house = House::new();
    let client = socket_based_api_client(house.socket());
    let ping = client.vmm_ping_get().await.unwrap();
    assert_eq!(ping.pid, Some(i64::from(std::process::id())));
    nothing_is_there(&client).await;

    let mut wanted = models::VmConfig::new(models::PayloadConfig { kernel: Some("/k".into()), ..Default::default() });
    wanted.cpus = Some(models::CpusConfig { boot_vcpus: 2, max_vcpus: 2, ..Default::default() });
    wanted.memory = Some(models::MemoryConfig { size: 1 << 30, shared: Some(true), ..Default::default() });
    wanted.disks = Some(vec![models::DiskConfig { path: Some("/d.img".into()), ..Default::default() }]);
    wanted.console = Some(models::ConsoleConfig::new(models::ConsoleMode::Pty));
    wanted.serial = Some(models::SerialConfig::new(models::ConsoleMode::Null));
    wanted.rng = Some(models::RngConfig::new("/dev/urandom".into()));
    client.create_vm(wanted.clone()).await.unwrap();
    assert_eq!(refused(client.create_vm(wanted).await), 500);
    let nothing = models::VmConfig::new(models::PayloadConfig::default());
    assert_eq!(refused(client.create_vm(nothing).await), 400);
    client.boot_vm().await.unwrap();
    assert_eq!(refused(client.boot_vm().await), 500);

    let info = client.vm_info_get().await.unwrap();
    assert_eq!(info.state, models::VmState::Running);
    assert_eq!(info.memory_actual_size, Some(1 << 30));
    assert_eq!(info.config.cpus.unwrap().boot_vcpus, 2);
    assert_eq!(info.config.disks.unwrap()[0].path.as_deref(), Some("/d.img"));
    assert_eq!(info.config.console.unwrap().mode, models::ConsoleMode::Pty);
    let counters = client.vm_counters_get().await.unwrap();
    assert_eq!(counters["_disk0"]["read_ops"], 7);

    plug(&client).await;
    client.pause_vm().await.unwrap();
    assert_eq!(refused(client.pause_vm().await), 500);
    client.resume_vm().await.unwrap();
    assert_eq!(refused(client.resume_vm().await), 500);
    client.vmm_nmi_put().await.unwrap();
    client.power_button_vm().await.unwrap();
    client.reboot_vm().await.unwrap();
    let size = |vcpus| models::VmResize { desired_vcpus: Some(vcpus), ..Default::default() };
    client.vm_resize_put(size(2)).await.unwrap();
    assert_eq!(refused(client.vm_resize_put(size(4)).await), 400);

    assert_eq!(refused(client.vm_add_device_put(Default::default()).await), 400);
    assert_eq!(refused(client.vm_add_pmem_put(models::PmemConfig::default()).await), 400);
    assert_eq!(refused(client.vm_add_vdpa_put(models::VdpaConfig::default()).await), 400);
    assert_eq!(refused(client.vm_coredump_put(Default::default()).await), 400);
    assert_eq!(refused(client.vm_receive_migration_put(Default::default()).await), 400);
    assert_eq!(refused(client.vm_send_migration_put(Default::default()).await), 400);
    assert_eq!(refused(client.vm_resize_zone_put(Default::default()).await), 400);
    assert_eq!(refused(client.vm_restore_put(Default::default()).await), 400);
    assert_eq!(refused(client.vm_snapshot_put(Default::default()).await), 400);

    client.shutdown_vm().await.unwrap();
    assert_eq!(refused(client.shutdown_vm().await), 500);
    client.delete_vm().await.unwrap();
    client.shutdown_vmm().await.unwrap();
    drop(client);
    house.close();
}

async fn nothing_is_there(client: &impl DefaultApi) {
    assert_eq!(refused(client.boot_vm().await), 404);
    assert_eq!(refused(client.pause_vm().await), 404);
    assert_eq!(refused(client.resume_vm().await), 404);
    assert_eq!(refused(client.reboot_vm().await), 404);
    assert_eq!(refused(client.power_button_vm().await), 404);
    assert_eq!(refused(client.shutdown_vm().await), 404);
    client.delete_vm().await.unwrap();
    assert_eq!(refused(client.vmm_nmi_put().await), 404);
    assert_eq!(refused(client.vm_info_get().await), 404);
    assert_eq!(refused(client.vm_counters_get().await), 404);
    assert_eq!(refused(client.vm_add_disk_put(disk("a")).await), 404);
}

fn disk(id: &str) -> models::DiskConfig {
    models::DiskConfig { id: Some(id.into()), path: Some("/d.img".into()), ..Default::default() }
}

async fn plug(client: &impl DefaultApi) {
    let place = client.vm_add_disk_put(disk("d")).await.unwrap();
    assert!(place.id == "d" && place.bdf.starts_with("0000:00:"), "{place:?}");
    assert_eq!(refused(client.vm_add_disk_put(disk("d")).await), 409);
    assert_eq!(refused(client.vm_add_disk_put(models::DiskConfig::default()).await), 400);
    let net = models::NetConfig { tap: Some("tap0".into()), mtu: Some(1400), ..Default::default() };
    client.vm_add_net_put(net).await.unwrap();
    let wrong = models::NetConfig { num_queues: Some(3), ..Default::default() };
    assert_eq!(refused(client.vm_add_net_put(wrong).await), 400);
    client.vm_add_fs_put(models::FsConfig::new("t".into(), "/s".into(), 1, 256)).await.unwrap();
    assert_eq!(refused(client.vm_add_fs_put(models::FsConfig::new("t".into(), "/s".into(), -1, 256)).await), 400);
    client.vm_add_vsock_put(models::VsockConfig::new(3, "/v".into())).await.unwrap();
    assert_eq!(refused(client.vm_add_vsock_put(models::VsockConfig::new(2, "/v".into())).await), 400);
    let mut generic = models::GenericVhostUserConfig::new("/g".into(), 4);
    assert_eq!(refused(client.vm_add_generic_vhost_user_put(generic.clone()).await), 400);
    generic.queue_size = Some(vec![64]);
    client.vm_add_generic_vhost_user_put(generic).await.unwrap();
    client.vm_add_user_device_put(models::VmAddUserDevice::new("/s".into())).await.unwrap();
    let bigger = |id: &str| models::VmResizeDisk { id: Some(id.into()), desired_size: Some(1 << 30) };
    client.vm_resize_disk_put(bigger("d")).await.unwrap();
    assert_eq!(refused(client.vm_resize_disk_put(bigger("nobody")).await), 404);
    let gone = |id: &str| models::VmRemoveDevice { id: Some(id.into()) };
    client.vm_remove_device_put(gone("d")).await.unwrap();
    assert_eq!(refused(client.vm_remove_device_put(gone("d")).await), 404);
    assert_eq!(refused(client.vm_remove_device_put(models::VmRemoveDevice::default()).await), 400);
}

/// One connection for many requests, refusals as errors with their sentences, descriptors, events, and the end.
#[test]
fn our_own_client() {
    let house = House::new();
    let mut client = Client::connect(&house.socket()).unwrap().with_patience(Duration::from_secs(10));
    let ping = client.call(Method::Get, "/api/v1/vmm.ping", None).unwrap().unwrap();
    assert_eq!(ping["version"], atoll_vmm::api::SPOKEN_VERSION);
    match client.call(Method::Put, "/api/v1/vm.boot", None) {
        Err(ClientError::Refused { status: 404, errors }) => assert!(errors[0].contains("create one first")),
        other => panic!("{other:?}"),
    }
    assert_eq!(client.call(Method::Put, "/api/v1/vm.create", Some(&config())).unwrap(), None);
    let (_, pipe) = std::io::pipe().unwrap();
    let card = json!({ "id": "card" });
    let answer = client.request_with(Method::Put, "/api/v1/vm.add-net", Some(&card), &[pipe.as_fd()]).unwrap();
    assert_eq!((answer.status, house.fake.book().devices[0].0.as_str()), (204, "card"));
    let metrics = client.request(Method::Get, "/metrics", None).unwrap();
    assert!(String::from_utf8(metrics.body).unwrap().contains("atoll_up 1"));

    let mut events = Client::connect(&house.socket()).unwrap().events().unwrap();
    assert!(events.next(Duration::ZERO).unwrap().is_none());
    house.story.tell("vm", "booted", []);
    house.story.tell("device", "crashed", [("id", "_disk0".to_owned())]);
    let first = events.next(Duration::from_secs(10)).unwrap().unwrap();
    let second = events.next(Duration::from_secs(10)).unwrap().unwrap();
    assert_eq!((first.event.as_str(), second.properties["id"].as_str()), ("booted", "_disk0"));

    let socket = house.socket();
    house.close();
    assert!(matches!(events.next(Duration::from_secs(10)), Err(ClientError::Cut)));
    assert!(matches!(client.call(Method::Get, "/api/v1/vmm.ping", None), Err(ClientError::Cut)));
    assert!(matches!(Client::connect(&socket), Err(ClientError::Connect { .. })));
}

/// A monitor that does not answer costs the client its patience and no more; what is no answer is told as that.
#[test]
fn a_silent_or_babbling_server() {
    use std::io::Write;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let mut silent = Client::connect(&path).unwrap().with_patience(Duration::from_millis(50));
    assert!(matches!(silent.call(Method::Get, "/", None), Err(ClientError::Late(_))));
    assert!(
        matches!(silent.call(Method::Get, "/", None), Err(ClientError::Cut)),
        "a late answer is no answer to the next"
    );
    let _first = listener.accept().unwrap();
    for babble in [
        "SSH-2.0\r\n\r\n",
        "HTTP/1.1 200 \r\nContent-Length: x\r\n\r\n",
        "HTTP/1.1 200 \r\nContent-Length: 99999999999\r\n\r\n",
    ] {
        let mut client = Client::connect(&path).unwrap().with_patience(Duration::from_secs(5));
        let mut server = listener.accept().unwrap().0;
        server.write_all(babble.as_bytes()).unwrap();
        assert!(matches!(client.call(Method::Get, "/", None), Err(ClientError::Garbled(_))), "{babble}");
    }
}
