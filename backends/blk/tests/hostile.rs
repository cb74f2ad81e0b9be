//! A guest, or a front end, that means harm: it hurts nobody but itself.

mod process;

use std::time::Duration;

use anyhow::Result;
use atoll_kit::driver::disk::Kind;
use atoll_kit::driver::queue::{INDIRECT, NEXT, Queue, WRITE};
use atoll_kit::driver::{Driver, Guest, Options};
use process::{DATA, image, listen, pattern, run};
use vhost::{VhostBackend, VringConfigData};

const SECOND: Duration = Duration::from_secs(10);

/// Writes a good header at `DATA`.
fn header(guest: &Guest, kind: Kind) {
    guest.store(DATA, kind as u32);
    guest.store(DATA + 8, 0_u64);
}

#[test]
fn chains_that_make_no_sense_are_given_back_and_harm_nothing() -> Result<()> {
    type Case = (&'static str, fn(&Queue, &Guest));
    // Each writes descriptors from 0 on; the head is 0. None may touch the disk.
    let cases: &[Case] = &[
        ("a loop", |q, g| {
            q.describe(g, 0, DATA, 16, NEXT, 1);
            q.describe(g, 1, DATA + 512, 512, NEXT | WRITE, 1);
        }),
        ("no status byte", |q, g| q.describe(g, 0, DATA, 16, 0, 0)),
        ("nothing readable", |q, g| q.describe(g, 0, DATA + 512, 1, WRITE, 0)),
        ("half a header", |q, g| {
            q.describe(g, 0, DATA, 8, NEXT, 1);
            q.describe(g, 1, DATA + 4096, 1, WRITE, 0);
        }),
        ("header outside memory", |q, g| {
            q.describe(g, 0, 1 << 45, 16, NEXT, 1);
            q.describe(g, 1, DATA + 4096, 1, WRITE, 0);
        }),
        ("status outside memory", |q, g| {
            q.describe(g, 0, DATA, 16, NEXT, 1);
            q.describe(g, 1, u64::MAX, 1, WRITE, 0);
        }),
        ("status of no bytes", |q, g| {
            q.describe(g, 0, DATA, 16, NEXT, 1);
            q.describe(g, 1, DATA + 4096, 0, WRITE, 0);
        }),
        ("readable behind writable", |q, g| {
            q.describe(g, 0, DATA, 16, NEXT, 1);
            q.describe(g, 1, DATA + 4096, 1, NEXT | WRITE, 2);
            q.describe(g, 2, DATA + 512, 512, 0, 0);
        }),
        ("next outside the table", |q, g| q.describe(g, 0, DATA, 16, NEXT, 60000)),
        ("an indirect table in itself", |q, g| {
            q.describe(g, 0, q.desc, 16 * 8, INDIRECT, 0);
        }),
        ("an indirect table of 4 GiB", |q, g| q.describe(g, 0, DATA, u32::MAX - 15, INDIRECT, 0)),
        ("a chain of 4 GiB descriptors", |q, g| {
            q.describe(g, 0, DATA, 16, NEXT, 1);
            for n in 1..5 {
                q.describe(g, n, DATA, u32::MAX, NEXT | WRITE, n + 1);
            }
            q.describe(g, 5, DATA + 4096, 1, WRITE, 0);
        }),
        ("the ring as buffer of a read", |q, g| {
            q.describe(g, 0, DATA, 16, NEXT, 1);
            q.describe(g, 1, q.desc + 16 * 64, 512, NEXT | WRITE, 2);
            q.describe(g, 2, DATA + 4096, 1, WRITE, 0);
        }),
    ];
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let path = image(folder.path(), 1 << 20)?;
    let before = pattern(9, 1 << 20);
    std::fs::write(&path, &before)?;
    let mut blk = listen(folder.path(), &["--path", path.to_str().unwrap()])?;
    for (name, write) in cases {
        let mut driver = blk.driver(Options::default())?;
        let (queue, guest) = driver.queue(0)?;
        header(guest, Kind::In);
        write(queue, guest);
        queue.add_head(guest, 0);
        queue.publish(guest)?;
        let taken = queue.take_within(guest, SECOND);
        assert_eq!(taken.map(|(head, _)| head).map_err(|e| format!("{name}: {e}")), Ok(0));
        // The same ring goes on.
        assert_eq!(run(&mut driver, Kind::In, 0, &[(DATA + 8192, 512)])?.0, 0, "after {name}");
    }
    assert!(std::fs::read(&path)? == before);
    Ok(())
}

#[test]
fn a_ring_that_contradicts_itself_is_left_alone_until_it_is_set_up_again() -> Result<()> {
    type Case = (&'static str, fn(&mut Queue, &Guest));
    let cases: &[Case] = &[
        ("avail index far ahead", |q, g| g.store(q.avail + 2, 30_000_u16)),
        ("a head outside the ring", |q, g| {
            q.add_head(g, 999);
            q.publish(g).unwrap();
        }),
    ];
    let folder = tempfile::tempdir()?;
    let path = image(folder.path(), 1 << 20)?;
    let mut blk = listen(folder.path(), &["--path", path.to_str().unwrap()])?;
    for (name, damage) in cases {
        let mut driver = blk.driver(Options::default())?;
        assert_eq!(run(&mut driver, Kind::In, 0, &[(DATA, 512)])?.0, 0);
        let (queue, guest) = driver.queue(0)?;
        damage(queue, guest);
        queue.kick.write(1)?;
        std::thread::sleep(Duration::from_millis(50));
        assert!(queue.take(guest).is_none(), "{name}");
        // The front end can still stop it.
        driver.stop(0)?;
        drop(driver);
        let mut driver = blk.driver(Options::default())?;
        assert_eq!(run(&mut driver, Kind::In, 0, &[(DATA, 512)])?.0, 0, "after {name}");
    }
    Ok(())
}

#[test]
fn a_head_that_is_available_twice_is_served_once_at_a_time() -> Result<()> {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let path = image(folder.path(), 1 << 20)?;
    let mut blk = listen(folder.path(), &["--path", path.to_str().unwrap(), "--direct"])?;
    let mut driver = blk.driver(Options::default())?;
    let (queue, guest) = driver.queue(0)?;
    header(guest, Kind::In);
    queue.describe(guest, 0, DATA, 16, NEXT, 1);
    queue.describe(guest, 1, DATA + 4096, 4096, NEXT | WRITE, 2);
    queue.describe(guest, 2, DATA + 512, 1, WRITE, 0);
    for _ in 0..16 {
        queue.add_head(guest, 0);
    }
    queue.publish(guest)?;
    // At least the first completes; the ring stops at a duplicate in flight.
    assert_eq!(queue.take_within(guest, SECOND)?.0, 0);
    driver.stop(0)?;
    drop(driver);
    let mut driver = blk.driver(Options::default())?;
    assert_eq!(run(&mut driver, Kind::In, 0, &[(DATA, 512)])?.0, 0);
    Ok(())
}

/// Addresses, sizes and orders that a front end must not send: refused, and the process serves the next one.
#[test]
fn a_front_end_that_talks_nonsense_is_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = image(folder.path(), 1 << 20)?;
    let mut blk = listen(folder.path(), &["--path", path.to_str().unwrap()])?;
    let ring = |desc: u64, used: u64, avail: u64| VringConfigData {
        queue_max_size: 128,
        queue_size: 128,
        flags: 0,
        desc_table_addr: desc,
        used_ring_addr: used,
        avail_ring_addr: avail,
        log_addr: None,
    };
    type Case<'a> = (&'a str, &'a dyn Fn(&mut Driver) -> Result<()>);
    let user = atoll_kit::driver::USER_OFFSET;
    let end = user + (16 << 20);
    let cases: &[Case<'_>] = &[
        ("a queue of no power of two", &|d| Ok(d.front()?.set_vring_num(0, 100)?)),
        ("a queue of 32768", &|d| Ok(d.front()?.set_vring_num(0, 32768)?)),
        ("a ring outside memory", &|d| restart(d, &ring(0x1000, 0x2000, 0x3000))),
        ("a ring across the end of memory", &|d| restart(d, &ring(end - 64, user + 0x2000, user + 0x3000))),
        ("a misaligned ring", &|d| restart(d, &ring(user + 8, user + 0x2000, user + 0x3000))),
        ("a log outside its file", &|d| {
            let log = Guest::new(4096)?;
            let region = vhost::VhostUserDirtyLogRegion {
                mmap_size: 1 << 30,
                mmap_offset: 0,
                mmap_handle: std::os::fd::AsRawFd::as_raw_fd(log.file()),
            };
            Ok(d.front()?.set_log_base(0, Some(region))?)
        }),
        ("memory behind the end of its file", &|d| {
            let mut region = d.region();
            region.memory_size = 1 << 40;
            d.front()?.set_mem_table(&[region])?;
            Ok(())
        }),
        ("memory that wraps around", &|d| {
            let mut region = d.region();
            region.guest_phys_addr = u64::MAX - 4095;
            d.front()?.set_mem_table(&[region])?;
            Ok(())
        }),
        ("overlapping memory", &|d| {
            let mut second = d.region();
            second.guest_phys_addr = 1 << 20;
            let first = d.region();
            d.front()?.set_mem_table(&[first, second])?;
            Ok(())
        }),
    ];
    for (name, harm) in cases {
        let mut driver = blk.driver(Options::default())?;
        assert!(harm(&mut driver).is_err(), "{name}");
        drop(driver);
        let mut driver = blk.driver(Options::default())?;
        assert_eq!(run(&mut driver, Kind::In, 0, &[(DATA, 512)])?.0, 0, "after {name}");
    }
    // Bytes that are no message at all.
    for noise in 0..20 {
        let mut stream = blk.connect()?;
        std::io::Write::write_all(&mut stream, &pattern(noise, 300))?;
    }
    let mut driver = blk.driver(Options::default())?;
    assert_eq!(run(&mut driver, Kind::In, 0, &[(DATA, 512)])?.0, 0);
    Ok(())
}

fn restart(driver: &mut Driver, ring: &VringConfigData) -> Result<()> {
    driver.stop(0)?;
    driver.front()?.set_vring_addr(0, ring)?;
    let kick = vmm_sys_util::eventfd::EventFd::new(0)?;
    Ok(driver.front()?.set_vring_kick(0, &kick)?)
}

/// One client that connected and never said a word kept the device from everybody else, for ever.
#[test]
fn a_silent_client_does_not_keep_others_waiting() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = image(folder.path(), 1 << 20)?;
    let mut blk = listen(folder.path(), &["--path", path.to_str().unwrap()])?;
    let silent = blk.connect()?;
    let mut driver = blk.driver(Options::default())?;
    assert_eq!(driver.config(60)?.len(), 60);
    drop(silent);
    Ok(())
}
