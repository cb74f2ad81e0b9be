//! Two claims about the order of writes, checked by cutting it everywhere.
//!
//! The death of a process keeps a prefix of all writes: at each one the image must be sound and hold all that was
//! acknowledged. A loss of power keeps what was made durable, and of the rest any part: the image must be sound, a sector
//! that was flushed and not written since must be there, and one that was written since must hold one of its contents.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use imago::StorageExt;

use super::file::Align;
use super::image::{Chain, Clear, Format, Image, Layer, Place};
use super::journal::Event;

const DISK: u64 = 4 << 20;
const SECTOR: usize = 512;

struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

fn qemu_img(folder: &Path, args: &[&str]) -> (bool, String) {
    let out = Command::new("qemu-img").args(args).current_dir(folder).output().expect("qemu-img (package qemu-utils)");
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    // 3: nothing but leaks.
    (matches!(out.status.code(), Some(0 | 3)), text)
}

fn open(folder: &Path, name: &str, base: bool, read_only: bool) -> Image {
    let layer = |name: &str, write: bool, format| {
        let file = File::options().read(true).write(write).open(folder.join(name)).unwrap();
        Layer { file: Arc::new(file), name: name.to_owned(), format }
    };
    let backing = if base { vec![layer("base", false, Format::Raw)] } else { Vec::new() };
    let top = layer(name, !read_only, Format::Qcow2);
    Image::open(&Chain { top, data: None, backing, read_only, align: Align::NONE }).unwrap()
}

fn content(image: &Image) -> Vec<u8> {
    let mut out = vec![0; DISK as usize];
    image.read(&mut out, 0).unwrap();
    out
}

/// Writes as a queue does.
fn write(image: &Image, mut offset: u64, mut data: &[u8]) {
    let mut change = Default::default();
    while !data.is_empty() {
        let (place, len) = image.place(offset, data.len() as u64, true).unwrap();
        let done = match place {
            Place::File { file, offset, writable: true } => {
                let part = &data[..len as usize];
                image.store.journal.write(&file, part, offset).unwrap();
                file.write_all_at(part, offset).unwrap();
                len
            }
            _ => {
                let put = |file: &super::file::ImageFile, host, len: u64| file.write(&data[..len as usize], host);
                let (done, made) = image.allocate(offset, len, put).unwrap();
                change = std::cmp::max(change, made);
                done
            }
        };
        offset += done;
        data = &data[done as usize..];
    }
    image.settle(change).unwrap();
}

/// The disk as it was acknowledged after each step, and which of these were flushed.
struct History {
    disks: Vec<Vec<u8>>,
    flushed: Vec<usize>,
}

fn storm(image: &Image, steps: u64, seed: u64) -> History {
    let mut dice = Dice(seed);
    let mut disk = content(image);
    let mut history = History { disks: vec![disk.clone()], flushed: vec![0] };
    for step in 0..steps {
        let sectors = 1 + dice.below(24);
        let sector = dice.below(DISK / 512 - sectors);
        let (offset, len) = (sector * 512, sectors * 512);
        let range = offset as usize..(offset + len) as usize;
        match dice.below(8) {
            0..5 => {
                let data: Vec<u8> = (0..len).map(|at| (at as u8 ^ step as u8).wrapping_mul(7) | 1).collect();
                write(image, offset, &data);
                disk[range].copy_from_slice(&data);
            }
            5 | 6 => {
                let how = if step % 2 == 0 { Clear::Unmap } else { Clear::Zero };
                let (change, rest) = image.clear(offset, len, how).unwrap();
                let mut last = change;
                for part in rest {
                    last = last.max(image.write_zeroes(part).unwrap());
                }
                image.settle(last).unwrap();
                disk[range].fill(0);
            }
            _ => {
                image.sync().unwrap();
                history.flushed.push(history.disks.len());
            }
        }
        image.store.journal.mark(history.disks.len());
        history.disks.push(disk.clone());
    }
    history
}

fn apply(file: &File, event: &Event, mut keeps: impl FnMut() -> bool) {
    match event {
        Event::Write(offset, data) => {
            for (at, part) in data.chunks(SECTOR).enumerate() {
                if keeps() {
                    file.write_all_at(part, offset + (at * SECTOR) as u64).unwrap();
                }
            }
        }
        Event::Zero(offset, len) if keeps() => {
            let end = file.metadata().unwrap().len().min(offset + len);
            if end > *offset {
                file.write_all_at(&vec![0; (end - offset) as usize], *offset).unwrap();
            }
        }
        Event::Grown(len) if keeps() && file.metadata().unwrap().len() < *len => file.set_len(*len).unwrap(),
        _ => {}
    }
}

