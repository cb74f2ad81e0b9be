//! Rate limits as a driver meets them, and the figures that a supervisor reads.

mod process;

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use atoll_kit::driver::disk::{self, Kind};
use atoll_kit::driver::{Driver, Options};
use atoll_protocol::stats::{self, QueueStats};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use process::{DATA, Process, command, image, inherit, run, with_fds};

/// Keeps `depth` reads of 4 KiB in flight for `time` and gives the bytes that were read. Each queue completes in the order
/// of arrival.
fn read_for(driver: &mut Driver, queues: usize, depth: usize, time: Duration) -> Result<u64> {
    let mut flying: Vec<VecDeque<u16>> = vec![VecDeque::new(); queues];
    let mut bytes = 0;
    let end = Instant::now() + time;
    loop {
        let mut idle = true;
        for (index, flying) in flying.iter_mut().enumerate() {
            let (queue, guest) = driver.queue(index)?;
            while flying.len() < depth {
                let head = disk::add(queue, guest, Kind::In, 0, &[(DATA, 4096)]).context("a free descriptor")?;
                flying.push_back(head);
                idle = false;
            }
            queue.publish(guest)?;
            while let Some((head, _)) = queue.take(guest) {
                anyhow::ensure!(Some(head) == flying.pop_front(), "completed out of order");
                anyhow::ensure!(disk::status(queue, guest, head) == 0, "an error");
                bytes += 4096;
                idle = false;
            }
        }
        if Instant::now() >= end {
            return Ok(bytes);
        }
        if idle {
            let (queue, guest) = driver.queue(0)?;
            queue.wait(guest, Duration::from_millis(2))?;
        }
    }
}

/// A limit of 10 MiB/s over two queues: what passes in a second is that, besides the full bucket and the burst at the
/// start.
#[test]
fn the_rate_is_the_limit_and_the_burst_comes_on_top() -> Result<()> {
    const SECOND: u64 = 10 << 20;
    let burst = 2_u64 << 20;
    let limit = format!("{},100,{burst}", SECOND / 10);
    let (_blk, stream) = inherit(&["--null", "1G", "--num-queues", "2", "--rate-bytes", &limit])?;
    let mut driver = Driver::connected(Options { queues: 2, ..Options::default() }, stream)?;
    let start = Instant::now();
    let read = read_for(&mut driver, 2, 32, Duration::from_millis(1500))?;
    let fair = SECOND / 10 + burst + (start.elapsed().as_secs_f64() * SECOND as f64) as u64;
    let ratio = read as f64 / fair as f64;
    assert!((0.95..1.01).contains(&ratio), "{read} bytes where {fair} are fair: {ratio:.3}");
    Ok(())
}

/// A request that waits for tokens for minutes keeps nobody else waiting: the ring stops at once, says where to go on, and
/// another backend without a limit finishes what was left, each once.
#[test]
fn a_limited_ring_stops_without_waiting_for_tokens() -> Result<()> {
    let limited = ["--null", "1G", "--rate-ops", "3,600000"];
    let (mut blk, stream) = inherit(&limited)?;
    let mut driver = Driver::connected(Options::default(), stream)?;
    let mut heads = Vec::new();
    let (queue, guest) = driver.queue(0)?;
    for _ in 0..8 {
        heads.push(disk::add(queue, guest, Kind::In, 0, &[(DATA, 512)]).context("a free descriptor")?);
    }
    queue.publish(guest)?;
    for head in heads.iter().take(3) {
        assert_eq!(queue.take_within(guest, disk::REQUEST_MAX)?.0, *head);
    }
    std::thread::sleep(Duration::from_millis(50));
    assert!(queue.take(guest).is_none(), "the fourth waits for tokens");
    let asked = Instant::now();
    assert_eq!(driver.stop(0)?, 3);
    assert!(asked.elapsed() < Duration::from_secs(5), "stopping took {:?}", asked.elapsed());
    // The same ring once more: the request goes on waiting; then the process dies with it.
    driver.start(0)?;
    std::thread::sleep(Duration::from_millis(50));
    blk.child.kill()?;
    blk.child.wait()?;
    let (_blk, stream) = inherit(&["--null", "1G"])?;
    driver.connect(stream)?;
    let (queue, guest) = driver.queue(0)?;
    for head in heads.iter().skip(3) {
        assert_eq!(queue.take_within(guest, disk::REQUEST_MAX)?.0, *head);
    }
    assert!(queue.take(guest).is_none(), "each once");
    Ok(())
}

fn page(queues: u16) -> Result<OwnedFd> {
    let fd = memfd_create(c"stats", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&fd, stats::page_bytes(queues) as u64)?;
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    let file = std::fs::File::from(fd);
    for (offset, value) in [(0, stats::MAGIC), (8, stats::VERSION), (16, u64::from(queues))] {
        file.write_all_at(&value.to_le_bytes(), offset)?;
    }
    Ok(file.into())
}

fn word(page: &OwnedFd, offset: usize) -> u64 {
    let mut bytes = [0; 8];
    assert_eq!(rustix::io::pread(page, &mut bytes, (stats::queue_at(0) + offset) as u64), Ok(8));
    u64::from_le_bytes(bytes)
}

fn figure(page: &OwnedFd, name: &str) -> u64 {
    let (_, offset) = QueueStats::COUNTERS.iter().find(|(known, _)| *known == name).expect("a figure");
    word(page, *offset)
}

/// The process is killed and another one started in its place: what both did stands in the page, on either engine.
#[test]
fn figures_tell_what_was_done_and_survive_a_crash() -> Result<()> {
    for folder in [tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?, tempfile::tempdir_in("/dev/shm")?] {
        let path = image(folder.path(), 1 << 20)?;
        let page = page(1)?;
        for lives in 1..=2_u64 {
            let (ours, theirs) = UnixStream::pair()?;
            let fds = [("--vhost-fd", theirs.into()), ("--stats-fd", page.try_clone()?)];
            let mut command = command();
            let child = with_fds(command.arg("--path").arg(&path), &fds).spawn()?;
            let mut blk = Process { child, socket: None };
            let mut driver = Driver::connected(Options::default(), ours)?;
            run(&mut driver, Kind::Out, 0, &[(DATA, 8192)])?;
            run(&mut driver, Kind::In, 0, &[(DATA, 4096)])?;
            run(&mut driver, Kind::Flush, 0, &[])?;
            assert_eq!(run(&mut driver, Kind::In, 1 << 30, &[(DATA, 512)])?.0, 1, "behind the end");
            // What is announced has been counted, except the last batch's time.
            driver.stop(0)?;
            blk.child.kill()?;
            blk.child.wait()?;
            let names = ["requests", "errors", "reads", "read_bytes", "writes", "write_bytes", "malformed"];
            let found = names.map(|name| figure(&page, name));
            assert_eq!(found, [4, 1, 1, 4096, 1, 8192, 0].map(|count| count * lives), "{}", path.display());
            assert_eq!(word(&page, stats::CLASS_AT), lives, "flushes");
            let counted: u64 = (0..stats::BUCKETS).map(|bucket| word(&page, stats::LATENCY_AT + 8 * bucket)).sum();
            assert_eq!(counted, 4 * lives, "each request is in the histogram");
            assert!(figure(&page, "calls") >= lives && figure(&page, "latency_sum_ns") > 0);
        }
    }
    Ok(())
}
