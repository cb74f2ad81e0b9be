//! The renderer with what its functions demand: one thread, ids that are known, and memory that stays for as long as it is lent.
//!
//! The library keeps the addresses of a backing until it is told to forget them. They are kept alive here until then: a backing
//! owns the mapping that it points into ([`Pinned`]), and is dropped only after the library has let go of it. Resources that
//! the guest gives up may live on in the library, in a framebuffer for one: their backing is taken away first.

#![allow(unsafe_code, reason = "functions of a C library")]

use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_void};
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use atoll_protocol::display::{PIXEL_BYTES, Rect};
use libc::iovec;

use super::library::{Callbacks, CreateArgs, Library, LibraryError};
use crate::render::{Box3, Capset, Failed, Pinned, Shape, Transfer};

/// USE_EGL, THREAD_SYNC, USE_SURFACELESS, ASYNC_FENCE_CB.
const FLAGS: c_int = 1 | 1 << 1 | 1 << 3 | 1 << 8;
/// VIRGL and VIRGL2.
const CAPSETS: [u32; 2] = [1, 2];
/// Most bytes that a capability set may have.
const CAPSET_MAX: u32 = 64 << 10;
/// Where VIRGL2 has its second word of abilities, and one of them: that data is copied back within a stream, which the dirty
/// log would not see.
const ABILITIES_AT: usize = 688;
const COPIES_BACK: u8 = 1 << 7;
/// How long to wait before the library is asked to look after queries, without which fences do not end.
const LOOK_AFTER: Duration = Duration::from_micros(500);

/// The last fence that is over. The library tells of it on a thread of its own.
static FENCE: Mutex<u32> = Mutex::new(0);
static FENCED: Condvar = Condvar::new();
/// Lines that the library would have said, most of them about streams.
static LINES: AtomicU64 = AtomicU64::new(0);

extern "C" fn write_fence(_cookie: *mut c_void, fence: u32) {
    *FENCE.lock().unwrap_or_else(PoisonError::into_inner) = fence;
    FENCED.notify_all();
}

/// A guest decides how much the library has to say: it is counted, and a line is said at each power of two.
extern "C" fn log(format: *const c_char, _arguments: *mut c_void) {
    let count = LINES.fetch_add(1, Ordering::Relaxed) + 1;
    if count.is_power_of_two() && !format.is_null() {
        // SAFETY: the library hands over a string of its own.
        let said = unsafe { std::ffi::CStr::from_ptr(format) }.to_string_lossy();
        tracing::debug!(count, said = said.trim_end(), "the renderer has something to say");
    }
}

/// What is lent for one resource. The boxed list is what the library points to.
struct Lent {
    pieces: Box<[iovec]>,
    _memory: Pinned,
}

/// The renderer. It stays on the thread that made it.
pub struct Virgl {
    library: Library,
    lent: HashMap<u32, Lent>,
    fence: u32,
    _here: PhantomData<*const ()>,
}

fn outcome(code: c_int) -> Result<(), Failed> {
    if code == 0 { Ok(()) } else { Err(Failed(code)) }
}

fn over(bytes: &mut [u8]) -> iovec {
    iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
}

impl Virgl {
    /// Starts it on this thread. Once in the life of a process: it keeps its state in variables of its own.
    ///
    /// # Errors
    /// [`LibraryError::Init`].
    pub(super) fn start(library: Library) -> Result<Self, LibraryError> {
        let callbacks = Callbacks { version: 1, write_fence, others: [std::ptr::null(); 4] };
        let callbacks = Box::leak(Box::new(callbacks));
        // SAFETY: the table lives for ever, and is of the version that it says; the cookie only must not be null.
        let code = unsafe {
            (library.functions.set_logger)(Some(log));
            (library.functions.init)(std::ptr::from_mut(callbacks).cast(), FLAGS, callbacks)
        };
        if code != 0 {
            return Err(LibraryError::Init(code));
        }
        Ok(Self { library, lent: HashMap::new(), fence: 0, _here: PhantomData })
    }

