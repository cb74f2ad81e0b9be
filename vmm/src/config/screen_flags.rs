//! GPU, display and input devices, as they are written on the command line.

use super::care::on_failure;
use super::device_flags::device;
use super::flags::named;
use super::keyvalue::{Bytes, FlagError, KeyError, OptionValue, Options};
use super::{ConfigError, DeviceConfig, DisplayConfig, GpuConfig, InputConfig, InputKind, Mode};

/// The modes of a list, where one that is none is told by itself.
fn modes(options: &Options) -> Result<Vec<Mode>, KeyError> {
    let texts: Vec<String> = options.get("modes")?.unwrap_or_default();
    let read = |text: String| {
        let expected = "WIDTHxHEIGHT, each from 64 to 8192, as in [1280x800],";
        text.parse().map_err(|_| KeyError::Value { key: "modes", value: text, expected })
    };
    texts.into_iter().map(read).collect()
}

impl OptionValue for InputKind {
    const EXPECTED: &'static str = "keyboard, tablet or mouse";
    fn read(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == text)
    }
}

impl GpuConfig {
    /// Reads `scanouts=2,modes=[1920x1080,1280x800],memory=256M,virgl=on`, all of which may be left out with `on`.
    ///
    /// # Errors
    /// What is wrong with it, naming `option`.
    pub fn from_flag(option: &'static str, text: &str) -> Result<Self, FlagError> {
        let keys = [
            "socket",
            "scanouts",
            "modes",
            "memory",
            "virgl",
            "stall_timeout",
            "start_attempts",
            "on_failure",
            "iommu",
            "id",
        ];
        let read = || {
            let options = Options::parse(if text == "on" { "scanouts=1" } else { text }, &keys, &[])?;
            Ok(Self {
                id: options.get("id")?,
                socket: options.get("socket")?,
                scanouts: options.get("scanouts")?,
                modes: modes(&options)?,
                memory: options.get::<Bytes>("memory")?.map(|bytes| bytes.0),
                virgl: options.on("virgl")?,
                stall_timeout: options.get("stall_timeout")?,
                start_attempts: options.get("start_attempts")?,
                on_failure: on_failure(&options)?,
                iommu: options.on("iommu")?,
            })
        };
        device(option, text, read, DeviceConfig::Gpu)
    }
}

impl InputConfig {
    /// Reads `keyboard`, `tablet` or `mouse`, or `kind=` with one of them and more.
    ///
    /// # Errors
    /// What is wrong with it, naming `option`.
    pub fn from_flag(option: &'static str, text: &str) -> Result<Self, FlagError> {
        let read = || {
            if let Some(kind) = InputKind::read(text) {
                return Ok(Self { kind, ..Self::default() });
            }
            if !text.contains('=') {
                return Err(KeyError::Choice {
                    valid: "keyboard, tablet or mouse, or kind= with one of them and more",
                });
            }
            let options = Options::parse(text, &["kind", "start_attempts", "on_failure", "iommu", "id"], &[])?;
            Ok(Self {
                id: options.get("id")?,
                kind: options.need("kind")?,
                start_attempts: options.get("start_attempts")?,
                on_failure: on_failure(&options)?,
                iommu: options.on("iommu")?,
            })
        };
        device(option, text, read, DeviceConfig::Input)
    }
}

impl DisplayConfig {
    /// Reads `web=127.0.0.1:8006,vnc=127.0.0.1:5900,password_file=FILE`, all of which may be left out with `on`.
    ///
    /// # Errors
    /// What is wrong with it, naming `option`.
    pub fn from_flag(option: &'static str, text: &str) -> Result<Self, FlagError> {
        let read = || {
            if text == "on" {
                return Ok(Self::default());
            }
            let options = Options::parse(text, &["vnc", "web", "password_file", "novnc"], &[])?;
            let display = Self {
                vnc: options.get("vnc")?,
                web: options.get("web")?,
                password_file: options.get("password_file")?,
                novnc: options.get("novnc")?,
            };
            let wrong = |what| KeyError::Config(ConfigError::Device { device: "display".into(), what });
            display.check().map_err(wrong).map(|()| display)
        };
        named(option, text, read())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn screens_are_described() {
        let gpu = GpuConfig::from_flag("--gpu", "scanouts=2,modes=[1920x1080,800x600],memory=64M").unwrap();
        assert_eq!((gpu.scanouts(), gpu.memory()), (2, 64 << 20));
        assert_eq!(gpu.modes, [Mode { width: 1920, height: 1080 }, Mode { width: 800, height: 600 }]);
        let plain = GpuConfig::from_flag("--gpu", "on").unwrap();
        assert_eq!((plain.scanouts(), plain.virgl, gpu.virgl), (1, false, false));
        assert!(GpuConfig::from_flag("--gpu", "virgl=on").unwrap().virgl);
        assert_eq!(InputConfig::from_flag("--input", "mouse").unwrap().kind, InputKind::Mouse);
        let display = DisplayConfig::from_flag("--display", "web=127.0.0.1:0,vnc=unix:/run/vnc").unwrap();
        assert_eq!(display.vnc.as_deref(), Some("unix:/run/vnc"));
    }

    /// One line each, with the remedy.
    #[test]
    fn mistakes_are_one_line() {
        let cases = [
            (GpuConfig::from_flag("--gpu", "scanouts=17").unwrap_err(), "1 to 16"),
            (GpuConfig::from_flag("--gpu", "modes=[1x1]").unwrap_err(), "1280x800"),
            (GpuConfig::from_flag("--gpu", "modes=[640x480,640x480]").unwrap_err(), "give scanouts"),
            (GpuConfig::from_flag("--gpu", "memory=1K").unwrap_err(), "16M"),
            (GpuConfig::from_flag("--gpu", "virgl=on,iommu=on").unwrap_err(), "leave one out"),
            (GpuConfig::from_flag("--gpu", "socket=/run/gpu,virgl=on").unwrap_err(), "give them there"),
            (InputConfig::from_flag("--input", "trackball").unwrap_err(), "keyboard, tablet or mouse"),
            (InputConfig::from_flag("--input", "kind=trackball").unwrap_err(), "keyboard, tablet or mouse"),
            (DisplayConfig::from_flag("--display", "vnc=0.0.0.0:5900").unwrap_err(), "ssh -L"),
            (DisplayConfig::from_flag("--display", "vnc=5900").unwrap_err(), "127.0.0.1:5900"),
            (DisplayConfig::from_flag("--display", "web=unix:/run/web").unwrap_err(), "127.0.0.1:8006"),
        ];
        for (error, expected) in cases {
            let message = error.to_string();
            assert!(!message.contains('\n') && message.starts_with("--") && message.contains(expected), "{message}");
        }
    }
}
