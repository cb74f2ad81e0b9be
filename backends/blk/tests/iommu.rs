//! A disk whose guest has an IOMMU: it reaches what the guest has mapped, where that leads, and nothing else.

mod process;

use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::Result;
use atoll_kit::driver::disk::Kind;
use atoll_kit::driver::iommu::{self, READ, WRITE};
use atoll_kit::driver::{Driver, Options, USER_OFFSET};
use vhost::VhostBackend as _;
use vhost::vhost_user::VhostUserFrontend;

use process::{DATA, Process, image, listen, pattern, run};

const IOVA: u64 = 7 << 40;
const PAGE: u64 = 4096;
const IO_ERROR: u8 = 1;

/// A disk, its driver, and the end of the back channel at which it asks.
fn disk(folder: &std::path::Path, bytes: u64) -> Result<(Process, Driver, UnixStream)> {
    let path = image(folder, bytes)?;
    let mut blk = listen(folder, &["--path", path.to_str().unwrap()])?;
    let mut driver = blk.driver(Options { iommu: true, ..Options::default() })?;
    let (questions, theirs) = UnixStream::pair()?;
    questions.set_read_timeout(Some(Duration::from_secs(60)))?;
    driver.front()?.set_backend_request_fd(&theirs)?;
    // It is not answered, and a request that came before it would have nowhere to ask: what is answered comes behind it.
    driver.front()?.get_features()?;
    Ok((blk, driver, questions))
}

/// One request that the device has to ask about; what it asked, and what became of the request.
fn refused(driver: &mut Driver, questions: &UnixStream, kind: Kind, data: &[(u64, u32)]) -> Result<((u64, u8), u8)> {
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| -> Result<(u64, u8)> {
            let asked = iommu::hear_miss(questions)?;
            iommu::answer_miss(questions, false)?;
            Ok(asked)
        });
        let (status, _) = run(driver, kind, 0, data)?;
        Ok((asked.join().expect("no panic")?, status))
    })
}

#[test]
fn a_disk_reaches_what_is_mapped_and_nothing_else() -> Result<()> {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let (_blk, mut driver, questions) = disk(folder.path(), 8 << 20)?;
    // Three pages in a row for the device, which lie apart and in another order.
    let places = [DATA + 5 * PAGE, DATA, DATA + 9 * PAGE];
    for (place, iova) in places.iter().zip([IOVA, IOVA + PAGE, IOVA + 2 * PAGE]) {
        assert!(iommu::update(driver.talk()?, iova, PAGE, USER_OFFSET + place, READ | WRITE)?);
    }
    let data = pattern(3, 3 * PAGE as usize);
    for (place, part) in places.iter().zip(data.chunks(PAGE as usize)) {
        driver.guest().write(*place, part);
    }
    let all = [(IOVA, 3 * PAGE as u32)];
    assert_eq!(run(&mut driver, Kind::Out, 0, &all)?.0, 0);
    for place in places {
        driver.guest().write(place, &[0; PAGE as usize]);
    }
    assert_eq!(run(&mut driver, Kind::In, 0, &all)?.0, 0);
    for (place, part) in places.iter().zip(data.chunks(PAGE as usize)) {
        let mut read = vec![0; PAGE as usize];
        driver.guest().read(*place, &mut read);
        assert!(read == part, "the page at {place:#x}");
    }

    // The middle page is taken back: the device asks, hears no, and has touched none of the memory.
    assert!(iommu::invalidate(driver.talk()?, IOVA + PAGE, PAGE)?);
    for place in places {
        driver.guest().write(place, &[0x5a; PAGE as usize]);
    }
    let (asked, status) = refused(&mut driver, &questions, Kind::In, &all)?;
    assert_eq!((asked, status), ((IOVA + PAGE, WRITE), IO_ERROR));
    let mut untouched = vec![0; 16 * PAGE as usize];
    driver.guest().read(DATA, &mut untouched);
    assert!(untouched.iter().all(|byte| matches!(byte, 0 | 0x5a)), "nothing of the disk came into memory");
    // The guest's own addresses mean nothing.
    let (asked, status) = refused(&mut driver, &questions, Kind::In, &[(DATA, 512)])?;
    assert_eq!((asked, status), ((DATA, WRITE), IO_ERROR));

    // Where it may only read it does not write.
    assert!(iommu::update(driver.talk()?, IOVA + PAGE, PAGE, USER_OFFSET + DATA, READ)?);
    assert_eq!(run(&mut driver, Kind::Out, 64, &[(IOVA + PAGE, 512)])?.0, 0);
    let (asked, status) = refused(&mut driver, &questions, Kind::In, &[(IOVA + PAGE, 512)])?;
    assert_eq!((asked, status), ((IOVA + PAGE, WRITE), IO_ERROR));
    // A translation that leads outside of what the front end has handed over leads nowhere.
    assert!(iommu::update(driver.talk()?, IOVA + PAGE, PAGE, USER_OFFSET - PAGE, READ | WRITE)?);
    assert_eq!(run(&mut driver, Kind::In, 0, &[(IOVA + PAGE, 512)])?.0, IO_ERROR);
    assert_eq!(run(&mut driver, Kind::In, 0, &[(IOVA, 512)])?.0, 0, "the others are as they were");
    driver.stop(0)?;
    Ok(())
}

