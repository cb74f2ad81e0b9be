//! A user land with graphics on a disk: Mesa with the driver of virtio GPUs, `modetest` and `kmscube` on the packages of
//! [`crate::userland`], and the initramfs that Debian's full kernel starts it from.
//!
//! The disk is read only, so that any number of machines share it; programs of ours come with the initramfs and lie in `/mnt`.

use crate::archive::Archive;
use crate::console::Console;
use crate::debian_disk::{Contents, debian};
use crate::packages::Package;
use crate::{full_kernel, images, place, userland};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// The drivers of the guest. `ext4` asks for checksums by a name of the kernel's, not by a driver's.
const DRIVERS: [&str; 7] =
    ["virtio_pci", "virtio_blk", "crc32c_generic", "ext4", "virtio_gpu", "virtio_input", "evdev"];
/// How long a step of the guest may take.
const STEP_LIMIT: Duration = Duration::from_secs(120);

/// A screen with fewer colours shows no shaded cube.
pub const CUBE_COLOURS_MIN: usize = 256;

/// The kernel's command line.
pub const CMDLINE: &str = "console=ttyS0 panic=-1 quiet";

const INIT: &str = r#"#!/bin/sh
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for driver in /modules/full/*.ko; do insmod "$driver"; done
for try in $(seq 200); do
    [ -b /dev/vda ] && break
    sleep 0.1
done
mount -o ro -t ext4 /dev/vda /root
mount -t tmpfs programs /root/mnt
cp -r /programs/. /root/mnt
exec switch_root /root /sbin/init
"#;

/// The disk; made on first use. Give it to machines to read only.
///
/// # Errors
/// A package cannot be had.
pub fn disk() -> Result<PathBuf> {
    Contents { name: "graphics", edition: 1, packages: &[userland::PACKAGES, PACKAGES], size: "768M" }.disk()
}

/// The initramfs of the full kernel that starts the user land of `/dev/vda`, with these programs of the host.
///
/// # Errors
/// A package cannot be had, or a program cannot be read.
pub fn initramfs(folder: &Path, programs: &[&Path]) -> Result<PathBuf> {
    let mut bytes = std::fs::read(images::guest("6.1")?.initramfs)?;
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    let mut archive = Archive::behind(bytes, 1);
    archive.program("init", INIT.as_bytes())?;
    archive.folder("programs")?;
    for program in programs {
        let name = program.file_name().and_then(|name| name.to_str()).context("a program has a name")?;
        let contents = std::fs::read(program).with_context(|| format!("cannot read {}", program.display()))?;
        archive.program(&format!("programs/{name}"), &contents)?;
    }
    full_kernel::add(&mut archive, &DRIVERS)?;
    let path = folder.join("initramfs");
    std::fs::write(&path, archive.end()?)?;
    Ok(path)
}

/// Atoll with this user land, these words of its GPU and these of its display.
///
/// # Errors
/// A package cannot be had, or `atoll` is not built.
pub fn atoll(initramfs: &Path, gpu: &str, display: &str) -> Result<Command> {
    let mut command = Command::new(place::program("atoll")?);
    command.arg("--kernel").arg(full_kernel::image()?).arg("--initramfs").arg(initramfs);
    command.args(["--cmdline", CMDLINE, "--memory", "size=512M", "--cpu", "soft"]);
    command.arg("--disk").arg(format!("path={},readonly=on", disk()?.display()));
    command.args(["--gpu", gpu, "--display", display]);
    Ok(command)
}

/// QEMU's software emulation with the same, and this virtio-gpu of its own; where its screen is seen is left to say.
///
/// # Errors
/// A package cannot be had.
pub fn qemu(initramfs: &Path, gpu: &str) -> Result<Command> {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-M", "q35", "-accel", "tcg", "-m", "512M", "-nodefaults", "-no-reboot", "-monitor", "none"]);
    // Its threads are named after what they do.
    command.args(["-serial", "stdio", "-name", "atoll,debug-threads=on", "-append", CMDLINE]);
    command.arg("-kernel").arg(full_kernel::image()?).arg("-initrd").arg(initramfs);
    command.arg("-drive").arg(format!("file={},if=none,id=d,format=raw,readonly=on", disk()?.display()));
    command.args(["-device", "virtio-blk-pci,drive=d", "-device", gpu]);
    Ok(command)
}

/// Has a cube turn on the screen until the guest ends.
///
/// # Errors
/// The guest does not answer.
pub fn turn_cube(console: &mut Console) -> Result<()> {
    // It turns until it reads something.
    let turn = "(tail -f /dev/null | HOME=/tmp kmscube > /tmp/kmscube 2>&1 &)";
    console.run(turn, STEP_LIMIT).map(drop)
}

/// Has `modetest` show its colour bars on the first screen in this mode, until the guest ends.
///
/// # Errors
/// The guest has no screen.
pub fn show_bars(console: &mut Console, (width, height): (usize, usize)) -> Result<()> {
    const CONNECTOR: &str =
        "modetest -M virtio_gpu -c | while read N E S R; do [ \"$S\" = connected ] && echo $N && break; done";
    let connector = console.run(CONNECTOR, STEP_LIMIT)?;
    let Ok(number) = connector.parse::<u32>() else {
        let log = console.run("dmesg | grep -iE 'virtio|drm' | tail -5", STEP_LIMIT)?;
        bail!("the guest's GPU has no screen: {connector}; its kernel says: {log}");
    };
    // It shows them until it reads a line.
    let show = format!("modetest -M virtio_gpu -s {number}:{width}x{height}");
    console.run(&format!("(tail -f /dev/null | {show} > /tmp/modetest 2>&1 &)"), STEP_LIMIT).map(drop)
}

const PACKAGES: &[Package] = &[
    debian("kmscube", "0.0.0~git20210103-1", "c3caa77f96f843459459f3c0150af809af33f814c130755f8c5c0ca1e5460cef"),
    debian("libdrm-amdgpu1", "2.4.114-1+b1", "b75a71e96f1faac0f131ac657e09efcbe8968eef62cc34b8abfcff2ff9f0cccd"),
    debian("libdrm-common", "2.4.114-1", "32f9664138b38b224383c6986457d5ad2ec8efd559b1a0ce7749405f7a451aad"),
    debian("libdrm-intel1", "2.4.114-1+b1", "b0e39318d14c07f4d85668b6da7f66a1341addf87a47d785c34d5a8b393f544c"),
    debian("libdrm-nouveau2", "2.4.114-1+b1", "ba59bb9ec6e1baf59fc4d4eb095a524e40d045af2413dad9d28df517005388b6"),
    debian("libdrm-radeon1", "2.4.114-1+b1", "2da3a9233187f995ad5a3e6db3d37252ea7209f0ca9605484d03478ebcc15feb"),
    debian("libdrm-tests", "2.4.114-1+b1", "61954754136ccfa54bc4a4e223409cb8d5105ed55933f7610f31b50b465974db"),
    debian("libdrm2", "2.4.114-1+b1", "be18fb670797ba32da9628cf3e8acd83160d8db8c8dd842501dd8e401c3b5371"),
    debian("libdw1", "0.188-2.1", "ffd7b1bad982ad1afd9c2b75ab2edd18e229508df731a8f4d8443f093a91442f"),
    debian("libedit2", "3.1-20221030-2", "1cf14abf2716d3279db12d0657a5737cf70074a1e71d3bdf73206625e3c89ce6"),
    debian("libegl-mesa0", "22.3.6-1+deb12u2", "731a406af777d0606dc932da21c2214f189069caa437b8bb4063c328bab840ca"),
    debian("libegl1", "1.6.0-1", "fe4d8b39f6e6fe1a32ab1efd85893553eaa9cf3866aa668ccf355f585b37d523"),
    debian("libexpat1", "2.5.0-1+deb12u5", "cae5ded666d8573dd33060bc66fbac21eea8b101a6b56e2af8bd590fcfa65d79"),
    debian("libffi8", "3.4.4-1", "6d9f6c25c30efccce6d4bceaa48ea86c329a3432abb360a141f76ac223a4c34a"),
    debian("libgbm1", "22.3.6-1+deb12u2", "4323840f2b7b3e108990848529125d99c0956ae5a854c1e0568ed08c8faeaa2e"),
    debian("libgl1-mesa-dri", "22.3.6-1+deb12u2", "350e4263aaacd521f6f757951262b57c003930edaf0419508f2c5675317577fe"),
    debian("libglapi-mesa", "22.3.6-1+deb12u2", "2db5b13a6b7f4042f9a417ad7fa4338b6c47528dc64d7f89cfd5e53d07d76bc4"),
    debian("libgles2", "1.6.0-1", "07b2f51b8aa3c8d6d928133cd46087bd8793d0d67c203f09fc289d45a2cf5f47"),
    debian("libglib2.0-0", "2.74.6-2+deb12u9", "7ff85197685d89e150e342b29a59aab1beee400050ba7da73de81cd999ffee5a"),
    debian("libglvnd0", "1.6.0-1", "b6da5b153dd62d8b5e5fbe25242db1fc05c068707c365db49abda8c2427c75f8"),
    debian(
        "libgstreamer-plugins-base1.0-0",
        "1.22.0-3+deb12u7",
        "e602ec57f366fbb5dc82c06cf0acd44f99dd60abdbb715da15331859a15e5e8b",
    ),
    debian("libgstreamer1.0-0", "1.22.0-2+deb12u1", "97fa34146e892871db0b60b70494b238519c5ae906ddbdd31c39a5a77b5e5499"),
    debian("libicu72", "72.1-3+deb12u1", "f7f6f99c6d7b025914df2447fc93e11d22c44c0c8bdd8b6f36691c9e7ddcef88"),
    debian("libllvm15", "1:15.0.6-4+b1", "9f0751109ba89e65b1313a4f3e34a29977a0db6fa30ed475e2c6bd555fa9e866"),
    debian("liborc-0.4-0", "1:0.4.33-2", "f2b775c4281fc4d02432833cef274cfaa927a446bdf619f02292bd83b201fe3a"),
    debian("libpciaccess0", "0.17-2", "4025f3608cf431c163efb94fdc553e7b93e16b8f0d741ea87762e19025ffc80e"),
    debian("libpng16-16", "1.6.39-2+deb12u6", "940b91d40d51c825de7f7aa133aecff1ffa25a91f12cb6aa6926c9ad55cd640c"),
    debian("libsensors-config", "1:3.6.0-7.1", "7f3c9fbd822858a9e30335e4a7f66c9468962eb26cd375b93bc8b789660bf02f"),
    debian("libsensors5", "1:3.6.0-7.1", "b7eb91dce728fbb9203aec8b22637303b29821c3384e5f78a8ff348b4e44efe3"),
    debian("libstdc++6", "12.2.0-14+deb12u1", "5cd3171216d4ab0fc911cfe9c35509bf2dd8f47761c43b7f6a4296701551a24d"),
    debian("libunwind8", "1.6.2-3", "7b297868682836e4c87be349f17e4a56bc287586e3576503e84a5cb5485ce925"),
    debian("libwayland-client0", "1.21.0-1", "1f002d028b8b79eec9847c636d8886d10dfe8c884cc2bebe18086b1391c5a28d"),
    debian("libwayland-egl1", "1.21.0-1", "cb4225f0e15e00a3570d4cbc288c87ff477d73e741c3f1c5a6d47cf350d45378"),
    debian("libwayland-server0", "1.21.0-1", "df0396221d7b794496a687ec61fae82b6465648bc0ab6501ba0a5ed7f56eb8d6"),
    debian("libx11-6", "2:1.8.4-2+deb12u2", "d88c973e79fd9b65838d77624142952757e47a6eb1a58602acf0911cf35989f4"),
    debian("libx11-xcb1", "2:1.8.4-2+deb12u2", "f5da45e1d881a793250a96613f28c471a248877f1a0f18a5c90e2a620a76c898"),
    debian("libxau6", "1:1.0.9-1", "679db1c4579ec7c61079adeaae8528adeb2e4bf5465baa6c56233b995d714750"),
    debian("libxcb-dri2-0", "1.15-1", "ef4959aa9e09a0d38d1de432e747585129d5d2dc1d84c8b6b3d2ffc3708b5805"),
    debian("libxcb-dri3-0", "1.15-1", "02699b144b9467de8636d27a76984b8f4e7b66e2d25d96df2b9677be86ee9a29"),
    debian("libxcb-present0", "1.15-1", "89383e627a4d17b9390d609b2459481bfd2029566367b43068586769e418b6e5"),
    debian("libxcb-randr0", "1.15-1", "f86e3d8ff8622871008833e9d064919b7a6237399c903c59fc330ff00f199ff5"),
    debian("libxcb-shm0", "1.15-1", "c1afcef29dc78b95c475159b181b28b1dedaf1d5aa06efd2fa6d90c73bfbe0e5"),
    debian("libxcb-sync1", "1.15-1", "3366ce715220d38dd0148b78a8e738137bade25ef7eec0698850c6f66800844f"),
    debian("libxcb-xfixes0", "1.15-1", "d744a7ebad2cbcf301c96cd6a1ab3ee856e436fc7be5cff5b7c28ac2ac181a64"),
    debian("libxcb1", "1.15-1", "fdc61332a3892168f3cc9cfa1fe9cf11a91dc3e0acacbc47cbc50ebaa234cc71"),
    debian("libxdmcp6", "1:1.1.2-3", "ecb8536f5fb34543b55bb9dc5f5b14c9dbb4150a7bddb3f2287b7cab6e9d25ef"),
    debian("libxfixes3", "1:6.0.0-2", "1cd616396ff2ecae77e6e8b5b7695d414f0146de2d147837a2a02165f99e1a2c"),
    debian("libxml2", "2.9.14+dfsg-1.3~deb12u6", "4460e39dda10a815881374217cde08474747cfa018358cd8612c14b390eff53b"),
    debian("libxshmfence1", "1.3-1", "1a38142e40e3d32dc4f9a326bf5617363b7d9b4bb762fdcdd262f2192092024d"),
    debian("libz3-4", "4.8.12-3.1", "6221ca25ad5abcfbe1965801029d85a88b4775320384b4b716de8fab7a4d2f7a"),
];
