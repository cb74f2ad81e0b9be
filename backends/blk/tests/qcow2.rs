//! qcow2 images of all kinds that `qemu-img` makes, under random requests, judged by `qemu-img`.

mod process;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use atoll_kit::driver::disk::Kind;
use atoll_kit::driver::{Driver, Options};
use process::qemu_img::{check, contents, qemu_img};
use process::{DATA, command, listen_with, pattern, run};

const DISK: u64 = 16 << 20;
const SECTORS: u64 = DISK / 512;
/// Bytes of the disk that images made from a source begin with; the rest is zero.
const SOURCE: u64 = (9 << 20) + 512 * 3;

/// How an image is made, and the options and descriptors with which it is served.
struct Recipe {
    name: &'static str,
    make: &'static [&'static [&'static str]],
    fds: &'static [(&'static str, &'static str)],
    from_source: bool,
}

const fn fresh(name: &'static str, make: &'static [&'static [&'static str]]) -> Recipe {
    Recipe { name, make, fds: &[], from_source: false }
}

const RECIPES: &[Recipe] = &[
    fresh("fresh", &[&["create", "-f", "qcow2", "disk", "16M"]]),
    fresh("small clusters", &[&["create", "-f", "qcow2", "-o", "cluster_size=512", "disk", "16M"]]),
    fresh("large clusters", &[&["create", "-f", "qcow2", "-o", "cluster_size=2M", "disk", "16M"]]),
    fresh("version 2", &[&["create", "-f", "qcow2", "-o", "compat=0.10,cluster_size=4096", "disk", "16M"]]),
    fresh("one bit per count", &[&["create", "-f", "qcow2", "-o", "refcount_bits=1,cluster_size=1024", "disk", "16M"]]),
    fresh("64 bits per count", &[&["create", "-f", "qcow2", "-o", "refcount_bits=64,cluster_size=512", "disk", "16M"]]),
    fresh("preallocated", &[&["create", "-f", "qcow2", "-o", "preallocation=metadata", "disk", "16M"]]),
    fresh("lazy counts", &[&["create", "-f", "qcow2", "-o", "lazy_refcounts=on", "disk", "16M"]]),
    Recipe {
        name: "converted",
        make: &[&["convert", "-f", "raw", "-O", "qcow2", "source", "disk"]],
        fds: &[],
        from_source: true,
    },
    Recipe {
        name: "compressed",
        make: &[&["convert", "-c", "-f", "raw", "-O", "qcow2", "source", "disk"]],
        fds: &[],
        from_source: true,
    },
    Recipe {
        name: "compressed, version 2",
        make: &[&[
            "convert",
            "-c",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "-o",
            "compat=0.10,cluster_size=8192",
            "source",
            "disk",
        ]],
        fds: &[],
        from_source: true,
    },
    Recipe {
        name: "with a snapshot",
        make: &[
            &["convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=16k", "source", "disk"],
            &["snapshot", "-c", "one", "disk"],
        ],
        fds: &[],
        from_source: true,
    },
    Recipe {
        name: "on a raw image",
        make: &[&["create", "-f", "qcow2", "-b", "source", "-F", "raw", "disk", "16M"]],
        fds: &[("--backing-raw", "source")],
        from_source: true,
    },
    Recipe {
        name: "on a shorter image, version 2",
        make: &[
            &["create", "-f", "raw", "short", "8M"],
            &["create", "-f", "qcow2", "-o", "compat=0.10", "-b", "short", "-F", "raw", "disk", "16M"],
        ],
        fds: &[("--backing-raw", "short")],
        from_source: false,
    },
    Recipe {
        name: "on a compressed image on a raw one",
        make: &[
            &["create", "-f", "qcow2", "-b", "source", "-F", "raw", "middle", "16M"],
            &["convert", "-c", "-O", "qcow2", "-B", "source", "-F", "raw", "source", "middle2"],
            &["create", "-f", "qcow2", "-o", "cluster_size=4k", "-b", "middle2", "-F", "qcow2", "disk", "16M"],
        ],
        fds: &[("--backing-qcow2", "middle2"), ("--backing-raw", "source")],
        from_source: true,
    },
    Recipe {
        name: "with its data apart",
        make: &[&["create", "-f", "qcow2", "-o", "data_file=apart", "disk", "16M"]],
        fds: &[("--data-fd", "apart")],
        from_source: false,
    },
];

