//! vCPUs, memory and serial ports, as they are written on the command line.

use super::keyvalue::{Bytes, FlagError, KeyError, OptionValue, Options, Tolerated};
use super::{ConsoleConfig, ConsoleMode, CpusConfig, MemoryConfig};
use crate::cpu::kvm::Irqchip;

/// Puts the option's name to what is wrong with its value.
pub(super) fn named<T>(option: &'static str, text: &str, read: Result<T, KeyError>) -> Result<T, FlagError> {
    read.map_err(|source| FlagError { option, text: text.into(), source })
}

/// A key that is a hint about speed: nothing that the guest could see hangs on it.
const fn hint(key: &'static str) -> Tolerated {
    Tolerated { key, values: &[], remedy: "" }
}

/// A switch that must be off.
const fn off(key: &'static str, remedy: &'static str) -> Tolerated {
    Tolerated { key, values: &["off", "false"], remedy }
}

const MEMORY_HINTS: [&str; 6] = ["hugepages", "hugepage_size", "mergeable", "prefault", "thp", "hotplug_method"];
const MEMORY_TOLERATED: [Tolerated; 6] = [
    hint(MEMORY_HINTS[0]),
    hint(MEMORY_HINTS[1]),
    hint(MEMORY_HINTS[2]),
    hint(MEMORY_HINTS[3]),
    hint(MEMORY_HINTS[4]),
    hint(MEMORY_HINTS[5]),
];
const CPUS_HINTS: [&str; 2] = ["topology", "max_phys_bits"];
const CPUS_TOLERATED: [Tolerated; 6] = [
    hint(CPUS_HINTS[0]),
    hint(CPUS_HINTS[1]),
    off("nested", "guests of guests do not exist yet; leave it out"),
    off("kvm_hyperv", "leave it out"),
    Tolerated { key: "affinity", values: &["[]"], remedy: "pin the threads vcpu0, vcpu1, … with taskset" },
    Tolerated { key: "features", values: &["[]"], remedy: "--cpu-model says what the guest sees" },
];

/// Says that a hint is heard and has no effect.
fn tell_hints(option: &str, options: &Options, hints: &[&str]) {
    for key in hints.iter().filter(|key| options.has(key)) {
        tracing::warn!("{option} {key}=: accepted for compatibility; it changes nothing");
    }
}

impl MemoryConfig {
    /// Reads `size=1G[,shared=on][,hotplug_size=0]`.
    ///
    /// # Errors
    /// What is wrong with it, naming `option`.
    pub fn from_flag(option: &'static str, text: &str) -> Result<Self, FlagError> {
        let read = || {
            let options = Options::parse(text, &["size", "shared", "hotplug_size"], &MEMORY_TOLERATED)?;
            if options.get::<bool>("shared")? == Some(false) {
                let (key, value) = ("shared", "off".into());
                return Err(KeyError::Value { key, value, expected: "on, as devices are processes," });
            }
            tell_hints(option, &options, &MEMORY_HINTS);
            let size = options.need::<Bytes>("size")?.0;
            let hotplug_size = options.get::<Bytes>("hotplug_size")?.map(|bytes| bytes.0);
            Ok(Self { size, hotplug_size, shared: true })
        };
        named(option, text, read())
    }
}

impl CpusConfig {
    /// Reads `boot=1[,max=1]`.
    ///
    /// # Errors
    /// What is wrong with it, naming `option`.
    pub fn from_flag(option: &'static str, text: &str) -> Result<Self, FlagError> {
        let read = || {
            let options = Options::parse(text, &["boot", "max"], &CPUS_TOLERATED)?;
            tell_hints(option, &options, &CPUS_HINTS);
            let boot = options.need::<u32>("boot")?;
            let refuse = |key, value: u32, expected| Err(KeyError::Value { key, value: value.to_string(), expected });
            if !(1..=255).contains(&boot) {
                return refuse("boot", boot, "a number from 1 to 255");
            }
            match options.get::<u32>("max")? {
                Some(max) if max != boot => {
                    refuse("max", max, "the same number as boot, as vCPUs cannot be added later,")
                }
                _ => Ok(Self { boot_vcpus: boot, max_vcpus: boot }),
            }
        };
        named(option, text, read())
    }
}

impl OptionValue for Irqchip {
    const EXPECTED: &'static str = "kernel or split";
    fn read(text: &str) -> Option<Self> {
        match text {
            "kernel" => Some(Self::Kernel),
            "split" => Some(Self::Split),
            _ => None,
        }
    }
}

impl Irqchip {
    /// Reads `irqchip=kernel` or `irqchip=split`.
    ///
    /// # Errors
    /// What is wrong with it, naming `option`.
    pub fn from_flag(option: &'static str, text: &str) -> Result<Self, FlagError> {
        named(option, text, Options::parse(text, &["irqchip"], &[]).and_then(|options| options.need("irqchip")))
    }
}

