//! The one thread that calls the renderer. Everybody else hands it what is to be done, and waits.
//!
//! Who waits does so for a bounded time: a renderer that does not return cannot be helped, and a successor of the process can. That
//! is also what makes it sound to lend it what stands on the caller's stack: either the work is done, or there is no caller any
//! more.

#![allow(unsafe_code, reason = "work is lent to a thread; the process ends without the library's leave")]

use std::ffi::{c_int, c_void};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use atoll_protocol::display::Rect;

use super::library::{Library, LibraryError};
use super::renderer::Virgl;
use crate::render::{Capset, Failed, Pinned, Render, Shape, Transfer};

/// How long one thing may take, with what others have asked for before it. A supervisor replaces a device that stands still for
/// 30 s; this says why.
const WORK_MAX: Duration = Duration::from_secs(20);
/// How long the renderer may take to start; it translates its first programs then.
const START_MAX: Duration = Duration::from_secs(30);
/// The exit status of a process whose renderer does not return.
pub const EXIT_HANGS: i32 = 73;
/// Works that wait, at most: each caller waits for one.
const WORKS_MAX: usize = 16;
/// Bytes of its stack: compilers are called on it.
const STACK: usize = 8 << 20;

type Work = Box<dyn FnOnce(&mut Virgl) + Send>;

/// The renderer, for all threads.
pub struct Renderer {
    works: SyncSender<Work>,
    capsets: Vec<Capset>,
}

unsafe extern "C" {
    fn on_exit(function: extern "C" fn(c_int, *mut c_void), argument: *mut c_void) -> c_int;
}

/// What the libraries would do at the end of a process they would do while their threads run.
extern "C" fn leave_at_once(status: c_int, _: *mut c_void) {
    // SAFETY: it ends the process.
    unsafe { libc::_exit(status) }
}

impl Renderer {
    /// Starts the thread and the renderer on it, and has it draw something, so that all that it makes once is made.
    ///
    /// # Errors
    /// [`LibraryError`].
    pub fn start(library: Library) -> Result<Self, LibraryError> {
        let (works, to_do) = sync_channel::<Work>(WORKS_MAX);
        let (ready, is_ready) = sync_channel(1);
        let run = move || serve(library, &ready, &to_do);
        let thread = std::thread::Builder::new().name("renderer".to_owned()).stack_size(STACK).spawn(run);
        thread.map_err(|error| LibraryError::Thread(error.to_string()))?;
        let started = is_ready.recv_timeout(START_MAX);
        let capsets = started.map_err(|_| LibraryError::Thread("it is not ready in time".into()))??;
        // SAFETY: the function lives for ever, and the argument is not used. It comes before those that the libraries have
        // registered.
        unsafe { on_exit(leave_at_once, std::ptr::null_mut()) };
        Ok(Self { works, capsets })
    }

    /// Has the thread do it.
    fn run<R: Send>(&self, work: impl FnOnce(&mut Virgl) -> R + Send) -> R {
        let (done, is_done) = sync_channel(1);
        let work: Box<dyn FnOnce(&mut Virgl) + Send + '_> = Box::new(move |virgl| {
            // Who asked waits.
            let _ = done.send(work(virgl));
        });
        // SAFETY: what the work borrows outlives it: this function returns when the work has been done and dropped, or with
        // the process.
        let work: Work = unsafe { std::mem::transmute(work) };
        if self.works.send(work).is_err() {
            end("the renderer's thread is gone");
        }
        match is_done.recv_timeout(WORK_MAX) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => {
                end("the renderer does not return; a successor begins without what it drew")
            }
            Err(RecvTimeoutError::Disconnected) => end("the renderer's thread is gone"),
        }
    }
}

fn end(why: &str) -> ! {
    tracing::error!("{why}");
    // SAFETY: it ends the process, and nothing of the library's runs for it.
    unsafe { libc::_exit(EXIT_HANGS) }
}

fn serve(library: Library, ready: &SyncSender<Result<Vec<Capset>, LibraryError>>, to_do: &Receiver<Work>) {
    let mut virgl = match Virgl::start(library) {
        Ok(virgl) => virgl,
        Err(error) => {
            let _ = ready.send(Err(error));
            return;
        }
    };
    super::warm_up::run(&mut virgl);
    let _ = ready.send(Ok(virgl.capsets()));
    while let Ok(work) = to_do.recv() {
        work(&mut virgl);
    }
}

impl Render for Renderer {
    fn capsets(&self) -> &[Capset] {
        &self.capsets
    }
    fn create_context(&self, id: u32, name: &[u8]) -> Result<(), Failed> {
        self.run(|virgl| virgl.create_context(id, name))
    }
    fn destroy_context(&self, id: u32) {
        self.run(|virgl| virgl.destroy_context(id));
    }
    fn create(&self, id: u32, shape: &Shape) -> Result<(), Failed> {
        self.run(|virgl| virgl.create(id, shape))
    }
    fn unref(&self, id: u32) {
        self.run(|virgl| virgl.unref(id));
    }
    fn attach(&self, id: u32, backing: Pinned) -> Result<(), Failed> {
        self.run(move |virgl| virgl.attach(id, backing))
    }
    fn detach(&self, id: u32) {
        self.run(|virgl| virgl.detach(id));
    }
    fn join(&self, context: u32, id: u32) {
        self.run(|virgl| virgl.join(context, id));
    }
    fn part(&self, context: u32, id: u32) {
        self.run(|virgl| virgl.part(context, id));
    }
    fn submit(&self, context: u32, stream: &mut [u32]) -> Result<(), Failed> {
        self.run(|virgl| virgl.submit(context, stream))
    }
    fn transfer(&self, transfer: &Transfer) -> Result<(), Failed> {
        self.run(|virgl| virgl.transfer(transfer))
    }
    fn read(&self, id: u32, rect: Rect, out: &mut [u8]) -> Result<(), Failed> {
        self.run(|virgl| virgl.read(id, rect, out))
    }
    fn write(&self, id: u32, rect: Rect, pixels: &mut [u8]) -> Result<(), Failed> {
        self.run(|virgl| virgl.write(id, rect, pixels))
    }
    fn finish(&self) {
        self.run(Virgl::finish);
    }
}