/// Numbers that look random and are always the same.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

fn descriptors(folder: &Path, recipe: &Recipe) -> Result<Vec<(&'static str, OwnedFd)>> {
    let open = |(option, name): &(&'static str, &str)| {
        let file = File::options().read(true).write(*option == "--data-fd").open(folder.join(name));
        Ok((*option, file.with_context(|| (*name).to_owned())?.into()))
    };
    recipe.fds.iter().map(open).collect()
}

fn read(driver: &mut Driver, sector: u64, sectors: u64) -> Result<Vec<u8>> {
    let back = DATA + (4 << 20);
    let len = sectors as u32 * 512;
    driver.guest().write(back, &vec![0xa5; len as usize]);
    // In two pieces, so that they end within clusters.
    let first = len / 1024 * 512;
    ensure!(run(driver, Kind::In, sector, &[(back, first), (back + u64::from(first), len - first)])? == (0, len + 1));
    let mut out = vec![0; len as usize];
    driver.guest().read(back, &mut out);
    Ok(out)
}

/// Random requests beside a model; gives what must be on the disk.
fn storm(driver: &mut Driver, mut model: Vec<u8>, steps: u64, seed: u64) -> Result<Vec<u8>> {
    let mut dice = Dice(seed);
    for step in 0..steps {
        let sectors = 1 + dice.below(if step % 8 == 0 { 600 } else { 40 });
        let sector = dice.below(SECTORS - sectors + 1);
        let range = (sector * 512) as usize..((sector + sectors) * 512) as usize;
        match dice.below(10) {
            0..5 => {
                let data = pattern(seed ^ step, range.len());
                driver.guest().write(DATA, &data);
                let first = data.len() as u32 / 1024 * 512;
                let pieces = [(DATA, first), (DATA + u64::from(first), data.len() as u32 - first)];
                ensure!(run(driver, Kind::Out, sector, &pieces)? == (0, 1), "write");
                model[range].copy_from_slice(&data);
            }
            5 | 6 => {
                let flags = u32::try_from(dice.below(2))?;
                clear(driver, Kind::WriteZeroes, sector, sectors, flags)?;
                model[range].fill(0);
            }
            7 => {
                clear(driver, Kind::Discard, sector, sectors, 0)?;
                // Whatever is there now stays.
                let is = read(driver, sector, sectors)?;
                model[range].copy_from_slice(&is);
            }
            8 => ensure!(run(driver, Kind::Flush, 0, &[])? == (0, 1), "flush"),
            _ => ensure!(read(driver, sector, sectors)? == model[range], "step {step}: {sectors} sectors at {sector}"),
        }
    }
    for sector in (0..SECTORS).step_by(2048) {
        let range = (sector * 512) as usize..((sector + 2048) * 512) as usize;
        ensure!(read(driver, sector, 2048)? == model[range], "read back at sector {sector}");
    }
    Ok(model)
}

fn clear(driver: &mut Driver, kind: Kind, sector: u64, sectors: u64, flags: u32) -> Result<()> {
    driver.guest().store(DATA, sector);
    driver.guest().store(DATA + 8, sectors as u32);
    driver.guest().store(DATA + 12, flags);
    ensure!(run(driver, kind, 0, &[(DATA, 16)])? == (0, 1), "{kind:?}");
    Ok(())
}

fn serve(recipe: &Recipe, folder: &Path, args: &[&str], steps: u64) -> Result<()> {
    let mut model = vec![0; DISK as usize];
    let source = pattern(77, SOURCE as usize);
    // Something to compress, and holes.
    let source: Vec<u8> = source
        .chunks(65536)
        .enumerate()
        .flat_map(|(n, part)| match n % 3 {
            0 => part.to_vec(),
            1 => part.iter().map(|byte| byte & 3).collect(),
            _ => vec![0; part.len()],
        })
        .collect();
    let file = folder.join("source");
    std::fs::write(&file, &source)?;
    File::options().write(true).open(&file)?.set_len(DISK)?;
    if recipe.from_source {
        model[..source.len()].copy_from_slice(&source);
    }
    for args in recipe.make {
        qemu_img(folder, args)?;
    }
    let path = folder.join("disk");
    let mut all = vec!["--path", path.to_str().context("a path")?, "--image-type", "qcow2"];
    all.extend_from_slice(args);
    let options = || Options { memory: 32 << 20, ..Options::default() };
    // Twice, so that a second process goes on with what the first one made.
    for seed in [1, 2] {
        let mut blk = listen_with(folder, &all, &descriptors(folder, recipe)?)?;
        let mut driver = blk.driver(options())?;
        ensure!(driver.config(8)? == SECTORS.to_le_bytes(), "the size of the disk");
        model = storm(&mut driver, model, steps, 0x9e37_79b9 * seed)?;
        driver.stop(0)?;
        drop(blk);
        ensure!(check(folder, "disk")? == 0, "clusters have leaked");
        ensure!(contents(folder, "disk")? == model, "qemu-img reads something else");
    }
    Ok(())
}

