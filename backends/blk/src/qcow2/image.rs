//! A qcow2 image, as the queues use it.
//!
//! A queue asks where a stretch of the disk lies ([`Image::place`]) and moves the data itself, on its ring, where it
//! lies in a file. Only what changes tables goes through a lock: writes to what is not allocated yet
//! ([`Image::allocate`]) and stretches that become zero ([`Image::clear`]). These say which change they were; the
//! request may be completed once [`Image::settle`] has carried that change out: then it is in the file, and the death of
//! this process takes nothing of it away. One call of it serves all requests of a batch. Requests that only meet what
//! another one has changed wait for that change too ([`Image::last_change`]).
//!
//! Clusters that a guest discards stay allocated to it, as zero clusters, and their space is given back to the host: so
//! data that is under way to a cluster can never land in somebody else's.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{FormatAccess, Mapping, ShallowMapping, StorageExt};
use thiserror::Error;

use super::file::{Align, ImageFile, Role};
use super::header::{Header, HeaderError};
use super::store::TableStore;
use super::tables::Tables;
use super::unsettled::Unsettled;
use crate::storage::unsupported;

/// Most images that may stand on each other.
pub const CHAIN_MAX: usize = 16;

/// Why an image cannot be served.
#[derive(Debug, Error)]
pub enum ImageError {
    /// It cannot be read.
    #[error("cannot read image {name}: {source}")]
    Read {
        /// Which.
        name: String,
        /// What the kernel, or imago, said.
        #[source]
        source: io::Error,
    },
    /// Something about it is not served.
    #[error("image {name} cannot be served: {source}")]
    Header {
        /// Which.
        name: String,
        /// What.
        #[source]
        source: HeaderError,
    },
    /// It stands on another image, which was not passed.
    #[error(
        "image {name} stands on the backing file {wants:?}, which was not passed: give the disk backing_files=on if \
         that file may be read, or join them with `qemu-img rebase -b ''`"
    )]
    WantsBacking {
        /// Which.
        name: String,
        /// The name in its header.
        wants: String,
    },
    /// Its data is in another file, which was not passed.
    #[error(
        "image {name} has its data in another file ({wants}), which was not passed: give the disk backing_files=on if \
         that file may be used"
    )]
    WantsData {
        /// Which.
        name: String,
        /// The name in its header, in words.
        wants: String,
    },
    /// A file was passed that it does not name.
    #[error("image {name} was passed {what} that it does not use: pass what its header names")]
    Surplus {
        /// Which.
        name: String,
        /// What is too much.
        what: &'static str,
    },
    /// Direct I/O cannot address its clusters.
    #[error("image {name} has clusters of {cluster} bytes and direct I/O needs {unit}: leave out direct=on")]
    Alignment {
        /// Which.
        name: String,
        /// Bytes of a cluster.
        cluster: u64,
        /// Least bytes of an operation.
        unit: u64,
    },
}

/// What a file in a chain is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The disk, byte for byte.
    Raw,
    /// qcow2.
    Qcow2,
}

/// One open file of a chain.
#[derive(Debug, Clone)]
pub struct Layer {
    /// The file.
    pub file: Arc<File>,
    /// Its name, for messages.
    pub name: String,
    /// What it is.
    pub format: Format,
}

/// An image and what it stands on, opened by somebody else.
#[derive(Debug, Clone)]
pub struct Chain {
    /// The image itself, which is qcow2.
    pub top: Layer,
    /// Where its data is, when that is another file.
    pub data: Option<Layer>,
    /// What it stands on, nearest first.
    pub backing: Vec<Layer>,
    /// Nothing is written to it.
    pub read_only: bool,
    /// What direct I/O demands.
    pub align: Align,
}

/// Where a stretch of the disk lies.
#[derive(Debug, Clone)]
pub enum Place {
    /// In a file.
    File {
        /// Which.
        file: Arc<File>,
        /// Where.
        offset: u64,
        /// The data there is this image's alone and may be written.
        writable: bool,
    },
    /// Nowhere: it is read as zeroes.
    Zero,
    /// In a compressed cluster: to be read by [`Image::read`].
    Compressed,
}