fn recipes() -> Vec<(&'static str, bool, Vec<&'static str>)> {
    vec![
        ("plain", false, vec!["create", "-f", "qcow2", "disk", "4M"]),
        ("tiny clusters", false, vec!["create", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=2", "disk", "4M"]),
        (
            "on a base",
            true,
            vec!["create", "-f", "qcow2", "-o", "cluster_size=4k", "-b", "base", "-F", "raw", "disk", "4M"],
        ),
        ("compressed", false, vec!["convert", "-c", "-O", "qcow2", "-o", "cluster_size=8k", "base", "disk"]),
        (
            "version 2",
            true,
            vec!["create", "-f", "qcow2", "-o", "compat=0.10", "-b", "base", "-F", "raw", "disk", "4M"],
        ),
    ]
}

fn prepared(make: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let base: Vec<u8> = (0..DISK).map(|at| ((at >> 9) as u8).wrapping_mul(31) | 2).collect();
    std::fs::write(folder.path().join("base"), base).unwrap();
    let (made, text) = qemu_img(folder.path(), make);
    assert!(made, "{text}");
    std::fs::copy(folder.path().join("disk"), folder.path().join("before")).unwrap();
    folder
}

/// An image under load, and every write of it. A careless one has no order.
fn recorded(base: bool, make: &[&str], steps: u64, careless: bool) -> (tempfile::TempDir, History, Vec<Event>) {
    let folder = prepared(make);
    let image = open(folder.path(), "disk", base, false);
    image.store.careless.store(careless, Ordering::Relaxed);
    let history = storm(&image, steps, 7 + steps);
    let events = image.store.journal.taken();
    drop(image);
    (folder, history, events)
}

/// Cuts after each write; what is wrong then, and how many cuts left leaks.
fn prefixes(base: bool, make: &[&str], careless: bool) -> Result<u32, String> {
    let (folder, history, events) = recorded(base, make, 40, careless);
    let cut = File::options().read(true).write(true).open(folder.path().join("before")).unwrap();
    let mut leaks = 0;
    for (number, event) in events.iter().enumerate() {
        apply(&cut, event, || true);
        let Event::Mark(acknowledged) = event else {
            let (sound, text) = qemu_img(folder.path(), &["check", "before"]);
            if !sound {
                return Err(format!("write {number}: {text}"));
            }
            leaks += u32::from(text.contains("leaked"));
            continue;
        };
        if content(&open(folder.path(), "before", base, true)) != history.disks[*acknowledged] {
            return Err(format!("step {acknowledged} is not there"));
        }
    }
    Ok(leaks)
}

#[test]
fn each_prefix_of_all_writes_is_a_sound_image_with_all_that_was_acknowledged() {
    for (name, base, make) in recipes() {
        let leaks = prefixes(base, &make, false).unwrap_or_else(|wrong| panic!("{name}: {wrong}"));
        assert!(leaks > 0, "{name}: no cut fell between two tables: this test shows nothing");
    }
    assert!(prefixes(false, &recipes()[0].2, true).is_err(), "an image without order was not noticed");
}

/// Loses power at places of a seed; what is wrong then.
fn losses(base: bool, make: &[&str], careless: bool) -> Result<(), String> {
    let (folder, history, events) = recorded(base, make, 60, careless);
    let mut dice = Dice(99);
    let before = std::fs::read(folder.path().join("before")).unwrap();
    for round in 0..40 {
        let end = dice.below(events.len() as u64 + 1) as usize;
        let durable = events[..end].iter().rposition(|event| matches!(event, Event::Synced)).unwrap_or(0);
        let path = folder.path().join("cut");
        std::fs::write(&path, &before).unwrap();
        let cut = File::options().read(true).write(true).open(&path).unwrap();
        let chance = round % 4 + 1;
        for (at, event) in events[..end].iter().enumerate() {
            apply(&cut, event, || at < durable || dice.below(5) < chance);
        }
        let at = format!("round {round}, cut at {end} of {}", events.len());
        let (sound, text) = qemu_img(folder.path(), &["check", "cut"]);
        if !sound {
            return Err(format!("{at}: {text}"));
        }
        // From the last flush that was acknowledged on, each content that a sector had or was about to have.
        let marks = |event: &Event| if let Event::Mark(step) = event { Some(*step) } else { None };
        let last = events[..end].iter().rev().find_map(marks).unwrap_or(0);
        let from = history.flushed.iter().rev().find(|step| **step <= last).copied().unwrap_or(0);
        let to = (last + 1).min(history.disks.len() - 1);
        let is = content(&open(folder.path(), "cut", base, true));
        for (sector, part) in is.chunks(SECTOR).enumerate() {
            let range = sector * SECTOR..(sector + 1) * SECTOR;
            if !history.disks[from..=to].iter().any(|disk| &disk[range.clone()] == part) {
                return Err(format!("{at}, steps {from} to {to}: sector {sector} holds {}", part[0]));
            }
        }
    }
    Ok(())
}

#[test]
fn a_loss_of_power_leaves_a_sound_image_with_all_that_was_flushed() {
    for (name, base, make) in recipes() {
        losses(base, &make, false).unwrap_or_else(|wrong| panic!("{name}: {wrong}"));
    }
    assert!(losses(true, &recipes()[2].2, true).is_err(), "an image without order was not noticed");
}

/// The last cluster of a file was written in part, and its rest by a second write; it was made zero, and written in part
/// again. The rest was taken for a place that nobody had ever written to, was not made zero, and the second write was back.
/// A campaign found it.
#[test]
fn what_was_made_zero_does_not_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let disk = DISK.to_string();
    let (ok, said) = qemu_img(folder, &["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "disk", &disk]);
    assert!(ok, "{said}");
    for reopened in [false, true] {
        let mut image = open(folder, "disk", false, false);
        write(&image, 0, &[1; 512]);
        if reopened {
            drop(image);
            image = open(folder, "disk", false, false);
        }
        write(&image, 2048, &[2; 1024]);
        let (change, rest) = image.clear(0, 4096, Clear::Zero).unwrap();
        assert!(rest.is_empty());
        image.settle(change).unwrap();
        write(&image, 0, &[3; 1536]);
        let found = content(&image);
        assert_eq!((found[1535], &found[1536..4096]), (3, &[0; 2560][..]), "reopened: {reopened}");
        let (change, _) = image.clear(0, 4096, Clear::Zero).unwrap();
        image.settle(change).unwrap();
    }
}