fn all(folder: &Path, args: &[&str], steps: u64) -> Result<()> {
    for recipe in RECIPES {
        let folder = tempfile::tempdir_in(folder)?;
        serve(recipe, folder.path(), args, steps).with_context(|| format!("{} {args:?}", recipe.name))?;
    }
    Ok(())
}

#[test]
fn each_kind_of_image_holds_what_was_written_in_memory() -> Result<()> {
    if Path::new("/dev/shm").is_dir() { all(Path::new("/dev/shm"), &[], 250) } else { Ok(()) }
}

#[test]
fn each_kind_of_image_holds_what_was_written_on_a_disk() -> Result<()> {
    all(Path::new(env!("CARGO_TARGET_TMPDIR")), &[], 60)
}

#[test]
fn each_kind_of_image_holds_what_was_written_with_direct_io() -> Result<()> {
    // Clusters must be as large as the blocks of direct I/O.
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    for recipe in RECIPES
        .iter()
        .filter(|recipe| !recipe.make.iter().any(|args| args.iter().any(|arg| arg.contains("cluster_size=512"))))
    {
        let folder = tempfile::tempdir_in(folder)?;
        serve(recipe, folder.path(), &["--direct"], 60).with_context(|| recipe.name)?;
    }
    Ok(())
}

/// What is not served is refused with its name and a remedy, in one line, and no file is changed.
#[test]
fn what_is_not_served_is_refused_by_name() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    std::fs::write(folder.join("source"), pattern(3, 1 << 20))?;
    let cases: &[(&[&str], &[&str], &str)] = &[
        (
            &["create", "-f", "qcow2", "-b", "source", "-F", "raw", "disk"],
            &["--image-type", "qcow2"],
            "backing file \"source\"",
        ),
        (
            &["create", "-f", "qcow2", "-o", "data_file=apart", "disk", "1M"],
            &["--image-type", "qcow2"],
            "another file (\"apart\")",
        ),
        (
            &["create", "-f", "qcow2", "-o", "extended_l2=on", "disk", "1M"],
            &["--image-type", "qcow2"],
            "extended L2 entries",
        ),
        (
            &["convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd", "source", "disk"],
            &["--image-type", "qcow2"],
            "compression type",
        ),
        (
            &[
                "create",
                "-f",
                "qcow2",
                "--object",
                "secret,id=s,data=x",
                "-o",
                "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
                "disk",
                "1M",
            ],
            &["--image-type", "qcow2"],
            "encrypted (method 2)",
        ),
        (&["create", "-f", "qcow2", "disk", "1M"], &[], "say --image-type qcow2"),
        (&["create", "-f", "raw", "disk", "1M"], &["--image-type", "qcow2"], "no qcow2 header"),
        (
            &["create", "-f", "qcow2", "disk", "1M"],
            &["--image-type", "qcow2", "--direct", "--num-queues", "0"],
            "num-queues",
        ),
    ];
    for (make, args, says) in cases {
        let _ = std::fs::remove_file(folder.join("disk"));
        qemu_img(folder, make)?;
        let before = std::fs::read(folder.join("disk"))?;
        let socket = folder.join("blk.sock");
        let out = command()
            .args(["--socket", socket.to_str().context("a path")?, "--path"])
            .arg(folder.join("disk"))
            .args(*args)
            .stderr(Stdio::piped())
            .output()?;
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        ensure!(!out.status.success() && text.contains(says) && text.lines().count() == 1, "{make:?}: {text}");
        ensure!(std::fs::read(folder.join("disk"))? == before && !socket.exists(), "{make:?}");
    }
    Ok(())
}