/// The number of a change of tables; later ones have higher numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Change(u64);

/// How a stretch is cleared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clear {
    /// What is read afterwards does not matter.
    Discard,
    /// Zeroes; the space may be freed.
    Unmap,
    /// Zeroes; the space stays.
    Zero,
}

#[derive(Debug, Default)]
struct Ledger {
    made: Change,
    settled: Change,
}

/// An open image.
#[derive(Debug)]
pub struct Image {
    access: FormatAccess<ImageFile>,
    pub(super) store: Arc<TableStore>,
    ledger: Mutex<Ledger>,
    unsettled: Unsettled,
    version: u32,
    cluster: u64,
    bytes: u64,
    /// Files that a flush must reach.
    written: Vec<Arc<File>>,
}

fn header_of(layer: &Layer, align: Align) -> Result<(Header, u64), ImageError> {
    let read = |source| ImageError::Read { name: layer.name.clone(), source };
    let bytes = rustix::fs::seek(&*layer.file, rustix::fs::SeekFrom::End(0)).map_err(|e| read(e.into()))?;
    let header = Header::read(&layer.file, align, bytes).map_err(read)?;
    let header = header.map_err(|source| ImageError::Header { name: layer.name.clone(), source })?;
    Ok((header, bytes))
}

/// Checks that exactly that was passed which an image names.
fn check_wants(layer: &Layer, header: &Header, backing: bool, data: bool) -> Result<(), ImageError> {
    let name = || layer.name.clone();
    match (&header.backing, backing) {
        (Some(wanted), false) => return Err(ImageError::WantsBacking { name: name(), wants: wanted.name.clone() }),
        (None, true) => return Err(ImageError::Surplus { name: name(), what: "a backing file" }),
        _ => {}
    }
    match (&header.data_file, data) {
        (Some(wanted), false) => {
            let wants = wanted.as_ref().map_or_else(|| "its name is not told".to_owned(), |n| format!("{n:?}"));
            Err(ImageError::WantsData { name: name(), wants })
        }
        (None, true) => Err(ImageError::Surplus { name: name(), what: "a data file" }),
        _ => Ok(()),
    }
}

/// Opens what an image stands on, farthest first.
fn open_backing(layers: &[Layer], align: Align) -> Result<Option<FormatAccess<ImageFile>>, ImageError> {
    let mut below: Option<FormatAccess<ImageFile>> = None;
    for layer in layers.iter().rev() {
        let read = |source| ImageError::Read { name: layer.name.clone(), source };
        let file = ImageFile::new(Arc::clone(&layer.file), Role::Fixed, align);
        below = Some(match layer.format {
            Format::Raw if below.is_some() => {
                return Err(ImageError::Surplus { name: layer.name.clone(), what: "a backing file" });
            }
            Format::Raw => FormatAccess::new(Raw::open_image(file, false).map_err(read)?),
            Format::Qcow2 => {
                let (header, bytes) = header_of(layer, align)?;
                check_wants(layer, &header, below.is_some(), false)?;
                let tables = Tables::read((&layer.file, align), bytes, &header, false).map_err(read)?;
                tables.map_err(|source| ImageError::Header { name: layer.name.clone(), source })?;
                let mut image = Qcow2::<ImageFile>::open_image(file, false).map_err(read)?;
                image.set_data_file(None);
                image.set_backing(below.take());
                FormatAccess::new(image)
            }
        });
    }
    Ok(below)
}

