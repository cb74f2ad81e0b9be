//! EGL and GLES 2, loaded where the program runs: what is built needs neither.
#![allow(unsafe_code, reason = "EGL and GLES are C libraries; every call to them is in this file")]

use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr;

use anyhow::{Context, Result, bail, ensure};
use libloading::Library;

type Int = i32;
type Name = u32;

const EGL_PLATFORM_SURFACELESS: u32 = 0x31dd;
const EGL_OPENGL_ES_API: u32 = 0x30a0;
const EGL_NONE: Int = 0x3038;
const EGL_SURFACE_TYPE: Int = 0x3033;
const EGL_PBUFFER_BIT: Int = 1;
const EGL_RENDERABLE_TYPE: Int = 0x3040;
const EGL_OPENGL_ES2_BIT: Int = 4;
const EGL_CONTEXT_CLIENT_VERSION: Int = 0x3098;

const GL_TRIANGLES: u32 = 4;
const GL_UNSIGNED_BYTE: u32 = 0x1401;
const GL_FLOAT: u32 = 0x1406;
const GL_RGBA: u32 = 0x1908;
const GL_RENDERER: u32 = 0x1f01;
const GL_TEXTURE_2D: u32 = 0xde1;
const GL_TEXTURE_MIN_FILTER: u32 = 0x2801;
const GL_NEAREST: Int = 0x2600;
const GL_FRAMEBUFFER: u32 = 0x8d40;
const GL_COLOR_ATTACHMENT0: u32 = 0x8ce0;
const GL_FRAMEBUFFER_COMPLETE: u32 = 0x8cd5;
const GL_FRAGMENT_SHADER: u32 = 0x8b30;
const GL_VERTEX_SHADER: u32 = 0x8b31;
const GL_LINK_STATUS: u32 = 0x8b82;
const GL_COLOR_BUFFER_BIT: u32 = 0x4000;

const VERTEX: &str = "
attribute vec2 place;
attribute vec3 colour;
varying vec3 shade;
void main() { shade = colour; gl_Position = vec4(place, 0.0, 1.0); }
";
const FRAGMENT: &str = "
precision mediump float;
varying vec3 shade;
void main() { gl_FragColor = vec4(shade, 1.0); }
";
/// Place and colour of each corner.
static CORNERS: [[f32; 5]; 3] =
    [[-0.75, -0.75, 1.0, 0.0, 0.0], [0.75, -0.75, 0.0, 1.0, 0.0], [0.0, 0.75, 0.0, 0.0, 1.0]];
const STRIDE: Int = 20;
const PLACE: Name = 0;
const COLOUR: Name = 1;

/// What came of it.
pub(crate) struct Drawing {
    /// GL_RENDERER.
    pub(crate) renderer: String,
    /// Red, green, blue and alpha of each pixel, from the lowest row on.
    pub(crate) pixels: Vec<u8>,
}

