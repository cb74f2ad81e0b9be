//! A first picture, drawn while the process can still open files and make threads: what the renderer, Mesa and its compiler make
//! once is made then.

use atoll_protocol::display::Rect;

use super::renderer::Virgl;
use crate::render::{Failed, Shape};

const ID: u32 = 1;
const SIDE: u32 = 16;

/// Commands of a stream: what, of which kind of object, with these words.
fn command(out: &mut Vec<u32>, code: u32, object: u32, words: &[u32]) {
    out.push(code | object << 8 | (words.len() as u32) << 16);
    out.extend_from_slice(words);
}

/// A shader as the renderer takes it, in text.
fn shader(out: &mut Vec<u32>, handle: u32, kind: u32, text: &str) {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    let len = bytes.len() as u32;
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    let mut words = vec![handle, kind, len, 300, 0];
    words.extend(bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)));
    command(out, 1, 4, &words);
    // It is the one of its kind.
    command(out, 31, 0, &[handle, kind]);
}

/// A green triangle over all of it, whose corners are made of their numbers.
fn stream() -> Vec<u32> {
    let mut out = Vec::new();
    // A surface of the resource, which is drawn on.
    command(&mut out, 1, 8, &[1, ID, 1, 0, 0]);
    command(&mut out, 5, 0, &[1, 0, 1]);
    let half = (SIDE as f32 / 2.0).to_bits();
    let (one, middle) = (1_f32.to_bits(), 0.5_f32.to_bits());
    command(&mut out, 4, 0, &[0, half, half, middle, half, half, middle]);
    command(&mut out, 7, 0, &[4, one, middle, 0, one, 0, 0, 0]);
    // Nothing is blended, tested or culled.
    command(&mut out, 1, 1, &[2, 0, 0, 0xf << 27, 0, 0, 0, 0, 0, 0, 0]);
    command(&mut out, 2, 1, &[2]);
    command(&mut out, 1, 3, &[3, 0, 0, 0, 0]);
    command(&mut out, 2, 3, &[3]);
    command(&mut out, 1, 2, &[4, 1 << 1 | 1 << 29, one, 0, 0, one, 0, 0, 0]);
    command(&mut out, 2, 2, &[4]);
    command(&mut out, 1, 5, &[5]);
    command(&mut out, 2, 5, &[5]);
    let vertex = "VERT\nDCL SV[0], VERTEXID\nDCL OUT[0], POSITION\nDCL TEMP[0..1]\n\
                  IMM[0] FLT32 { 4.0, -1.0, 0.0, 1.0 }\nIMM[1] FLT32 { 1.0, 2.0, 0.0, 0.0 }\n\
                  0: U2F TEMP[0].x, SV[0].xxxx\n1: SEQ TEMP[1].x, TEMP[0].xxxx, IMM[1].xxxx\n\
                  2: SEQ TEMP[1].y, TEMP[0].xxxx, IMM[1].yyyy\n3: MAD OUT[0].xy, TEMP[1].xyyy, IMM[0].xxxx, IMM[0].yyyy\n\
                  4: MOV OUT[0].zw, IMM[0].zwww\n5: END\n";
    let fragment = "FRAG\nDCL OUT[0], COLOR\nIMM[0] FLT32 { 0.0, 1.0, 0.0, 1.0 }\n0: MOV OUT[0], IMM[0]\n1: END\n";
    shader(&mut out, 6, 0, vertex);
    shader(&mut out, 7, 1, fragment);
    // Three vertices, from nowhere.
    command(&mut out, 8, 0, &[0, 3, 4, 0, 1, 0, 0, 0, 0, 0, 2, 0]);
    out
}

fn draw(virgl: &mut Virgl) -> Result<(), Failed> {
    virgl.create_context(ID, b"warm-up")?;
    virgl.create(ID, &Shape::flat(1, SIDE, SIDE))?;
    virgl.join(ID, ID);
    let drawn = virgl.submit(ID, &mut stream());
    virgl.finish();
    let mut pixels = vec![0; (SIDE * SIDE * 4) as usize];
    let whole = Rect { x: 0, y: 0, width: SIDE, height: SIDE };
    virgl.read(ID, whole, &mut pixels)?;
    if pixels.first_chunk() != Some(&[0, 255, 0, 255]) {
        tracing::debug!("the first picture is not as it was meant");
    }
    virgl.write(ID, whole, &mut pixels)?;
    drawn
}

/// Draws it. What fails here fails for the guest, too, which is told of it.
pub(super) fn run(virgl: &mut Virgl) {
    if let Err(error) = draw(virgl) {
        tracing::debug!(%error, "the first picture was not drawn");
    }
    virgl.unref(ID);
    virgl.destroy_context(ID);
    virgl.finish();
}
