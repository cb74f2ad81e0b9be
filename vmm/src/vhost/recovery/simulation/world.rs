//! What the machine is tried on: a guest, its rings, a record of requests in flight, and processes that die at any step.
//!
//! A request goes the way that it goes in a backend of ours: taken, marked in the record, submitted, executed by the storage,
//! put into the used ring, unmarked, called. What a dead process has submitted may still be executed later. Nobody here
//! knows the machine.

use super::rng::Rng;

/// The most requests that wait in one ring.
const SIZE: usize = 6;

/// What is known of a request, beyond all rings.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Fate {
    pub(super) epoch: u32,
    pub(super) executed: bool,
    pub(super) failed: bool,
    pub(super) reaped: bool,
}

/// One queue: the rings, and its part of the record.
#[derive(Clone, Debug, Default)]
pub(super) struct Ring {
    pub(super) available: Vec<usize>,
    pub(super) used: Vec<usize>,
    pub(super) reaped: usize,
    pub(super) kicked: bool,
    pub(super) called: bool,
    /// Requests marked as taken, in the order of their counter.
    pub(super) marks: Vec<usize>,
    /// The used index that the record knows, and the request that was being completed.
    pub(super) record_used: usize,
    pub(super) record_last: usize,
}

impl Ring {
    pub(super) fn waiting(&self) -> bool {
        self.available.len() > self.used.len()
    }
    /// Where a successor finds the next request when it has put the record right: behind those that are marked.
    pub(super) fn repair(&mut self) -> usize {
        if self.record_used != self.used.len() {
            let last = self.record_last;
            self.marks.retain(|request| *request != last);
            self.record_used = self.used.len();
        }
        self.used.len() + self.marks.len()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Taken,
    Marked,
    Submitted,
    Executed,
    /// The record says that it is being completed.
    Noted,
    /// In the used ring.
    Published,
    /// Not marked any more.
    Unmarked,
    /// The record knows the used index.
    Balanced,
}

/// A process' side of one queue.
#[derive(Clone, Debug, Default)]
struct Hands {
    next: usize,
    awake: bool,
    work: Vec<(usize, Stage)>,
}

/// What a process will do wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Vices {
    pub(super) never_ready: bool,
    pub(super) lacks: bool,
    pub(super) dies_at_hand_over: bool,
    pub(super) refuses_rings: bool,
    pub(super) stuck: bool,
    pub(super) lingers: bool,
    pub(super) refuses_state: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    Starting,
    Greeted,
    /// Killed, and not reaped yet.
    Lingering,
    Gone,
}

#[derive(Clone, Debug)]
pub(super) struct Process {
    pub(super) generation: u64,
    pub(super) life: Life,
    pub(super) vices: Vices,
    pub(super) has_rings: bool,
    /// It has ended by itself, and nobody has noticed.
    pub(super) ended: bool,
    /// It was started while another one lived, and waits for no fence before it is greeted.
    pub(super) beside: bool,
    /// Its end was seen, or wanted.
    pub(super) noticed: bool,
    /// What it is made of.
    pub(super) build: u32,
    /// What the driver has told it that is not in the rings.
    pub(super) knows: u32,
    hands: Vec<Hands>,
}

/// Everything but the machine.
#[derive(Clone, Debug)]
pub(super) struct World {
    pub(super) rings: Vec<Ring>,
    pub(super) fates: Vec<Fate>,
    pub(super) epoch: u32,
    pub(super) processes: Vec<Process>,
    /// Submitted by processes that are gone.
    pub(super) late: Vec<usize>,
    /// Backends keep a record.
    pub(super) record: bool,
    pub(super) complaint: Option<&'static str>,
}

impl Process {
    /// It is gone, and everybody knows.
    pub(super) fn leave(&mut self) {
        (self.life, self.ended, self.noticed, self.has_rings) = (Life::Gone, true, true, false);
    }
}

impl World {
    pub(super) fn new(queues: usize, record: bool) -> Self {
        let rings = vec![Ring::default(); queues];
        Self { rings, fates: Vec::new(), epoch: 0, processes: Vec::new(), late: Vec::new(), record, complaint: None }
    }