/// What a device was not told before, it asks for.
#[test]
fn a_disk_asks_and_is_answered() -> Result<()> {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let (_blk, mut driver, questions) = disk(folder.path(), 8 << 20)?;
    let talk = driver.talk()?.try_clone()?;
    driver.guest().write(DATA, &pattern(4, PAGE as usize));
    let (asked, status) = std::thread::scope(|scope| -> Result<_> {
        let answered = scope.spawn(|| -> Result<(u64, u8)> {
            let asked = iommu::hear_miss(&questions)?;
            assert!(iommu::update(&talk, IOVA, PAGE, USER_OFFSET + DATA, READ)?);
            iommu::answer_miss(&questions, true)?;
            Ok(asked)
        });
        let status = run(&mut driver, Kind::Out, 8, &[(IOVA + 512, 1024)])?.0;
        Ok((answered.join().expect("no panic")?, status))
    })?;
    assert_eq!((asked, status), ((IOVA + 512, READ), 0));
    // A front end that says nothing keeps the device waiting no longer than it takes another request.
    assert_eq!(run(&mut driver, Kind::In, 8, &[(IOVA + PAGE, 512)])?.0, IO_ERROR);
    assert_eq!(run(&mut driver, Kind::Out, 8, &[(IOVA, 512)])?.0, 0);
    Ok(())
}

/// Messages that cannot be right end the conversation, and the next front end finds nothing of the last one's.
#[test]
fn messages_that_cannot_be_right_end_the_conversation() -> Result<()> {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let (mut blk, mut driver, _questions) = disk(folder.path(), 8 << 20)?;
    assert!(iommu::update(driver.talk()?, IOVA, PAGE, USER_OFFSET + DATA, READ | WRITE)?);
    let body = |iova: u64, len: u64, user: u64, kind: u8| {
        let mut body = [iova, len, user].map(u64::to_le_bytes).concat();
        body.extend([3, kind, 0, 0, 0, 0, 0, 0]);
        body
    };
    let beyond = u64::MAX - PAGE;
    for (flags, body) in [
        (9, body(IOVA, 0, 0, 2)),
        (9, body(beyond, 2 * PAGE, 0, 2)),
        (9, body(IOVA, 2 * PAGE, beyond, 2)),
        (9, body(IOVA, PAGE, 0, 1)),
        (9, body(IOVA, PAGE, 0, 9)),
        (9, body(IOVA, PAGE, 0, 2)[..24].to_vec()),
        (13, body(IOVA, PAGE, 0, 3)),
    ] {
        assert!(iommu::say(driver.talk()?, flags, &body).is_err(), "{body:?}");
        driver.disconnect();
        driver.connect(blk.connect()?)?;
    }
    assert_eq!(run(&mut driver, Kind::In, 0, &[(IOVA, 512)])?.0, IO_ERROR, "a successor begins with nothing");
    Ok(())
}
