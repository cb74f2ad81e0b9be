//! What tests see of the order in which an image reaches its file.

use std::fs::File;
use std::io::{self, IoSlice};
use std::sync::{Mutex, PoisonError};

/// Something that reached the file.
#[derive(Debug, Clone)]
pub(super) enum Event {
    Write(u64, Vec<u8>),
    Zero(u64, u64),
    Grown(u64),
    /// All before is durable.
    Synced,
    /// The test's own mark.
    Mark(usize),
}

#[derive(Debug, Default)]
pub(super) struct Journal(Mutex<Vec<Event>>);

impl Journal {
    fn push(&self, event: Event) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(event);
    }

    pub(super) fn write(&self, _file: &File, data: &[u8], offset: u64) -> io::Result<()> {
        self.push(Event::Write(offset, data.to_vec()));
        Ok(())
    }

    pub(super) fn write_all(&self, file: &File, slices: &[IoSlice<'_>], mut offset: u64) -> io::Result<()> {
        for slice in slices {
            self.write(file, slice, offset)?;
            offset += slice.len() as u64;
        }
        Ok(())
    }

    pub(super) fn zero(&self, _file: &File, offset: u64, len: u64) -> io::Result<()> {
        self.push(Event::Zero(offset, len));
        Ok(())
    }

    pub(super) fn grown(&self, len: u64) {
        self.push(Event::Grown(len));
    }

    pub(super) fn synced(&self) {
        self.push(Event::Synced);
    }

    pub(super) fn mark(&self, number: usize) {
        self.push(Event::Mark(number));
    }

    pub(super) fn taken(&self) -> Vec<Event> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
