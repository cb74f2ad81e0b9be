//! A glibc user land on a disk: the packages of a minimal Debian 12 (bash, coreutils, perl, iproute2, iperf3, …), pinned,
//! unpacked side by side into one ext4 image. No maintainer script runs, so no root is needed: what programs need to start
//! is there, accounts and services are not.

use crate::packages::{self, Package};
use crate::place;
use anyhow::{Context, Result};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Changes when the contents of the disk change.
const EDITION: u32 = 3;
/// Folders at the top that are links into `/usr`.
const MERGED: [&str; 4] = ["bin", "sbin", "lib", "lib64"];

const INIT: &str = r#"#!/bin/bash
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
export HOME=/root PATH=/usr/sbin:/usr/bin PS1='atoll# ' LC_ALL=C
cd /root
echo 1 > /proc/sys/kernel/printk
exec setsid --ctty bash --norc --noediting
"#;

const fn debian(name: &'static str, version: &'static str, sha256: &'static str) -> Package {
    Package { name, version, sha256, successor: name }
}

/// The disk; made on first use. Copy it before use.
pub fn disk() -> Result<PathBuf> {
    let folder = place::cache()?.join(format!("userland-{EDITION}"));
    std::fs::create_dir_all(&folder)?;
    let path = folder.join("debian.ext4");
    crate::images::made(&path, write)?;
    Ok(path)
}

fn write(path: &Path) -> Result<()> {
    let tree = tempfile::tempdir()?;
    let root = tree.path();
    for folder in ["usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "dev", "proc", "sys", "tmp", "mnt", "root", "etc"] {
        std::fs::create_dir_all(root.join(folder))?;
    }
    for name in MERGED {
        symlink(format!("usr/{name}"), root.join(name))?;
    }
    for folder in packages::all_unpacked(PACKAGES)? {
        for entry in std::fs::read_dir(&folder)? {
            let entry = entry?;
            let name = entry.file_name();
            let merged = MERGED.iter().find(|merged| name == **merged);
            let to = merged.map_or_else(|| root.join(&name), |merged| root.join("usr").join(merged));
            if entry.file_type()?.is_dir() {
                std::fs::create_dir_all(&to)?;
                place::run(Command::new("cp").arg("-a").arg(entry.path().join(".")).arg(&to))?;
            }
        }
    }
    for unused in
        ["usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/lib/x86_64-linux-gnu/gconv"]
    {
        let _ = std::fs::remove_dir_all(root.join(unused));
    }
    // There is no init system: what powers the machine off and gets it an address comes from busybox.
    let busybox = packages::unpacked(&packages::BUSYBOX)?.join("bin/busybox");
    std::fs::copy(busybox, root.join("usr/bin/busybox"))?;
    for applet in ["poweroff", "reboot", "udhcpc", "wget"] {
        symlink("../bin/busybox", root.join("usr/sbin").join(applet))?;
    }
    crate::images::write_lease_script(root)?;
    std::fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/bash\n")?;
    std::fs::write(root.join("etc/group"), "root:x:0:\n")?;
    std::fs::write(root.join("etc/hosts"), "127.0.0.1 localhost\n")?;
    let init = root.join("usr/sbin/init");
    std::fs::write(&init, INIT)?;
    std::fs::set_permissions(&init, std::fs::Permissions::from_mode(0o755))?;
    let mkfs = place::on_path("mkfs.ext4").context("mkfs.ext4 is missing: install e2fsprogs")?;
    place::run(
        Command::new(mkfs)
            .args(["-q", "-F", "-L", "debian", "-E", "root_owner=0:0,lazy_itable_init=0", "-d"])
            .arg(root)
            .arg(path)
            .arg("384M")
            .stdin(Stdio::null()),
    )
}

