//! 3D by libvirglrenderer, which carries out the streams of Mesa's virgl driver on the host's OpenGL: here that of its processors
//! (llvmpipe), through EGL without a surface.
//!
//! It is a library of C, loaded where a host has it; nothing is linked against it. Three layers: [`library`] knows its functions,
//! [`renderer`] keeps what they demand (whose memory they point into, and for how long), [`thread`](mod@thread) is the one thread
//! that calls them, and the end of the process when they do not return.
//!
//! A guest's stream is the library's to judge. If it judges wrong, this process ends, in its jail, and a successor goes on.

pub mod library;
pub mod renderer;
pub mod thread;
mod warm_up;