    /// What it can do.
    pub(super) fn capsets(&self) -> Vec<Capset> {
        let capset = |id: u32| {
            let (mut version, mut len) = (0, 0);
            // SAFETY: both are numbers of ours.
            unsafe { (self.library.functions.cap_set)(id, &raw mut version, &raw mut len) };
            if len == 0 || len > CAPSET_MAX {
                return None;
            }
            // In words, as what is written there is.
            let mut words = vec![0_u32; (len as usize).div_ceil(4)];
            // SAFETY: it writes as many bytes as it has said.
            unsafe { (self.library.functions.fill_caps)(id, version, words.as_mut_ptr().cast()) };
            let mut bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).take(len as usize).collect();
            if let (2, Some(abilities)) = (id, bytes.get_mut(ABILITIES_AT)) {
                *abilities &= !COPIES_BACK;
            }
            Some(Capset { id, version, bytes: bytes.into() })
        };
        CAPSETS.into_iter().filter_map(capset).collect()
    }

    pub(super) fn create_context(&mut self, id: u32, name: &[u8]) -> Result<(), Failed> {
        // SAFETY: it copies so many bytes.
        outcome(unsafe { (self.library.functions.context_create)(id, name.len() as u32, name.as_ptr().cast()) })
    }

    pub(super) fn destroy_context(&mut self, id: u32) {
        // SAFETY: numbers; one that it does not know it ignores.
        unsafe { (self.library.functions.context_destroy)(id) };
    }

    pub(super) fn create(&mut self, id: u32, shape: &Shape) -> Result<(), Failed> {
        let Shape { target, format, bind, width, height, depth, array_size, last_level, samples, flags } = *shape;
        let mut args = CreateArgs {
            handle: id,
            target,
            format,
            bind,
            width,
            height,
            depth,
            array_size,
            last_level,
            samples,
            flags,
        };
        // SAFETY: it reads the arguments; there is no backing yet.
        outcome(unsafe { (self.library.functions.resource_create)(&raw mut args, std::ptr::null_mut(), 0) })
    }

    pub(super) fn unref(&mut self, id: u32) {
        self.detach(id);
        // SAFETY: numbers; one that it does not know it ignores.
        unsafe { (self.library.functions.resource_unref)(id) };
    }

    pub(super) fn attach(&mut self, id: u32, memory: Pinned) -> Result<(), Failed> {
        self.detach(id);
        let piece = |&(addr, len): &(usize, usize)| iovec {
            iov_base: std::ptr::with_exposed_provenance_mut(addr),
            iov_len: len,
        };
        let mut pieces: Box<[iovec]> = memory.pieces().iter().map(piece).collect();
        if pieces.is_empty() {
            return Ok(());
        }
        // SAFETY: the list and what it points to are kept until the library is told to forget them, in `detach`; the memory is
        // shared with a guest, which the library expects.
        let code =
            unsafe { (self.library.functions.attach_iov)(id as c_int, pieces.as_mut_ptr(), pieces.len() as c_int) };
        outcome(code)?;
        self.lent.insert(id, Lent { pieces, _memory: memory });
        Ok(())
    }

    pub(super) fn detach(&mut self, id: u32) {
        let Some(lent) = self.lent.remove(&id) else { return };
        // SAFETY: where the list is wanted back it is not asked.
        unsafe { (self.library.functions.detach_iov)(id as c_int, std::ptr::null_mut(), std::ptr::null_mut()) };
        // Only now: until here the library had its address.
        drop(lent.pieces);
    }

    pub(super) fn join(&mut self, context: u32, id: u32) {
        // SAFETY: numbers; those that it does not know it ignores.
        unsafe { (self.library.functions.context_attach)(context as c_int, id as c_int) };
    }

    pub(super) fn part(&mut self, context: u32, id: u32) {
        // SAFETY: as above.
        unsafe { (self.library.functions.context_detach)(context as c_int, id as c_int) };
    }

    pub(super) fn submit(&mut self, context: u32, stream: &mut [u32]) -> Result<(), Failed> {
        // SAFETY: so many words, which are nobody else's, the guest's least of all.
        let code = unsafe {
            (self.library.functions.submit)(stream.as_mut_ptr().cast(), context as c_int, stream.len() as c_int)
        };
        outcome(code)
    }

    pub(super) fn transfer(&mut self, transfer: &Transfer) -> Result<(), Failed> {
        let Transfer { id, context, mut area, level, stride, layer_stride, offset, to_host } = *transfer;
        let (none, area) = (std::ptr::null_mut(), &raw mut area);
        let (read, write) = (self.library.functions.read_iov, self.library.functions.write_iov);
        // SAFETY: it uses the backing that it was lent, and checks the box and the offset against it.
        outcome(unsafe {
            if to_host {
                write(id, context, level as c_int, stride, layer_stride, area, offset, none, 0)
            } else {
                read(id, context, level, stride, layer_stride, area, offset, none, 0)
            }
        })
    }

    pub(super) fn read(&mut self, id: u32, rect: Rect, out: &mut [u8]) -> Result<(), Failed> {
        let (stride, mut area, mut piece) = (rect.width * PIXEL_BYTES as u32, Box3::from(rect), over(out));
        let (area, piece) = (&raw mut area, &raw mut piece);
        // SAFETY: it writes within the piece, whose length it knows.
        outcome(unsafe { (self.library.functions.read_iov)(id, 0, 0, stride, 0, area, 0, piece, 1) })
    }

    pub(super) fn write(&mut self, id: u32, rect: Rect, pixels: &mut [u8]) -> Result<(), Failed> {
        let (stride, mut area, mut piece) = (rect.width * PIXEL_BYTES as u32, Box3::from(rect), over(pixels));
        let (area, piece) = (&raw mut area, &raw mut piece);
        // SAFETY: it reads within the piece, whose length it knows.
        outcome(unsafe { (self.library.functions.write_iov)(id, 0, 0, stride, 0, area, 0, piece, 1) })
    }

    /// Returns when all is drawn. What never is is the caller's to notice.
    pub(super) fn finish(&mut self) {
        self.fence = self.fence.wrapping_add(1);
        let wanted = self.fence;
        // SAFETY: numbers.
        if unsafe { (self.library.functions.create_fence)(wanted as c_int, 0) } != 0 {
            return;
        }
        let mut over = FENCE.lock().unwrap_or_else(PoisonError::into_inner);
        while (wanted.wrapping_sub(*over) as i32) > 0 {
            let (guard, waited) = FENCED.wait_timeout(over, LOOK_AFTER).unwrap_or_else(PoisonError::into_inner);
            over = guard;
            if waited.timed_out() {
                drop(over);
                // SAFETY: no arguments; it is this thread's to call.
                unsafe { (self.library.functions.poll)() };
                over = FENCE.lock().unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}