impl ConsoleConfig {
    /// A port of this mode and nothing else.
    pub fn of(mode: ConsoleMode) -> Self {
        Self { mode, ..Self::default() }
    }

    /// Reads `off`, `null`, `tty`, `pty`, `file=PATH`, `socket=PATH`, or `socket` alone, which leaves the path to the
    /// caller.
    ///
    /// # Errors
    /// What is wrong with it, naming `option`.
    pub fn from_flag(option: &'static str, text: &str) -> Result<Self, FlagError> {
        // What else there is to say of a virtio console; a serial port has no process of that kind.
        let more: &[&'static str] =
            if option == "--console" { &["stall_timeout", "start_attempts", "on_failure"] } else { &[] };
        let read = || {
            let (options, mut port) = if text.starts_with("file=") {
                let options = Options::parse(text, &[&["file"], more].concat(), &[])?;
                let file = Some(options.need("file")?);
                (options, Self { file, ..Self::of(ConsoleMode::File) })
            } else if text.starts_with("socket=") {
                let options = Options::parse(text, &[&["socket"], more].concat(), &[])?;
                let socket = Some(options.need("socket")?);
                (options, Self { socket, ..Self::of(ConsoleMode::Socket) })
            } else {
                let (mode, rest) = text.split_once(',').map_or((text, None), |(mode, rest)| (mode, Some(rest)));
                let mode = match mode {
                    "off" => ConsoleMode::Off,
                    "null" => ConsoleMode::Null,
                    "tty" => ConsoleMode::Tty,
                    "pty" => ConsoleMode::Pty,
                    "socket" => ConsoleMode::Socket,
                    _ => {
                        return Err(KeyError::Choice {
                            valid: "tty, pty, socket, socket=PATH, file=PATH, null or off",
                        });
                    }
                };
                let Some(rest) = rest else { return Ok(Self::of(mode)) };
                (Options::parse(rest, more, &[])?, Self::of(mode))
            };
            port.stall_timeout = options.get("stall_timeout")?;
            port.start_attempts = options.get("start_attempts")?;
            port.on_failure = options.get("on_failure").map(Option::unwrap_or_default)?;
            Ok(port)
        };
        named(option, text, read())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::OnFailure;

    #[test]
    fn machines_are_described() {
        let memory = MemoryConfig::from_flag("--memory", "size=1G,shared=on,hugepages=on").unwrap();
        assert_eq!(memory.size, 1 << 30);
        let cpus = CpusConfig::from_flag("--cpus", "boot=2,max=2,topology=1:2:1:1").unwrap();
        assert_eq!((cpus.boot_vcpus, cpus.max_vcpus), (2, 2));
        let serial = |text| ConsoleConfig::from_flag("--serial", text).unwrap();
        assert_eq!(serial("file=/tmp/x").file, Some("/tmp/x".into()));
        assert_eq!(serial("socket=/tmp/y").socket, Some("/tmp/y".into()));
        assert_eq!(serial("pty").mode, ConsoleMode::Pty);
        let console = |text| ConsoleConfig::from_flag("--console", text).unwrap();
        for (text, mode) in [
            ("pty,stall_timeout=5,on_failure=wait", ConsoleMode::Pty),
            ("file=/tmp/x,on_failure=wait,stall_timeout=5", ConsoleMode::File),
        ] {
            let port = console(text);
            assert_eq!((port.mode, port.stall_timeout, port.on_failure), (mode, Some(5), OnFailure::Wait));
        }
    }

    /// One line each, beginning with the option as it was given.
    #[test]
    fn mistakes_are_one_line() {
        let cases = [
            (MemoryConfig::from_flag("--memory", "size=512M,shared=off").unwrap_err(), "as devices are processes"),
            (MemoryConfig::from_flag("--memory", "sze=1").unwrap_err(), "no key 'sze'"),
            (CpusConfig::from_flag("--cpus", "boot=0").unwrap_err(), "1 to 255"),
            (CpusConfig::from_flag("--cpus", "boot=1,max=4").unwrap_err(), "the same number"),
            (CpusConfig::from_flag("--cpus", "boot=1,affinity=[0@1]").unwrap_err(), "taskset"),
            (ConsoleConfig::from_flag("--serial", "pty,stall_timeout=5").unwrap_err(), "no key 'stall_timeout'"),
            (ConsoleConfig::from_flag("--serial", "teletype").unwrap_err(), "tty, pty"),
            (ConsoleConfig::from_flag("--serial", "file=").unwrap_err(), "file needs a value"),
        ];
        for (error, expected) in cases {
            let message = error.to_string();
            assert!(!message.contains('\n') && message.starts_with("--") && message.contains(expected), "{message}");
        }
    }
}
