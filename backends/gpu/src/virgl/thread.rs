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

/// The exit status of a process whose renderer does not return.
pub const EXIT_HANGS: i32 = 73;
/// Works that wait, at most: each caller waits for one.
const WORKS_MAX: usize = 16;
/// Bytes of its stack: compilers are called on it.
const STACK: usize = 8 << 20;

/// How long the renderer may take.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// To start; it translates its first programs then.
    start: Duration,
    /// For one thing, with what others have asked for before it. A supervisor replaces a device that stands still for 30 s; this
    /// says why.
    work: Duration,
}

const LIMITS: Limits = Limits { start: Duration::from_secs(30), work: Duration::from_secs(20) };

type Work<T> = Box<dyn FnOnce(&mut T) + Send>;

/// A thread that has `T`, and does to it what others ask for.
struct Hand<T> {
    works: SyncSender<Work<T>>,
    work_max: Duration,
}

impl<T: 'static> Hand<T> {
    /// Starts the thread, has it make `T` there, and says what there is to say of it.
    fn start<R: Send + 'static>(
        limits: Limits,
        make: impl FnOnce() -> Result<(T, R), LibraryError> + Send + 'static,
    ) -> Result<(Self, R), LibraryError> {
        let (works, to_do) = sync_channel::<Work<T>>(WORKS_MAX);
        let (ready, is_ready) = sync_channel(1);
        let run = move || serve(make, &ready, &to_do);
        let thread = std::thread::Builder::new().name("renderer".to_owned()).stack_size(STACK).spawn(run);
        thread.map_err(|error| LibraryError::Thread(error.to_string()))?;
        let started = is_ready.recv_timeout(limits.start);
        let told = started.map_err(|_| LibraryError::Thread("it is not ready in time".into()))??;
        Ok((Self { works, work_max: limits.work }, told))
    }

    /// Has the thread do it. A thread that does not do it in time ends the process.
    fn run<R: Send>(&self, work: impl FnOnce(&mut T) -> R + Send) -> R {
        let (done, is_done) = sync_channel(1);
        let work: Box<dyn FnOnce(&mut T) + Send + '_> = Box::new(move |it| {
            // Who asked waits.
            let _ = done.send(work(it));
        });
        // SAFETY: what the work borrows outlives it: this function returns when the work has been done and dropped, or with
        // the process.
        let work: Work<T> = unsafe { std::mem::transmute(work) };
        if self.works.send(work).is_err() {
            end("the renderer's thread is gone");
        }
        match is_done.recv_timeout(self.work_max) {
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

fn serve<T, R>(
    make: impl FnOnce() -> Result<(T, R), LibraryError>,
    ready: &SyncSender<Result<R, LibraryError>>,
    to_do: &Receiver<Work<T>>,
) {
    let (mut it, told) = match make() {
        Ok(made) => made,
        Err(error) => {
            let _ = ready.send(Err(error));
            return;
        }
    };
    let _ = ready.send(Ok(told));
    while let Ok(work) = to_do.recv() {
        work(&mut it);
    }
}

unsafe extern "C" {
    fn on_exit(function: extern "C" fn(c_int, *mut c_void), argument: *mut c_void) -> c_int;
}

/// What the libraries would do at the end of a process they would do while their threads run.
extern "C" fn leave_at_once(status: c_int, _: *mut c_void) {
    // SAFETY: it ends the process.
    unsafe { libc::_exit(status) }
}

/// The renderer, for all threads.
pub struct Renderer {
    hand: Hand<Virgl>,
    capsets: Vec<Capset>,
}

impl Renderer {
    /// Starts the thread and the renderer on it, and has it draw something, so that all that it makes once is made.
    ///
    /// # Errors
    /// [`LibraryError`].
    pub fn start(library: Library) -> Result<Self, LibraryError> {
        let (hand, capsets) = Hand::start(LIMITS, move || {
            let mut virgl = Virgl::start(library)?;
            super::warm_up::run(&mut virgl);
            let capsets = virgl.capsets();
            Ok((virgl, capsets))
        })?;
        // SAFETY: the function lives for ever, and the argument is not used. It comes before those that the libraries have
        // registered.
        unsafe { on_exit(leave_at_once, std::ptr::null_mut()) };
        Ok(Self { hand, capsets })
    }
}

impl Render for Renderer {
    fn capsets(&self) -> &[Capset] {
        &self.capsets
    }
    fn create_context(&self, id: u32, name: &[u8]) -> Result<(), Failed> {
        self.hand.run(|virgl| virgl.create_context(id, name))
    }
    fn destroy_context(&self, id: u32) {
        self.hand.run(|virgl| virgl.destroy_context(id));
    }
    fn create(&self, id: u32, shape: &Shape) -> Result<(), Failed> {
        self.hand.run(|virgl| virgl.create(id, shape))
    }
    fn unref(&self, id: u32) {
        self.hand.run(|virgl| virgl.unref(id));
    }
    fn attach(&self, id: u32, backing: Pinned) -> Result<(), Failed> {
        self.hand.run(move |virgl| virgl.attach(id, backing))
    }
    fn detach(&self, id: u32) {
        self.hand.run(|virgl| virgl.detach(id));
    }
    fn join(&self, context: u32, id: u32) {
        self.hand.run(|virgl| virgl.join(context, id));
    }
    fn part(&self, context: u32, id: u32) {
        self.hand.run(|virgl| virgl.part(context, id));
    }
    fn submit(&self, context: u32, stream: &mut [u32]) -> Result<(), Failed> {
        self.hand.run(|virgl| virgl.submit(context, stream))
    }
    fn transfer(&self, transfer: &Transfer) -> Result<(), Failed> {
        self.hand.run(|virgl| virgl.transfer(transfer))
    }
    fn read(&self, id: u32, rect: Rect, out: &mut [u8]) -> Result<(), Failed> {
        self.hand.run(|virgl| virgl.read(id, rect, out))
    }
    fn write(&self, id: u32, rect: Rect, pixels: &mut [u8]) -> Result<(), Failed> {
        self.hand.run(|virgl| virgl.write(id, rect, pixels))
    }
    fn finish(&self) {
        self.hand.run(Virgl::finish);
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::sync::Arc;
    use std::time::Instant;

    use super::*;

    const BRIEF: Limits = Limits { start: Duration::from_secs(2), work: Duration::from_secs(2) };
    /// Says to a process of this program what is to happen in it.
    const HOW: &str = "ATOLL_TEST_RENDERER";

    /// What a process does whose renderer does that.
    fn play(how: &str) {
        let (hand, ()) = Hand::start(BRIEF, || Ok((0_u32, ()))).unwrap();
        let hand = Arc::new(hand);
        match how {
            // Whoever asks behind it waits no longer than it.
            "hangs" => {
                let first = Arc::clone(&hand);
                let (begun, has_begun) = sync_channel(1);
                std::thread::spawn(move || {
                    first.run(|_| {
                        begun.send(()).unwrap();
                        std::thread::sleep(Duration::from_secs(600));
                    });
                });
                has_begun.recv().unwrap();
                hand.run(|it| *it += 1);
            }
            "panics" => hand.run(|_| panic!("a renderer that gives up")),
            // Each of many takes its time, and nobody too long.
            _ => (0..45).for_each(|_| hand.run(|_| std::thread::sleep(Duration::from_millis(50)))),
        }
    }

    /// A guest's stream that keeps the renderer busy for ever would have kept its queue so, too, without a word. A process whose
    /// renderer does not return, or is no more, ends with a status of its own, soon after the limit; one that is slow goes on.
    #[test]
    fn a_renderer_that_does_not_return_ends_the_process() {
        if let Ok(how) = std::env::var(HOW) {
            return play(&how);
        }
        let name = "virgl::thread::tests::a_renderer_that_does_not_return_ends_the_process";
        for (how, status) in [("hangs", EXIT_HANGS), ("panics", EXIT_HANGS), ("is slow", 0)] {
            let began = Instant::now();
            let mut child = Command::new(std::env::current_exe().unwrap());
            let child = child.args([name, "--exact"]).env(HOW, how).stdout(Stdio::null()).stderr(Stdio::null());
            assert_eq!(child.status().unwrap().code(), Some(status), "{how}");
            // The process' own start is in it.
            assert!(began.elapsed() < 20 * BRIEF.work, "{how}: {:?}", began.elapsed());
        }
    }

    /// One that does not start is an error, in time.
    #[test]
    fn a_renderer_that_does_not_start_is_told() {
        let limits = Limits { start: Duration::from_millis(100), ..BRIEF };
        let hangs = Hand::<()>::start(limits, || {
            std::thread::sleep(Duration::from_secs(600));
            Ok(((), ()))
        });
        assert!(matches!(hangs, Err(LibraryError::Thread(why)) if why.contains("in time")));
    }
}