impl Image {
    /// Opens a chain. Nobody else may write to it any more, nor I/O of anybody be under way.
    pub fn open(chain: &Chain) -> Result<Self, ImageError> {
        let top = &chain.top;
        let read = |source| ImageError::Read { name: top.name.clone(), source };
        let unfit = |source| ImageError::Header { name: top.name.clone(), source };
        let (header, file_bytes) = header_of(top, chain.align)?;
        check_wants(top, &header, !chain.backing.is_empty(), chain.data.is_some())?;
        if !chain.read_only {
            header.writable().map_err(unfit)?;
        }
        let (cluster, unit) = (header.cluster(), chain.align.offset);
        if cluster < unit {
            return Err(ImageError::Alignment { name: top.name.clone(), cluster, unit });
        }
        let tables = Tables::read((&top.file, chain.align), file_bytes, &header, !chain.read_only);
        let tables = tables.map_err(read)?.map_err(unfit)?;
        let below = open_backing(&chain.backing, chain.align)?;
        let data_file = chain.data.as_ref().map(|data| Arc::clone(&data.file));
        let order = header.refcount_order;
        let store = TableStore::new(Arc::clone(&top.file), data_file.clone(), chain.align, tables, order);
        let store = Arc::new(store);
        let host = data_file.as_ref().unwrap_or(&top.file);
        let host_bytes = rustix::fs::seek(&**host, rustix::fs::SeekFrom::End(0)).map_err(|e| read(e.into()))?;
        let (tables_role, data_role) = if chain.read_only {
            (Role::Fixed, Role::Fixed)
        } else {
            let reached = host_bytes.checked_next_multiple_of(cluster).unwrap_or(u64::MAX);
            (Role::Tables(Arc::clone(&store)), Role::Data(Arc::clone(&store), reached.into()))
        };
        let tables_file = ImageFile::new(Arc::clone(&top.file), tables_role, chain.align);
        let mut image = Qcow2::<ImageFile>::open_image(tables_file, !chain.read_only).map_err(read)?;
        // A file object of its own for guest data, also where it is the same file: tables and data are written apart.
        image.set_data_file(Some(ImageFile::new(Arc::clone(host), data_role, chain.align)));
        image.set_backing(below);
        let opened = Self {
            access: FormatAccess::new(image),
            store,
            ledger: Mutex::default(),
            unsettled: Unsettled::new(cluster),
            version: header.version,
            cluster,
            bytes: header.bytes,
            written: std::iter::once(Arc::clone(&top.file)).chain(data_file).collect(),
        };
        if !chain.read_only {
            // imago clears the bits of features that it does not keep up (dirty bitmaps).
            opened.store.settle().map_err(read)?;
        }
        Ok(opened)
    }

    /// Bytes of the disk and of a cluster, by the header of an image that somebody may be serving: they never change.
    pub fn shape(chain: &Chain) -> Result<(u64, u64), ImageError> {
        header_of(&chain.top, chain.align).map(|(header, _)| (header.bytes, 1 << header.cluster_bits))
    }

    /// Bytes of the disk.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of a cluster: what is cleared in smaller parts is written.
    pub fn cluster(&self) -> u64 {
        self.cluster
    }