    pub(super) fn complain(&mut self, about: &'static str) {
        self.complaint.get_or_insert(about);
    }

    pub(super) fn process(&mut self, generation: u64) -> Option<&mut Process> {
        self.processes.iter_mut().rev().find(|process| process.generation == generation)
    }

    pub(super) fn bear(&mut self, generation: u64, life: Life, vices: Vices, build: u32) {
        // One whose end nobody has seen is still believed to be there.
        self.processes.retain(|process| process.life != Life::Gone || !process.noticed);
        let (has_rings, ended, beside, noticed, knows) = (false, false, false, false, 0);
        let hands = Vec::new();
        self.processes.push(Process {
            generation,
            life,
            vices,
            has_rings,
            ended,
            beside,
            noticed,
            build,
            knows,
            hands,
        });
    }

    /// Processes that run, whatever they are at.
    pub(super) fn running(&self) -> usize {
        self.processes.iter().filter(|process| process.life != Life::Gone && !process.ended).count()
    }

    /// Whether anybody but `generation` could touch the rings.
    pub(super) fn has_another_owner(&self, generation: Option<u64>) -> bool {
        let others = self.processes.iter().filter(|process| Some(process.generation) != generation);
        others.into_iter().any(|process| process.has_rings && process.life != Life::Gone)
    }

    /// The guest asks for something.
    pub(super) fn issue(&mut self, rng: &mut Rng) {
        let at = rng.below(self.rings.len());
        let (epoch, request) = (self.epoch, self.fates.len());
        let Some(ring) = self.rings.get_mut(at) else { return };
        if ring.available.len() - ring.reaped < SIZE {
            ring.available.push(request);
            ring.kicked = true;
            self.fates.push(Fate { epoch, ..Fate::default() });
        }
    }

    /// The guest looks at what it was interrupted for.
    pub(super) fn reap(&mut self) {
        let mut complaint = None;
        for ring in self.rings.iter_mut().filter(|ring| ring.called) {
            ring.called = false;
            while let Some(request) = ring.used.get(ring.reaped).copied() {
                ring.reaped += 1;
                let Some(fate) = self.fates.get_mut(request) else { continue };
                if fate.epoch != self.epoch {
                    complaint = Some("a request of an earlier driver was completed");
                } else if fate.reaped {
                    complaint = Some("a request was completed twice");
                } else if !fate.executed && !fate.failed {
                    complaint = Some("a request was completed and never executed");
                }
                fate.reaped = true;
            }
        }
        if let Some(complaint) = complaint {
            self.complain(complaint);
        }
    }

    /// Everything that the guest has asked for has come back.
    pub(super) fn all_reaped(&self) -> bool {
        self.fates.iter().all(|fate| fate.reaped || fate.epoch != self.epoch)
    }

    /// Another driver comes, with rings of its own; the record is for the machine to clear.
    pub(super) fn new_epoch(&mut self) {
        self.epoch += 1;
        for ring in &mut self.rings {
            (ring.available, ring.used, ring.reaped) = (Vec::new(), Vec::new(), 0);
            (ring.kicked, ring.called) = (false, false);
        }
    }

    pub(super) fn clear_record(&mut self) {
        for ring in &mut self.rings {
            (ring.marks, ring.record_used, ring.record_last) = (Vec::new(), 0, usize::MAX);
        }
    }

    /// A process gets the rings. `base`: where each goes on, if not where the record says.
    pub(super) fn hand_over(&mut self, generation: u64, base: impl Fn(&mut Ring) -> usize) {
        let record = self.record;
        let rings = &mut self.rings;
        let hands = rings.iter_mut().map(|ring| {
            let next = base(ring);
            let work = ring.marks.iter().filter(|_| record).map(|request| (*request, Stage::Marked)).collect();
            Hands { next, awake: false, work }
        });
        let hands: Vec<Hands> = hands.collect();
        if let Some(process) = self.process(generation) {
            (process.hands, process.has_rings) = (hands, true);
        }
    }