/// Declares functions of a library as a structure that has them all.
macro_rules! functions {
    ($(#[$doc:meta])* $table:ident { $($name:ident: $symbol:literal fn($($argument:ty),*) $(-> $result:ty)?;)* }) => {
        $(#[$doc])*
        struct $table {
            $($name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
            _library: Library,
        }
        impl $table {
            fn load(file: &str) -> Result<Self> {
                // SAFETY: a library of the system's, whose initialisers are meant to be run by any program.
                let library = unsafe { Library::new(file) }.with_context(|| format!("cannot load {file}"))?;
                Ok(Self {
                    // SAFETY: the type is the function's in the Khronos registry, and the library lives as long as the table.
                    $($name: *unsafe { library.get($symbol) }.with_context(|| {
                        format!("{file} has no {}", stringify!($name))
                    })?,)*
                    _library: library,
                })
            }
        }
    };
}

functions! {
    /// EGL 1.5.
    Egl {
        get_platform_display: b"eglGetPlatformDisplay\0" fn(u32, *mut c_void, *const isize) -> *mut c_void;
        initialize: b"eglInitialize\0" fn(*mut c_void, *mut Int, *mut Int) -> u32;
        bind_api: b"eglBindAPI\0" fn(u32) -> u32;
        choose_config: b"eglChooseConfig\0" fn(*mut c_void, *const Int, *mut *mut c_void, Int, *mut Int) -> u32;
        create_context: b"eglCreateContext\0" fn(*mut c_void, *mut c_void, *mut c_void, *const Int) -> *mut c_void;
        make_current: b"eglMakeCurrent\0" fn(*mut c_void, *mut c_void, *mut c_void, *mut c_void) -> u32;
        terminate: b"eglTerminate\0" fn(*mut c_void) -> u32;
    }
}

functions! {
    /// GLES 2.
    Gles {
        get_string: b"glGetString\0" fn(u32) -> *const c_char;
        get_error: b"glGetError\0" fn() -> u32;
        gen_textures: b"glGenTextures\0" fn(Int, *mut Name);
        bind_texture: b"glBindTexture\0" fn(u32, Name);
        tex_parameter: b"glTexParameteri\0" fn(u32, u32, Int);
        tex_image: b"glTexImage2D\0" fn(u32, Int, Int, Int, Int, Int, u32, u32, *const c_void);
        gen_framebuffers: b"glGenFramebuffers\0" fn(Int, *mut Name);
        bind_framebuffer: b"glBindFramebuffer\0" fn(u32, Name);
        framebuffer_texture: b"glFramebufferTexture2D\0" fn(u32, u32, u32, Name, Int);
        check_framebuffer: b"glCheckFramebufferStatus\0" fn(u32) -> u32;
        create_shader: b"glCreateShader\0" fn(u32) -> Name;
        shader_source: b"glShaderSource\0" fn(Name, Int, *const *const c_char, *const Int);
        compile_shader: b"glCompileShader\0" fn(Name);
        create_program: b"glCreateProgram\0" fn() -> Name;
        attach_shader: b"glAttachShader\0" fn(Name, Name);
        bind_attribute: b"glBindAttribLocation\0" fn(Name, Name, *const c_char);
        link_program: b"glLinkProgram\0" fn(Name);
        get_program: b"glGetProgramiv\0" fn(Name, u32, *mut Int);
        use_program: b"glUseProgram\0" fn(Name);
        attribute_pointer: b"glVertexAttribPointer\0" fn(Name, Int, u32, u8, Int, *const c_void);
        enable_attribute: b"glEnableVertexAttribArray\0" fn(Name);
        viewport: b"glViewport\0" fn(Int, Int, Int, Int);
        clear_colour: b"glClearColor\0" fn(f32, f32, f32, f32);
        clear: b"glClear\0" fn(u32);
        draw_arrays: b"glDrawArrays\0" fn(u32, Int, Int);
        read_pixels: b"glReadPixels\0" fn(Int, Int, Int, Int, u32, u32, *mut c_void);
    }
}

/// A context that is current in this thread, without a window; gone with its owner.
struct Current {
    egl: Egl,
    display: *mut c_void,
}

impl Current {
    fn new() -> Result<Self> {
        let egl = Egl::load("libEGL.so.1")?;
        // SAFETY: EGL_DEFAULT_DISPLAY and no attributes.
        let display = unsafe { (egl.get_platform_display)(EGL_PLATFORM_SURFACELESS, ptr::null_mut(), ptr::null()) };
        ensure!(!display.is_null(), "EGL has no platform without windows");
        let current = Self { egl, display };
        let egl = &current.egl;
        // SAFETY: the display is there; versions are not asked for.
        let begun = unsafe { (egl.initialize)(display, ptr::null_mut(), ptr::null_mut()) };
        ensure!(begun == 1, "EGL does not start");
        // SAFETY: any value is checked by EGL.
        ensure!(unsafe { (egl.bind_api)(EGL_OPENGL_ES_API) } == 1, "EGL has no GLES");
        let wanted = [EGL_SURFACE_TYPE, EGL_PBUFFER_BIT, EGL_RENDERABLE_TYPE, EGL_OPENGL_ES2_BIT, EGL_NONE];
        let (mut config, mut count) = (ptr::null_mut(), 0);
        // SAFETY: the list ends with EGL_NONE, and there is room for the one that is asked for.
        let chosen = unsafe { (egl.choose_config)(display, wanted.as_ptr(), &raw mut config, 1, &raw mut count) };
        ensure!(chosen == 1 && count == 1, "EGL has no configuration for GLES 2");
        let attributes = [EGL_CONTEXT_CLIENT_VERSION, 2, EGL_NONE];
        // SAFETY: display and configuration belong together, the list ends with EGL_NONE.
        let context = unsafe { (egl.create_context)(display, config, ptr::null_mut(), attributes.as_ptr()) };
        ensure!(!context.is_null(), "EGL has no context for GLES 2");
        // SAFETY: no surface (EGL_KHR_surfaceless_context), a context of this display's.
        let current_now = unsafe { (egl.make_current)(display, ptr::null_mut(), ptr::null_mut(), context) };
        ensure!(current_now == 1, "EGL's context needs a surface");
        Ok(current)
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        // SAFETY: the display was given by this library, and nothing of it is used any more.
        let _ = unsafe { (self.egl.terminate)(self.display) };
    }
}

fn shader(gl: &Gles, kind: u32, source: &str) -> Result<Name> {
    let source = CString::new(source)?;
    // SAFETY: a context is current; one string that ends with a zero, read before the call returns.
    unsafe {
        let shader = (gl.create_shader)(kind);
        (gl.shader_source)(shader, 1, &source.as_ptr(), ptr::null());
        (gl.compile_shader)(shader);
        Ok(shader)
    }
}

fn use_program(gl: &Gles) -> Result<()> {
    let shaders = [shader(gl, GL_VERTEX_SHADER, VERTEX)?, shader(gl, GL_FRAGMENT_SHADER, FRAGMENT)?];
    let mut linked = 0;
    // SAFETY: a context is current; names are GL's own, strings end with a zero, and there is room for one number.
    unsafe {
        let program = (gl.create_program)();
        shaders.iter().for_each(|shader| (gl.attach_shader)(program, *shader));
        (gl.bind_attribute)(program, PLACE, c"place".as_ptr());
        (gl.bind_attribute)(program, COLOUR, c"colour".as_ptr());
        (gl.link_program)(program);
        (gl.get_program)(program, GL_LINK_STATUS, &raw mut linked);
        (gl.use_program)(program);
    }
    ensure!(linked == 1, "GL does not link the shaders");
    Ok(())
}

/// A picture of this size that is drawn into from now on.
fn canvas(gl: &Gles, width: Int, height: Int) -> Result<()> {
    let (mut texture, mut framebuffer) = (0, 0);
    // SAFETY: a context is current; there is room for one name each; a texture without a source is only reserved.
    let state = unsafe {
        (gl.gen_textures)(1, &raw mut texture);
        (gl.bind_texture)(GL_TEXTURE_2D, texture);
        (gl.tex_parameter)(GL_TEXTURE_2D, GL_TEXTURE_MIN_FILTER, GL_NEAREST);
        (gl.tex_image)(GL_TEXTURE_2D, 0, GL_RGBA as Int, width, height, 0, GL_RGBA, GL_UNSIGNED_BYTE, ptr::null());
        (gl.gen_framebuffers)(1, &raw mut framebuffer);
        (gl.bind_framebuffer)(GL_FRAMEBUFFER, framebuffer);
        (gl.framebuffer_texture)(GL_FRAMEBUFFER, GL_COLOR_ATTACHMENT0, GL_TEXTURE_2D, texture, 0);
        (gl.check_framebuffer)(GL_FRAMEBUFFER)
    };
    ensure!(state == GL_FRAMEBUFFER_COMPLETE, "GL does not draw into a texture: {state:#x}");
    Ok(())
}

/// Draws it.
///
/// # Errors
/// EGL or GLES is missing here, or refuses.
pub(crate) fn triangle(width: u16, height: u16) -> Result<Drawing> {
    let _current = Current::new()?;
    let gl = Gles::load("libGLESv2.so.2")?;
    // SAFETY: a context is current.
    let renderer = unsafe { (gl.get_string)(GL_RENDERER) };
    ensure!(!renderer.is_null(), "GL does not say who renders");
    // SAFETY: GL's strings end with a zero and live as long as the context.
    let renderer = unsafe { CStr::from_ptr(renderer) }.to_string_lossy().into_owned();
    let (columns, rows) = (Int::from(width), Int::from(height));
    canvas(&gl, columns, rows)?;
    use_program(&gl)?;
    let mut pixels = vec![0; 4 * usize::from(width) * usize::from(height)];
    let corners = CORNERS.as_ptr().cast::<f32>();
    // SAFETY: a context is current. The three corners, five numbers each, live until the drawing is done, which reading back waits
    // for; there is room for four bytes a pixel, and rows of 640 pixels need no padding.
    let error = unsafe {
        (gl.viewport)(0, 0, columns, rows);
        (gl.clear_colour)(0.125, 0.25, 0.5, 1.0);
        (gl.clear)(GL_COLOR_BUFFER_BIT);
        (gl.attribute_pointer)(PLACE, 2, GL_FLOAT, 0, STRIDE, corners.cast());
        (gl.attribute_pointer)(COLOUR, 3, GL_FLOAT, 0, STRIDE, corners.add(2).cast());
        (gl.enable_attribute)(PLACE);
        (gl.enable_attribute)(COLOUR);
        (gl.draw_arrays)(GL_TRIANGLES, 0, 3);
        (gl.read_pixels)(0, 0, columns, rows, GL_RGBA, GL_UNSIGNED_BYTE, pixels.as_mut_ptr().cast());
        (gl.get_error)()
    };
    if error != 0 {
        bail!("GL says {error:#x}");
    }
    Ok(Drawing { renderer, pixels })
}
