//! What the host itself does with a function: file systems on its disks, networks that are up, a process that has it open.

use std::fs;
use std::path::Path;

use super::bdf::Bdf;
use super::host::{Host, link_name, names, text};

/// Folders that are looked through below a function, and how deep.
const FOLDERS_MAX: usize = 4096;
const DEPTH_MAX: usize = 12;

/// Block devices (`8:1`) and network interfaces below a function.
#[derive(Default)]
struct Below {
    /// Name and number.
    blocks: Vec<(String, String)>,
    interfaces: Vec<String>,
    looked: usize,
}

impl Below {
    fn look(&mut self, folder: &Path, depth: usize) {
        self.looked += 1;
        if self.looked > FOLDERS_MAX || depth > DEPTH_MAX {
            return;
        }
        let class = link_name(&folder.join("subsystem"));
        let name = folder.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        match class.as_deref() {
            Some("block") => self.blocks.extend(text(&folder.join("dev")).map(|number| (name, number))),
            Some("net") => self.interfaces.push(name),
            _ => {}
        }
        for entry in names(folder) {
            // Another function below a bridge is another's; what is no folder has nothing below it.
            let below = folder.join(&entry);
            let is_own = entry.parse::<Bdf>().is_err();
            if is_own && fs::symlink_metadata(&below).is_ok_and(|entry| entry.is_dir()) {
                self.look(&below, depth + 1);
            }
        }
    }
}

/// Where a block device is mounted, or that it is swapped to, or that another one stands on it.
fn used_block(host: &Host, name: &str, number: &str) -> Option<String> {
    let mounts = text(&host.root().join("proc/self/mountinfo")).unwrap_or_default();
    let place = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        (fields.nth(2) == Some(number)).then(|| fields.nth(1)).flatten()
    });
    if let Some(place) = place {
        return Some(format!("{name} is mounted at {place}"));
    }
    let swaps = text(&host.root().join("proc/swaps")).unwrap_or_default();
    let node = format!("/dev/{name}");
    if swaps.lines().any(|line| line.split_whitespace().next() == Some(node.as_str())) {
        return Some(format!("{name} is swap space"));
    }
    let holders = names(&host.root().join(format!("sys/dev/block/{number}/holders")));
    holders.first().map(|holder| format!("{holder} stands on {name}"))
}

/// What the host would lose with this function; each a short sentence.
pub(super) fn losses(host: &Host, bdf: Bdf) -> Vec<String> {
    let mut below = Below::default();
    below.look(&host.folder(bdf), 0);
    let blocks = below.blocks.iter().filter_map(|(name, number)| used_block(host, name, number));
    let up =
        |name: &&String| text(&host.root().join(format!("sys/class/net/{name}/operstate"))).as_deref() == Some("up");
    let interfaces = below.interfaces.iter().filter(up).map(|name| format!("network interface {name} is up"));
    blocks.chain(interfaces).collect()
}

/// The process that has the function open through VFIO, if it can be seen.
pub(super) fn opened_by(host: &Host, bdf: Bdf) -> Option<u32> {
    let group = host.functions.get(&bdf)?.group;
    let mut nodes: Vec<String> = group.iter().map(|group| format!("/dev/vfio/{group}")).collect();
    let own = names(&host.folder(bdf).join("vfio-dev"));
    nodes.extend(own.into_iter().map(|name| format!("/dev/vfio/devices/{name}")));
    let processes = names(&host.root().join("proc")).into_iter().filter_map(|name| name.parse::<u32>().ok());
    let mut processes = processes.filter(|pid| {
        let folder = host.root().join(format!("proc/{pid}/fd"));
        let opened = names(&folder).into_iter().filter_map(|fd| fs::read_link(folder.join(fd)).ok());
        opened.into_iter().any(|file| nodes.iter().any(|node| file == Path::new(node)))
    });
    processes.next()
}
