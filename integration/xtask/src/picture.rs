//! What a screen shows, as files of pictures have it.

use anyhow::{Context, Result, ensure};

/// Columns, rows, and three bytes for each pixel.
pub type Picture = ((usize, usize), Vec<u8>);

/// The pixels of a PNG.
///
/// # Errors
/// It is none, or none of three colours.
pub fn of_png(bytes: &[u8]) -> Result<Picture> {
    let mut reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info()?;
    let mut pixels = vec![0; reader.output_buffer_size().context("a picture has a size")?];
    let info = reader.next_frame(&mut pixels)?;
    ensure!(info.color_type == png::ColorType::Rgb, "the picture is {:?}", info.color_type);
    Ok(((info.width as usize, info.height as usize), pixels))
}

/// The pixels of a PPM, as QEMU writes it.
///
/// # Errors
/// It is none.
pub fn of_ppm(bytes: &[u8]) -> Result<Picture> {
    let mut words = bytes.splitn(4, |byte| byte.is_ascii_whitespace());
    let mut word = || words.next().context("a PPM has a header of four words");
    let number = |word: &[u8]| -> Result<usize> { Ok(std::str::from_utf8(word)?.parse()?) };
    ensure!(word()? == b"P6", "no PPM");
    let (width, height) = (number(word()?)?, number(word()?)?);
    let rest = word()?;
    let at = rest.iter().position(u8::is_ascii_whitespace).context("a PPM says its depth")?;
    Ok(((width, height), rest[at + 1..].to_vec()))
}

/// How many pixels of two pictures differ; all of them where their sizes do.
#[must_use]
pub fn differing((size, pixels): &Picture, (other_size, others): &Picture) -> usize {
    if size != other_size || pixels.len() != others.len() {
        return size.0 * size.1;
    }
    pixels.chunks(3).zip(others.chunks(3)).filter(|(one, other)| one != other).count()
}
