//! Archives that a kernel unpacks into its first file system (cpio, "newc"). Several may stand one behind the other, each beginning
//! at a multiple of four bytes.

use anyhow::Result;
use std::io::Write;

const FOLDER: u32 = 0o040_755;
const FILE: u32 = 0o100_644;
const PROGRAM: u32 = 0o100_755;
const LINK: u32 = 0o120_777;
/// Numbers for each archive that stands in a row.
const INODES: u32 = 1 << 20;

/// One that is being written.
pub struct Archive<W> {
    to: W,
    inode: u32,
}

impl<W: Write> Archive<W> {
    /// The first of a row.
    pub fn new(to: W) -> Self {
        Self::behind(to, 0)
    }
    /// One behind so many others, which the kernel must not take for links to files of theirs.
    pub fn behind(to: W, others: u32) -> Self {
        Self { to, inode: others * INODES }
    }
    fn add(&mut self, name: &str, mode: u32, contents: &[u8]) -> Result<()> {
        self.inode += 1;
        let entry = cpio::newc::Builder::new(name).ino(self.inode).mode(mode).nlink(1);
        let mut writer = entry.write(&mut self.to, u32::try_from(contents.len())?);
        writer.write_all(contents)?;
        writer.finish()?;
        Ok(())
    }
    /// A folder; those above it come first.
    ///
    /// # Errors
    /// Writing fails, as with all that follow.
    pub fn folder(&mut self, name: &str) -> Result<()> {
        self.add(name, FOLDER, b"")
    }
    /// A file.
    ///
    /// # Errors
    /// As above, or it has more than 4 GiB.
    pub fn file(&mut self, name: &str, contents: &[u8]) -> Result<()> {
        self.add(name, FILE, contents)
    }
    /// A file that can be run.
    ///
    /// # Errors
    /// As above.
    pub fn program(&mut self, name: &str, contents: &[u8]) -> Result<()> {
        self.add(name, PROGRAM, contents)
    }
    /// A symbolic link.
    ///
    /// # Errors
    /// As above.
    pub fn link(&mut self, name: &str, target: &str) -> Result<()> {
        self.add(name, LINK, target.as_bytes())
    }
    /// The end.
    ///
    /// # Errors
    /// As above.
    pub fn end(mut self) -> Result<W> {
        cpio::newc::trailer(&mut self.to)?;
        Ok(self.to)
    }
}