    /// The files that a flush must reach, the image itself first.
    pub fn written(&self) -> &[Arc<File>] {
        &self.written
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the disk from `offset` on lies, and how many bytes of `len` lie there. What is to be written must not be a
    /// table.
    pub fn place(&self, offset: u64, len: u64, write: bool) -> io::Result<(Place, u64)> {
        let (mapping, found) = self.access.get_mapping(offset, len)?;
        if found == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let place = match mapping {
            Mapping::Raw { storage, offset, writable, .. } => {
                if offset.checked_add(found).is_none_or(|end| i64::try_from(end).is_err()) {
                    return Err(io::Error::other("the image maps data beyond the end of any file"));
                }
                if write && writable {
                    self.store.refuse_tables(offset, offset + found)?;
                }
                Place::File { file: Arc::clone(&storage.file), offset, writable }
            }
            Mapping::Special { .. } => Place::Compressed,
            _ => Place::Zero,
        };
        Ok((place, found))
    }

    /// The change that made a stretch, whose place was asked for before, what it is now; none when that is in the file.
    /// Nothing that was done there counts before it is settled.
    pub fn last_change(&self, offset: u64, len: u64) -> Change {
        self.unsettled.last(offset..offset.saturating_add(len))
    }

    /// Reads, whatever lies there.
    pub fn read(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        self.access.read(out, offset)
    }

    /// Finds room for what is to be written at `offset`, lets `write` write there, and maps it. Gives how many bytes of
    /// `len` that were, and the change that must be settled before they count as written.
    pub fn allocate(
        &self,
        offset: u64,
        len: u64,
        write: impl FnOnce(&ImageFile, u64, u64) -> io::Result<()>,
    ) -> io::Result<(u64, Change)> {
        let mut ledger = self.ledger();
        let (mapping, len) = self.access.get_mapping(offset, len)?;
        let was_zero = matches!(mapping, Mapping::Zero { .. });
        // Compressed data is freed, what a snapshot shares is counted down.
        let gives_up = matches!(
            self.access.get_shallow_mapping(offset, len)?.0,
            ShallowMapping::Special { .. } | ShallowMapping::Raw { writable: false, .. }
        );
        let prepared = self.access.prepare_data_mapping(offset, len, true)?;
        let (file, host, len) = (prepared.storage(), prepared.offset(), prepared.length().min(len));
        let end = host.checked_add(len).ok_or(io::ErrorKind::InvalidData)?;
        file.before_data(&self.store, host, end)?;
        // After a loss of power the place must hold what was there before or what is written now. Only where zeroes
        // were, and nothing was ever written, is that so without waiting for the data.
        let as_before = was_zero && file.is_fresh(host);
        let written = write(file, host, len);
        file.reached(end);
        if !as_before {
            self.store.data_written();
        }
        written?;
        ledger.made.0 += 1;
        let change = ledger.made;
        self.unsettled.note(offset..offset + len, change);
        let reached = end.checked_next_multiple_of(self.cluster).ok_or(io::ErrorKind::InvalidData)?;
        let committed = self.access.commit_data_mapping(prepared);
        // From now on anything of the cluster may be written in place, without a word.
        file.reached(reached);
        committed?;
        if gives_up || self.store.is_urgent() {
            // What was given up must not be used again before that is in the file.
            self.settle_all(&mut ledger)?;
        }
        Ok((len, change))
    }

    /// Makes a stretch read as zeroes, without writing them. Gives the change, and what it could not do so: parts of
    /// clusters, which are to be written. What is discarded leaves nothing to be written.
    pub fn clear(&self, offset: u64, len: u64, how: Clear) -> io::Result<(Change, Vec<Range<u64>>)> {
        let mut ledger = self.ledger();
        let end = offset.saturating_add(len).min(self.bytes);
        let mut rest = Vec::new();
        let mut at = offset;
        while at < end {
            let (mapping, found) = self.access.get_shallow_mapping(at, end - at)?;
            if found == 0 {
                break;
            }
            let next = at.saturating_add(found).min(end);
            match mapping {
                ShallowMapping::Zero { .. } | ShallowMapping::Eof { .. } => {}
                ShallowMapping::Raw { storage, offset: host, writable, .. } => {
                    let held = writable.then_some((storage, host));
                    self.clear_part(&mut ledger, at..next, held, how, &mut rest)?;
                }
                _ => self.clear_part(&mut ledger, at..next, None, how, &mut rest)?,
            }
            at = next;
        }
        let change = ledger.made;
        if how == Clear::Discard {
            rest.clear();
        }
        Ok((change, rest))
    }

    /// Clears a stretch of one kind. `held` is where its own data lies.
    fn clear_part(
        &self,
        ledger: &mut Ledger,
        part: Range<u64>,
        held: Option<(&ImageFile, u64)>,
        how: Clear,
        rest: &mut Vec<Range<u64>>,
    ) -> io::Result<()> {
        let mask = self.cluster - 1;
        let first = (part.start + mask) & !mask;
        // The last cluster of the disk may be cut short.
        let last = if part.end == self.bytes { part.end } else { part.end & !mask };
        if first >= last {
            rest.push(part);
            return Ok(());
        }
        rest.extend([part.start..first, last..part.end].into_iter().filter(|range| !range.is_empty()));
        if self.version < 3 {
            // There are no zero clusters. Freed space is read as zeroes too; what is not ours must be written.
            match held {
                Some((file, host)) if how != Clear::Zero => {
                    match self.punch(file, host + (first - part.start), last - first) {
                        Err(e) if unsupported(&e) => rest.push(first..last),
                        done => done?,
                    }
                }
                _ => rest.push(first..last),
            }
            return Ok(());
        }
        let gives_up = held.is_none();
        let mut at = first;
        while at < last {
            ledger.made.0 += 1;
            self.unsettled.note(at..last, ledger.made);
            let (done_at, done) = self.access.inner().ensure_zero_mapping(at, last - at)?;
            if done == 0 || done_at != at {
                return Err(io::Error::other("a cluster cannot be made zero"));
            }
            at += done;
        }
        if gives_up {
            self.settle_all(ledger)?;
        }
        if let Some((file, host)) = held
            && how != Clear::Zero
        {
            match self.punch(file, host + (first - part.start), last - first) {
                // The space stays, the zeroes are there all the same.
                Err(e) if unsupported(&e) => {}
                done => done?,
            }
        }
        Ok(())
    }

    /// Writes zeroes, where none are read anyhow.
    pub fn write_zeroes(&self, range: Range<u64>) -> io::Result<Change> {
        static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
        let mut at = range.start;
        let mut change = Change::default();
        while at < range.end {
            let (mapping, found) = self.access.get_mapping(at, range.end - at)?;
            let part = found.min(range.end - at).min(ZEROES.len() as u64);
            let zeroes = |len: u64| ZEROES.get(..len as usize).unwrap_or(&ZEROES);
            if part == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            change = change.max(self.last_change(at, found));
            at += match mapping {
                Mapping::Zero { .. } => found,
                Mapping::Raw { storage, offset, writable: true, .. } => {
                    storage.write(zeroes(part), offset)?;
                    part
                }
                _ => {
                    let (done, made) = self.allocate(at, part, |file, host, len| file.write(zeroes(len), host))?;
                    change = change.max(made);
                    done
                }
            };
        }
        Ok(change)
    }

    fn punch(&self, file: &ImageFile, host: u64, len: u64) -> io::Result<()> {
        file.before_data(&self.store, host, host.saturating_add(len))?;
        self.store.data_written();
        #[cfg(test)]
        self.store.journal.zero(&file.file, host, len)?;
        file.punch(host, len)
    }

    fn settle_all(&self, ledger: &mut Ledger) -> io::Result<()> {
        // imago's caches into the store, the store into the file.
        self.access.flush()?;
        self.store.settle()?;
        ledger.settled = ledger.made;
        self.unsettled.settled(ledger.made);
        Ok(())
    }

    /// Whether a change has been carried out.
    pub fn is_settled(&self, change: Change) -> bool {
        self.ledger().settled >= change
    }

    /// Carries out all changes of tables up to `change`: afterwards they survive the death of this process.
    pub fn settle(&self, change: Change) -> io::Result<()> {
        let mut ledger = self.ledger();
        if ledger.settled >= change { Ok(()) } else { self.settle_all(&mut ledger) }
    }

    /// Carries out all changes there are.
    pub fn settle_made(&self) -> io::Result<()> {
        let mut ledger = self.ledger();
        if ledger.settled >= ledger.made { Ok(()) } else { self.settle_all(&mut ledger) }
    }

    /// Makes all that was written durable, on the calling thread.
    pub fn sync(&self) -> io::Result<()> {
        self.settle_made()?;
        self.store.sync()
    }
}