    /// A process takes one step in one of its queues. Says whether it could.
    pub(super) fn step(&mut self, generation: u64, rng: &mut Rng) -> bool {
        let record = self.record;
        let Some(process) = self.processes.iter_mut().rev().find(|process| process.generation == generation) else {
            return false;
        };
        if !process.has_rings || process.vices.stuck || process.ended || process.life != Life::Greeted {
            return false;
        }
        let first = rng.below(process.hands.len());
        for turn in 0..process.hands.len() {
            let at = (first + turn) % process.hands.len();
            let (Some(hands), Some(ring)) = (process.hands.get_mut(at), self.rings.get_mut(at)) else { continue };
            if std::mem::take(&mut ring.kicked) {
                hands.awake = true;
                return true;
            }
            // What is taken is marked before the next is taken: the record and the available ring agree on the order.
            let unmarked = hands.work.iter().position(|(_, stage)| *stage == Stage::Taken);
            if hands.awake && unmarked.is_none() && hands.next < ring.available.len() && rng.chance(2) {
                if let Some(request) = ring.available.get(hands.next) {
                    hands.work.push((*request, Stage::Taken));
                }
                hands.next += 1;
                return true;
            }
            if hands.work.is_empty() {
                continue;
            }
            let among = rng.below(hands.work.len());
            // What is being completed is completed before anything else is.
            let busy = hands.work.iter().position(|(_, stage)| *stage >= Stage::Noted);
            let chosen = busy.or(unmarked).unwrap_or(among);
            let Some((request, stage)) = hands.work.get_mut(chosen) else { continue };
            match stage {
                Stage::Taken => {
                    ring.marks.extend(record.then_some(*request));
                    *stage = Stage::Marked;
                }
                Stage::Marked => *stage = Stage::Submitted,
                Stage::Submitted => {
                    if let Some(fate) = self.fates.get_mut(*request) {
                        fate.executed = true;
                    }
                    *stage = Stage::Executed;
                }
                Stage::Executed => {
                    ring.record_last = *request;
                    *stage = Stage::Noted;
                }
                Stage::Noted => {
                    ring.used.push(*request);
                    *stage = Stage::Published;
                }
                Stage::Published => {
                    ring.marks.retain(|mark| mark != request);
                    *stage = Stage::Unmarked;
                }
                Stage::Unmarked => {
                    ring.record_used = ring.used.len();
                    *stage = Stage::Balanced;
                }
                Stage::Balanced => {
                    ring.called = true;
                    hands.work.swap_remove(chosen);
                }
            }
            return true;
        }
        false
    }

    /// A process ends where it stands; what it has submitted goes on without it.
    pub(super) fn end(&mut self, generation: u64) {
        let record = self.record;
        let Some(process) = self.processes.iter_mut().rev().find(|process| process.generation == generation) else {
            return;
        };
        (process.ended, process.has_rings) = (true, false);
        if process.life != Life::Starting {
            process.life = Life::Gone;
        }
        // What a backend of others has under way ends with it, as far as this world goes.
        let work = process.hands.drain(..).flat_map(|hands| hands.work);
        self.late.extend(work.filter(|(_, stage)| record && *stage == Stage::Submitted).map(|(request, _)| request));
    }

    /// Something that a dead process had submitted is executed, or is not.
    pub(super) fn land(&mut self, rng: &mut Rng) {
        if !self.late.is_empty() {
            let request = self.late.swap_remove(rng.below(self.late.len()));
            if let Some(fate) = self.fates.get_mut(request).filter(|_| rng.chance(2)) {
                fate.executed = true;
            }
        }
    }

    /// Everything outstanding, of all rings or of those that a dead process has seen, is failed.
    pub(super) fn fail_outstanding(&mut self, seen: Option<&[usize]>) {
        for (at, ring) in self.rings.iter_mut().enumerate() {
            let limit = seen.and_then(|seen| seen.get(at).copied()).unwrap_or(ring.available.len());
            for request in ring.available.iter().take(limit) {
                if !ring.used.contains(request) {
                    ring.used.push(*request);
                    if let Some(fate) = self.fates.get_mut(*request) {
                        fate.failed = true;
                    }
                }
            }
            ring.called = true;
            (ring.marks, ring.record_used) = (Vec::new(), ring.used.len());
        }
    }
}

impl PartialOrd for Stage {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        (*self as u8).partial_cmp(&(*other as u8))
    }
}
