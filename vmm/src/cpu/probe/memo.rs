//! What was found out, in a file of the user's: good until the host boots again.

use std::fs;
use std::path::{Path, PathBuf};

use super::Verdict;

/// Longest memo that is believed.
const LEN_MAX: u64 = 1024;

/// The file and this boot's name.
#[derive(Clone, Debug)]
pub struct Memo {
    file: PathBuf,
    boot: String,
}

impl Memo {
    /// The memo in `folder`, for the boot named `boot`.
    pub fn new(folder: &Path, boot: &str) -> Self {
        // Another release may ask other questions.
        Self { file: folder.join("cpu-probe"), boot: format!("{} {}", boot.trim(), env!("CARGO_PKG_VERSION")) }
    }

    /// The user's: in the runtime folder, else in the cache. `None` where neither is known.
    pub fn of_user() -> Option<Self> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let folder = absolute("XDG_RUNTIME_DIR")
            .or_else(|| absolute("XDG_CACHE_HOME"))
            .or_else(|| absolute("HOME").map(|home| home.join(".cache")))?;
        Some(Self::new(&folder.join("atoll"), &boot))
    }

    /// What is remembered of this boot.
    pub(super) fn recall(&self) -> Option<Verdict> {
        if fs::metadata(&self.file).ok()?.len() > LEN_MAX {
            return None;
        }
        let text = fs::read_to_string(&self.file).ok()?;
        let mut lines = text.lines();
        if lines.next()? != self.boot {
            return None;
        }
        let usable = match lines.next()? {
            "usable" => true,
            "not usable" => false,
            _ => return None,
        };
        Some(Verdict { usable, reason: lines.next().filter(|reason| !reason.is_empty())?.into() })
    }

    /// Remembers; a memo that cannot be written costs the next start a moment and nothing else.
    pub(super) fn note(&self, verdict: &Verdict) {
        let usable = if verdict.usable { "usable" } else { "not usable" };
        let text = format!("{}\n{usable}\n{}\n", self.boot, verdict.reason.replace('\n', " "));
        // In place at once: another start may read it meanwhile.
        let draft = self.file.with_extension(format!("{}", std::process::id()));
        let written = self.file.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::write(&draft, text));
        if let Err(error) = written.and_then(|()| fs::rename(&draft, &self.file)) {
            tracing::debug!(file = %self.file.display(), %error, "what KVM can do was not remembered");
            let _ = fs::remove_file(&draft);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A memo of an earlier boot, a cut one or somebody's text is no answer; the host is asked again.
    #[test]
    fn only_this_boots_memo_counts() {
        let folder = tempfile::tempdir().unwrap();
        let memo = Memo::new(&folder.path().join("atoll"), "b00t\n");
        assert_eq!(memo.recall(), None);
        let verdict = Verdict { usable: false, reason: "it interprets".into() };
        memo.note(&verdict);
        assert_eq!(memo.recall(), Some(verdict));
        assert_eq!(Memo::new(&folder.path().join("atoll"), "other").recall(), None);
        for text in ["", "usable", "perhaps\nx\n", "usable\n\n"] {
            fs::write(&memo.file, format!("{}\n{text}", memo.boot)).unwrap();
            assert_eq!(memo.recall(), None, "{text:?}");
        }
        assert_eq!(fs::read_dir(folder.path().join("atoll")).unwrap().count(), 1);
    }
}
