//! What a guest says in 3D, and the streams of a driver of it (virgl), made by hand.

use anyhow::{Result, ensure};

use super::{Guest, OK, words};

/// A resource that can be drawn on and shown: target, format, bind, columns, rows, slices, elements, levels, samples, flags.
pub(crate) fn canvas(width: u32, height: u32) -> [u32; 10] {
    [2, 1, 1 << 1 | 1 << 3 | 1 << 18, width, height, 1, 1, 0, 0, 0]
}

/// Commands of a stream.
#[derive(Clone, Default)]
pub(crate) struct Stream(pub(crate) Vec<u32>);

impl Stream {
    /// A command: what, of which kind of object, with these words.
    pub(crate) fn command(mut self, code: u32, object: u32, words: &[u32]) -> Self {
        self.0.push(code | object << 8 | (words.len() as u32) << 16);
        self.0.extend_from_slice(words);
        self
    }

    /// What is drawn goes to a resource from now on, by a surface of this number.
    pub(crate) fn onto(self, surface: u32, id: u32) -> Self {
        self.command(1, 8, &[surface, id, 1, 0, 0]).command(5, 0, &[1, 0, surface])
    }

    /// All of it has this colour: red, green, blue, alpha.
    pub(crate) fn clear(self, colour: [f32; 4]) -> Self {
        let [r, g, b, a] = colour.map(f32::to_bits);
        self.command(7, 0, &[4, r, g, b, a, 0, 0, 0])
    }

    /// A part of one resource goes to another, without a change.
    pub(crate) fn copy(self, to: u32, (x, y): (u32, u32), from: u32, (width, height): (u32, u32)) -> Self {
        self.command(17, 0, &[to, 0, x, y, 0, from, 0, 0, 0, 0, width, height, 1])
    }
}

impl Guest {
    /// Begins a context and speaks for it.
    pub(crate) fn begin(&mut self, context: u32) -> Result<u32> {
        self.context = context;
        let mut body = words(&[4, 0]);
        body.extend(b"test");
        body.resize(72, 0);
        Ok(self.ask(0x200, &body)?.0)
    }

    /// Makes a resource of 3D.
    pub(crate) fn create_3d(&mut self, id: u32, shape: [u32; 10]) -> Result<u32> {
        self.status(0x204, &[&[id], shape.as_slice(), &[0]].concat())
    }

    /// Makes one that the context may use.
    pub(crate) fn canvas(&mut self, id: u32, width: u32, height: u32) -> Result<()> {
        ensure!(self.create_3d(id, canvas(width, height))? == OK);
        self.done(0x202, &[id, 0])
    }

    /// Has a stream carried out.
    pub(crate) fn submit(&mut self, stream: &Stream) -> Result<u32> {
        self.status(0x207, &[&[stream.0.len() as u32 * 4, 0], stream.0.as_slice()].concat())
    }

    /// Moves a part of a resource's first level to its backing, or from there.
    pub(crate) fn transfer_3d(
        &mut self,
        to_host: bool,
        id: u32,
        [x, y, width, height]: [u32; 4],
        offset: u32,
    ) -> Result<u32> {
        let kind = if to_host { 0x205 } else { 0x206 };
        self.status(kind, &[x, y, 0, width, height, 1, offset, 0, id, 0, 0, 0])
    }
}
