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

    /// A shader, in the renderer's text: 0 for vertices, 1 for pixels.
    pub(crate) fn shader(self, handle: u32, kind: u32, text: &str) -> Self {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        let len = bytes.len() as u32;
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        let mut words = vec![handle, kind, len, 300, 0];
        words.extend(bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)));
        self.command(1, 4, &words).command(31, 0, &[handle, kind])
    }

    /// One triangle over all of a canvas of this size, whose red grows with the columns and whose blue is this much.
    pub(crate) fn triangle(self, width: u32, height: u32, blue: f32) -> Self {
        let [half_width, half_height, half, one] =
            [width as f32 / 2.0, height as f32 / 2.0, 0.5, 1.0].map(f32::to_bits);
        let vertex = "VERT\nDCL SV[0], VERTEXID\nDCL OUT[0], POSITION\nDCL OUT[1], GENERIC[0]\nDCL TEMP[0..1]\n\
                      IMM[0] FLT32 { 4.0, -1.0, 0.0, 1.0 }\nIMM[1] FLT32 { 1.0, 2.0, 0.5, 0.0 }\n\
                      0: U2F TEMP[0].x, SV[0].xxxx\n1: SEQ TEMP[1].x, TEMP[0].xxxx, IMM[1].xxxx\n\
                      2: SEQ TEMP[1].y, TEMP[0].xxxx, IMM[1].yyyy\n3: MAD TEMP[0].xy, TEMP[1].xyyy, IMM[0].xxxx, IMM[0].yyyy\n\
                      4: MOV TEMP[0].zw, IMM[0].zwww\n5: MOV OUT[0], TEMP[0]\n6: MAD OUT[1], TEMP[0], IMM[1].zzzz, IMM[1].zzzz\n7: END\n";
        let fragment = format!(
            "FRAG\nDCL IN[0], GENERIC[0], PERSPECTIVE\nDCL OUT[0], COLOR\nIMM[0] FLT32 {{ 0.0, {blue:?}, 1.0, 0.0 }}\n\
             0: MOV OUT[0].x, IN[0].xxxx\n1: MOV OUT[0].yzw, IMM[0].xxyz\n2: END\n"
        );
        self.command(4, 0, &[0, half_width, half_height, half, half_width, half_height, half])
            .command(1, 1, &[102, 0, 0, 0xf << 27, 0, 0, 0, 0, 0, 0, 0])
            .command(2, 1, &[102])
            .command(1, 3, &[103, 0, 0, 0, 0])
            .command(2, 3, &[103])
            .command(1, 2, &[104, 1 << 1 | 1 << 29, one, 0, 0, one, 0, 0, 0])
            .command(2, 2, &[104])
            .command(1, 5, &[105])
            .command(2, 5, &[105])
            .shader(106, 0, vertex)
            .shader(107, 1, &fragment)
            .command(8, 0, &[0, 3, 4, 0, 1, 0, 0, 0, 0, 0, 2, 0])
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
