//! The guest's driver of disks, on a file: threads, direct I/O, history as text, judge.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use atoll_verify::blk::guest::{Plan, run};
use atoll_verify::blk::{Judge, Workload, history};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Clone, Default)]
struct Tape(Arc<Mutex<Vec<u8>>>);

impl Write for Tape {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The whole way on a file: threads, direct I/O, history as text, judge; then once more, as after a restart, with one
/// sector put back by a foreign hand.
#[test]
fn a_load_on_a_file_is_played_and_judged() -> io::Result<()> {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let device = folder.path().join("disk");
    let load = Workload { sectors: 256, sectors_max: 16, ..Workload::new(9) };
    File::create(&device)?.set_len(256 * 512)?;
    let mut plan = Plan {
        device: device.clone(),
        load,
        epoch: 0,
        length: Duration::from_millis(300),
        stop: None,
        threads: 3,
        deadline: Duration::from_secs(20),
    };
    let tape = Tape::default();
    run(&plan, Box::new(tape.clone()))?;
    plan.epoch = 1;
    run(&plan, Box::new(tape.clone()))?;
    let told = String::from_utf8_lossy(&lock(&tape.0)).into_owned();
    let verdict = Judge::judge(&history::History::parse(&told));
    assert!(verdict.ok && verdict.counts.reads > 30 && verdict.counts.resets == 1, "{}", verdict.json());
    let old = std::fs::read(&device)?;
    let file = File::options().write(true).open(&device)?;
    plan.epoch = 2;
    file.write_all_at(&old[512..1024], 0)?;
    run(&plan, Box::new(tape.clone()))?;
    let told = String::from_utf8_lossy(&lock(&tape.0)).into_owned();
    let verdict = Judge::judge(&history::History::parse(&told));
    assert!(!verdict.ok, "{}", verdict.json());
    Ok(())
}