const PACKAGES: &[Package] = &[
    debian("adduser", "3.134", "c24fe4eb8e60d8632d72ed104cce7c92cff200847c897dc8ba764b6c47b519e0"),
    debian("base-files", "12.4+deb12u15", "3eb1ea6d85488f488cc2a163b98ad640ef88cee4c79287cf14e361aaf6206f47"),
    debian("bash", "5.2.15-2+b13", "82130bb6a560cd2a7234d8018baf73f188f5dd56413d5aa0accc987b2197a6a1"),
    debian("coreutils", "9.1-1", "61038f857e346e8500adf53a2a0a20859f4d3a3b51570cc876b153a2d51a3091"),
    debian("dash", "0.5.12-2", "33ea40061da2f1a861ec46212b2b6a34f0776a049b1a3f0abce2fb8cb994258f"),
    debian("debianutils", "5.7-0.5~deb12u1", "55f951359670eb3236c9e2ccd5fac9ccb3db734f5a22aff21589e7a30aee48c9"),
    debian("diffutils", "1:3.8-4", "8bdfedc14c1035e3750e9f055ac9c1ecd9b5d05d9e6dc6466c4e9237eef407dd"),
    debian("dpkg", "1.21.23", "f89e9f8d1a4a50ade44be3ed59a6ec55460fce205d2f8520c5c492137c5b609b"),
    debian("e2fsprogs", "1.47.0-2+b2", "fedd424691c08ef0739729026be298e7be8236337bf8e031b3c7ec66794e6fc2"),
    debian("findutils", "4.9.0-4", "5dd86bd0af4aa73f067dfd6b8339dd868f2dd84056aa79db29d1206d4fbc5e04"),
    debian("gcc-12-base", "12.2.0-14+deb12u1", "1896a2aacf4ad681ff5eacc24a5b0ca4d5d9c9b9c9e4b6de5197bc1e116ea619"),
    debian("grep", "3.8-5", "3264acea728df3c48a54f20e9291b965130e306b9d00adac76647049da7196df"),
    debian("gzip", "1.12-1", "eabec1dde2834f72540d7b93fc5df2625f52611c06d93d61f5cdb12480e0e6a3"),
    debian("hostname", "3.23+nmu1", "17d9a2f3c05004499d80e180d2440fd716f84c32b65f09d96c9a024af4d1d0e7"),
    debian("init-system-helpers", "1.65.2+deb12u1", "afab482524c64e4e256eb5cab43c1a96dc493ec476d94f19f1a5ec3de5fa0fef"),
    debian("iperf3", "3.12-1+deb12u2", "16215637827a05c4450ff9c04de399a2a56564eaf651b12cf7b63e374eb806cd"),
    debian("iproute2", "6.1.0-3", "1204b29e916e836267096d0b9d778106752f821ebde0d281539008b4386d9070"),
    debian("iputils-ping", "3:20221126-1+deb12u1", "5a206d74e2147990e08b89d09a4655e59a17222e0513a309a48e16ed2281589b"),
    debian("kmod", "30+20221128-1", "e21ae247204fe8a14ac29a5f510227d45b41cd3c41059cc942f2502d25765165"),
    debian("libacl1", "2.3.1-3", "8be9df5795114bfe90e2be3d208ef47a5edd3fc7b3e20d387a597486d444e5e2"),
    debian("libattr1", "1:2.5.1-4", "c4945123d66d0503ba42e2fc0585abc76d0838978c6d277b9cc37a4da25d1a34"),
    debian("libaudit-common", "1:3.0.9-1", "17d0341ca6ce604ce59c296780ac2c2a24141a769823c50669af942c025e6591"),
    debian("libaudit1", "1:3.0.9-1", "30954df4b5a7c505661ba8ae5e6ea94f5805e408899fb400783bb166eb5ff306"),
    debian("libblkid1", "2.38.1-5+deb12u3", "5a083377f29191cafcdf0f91ec124349b4a7895b531556633a136e43c6d53943"),
    debian("libbpf1", "1:1.1.2-0+deb12u1", "5e7505ef77ebc84ad0203411e4afdeb8a98f40fb7f78f013aa4dd8710e49f8ed"),
    debian("libbsd0", "0.11.7-2", "bb31cc8b40f962a85b2cec970f7f79cc704a1ae4bad24257a822055404b2c60b"),
    debian("libbz2-1.0", "1.0.8-5+b1", "54149da3f44b22d523b26b692033b84503d822cc5122fed606ea69cc83ca5aeb"),
    debian("libc-bin", "2.36-9+deb12u14", "e667401af91fad95f15b3ebd25d1abd8373fd18b00dc32219678413170544e84"),
    debian("libc6", "2.36-9+deb12u14", "ba4f88f73dbc3ae9055f3c20f4523bfdbaf1ad13ff95e258924f77d20b4fbedf"),
    debian("libcap-ng0", "0.8.3-1+b3", "b4b54769c77e4a71c8b33aee4d600ba28a9994a1c6f60d55d4ebe7fc44882e07"),
    debian("libcap2", "1:2.66-4+deb12u3+b1", "8d684c673e7483802a5c447834b0df6fce006eb3a7109e1be412f5ad425bb24f"),
    debian("libcap2-bin", "1:2.66-4+deb12u3+b1", "e7e14ebae53ef34c881a557e0a6d125b5e6721b692999045cf6af962daebe8d6"),
    debian("libcom-err2", "1.47.0-2+b2", "a2bac7015e78fbc0c504df3e441f3a22292f1d2d77f9ccda760057f3690e22f2"),
    debian("libcrypt1", "1:4.4.33-2", "f5f60a5cdfd4e4eaa9438ade5078a57741a7a78d659fcb0c701204f523e8bd29"),
    debian("libdb5.3", "5.3.28+dfsg2-1", "7dc5127b8dd0da80e992ba594954c005ae4359d839a24eb65d0d8129b5235c84"),
    debian("libelf1", "0.188-2.1", "619add379c606b3ac6c1a175853b918e6939598a83d8ebadf3bdfd50d10b3c8c"),
    debian("libext2fs2", "1.47.0-2+b2", "dff731f2318df99da4b8bf5f330f415f95b94c609bac29e7b2edba0a38f22a98"),
    debian("libgcc-s1", "12.2.0-14+deb12u1", "3016e62cb4b7cd8038822870601f5ed131befe942774d0f745622cc77d8a88f7"),
    debian("libgcrypt20", "1.10.1-3+deb12u1", "e7a56552139c693904a6f9712234c05fe918353273a7cbdb5e62f423ad71bb97"),
    debian("libgmp10", "2:6.2.1+dfsg1-1.1", "187aedef2ed763f425c1e523753b9719677633c7eede660401739e9c893482bd"),
    debian("libgpg-error0", "1.46-1", "89944ee11d7370ce6ef46fc52f094c4a6512eff8943ec4c6ebefeae6360ceada"),
    debian("libgssapi-krb5-2", "1.20.1-2+deb12u5", "d8b87aea91b956b416c01a28c44ff6228315ae3b73de40acddac3dc5043607d2"),
    debian("libidn2-0", "2.3.3-1+b1", "d50716d5824083d667427817d506b45d3f59dc77e1ca52de000f3f62d4918afa"),
    debian("libiperf0", "3.12-1+deb12u2", "0e05c09cf1252d897f882ebd1c6ee540d8a5fbde0542e450b5ad573158b571b2"),
    debian("libk5crypto3", "1.20.1-2+deb12u5", "7b6e47d15c5c9cdcd456137533d8308aeba608a54cec73b28bd59bfc4b54cf06"),
    debian("libkeyutils1", "1.6.3-2", "cfac89e6a7a54ff3c6a4f843310e25efeddaa771baeae470bd98bd588c373563"),
    debian("libkmod2", "30+20221128-1", "af63bbbfc15fbd1f254b15c393b3b95b18b18cc81348fc1b4f1c9c34b4d672d7"),
    debian("libkrb5-3", "1.20.1-2+deb12u5", "c90801be09701af221b54dd502a59cb378b7284ff31e480738baca317d2f7653"),
    debian("libkrb5support0", "1.20.1-2+deb12u5", "8b9c05f2d8d461a10d657b118f572af5bf8fd6c8f93dcef81e852c5ab0f428ab"),
    debian("liblz4-1", "1.9.4-1", "64cde86cef1deaf828bd60297839b59710b5cd8dc50efd4f12643caaee9389d3"),
    debian("liblzma5", "5.4.1-1+deb12u2", "3d8c29c8c21ec6007635e1b2591edf98b771c9572a085968f47452b33040f384"),
    debian("libmd0", "1.0.4-2", "03539fd30c509e27101d13a56e52eda9062bdf1aefe337c07ab56def25a13eab"),
    debian("libmnl0", "1.0.4-3", "4581f42e3373cb72f9ea4e88163b17873afca614a6c6f54637e95aa75983ea7c"),
    debian("libmount1", "2.38.1-5+deb12u3", "f46e2d6b006951825adde9757790b6609d7c66c7700f9b68f3db913eaac323c3"),
    debian("libncursesw6", "6.4-4", "98fa7a53dc565a38b65fb70422ad08001bf5361d8fbc74255280c329996a6bec"),
    debian("libpam-modules", "1.5.2-6+deb12u2", "19fb4838168e68bc15a5606070f14b1162bb34a3899686913f5d661f1707f483"),
    debian("libpam-modules-bin", "1.5.2-6+deb12u2", "e7b1f6c60a51398920c5da792016161a65bf1c7caaa64140dd2099176ed51280"),
    debian("libpam-runtime", "1.5.2-6+deb12u2", "7a4f26d54c1e3ee8c68095f9d9013d13dd89a33ff78ef87330d21f21235fc278"),
    debian("libpam0g", "1.5.2-6+deb12u2", "a06f889caf9e97ccf04dedec0905573916bc6ec3366ade2c6ef8900047fd5cc1"),
    debian("libpcre2-8-0", "10.42-1+deb12u2", "d2f7edfcc7689b9e0761c2742cc824ac86a20768bc5e8057818dc6875291fe76"),
    debian("libproc2-0", "2:4.0.2-3", "e82ba5d01929eafb8b9954606a3c38b0332a987c2b3432388b4ee7365e54deae"),
    debian("libsctp1", "1.0.19+dfsg-2", "e42749da6321b526dc617480d573732180c183a84a3393e5c398eb34f0ed0ff5"),
    debian("libselinux1", "3.4-1+b6", "2b07f5287b9105f40158b56e4d70cc1652dac56a408f3507b4ab3d061eed425f"),
    debian("libsemanage-common", "3.4-1", "835f806c21ae25e39053bd3057051640341b0cf08e1db9746fd82e370d82fa30"),
    debian("libsemanage2", "3.4-1+b5", "fd36d0972866adde5a52269a309fcecd76a8e45e557dd0ecd33aa221cabc2a8c"),
    debian("libsepol2", "3.4-2.1", "b998946bb9818a97b387a962826caae33bc7fdcb6d706b2782c0470510be6b48"),
    debian("libsmartcols1", "2.38.1-5+deb12u3", "84088c6895fc07538fc51624899f3f71835188e0d38ebc3812097ac13da523b0"),
    debian("libss2", "1.47.0-2+b2", "24115749c09b4e259acff1f799faccd1748ff322bd638b09d820729cb3b24579"),
    debian("libssl3", "3.0.22-1~deb12u2", "cb4784740daa9b3b0eaea2b444bbefa686794afbbf3d678d238c1fd9875f2efd"),
    debian("libsystemd0", "252.39-1~deb12u2", "013c07514a9e4933b2d5c098018695a6aa42d085dbc483ce2c094a954c8a1b0a"),
    debian("libtinfo6", "6.4-4", "072d908f38f51090ca28ca5afa3b46b2957dc61fe35094c0b851426859a49a51"),
    debian("libtirpc-common", "1.3.3+ds-1", "3e3ef129b4bf61513144236e15e1b4ec57fa5ae3dc8a72137abdbefb7a63af85"),
    debian("libtirpc3", "1.3.3+ds-1", "2a46d5a5e9486da11ffeff5740931740d6deae4f92cd6098df060dc5dff1e1c7"),
    debian("libudev1", "252.39-1~deb12u2", "6f7e08f11c4809d2e5998c775f7b423ab5ec2ce0309494b4a2615037052245e2"),
    debian("libunistring2", "1.0-2", "d466bbfe011d764d793c1d9d777cad9c7cf65b938e11598f27408171ad95a951"),
    debian("libuuid1", "2.38.1-5+deb12u3", "5fff398321da62d28a842bcbabd193d72ae21724962c029dc32b1dc6b2deaeaf"),
    debian("libxtables12", "1.8.9-2", "cb841d66950a43af4a398625313d2f3da9065299c9738538de6c2c3495857040"),
    debian("libzstd1", "1.5.4+dfsg2-5", "6315b5ac38b724a710fb96bf1042019398cb656718b1522279a5185ed39318fa"),
    debian("login", "1:4.13+dfsg1-1+deb12u2", "f1cc45bf505a8457340dc3c36f3a01a1835aaf564d73d9d394afb8ccfb6595a0"),
    debian("mawk", "1.3.4.20200120-3.1", "bcbc83f391854ea9d50ce2a4101aacf330de3b8b71d81a798faadba14a157f78"),
    debian("mount", "2.38.1-5+deb12u3", "456ed2c62f884bc1133b6969d4d1eb2e6d8581076b00b4c8d700151155270a7a"),
    debian("ncurses-base", "6.4-4", "bfd1d89f833c09a28b062ee916495cf69649ca2bf529532476c7b69d75d24909"),
    debian("netbase", "6.4", "29b23c48c0fe6f878e56c5ddc9f65d1c05d729360f3690a593a8c795031cd867"),
    debian("passwd", "1:4.13+dfsg1-1+deb12u2", "fb787363372903e03627e53fd483e51dfb6861047a1e02c7d5a5f27d66546d08"),
    debian("perl-base", "5.36.0-7+deb12u4", "d7d1943aec9597629bf73075efcc5ef6dc9bda96d78e80d843156ecd448478b8"),
    debian("procps", "2:4.0.2-3", "d9d0e75779cb79af869181f17b93c5c263a2b89cac6a0193c436160a4483ddc1"),
    debian("sed", "4.9-1+deb12u1", "fd557efeee8aae4619c2cb7f68aadccb804322ad4a99ab048aaae5901d253885"),
    debian("tar", "1.34+dfsg-1.2+deb12u1", "24fb92e98c2969171f81a8b589263d705f6b1670f95d121cd74c810d4605acc3"),
    debian("util-linux", "2.38.1-5+deb12u3", "8eb241ff24b2e1ee9c0373f4fc9bc728b85bf5966c1496154df7da01c0e42f34"),
    debian("util-linux-extra", "2.38.1-5+deb12u3", "b097a68c68e5c47a18e82678729dd9986782cf1d439f53beafad6f6dd3e6d688"),
    debian("zlib1g", "1:1.2.13.dfsg-1", "d7dd1d1411fedf27f5e27650a6eff20ef294077b568f4c8c5e51466dc7c08ce4"),
];
