//! The functions of libvirglrenderer 0.10.4 and later, and of EGL, looked up when they are wanted.
//!
//! A process that is going into a jail has to have loaded everything before it: [`Library::load`] also has EGL find its driver,
//! which opens files, and starts no thread.

#![allow(unsafe_code, reason = "functions of a C library")]

use std::ffi::{c_char, c_int, c_uint, c_void};

use libc::iovec;
use thiserror::Error;

use crate::render::Box3;

const VIRGL: &str = "libvirglrenderer.so.1";
const EGL: &str = "libEGL.so.1";
/// What the renderer's own loader asks for by name, later, when nothing can be opened any more.
const LATER: [&str; 3] = ["libGL.so.1", "libGLX.so.0", "libGLESv2.so.2"];
/// EGL_PLATFORM_SURFACELESS_MESA.
const SURFACELESS: c_uint = 0x31dd;

/// There is no renderer.
#[derive(Debug, Error)]
pub enum LibraryError {
    /// The library is not there, or not as it should be.
    #[error("3D needs {name}: {reason}; install the package {package}, or serve without --virgl")]
    Missing {
        /// The file.
        name: &'static str,
        /// What the loader said.
        reason: String,
        /// Debian's package of it.
        package: &'static str,
    },
    /// It is older than 0.10.4, or something else.
    #[error("{name} has no {symbol}: install {package} 0.10.4 or later, or serve without --virgl")]
    Symbol {
        /// The file.
        name: &'static str,
        /// The function.
        symbol: String,
        /// Debian's package of it.
        package: &'static str,
    },
    /// EGL has no driver.
    #[error("EGL has no driver that draws without a surface ({0}): install libgl1-mesa-dri, or serve without --virgl")]
    Egl(&'static str),
    /// The renderer does not start.
    #[error("the renderer does not start ({0}): is this host's Mesa complete? Serve without --virgl otherwise")]
    Init(c_int),
    /// It has no thread, or did not begin in time.
    #[error("the renderer's thread does not start: {0}")]
    Thread(String),
}

/// `struct virgl_renderer_callbacks`, version 1: fences, and contexts that are not ours to make.
#[repr(C)]
pub(super) struct Callbacks {
    pub(super) version: c_int,
    pub(super) write_fence: extern "C" fn(*mut c_void, u32),
    pub(super) others: [*const c_void; 4],
}

/// `struct virgl_renderer_resource_create_args`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct CreateArgs {
    pub(super) handle: u32,
    pub(super) target: u32,
    pub(super) format: u32,
    pub(super) bind: u32,
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) depth: u32,
    pub(super) array_size: u32,
    pub(super) last_level: u32,
    pub(super) samples: u32,
    pub(super) flags: u32,
}

/// `virgl_debug_callback_type`; the arguments are a `va_list`, which is passed by its address here.
pub(super) type Logger = extern "C" fn(*const c_char, *mut c_void);

