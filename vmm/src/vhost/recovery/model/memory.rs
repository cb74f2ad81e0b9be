//! What outlives a process: the words of a ring and the record of requests in flight, in a form that can be a state of a
//! model. A process writes to them one word after the other and may die between any two: then the rest is not written.

use std::cell::Cell;

use atoll_devices::virtio::notification::{Wish, Words};
use atoll_kit::course::Shared;
use atoll_kit::inflight::{Field, Record};
use atoll_kit::memory::OutOfRange;

/// Entries of a ring.
pub(super) const SIZE: usize = 2;

/// A write that a faulty program leaves out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Write {
    Version,
    DescNum,
    LastBatchHead,
    UsedIdx,
    Mark,
    Unmark,
    Next,
    Counter,
    /// To the ring; nobody leaves these out.
    Ring,
}

#[derive(Clone, Copy)]
struct Life {
    /// Writes until death.
    left: u32,
    written: u32,
    forgets: Option<Write>,
}

thread_local! {
    static LIFE: Cell<Life> = const { Cell::new(Life { left: u32::MAX, written: 0, forgets: None }) };
}

/// Has a process do something and die after `left` writes; how many it would have made.
pub(super) fn live<T>(left: Option<u32>, forgets: Option<Write>, act: impl FnOnce() -> T) -> (T, u32) {
    LIFE.set(Life { left: left.unwrap_or(u32::MAX), written: 0, forgets });
    let result = act();
    (result, LIFE.get().written)
}

fn may(write: Write) -> bool {
    let mut life = LIFE.get();
    if life.forgets == Some(write) {
        return false;
    }
    life.written += 1;
    let lives = life.left > 0;
    life.left = life.left.saturating_sub(1);
    LIFE.set(life);
    lives
}

/// One queue's part of the record.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Part {
    version: u16,
    desc_num: u16,
    last_batch_head: u16,
    used_idx: u16,
    entries: [Entry; SIZE],
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Entry {
    in_flight: bool,
    next: u16,
    counter: u64,
}

impl Part {
    fn entry(&self, head: u16) -> Entry {
        self.entries.get(usize::from(head)).copied().unwrap_or_default()
    }
    fn change(&mut self, head: u16, write: Write, change: impl FnOnce(&mut Entry)) {
        if let Some(entry) = self.entries.get_mut(usize::from(head))
            && may(write)
        {
            change(entry);
        }
    }
}

impl Record for Part {
    fn entries(&self) -> u16 {
        SIZE as u16
    }
    fn field(&self, field: Field) -> u16 {
        match field {
            Field::Version => self.version,
            Field::DescNum => self.desc_num,
            Field::LastBatchHead => self.last_batch_head,
            Field::UsedIdx => self.used_idx,
        }
    }
    fn set_field(&mut self, field: Field, value: u16) {
        let (word, write) = match field {
            Field::Version => (&mut self.version, Write::Version),
            Field::DescNum => (&mut self.desc_num, Write::DescNum),
            Field::LastBatchHead => (&mut self.last_batch_head, Write::LastBatchHead),
            Field::UsedIdx => (&mut self.used_idx, Write::UsedIdx),
        };
        if may(write) {
            *word = value;
        }
    }
    fn is_in_flight(&self, head: u16) -> bool {
        self.entry(head).in_flight
    }
    fn set_in_flight(&mut self, head: u16, value: bool) {
        self.change(head, if value { Write::Mark } else { Write::Unmark }, |entry| entry.in_flight = value);
    }
    fn next(&self, head: u16) -> u16 {
        self.entry(head).next
    }
    fn set_next(&mut self, head: u16, value: u16) {
        self.change(head, Write::Next, |entry| entry.next = value);
    }
    fn counter(&self, head: u16) -> u64 {
        self.entry(head).counter
    }
    fn set_counter(&mut self, head: u16, value: u64) {
        self.change(head, Write::Counter, |entry| entry.counter = value);
    }
}

/// The words of a ring, with EVENT_IDX.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ring {
    pub(super) avail_index: u16,
    heads: [u16; SIZE],
    used_event: u16,
    pub(super) used_index: u16,
    elements: [u16; SIZE],
    avail_event: u16,
}

fn slot(cells: &[u16; SIZE], index: u16) -> u16 {
    cells.get(usize::from(index) % SIZE).copied().unwrap_or_default()
}

fn put(cells: &mut [u16; SIZE], index: u16, value: u16) {
    if let Some(cell) = cells.get_mut(usize::from(index) % SIZE) {
        *cell = value;
    }
}

impl Ring {
    pub(super) fn new() -> Self {
        let (heads, elements) = ([0; SIZE], [0; SIZE]);
        Self { avail_index: 0, heads, used_event: 0, used_index: 0, elements, avail_event: 0 }
    }
    /// The driver makes a head available.
    pub(super) fn make_available(&mut self, head: u16) {
        put(&mut self.heads, self.avail_index, head);
        self.avail_index = self.avail_index.wrapping_add(1);
    }
    /// What was completed as number `index`.
    pub(super) fn completed(&self, index: u16) -> u16 {
        slot(&self.elements, index)
    }
    /// Every request has been completed.
    pub(super) fn is_idle(&self) -> bool {
        self.avail_index == self.used_index
    }
}

impl Shared for Ring {
    fn avail_index(&self) -> Result<u16, OutOfRange> {
        Ok(self.avail_index)
    }
    fn avail_flags(&self) -> Result<u16, OutOfRange> {
        Ok(0)
    }
    fn avail_head(&self, index: u16) -> Result<u16, OutOfRange> {
        Ok(slot(&self.heads, index))
    }
    fn used_event(&self) -> Result<u16, OutOfRange> {
        Ok(self.used_event)
    }
    fn set_used_index(&mut self, index: u16) -> Result<(), OutOfRange> {
        if may(Write::Ring) {
            self.used_index = index;
        }
        Ok(())
    }
    fn set_used_flags(&mut self, _flags: u16) -> Result<(), OutOfRange> {
        Ok(())
    }
    fn set_avail_event(&mut self, index: u16) -> Result<(), OutOfRange> {
        if may(Write::Ring) {
            self.avail_event = index;
        }
        Ok(())
    }
    fn set_used(&mut self, first: u16, done: &[(u16, u32)]) -> Result<(), OutOfRange> {
        for (number, (head, _)) in (0..).map(|n: u16| first.wrapping_add(n)).zip(done) {
            if may(Write::Ring) {
                put(&mut self.elements, number, *head);
            }
        }
        Ok(())
    }
    fn fence(&self) {}
}

/// The driver's side.
impl Words for Ring {
    type Error = OutOfRange;
    fn ask(&mut self, next: u16) -> Result<(), OutOfRange> {
        self.used_event = next;
        Ok(())
    }
    fn wish(&self) -> Result<Wish, OutOfRange> {
        Ok(Wish::Past(self.avail_event))
    }
    fn shown(&self) -> Result<u16, OutOfRange> {
        Ok(self.used_index)
    }
    fn fence(&self) {}
}
