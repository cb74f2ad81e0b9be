//! One shaded triangle by GLES 2 without a window: drawn into a picture in memory, read back, written to a file. It says which
//! renderer drew it. The same program runs on a host and in a guest, and the files are compared.

#![allow(clippy::print_stdout, reason = "a program for a shell")]

mod gles;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;

/// Draws a triangle of 640 by 480 pixels, four bytes each, into a file; prints the renderer's name.
#[derive(Parser)]
struct Arguments {
    /// The file.
    out: PathBuf,
}

fn main() -> Result<()> {
    let Arguments { out } = Arguments::parse();
    let drawing = gles::triangle(640, 480)?;
    std::fs::write(&out, &drawing.pixels).with_context(|| format!("cannot write {}", out.display()))?;
    println!("{}", drawing.renderer);
    Ok(())
}
