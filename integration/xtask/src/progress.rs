//! What is done of a long run, in a file: a run that was broken off goes on where it was.
//!
//! A run consists of parts, each with a machine of its own and a seed that follows from the run's. Parts of another
//! commit, another seed or another length are not counted.

use crate::place;
use anyhow::{Context, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The parts of a run that are done.
#[derive(Debug)]
pub struct Progress<T> {
    path: PathBuf,
    key: Key,
    /// In order.
    pub parts: Vec<T>,
}

/// What makes two runs the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, serde::Deserialize)]
struct Key {
    commit: String,
    seed: u64,
    count: u32,
}

#[derive(Serialize, serde::Deserialize)]
struct Kept<T> {
    #[serde(flatten)]
    key: Key,
    parts: Vec<T>,
}

/// The commit that is checked out, with a plus sign when something has been changed since.
pub fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").arg("-C").arg(place::repository()).args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    match git(&["rev-parse", "--short", "HEAD"]) {
        Some(commit) if git(&["status", "--porcelain", "-uno"]).is_none_or(|changed| changed.is_empty()) => commit,
        Some(commit) => format!("{commit}+"),
        None => "unknown".to_owned(),
    }
}

impl<T: Serialize + DeserializeOwned> Progress<T> {
    /// What is done of this run, in `path`, or in a file of the cache that is named after the run.
    pub fn open(name: &str, path: Option<&Path>, seed: u64, count: u32) -> Result<Self> {
        let key = Key { commit: commit(), seed, count };
        let path = match path {
            Some(path) => path.to_owned(),
            None => {
                let folder = place::cache()?.join("soaks");
                std::fs::create_dir_all(&folder)?;
                // A run may be named after its arguments, paths among them.
                folder.join(format!("{name}-{seed:#x}-{count}.json").replace('/', "_"))
            }
        };
        let kept: Option<Kept<T>> = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).ok(),
            Err(_) => None,
        };
        let parts = match kept {
            Some(kept) if kept.key == key => kept.parts,
            _ => Vec::new(),
        };
        if !parts.is_empty() {
            eprintln!("going on after {} parts ({})", parts.len(), path.display());
        }
        Ok(Self { path, key, parts })
    }

    /// The commit that all parts are of.
    pub fn commit(&self) -> &str {
        &self.key.commit
    }

    /// Adds a part, which is kept from now on.
    pub fn add(&mut self, part: T) -> Result<()> {
        self.parts.push(part);
        let parts = std::mem::take(&mut self.parts);
        let kept = Kept { key: self.key.clone(), parts };
        let text = serde_json::to_vec(&kept)?;
        self.parts = kept.parts;
        let draft = self.path.with_extension("draft");
        std::fs::write(&draft, text).with_context(|| format!("cannot write {}", draft.display()))?;
        Ok(std::fs::rename(&draft, &self.path)?)
    }

    /// The run is over.
    pub fn finish(self) -> Vec<T> {
        let _ = std::fs::remove_file(&self.path);
        self.parts
    }
}

#[cfg(test)]
mod tests {
    use super::Progress;

    /// A run that was broken off goes on; another seed begins anew; a run that is over leaves nothing.
    #[test]
    fn runs_go_on_where_they_were() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.json");
        let mut run: Progress<u32> = Progress::open("x", Some(&path), 1, 10).unwrap();
        run.add(7).unwrap();
        run.add(8).unwrap();
        drop(run);
        assert_eq!(Progress::<u32>::open("x", Some(&path), 1, 10).unwrap().parts, [7, 8]);
        assert!(Progress::<u32>::open("x", Some(&path), 2, 10).unwrap().parts.is_empty());
        assert_eq!(Progress::<u32>::open("x", Some(&path), 1, 10).unwrap().finish(), [7, 8]);
        assert!(!path.exists());
    }
}