/// Declares a table of functions and how it is filled.
macro_rules! functions {
    ($(#[$doc:meta])* $table:ident from $file:ident of $package:literal { $($name:ident = $symbol:literal: fn($($arg:ty),*) $(-> $out:ty)?;)* }) => {
        $(#[$doc])*
        pub(super) struct $table {
            $(pub(super) $name: unsafe extern "C" fn($($arg),*) $(-> $out)?,)*
        }

        impl $table {
            fn find(library: &libloading::Library) -> Result<Self, LibraryError> {
                Ok(Self {
                    $($name: {
                        // SAFETY: the type is that of the function in the library's header, and the library stays.
                        let found = unsafe { library.get::<unsafe extern "C" fn($($arg),*) $(-> $out)?>($symbol) };
                        let symbol = || String::from_utf8_lossy($symbol).into_owned();
                        *found.map_err(|_| LibraryError::Symbol { name: $file, symbol: symbol(), package: $package })?
                    },)*
                })
            }
        }
    };
}

functions! {
    /// What is called of the renderer.
    Functions from VIRGL of "libvirglrenderer1" {
        init = b"virgl_renderer_init": fn(*mut c_void, c_int, *mut Callbacks) -> c_int;
        poll = b"virgl_renderer_poll": fn();
        set_logger = b"virgl_set_debug_callback": fn(Option<Logger>) -> Option<Logger>;
        cap_set = b"virgl_renderer_get_cap_set": fn(u32, *mut u32, *mut u32);
        fill_caps = b"virgl_renderer_fill_caps": fn(u32, u32, *mut c_void);
        context_create = b"virgl_renderer_context_create": fn(u32, u32, *const c_char) -> c_int;
        context_destroy = b"virgl_renderer_context_destroy": fn(u32);
        context_attach = b"virgl_renderer_ctx_attach_resource": fn(c_int, c_int);
        context_detach = b"virgl_renderer_ctx_detach_resource": fn(c_int, c_int);
        resource_create = b"virgl_renderer_resource_create": fn(*mut CreateArgs, *mut iovec, u32) -> c_int;
        resource_unref = b"virgl_renderer_resource_unref": fn(u32);
        attach_iov = b"virgl_renderer_resource_attach_iov": fn(c_int, *mut iovec, c_int) -> c_int;
        detach_iov = b"virgl_renderer_resource_detach_iov": fn(c_int, *mut *mut iovec, *mut c_int);
        submit = b"virgl_renderer_submit_cmd": fn(*mut c_void, c_int, c_int) -> c_int;
        read_iov = b"virgl_renderer_transfer_read_iov": fn(u32, u32, u32, u32, u32, *mut Box3, u64, *mut iovec, c_int) -> c_int;
        write_iov = b"virgl_renderer_transfer_write_iov": fn(u32, u32, c_int, u32, u32, *mut Box3, u64, *mut iovec, c_uint) -> c_int;
        create_fence = b"virgl_renderer_create_fence": fn(c_int, u32) -> c_int;
    }
}

functions! {
    /// What is called of EGL.
    EglFunctions from EGL of "libegl1" {
        get_platform_display = b"eglGetPlatformDisplay": fn(c_uint, *mut c_void, *const isize) -> *mut c_void;
        initialize = b"eglInitialize": fn(*mut c_void, *mut i32, *mut i32) -> c_uint;
    }
}

/// A loaded renderer, which stays loaded.
pub struct Library {
    pub(super) functions: Functions,
}

/// How Mesa is to behave: it draws on the processors, also where there is a device that nobody has lent, and keeps no files.
const SETTINGS: [(&str, &str); 3] =
    [("LIBGL_ALWAYS_SOFTWARE", "1"), ("GALLIUM_DRIVER", "llvmpipe"), ("MESA_SHADER_CACHE_DISABLE", "true")];

fn load(name: &'static str, package: &'static str) -> Result<libloading::Library, LibraryError> {
    // SAFETY: what these libraries do when they are loaded is theirs to answer for; there is one thread, and the process has
    // opened nothing that they could disturb.
    let loaded = unsafe { libloading::Library::new(name) };
    loaded.map_err(|error| {
        // The loader's words come behind its own.
        let cause = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
        LibraryError::Missing { name, reason: cause, package }
    })
}

impl Library {
    /// Loads it, with the driver that it will draw with. To be called while there is one thread.
    ///
    /// # Errors
    /// [`LibraryError`], which names what to install.
    pub fn load() -> Result<Self, LibraryError> {
        for (name, value) in SETTINGS {
            // SAFETY: there is one thread, which reads no environment meanwhile.
            unsafe { std::env::set_var(name, value) };
        }
        let virgl = load(VIRGL, "libvirglrenderer1")?;
        let functions = Functions::find(&virgl)?;
        let egl = load(EGL, "libegl1")?;
        let egl_functions = EglFunctions::find(&egl)?;
        for name in LATER {
            match load(name, "libgl1") {
                Ok(library) => std::mem::forget(library),
                // The renderer has to do without, and says so if it cannot.
                Err(error) => tracing::debug!(%error, "a library that may not be needed"),
            }
        }
        // Functions and threads of theirs stay for as long as the process does.
        std::mem::forget((virgl, egl));
        // SAFETY: no attributes; the display is EGL's own.
        let display =
            unsafe { (egl_functions.get_platform_display)(SURFACELESS, std::ptr::null_mut(), std::ptr::null()) };
        if display.is_null() {
            return Err(LibraryError::Egl("no display"));
        }
        // SAFETY: it is a display, and the version is not asked for.
        let begun = unsafe { (egl_functions.initialize)(display, std::ptr::null_mut(), std::ptr::null_mut()) };
        if begun == 0 { Err(LibraryError::Egl("no driver")) } else { Ok(Self { functions }) }
    }
}
