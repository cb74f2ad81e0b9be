//! A guest that means harm: it hurts nobody but itself.

mod process;

use std::time::Duration;

use anyhow::Result;
use atoll_kit::driver::net::NetOptions;
use atoll_kit::driver::queue::{INDIRECT, NEXT, WRITE};
use process::{ALL, PLAIN, frame, listen, mac};

const SOON: Duration = Duration::from_secs(20);

#[test]
fn frames_that_make_no_sense_are_given_back_and_reach_nobody() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut net = listen(folder.path(), &["--switch", "--ports", "2"])?;
    let mut bad = net.guest(NetOptions::default())?;
    let mut good = net.guest(NetOptions::default())?;
    let (queue, guest) = bad.queue(1)?;
    let at = queue.small;
    guest.write(at, &frame(ALL, mac(1), 1, 600));
    type Case = (&'static str, Vec<(u64, u32)>, Vec<(u64, u32)>);
    let cases: Vec<Case> = vec![
        ("shorter than a header", vec![(at, 11)], vec![]),
        ("a header and nothing", vec![(at, 12)], vec![]),
        ("less than addresses", vec![(at, 12 + 13)], vec![]),
        ("an empty one", vec![(at, 0)], vec![]),
        ("only writable", vec![], vec![(at, 100)]),
        ("longer than any frame", vec![(at, 12 + 65_554)], vec![]),
        ("four gigabytes", vec![(at, u32::MAX)], vec![]),
        ("outside memory", vec![(1 << 40, 100)], vec![]),
        ("partly outside memory", vec![(at, 40), (u64::MAX - 20, 100)], vec![]),
        ("an offload that is not known", vec![(at + 0x800, 12), (at, 100)], vec![]),
    ];
    // Segmentation of a kind that does not exist.
    guest.write(at + 0x800, &[1, 77, 0, 0, 100, 0, 34, 0, 16, 0, 0, 0]);
    for (what, readable, writable) in &cases {
        let head = queue.add(guest, readable, writable).unwrap();
        queue.publish(guest)?;
        assert_eq!(queue.take_within(guest, SOON)?, (head, 0), "{what}");
    }
    // Headers that lie about a good frame.
    let lies: &[[u8; 12]] = &[
        [1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0],
        [1, 0, 0, 0, 0, 0, 255, 0, 200, 1, 0, 0],
        [1, 1, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0],
        [0, 1, 0, 0, 100, 0, 0, 0, 0, 0, 0, 0],
        [1, 3, 0, 0, 100, 0, 34, 0, 6, 0, 0, 0],
    ];
    for lie in lies {
        bad.send_with(0, lie, &frame(ALL, mac(1), 1, 200))?;
    }
    bad.send(&frame(ALL, mac(1), 2, 60))?;
    assert_eq!(good.receive()?.frame, frame(ALL, mac(1), 2, 60), "the first that makes sense");
    Ok(())
}

#[test]
fn receive_buffers_that_make_no_sense_come_back_empty() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut net = listen(folder.path(), &["--switch", "--ports", "2"])?;
    let mut good = net.guest(NetOptions::default())?;
    let mut bad = atoll_kit::driver::net::NetGuest::new(NetOptions::default())?;
    bad.driver.connect(net.connect()?)?;
    let (queue, guest) = bad.queue(0)?;
    let at = queue.small;
    type Buffer = (&'static str, Vec<(u64, u32)>);
    let buffers: Vec<Buffer> = vec![
        ("too small for a header", vec![(at, 4)]),
        ("empty", vec![(at, 0)]),
        ("outside memory", vec![(1 << 40, 2000)]),
        ("partly outside memory", vec![(at, 40), (u64::MAX - 20, 2000)]),
    ];
    for (what, writable) in &buffers {
        let head = queue.add(guest, &[], writable).unwrap();
        queue.publish(guest)?;
        // With none behind it, a small one waits for the next; with a good one behind it, it comes back.
        let good_head = queue.add(guest, &[], &[(at + 0x800, 1600)]).unwrap();
        queue.publish(guest)?;
        let mut seen = Vec::new();
        while !seen.iter().any(|(head, _)| *head == good_head) {
            good.send(&frame(ALL, mac(1), 3, 60))?;
            while let Some(done) = queue.take(guest) {
                seen.push(done);
            }
        }
        assert!(seen.contains(&(head, 0)), "{what}: {seen:?}");
        assert!(seen.contains(&(good_head, 72)), "{what}: {seen:?}");
    }
    // Chains that loop, leave their table or nest.
    for (flags, next) in [(NEXT | WRITE, 127), (NEXT | WRITE, 500), (INDIRECT, 0), (INDIRECT | NEXT, 0)] {
        queue.describe(guest, 127, at, 7, flags, next);
        queue.add_head(guest, 127);
        queue.publish(guest)?;
        let good_head = queue.add(guest, &[], &[(at + 0x800, 1600)]).unwrap();
        queue.publish(guest)?;
        let mut seen = Vec::new();
        while seen.len() < 2 {
            good.send(&frame(ALL, mac(1), 4, 60))?;
            while let Some(done) = queue.take(guest) {
                seen.push(done);
            }
        }
        assert_eq!(seen, [(127, 0), (good_head, 72)]);
    }
    Ok(())
}

/// A guest that breaks its ring is not served until it sets the ring up again; its neighbours do not notice.
#[test]
fn a_broken_ring_breaks_nothing_else() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut net = listen(folder.path(), &["--switch", "--ports", "3"])?;
    let mut bad = net.guest(NetOptions::default())?;
    let mut a = net.guest(NetOptions::default())?;
    let mut b = net.guest(NetOptions::default())?;
    for index in [0, 1] {
        let (queue, guest) = bad.queue(index)?;
        // An index that runs away.
        guest.store(queue.avail + 2, 40_000_u16);
        queue.kick.write(1)?;
    }
    for number in 0..200 {
        a.send(&frame(ALL, mac(1), number, 60))?;
        assert_eq!(b.receive()?.frame, frame(ALL, mac(1), number, 60));
    }
    let again = NetOptions { size: 64, ..NetOptions::default() };
    drop(bad);
    let mut fresh = loop {
        match net.guest(again.clone()) {
            Ok(guest) => break guest,
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    fresh.send_with(0, &PLAIN, &frame(ALL, mac(3), 7, 60))?;
    assert_eq!(a.receive()?.frame, frame(ALL, mac(3), 7, 60));
    Ok(())
}
