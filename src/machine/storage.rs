//! The storage a directory lies on: which device, which filesystem, how much room, how fast it is read.
//!
//! The one idea: the mount table leads from a path to a device number, and `/sys` from there to the disk behind it. Speed
//! is measured on a file that is there already, a model: its pages are dropped from the cache, some are read in order, and
//! the result counts only if the kernel confirms (`/proc/self/io`) that they came from the device.

use std::fs;
use std::path::{Path, PathBuf};

use super::Root;

/// What a directory lies on.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Storage {
    /// Where its filesystem is mounted.
    pub mount: String,
    /// `ext4`, `btrfs`, `overlay`.
    pub filesystem: String,
    /// The disk: `nvme0n1`.
    pub device: Option<String>,
    /// What kind of disk it is.
    pub kind: Option<Kind>,
    /// Its own name: `Samsung SSD 980 1TB`.
    pub model: Option<String>,
}

/// What kind of thing stores the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A memory card.
    SdCard,
    /// Flash soldered to a board.
    Emmc,
    /// Flash on PCI Express.
    Nvme,
    /// Other flash.
    Ssd,
    /// A rotating disk.
    HardDisk,
    /// Anything behind USB.
    Usb,
    /// A disk that a hypervisor presents.
    Virtual,
    /// Another computer, or the host of a virtual machine.
    Network,
    /// Memory: gone when the computer is switched off.
    Memory,
}

impl Kind {
    /// A name for people and scripts.
    pub fn name(self) -> &'static str {
        match self {
            Kind::SdCard => "SD card",
            Kind::Emmc => "eMMC",
            Kind::Nvme => "NVMe",
            Kind::Ssd => "SSD",
            Kind::HardDisk => "hard disk",
            Kind::Usb => "USB",
            Kind::Virtual => "virtual disk",
            Kind::Network => "network",
            Kind::Memory => "memory",
        }
    }
}

impl Storage {
    /// What `path` lies on, which must be absolute and without symbolic links; `None` if the mount table does not tell.
    pub fn of(root: &Root, path: &Path) -> Option<Storage> {
        let table = root.text("proc/self/mountinfo")?;
        let mut mounts: Vec<Mount> = table.lines().filter_map(Mount::parse).collect();
        // The deepest mount point above the path; of several mounts on one point the last hides the others.
        mounts.retain(|mount| path.starts_with(&mount.point));
        let mount = mounts.into_iter().max_by_key(|mount| Path::new(&mount.point).components().count())?;
        let filesystem = mount.filesystem.as_str();
        let network = ["nfs", "cifs", "smb", "9p", "virtiofs", "fuse.sshfs", "ceph", "vboxsf"];
        let (mut disk, mut kind) = (None, None);
        if ["tmpfs", "ramfs"].contains(&filesystem) {
            kind = Some(Kind::Memory);
        } else if network.iter().any(|name| filesystem.starts_with(name)) {
            kind = Some(Kind::Network);
        } else {
            disk = Disk::find(root, &mount.device, &mount.source);
        }
        let text = crate::error::printable;
        Some(Storage {
            mount: text(&mount.point),
            filesystem: text(&mount.filesystem),
            kind: kind.or_else(|| disk.as_ref().and_then(|disk| disk.kind(root))),
            model: disk.as_ref().and_then(|disk| root.line(disk.path.join("device/model"))),
            device: disk.map(|disk| text(&disk.name)),
        })
    }
}

/// A line of `/proc/self/mountinfo`.
struct Mount {
    /// Major and minor number of the device: `8:1`.
    device: String,
    point: String,
    filesystem: String,
    /// What was mounted: `/dev/sda1`.
    source: String,
}

impl Mount {
    fn parse(line: &str) -> Option<Mount> {
        let (before, after) = line.split_once(" - ")?;
        let (mut before, mut after) = (before.split(' ').skip(2), after.split(' '));
        let (device, point) = (before.next()?.to_string(), unescaped(before.nth(1)?));
        Some(Mount { device, point, filesystem: after.next()?.to_string(), source: unescaped(after.next()?) })
    }
}

/// Spaces and the like in the mount table are written as a backslash and three octal digits.
fn unescaped(text: &str) -> String {
    let mut pieces = text.split('\\');
    let mut out = pieces.next().unwrap_or_default().to_string();
    for piece in pieces {
        match piece.split_at_checked(3).map(|(digits, rest)| (u8::from_str_radix(digits, 8), rest)) {
            Some((Ok(byte), rest)) if byte.is_ascii() => {
                out.push(byte as char);
                out.push_str(rest);
            }
            _ => {
                out.push('\\');
                out.push_str(piece);
            }
        }
    }
    out
}

/// A whole disk, not a partition of it.
struct Disk {
    name: String,
    /// Its directory, below the root.
    path: PathBuf,
    /// Where the directory really is, which names the buses on the way.
    real: PathBuf,
}

impl Disk {
    /// By device number, or by name where a filesystem has a number of its own.
    fn find(root: &Root, device: &str, source: &str) -> Option<Disk> {
        let by_name = || source.strip_prefix("/dev/").map(|name| PathBuf::from("sys/class/block").join(name));
        let by_number = PathBuf::from("sys/dev/block").join(device);
        let mut path = if root.path(&by_number).exists() { by_number } else { by_name()? };
        // From a logical volume to the first disk below it, from a partition to its disk.
        for _ in 0..8 {
            if let Some(below) = root.names(path.join("slaves")).into_iter().next() {
                path = PathBuf::from("sys/class/block").join(below);
            } else {
                break;
            }
        }
        let real = fs::canonicalize(root.path(&path)).ok()?;
        let real = if real.join("partition").exists() { real.parent()?.to_path_buf() } else { real };
        let name = real.file_name()?.to_str()?.to_string();
        Some(Disk { path: PathBuf::from("sys/class/block").join(&name), name, real })
    }

    fn kind(&self, root: &Root) -> Option<Kind> {
        if self.real.to_string_lossy().contains("/usb") {
            return Some(Kind::Usb);
        }
        let number = |file: &str| root.number::<u32>(self.path.join(file));
        match self.name.trim_end_matches(|c: char| c.is_ascii_digit()) {
            name if name.starts_with("nvme") => Some(Kind::Nvme),
            "mmcblk" => match root.line(self.path.join("device/type"))?.as_str() {
                "SD" => Some(Kind::SdCard),
                "MMC" => Some(Kind::Emmc),
                _ => None,
            },
            "zram" | "ram" => Some(Kind::Memory),
            name if name.starts_with("vd") || name.starts_with("xvd") => Some(Kind::Virtual),
            _ => match number("queue/rotational")? {
                0 => Some(Kind::Ssd),
                _ => Some(Kind::HardDisk),
            },
        }
    }
}

/// The deepest directory on the way to `path` that exists, without symbolic links.
pub fn existing(path: &Path) -> Option<PathBuf> {
    path.ancestors().find_map(|ancestor| fs::canonicalize(ancestor).ok())
}

/// Bytes that are free for users on the filesystem of `path`.
pub fn free(path: &Path) -> Option<u64> {
    #[cfg(unix)]
    {
        let figures = rustix::fs::statvfs(path).ok()?;
        figures.f_bavail.checked_mul(figures.f_frsize)
    }
    #[cfg(not(unix))]
    {
        let _ = path;
        None
    }
}

/// Bytes that are read to measure; files shorter than twice as many are not.
const SAMPLE: u64 = 64 << 20;

/// Bytes a second at which a file is read in order from its device. `None` if the file is too short, is still cached
/// after all (because somebody uses it), or the system does not tell.
#[cfg(target_os = "linux")]
pub fn read_speed(path: &Path) -> Option<f64> {
    use std::os::unix::fs::FileExt;

    let file = fs::File::open(path).ok()?;
    let length = file.metadata().ok().filter(|meta| meta.is_file())?.len();
    if length < 2 * SAMPLE {
        return None;
    }
    // The middle of the file: its beginning, which every program reads, may be in use.
    let start = (length - SAMPLE) / 2 / 4096 * 4096;
    let range = std::num::NonZero::new(SAMPLE);
    rustix::fs::fadvise(&file, start, range, rustix::fs::Advice::DontNeed).ok()?;
    rustix::fs::fadvise(&file, start, range, rustix::fs::Advice::Sequential).ok()?;
    let fetched = || super::field(&Root::system().text("proc/self/io")?, "read_bytes")?.parse::<u64>().ok();
    let before = fetched()?;
    let mut buffer = vec![0; 1 << 20];
    let time = std::time::Instant::now();
    let mut at = start;
    while at < start + SAMPLE {
        match file.read_at(&mut buffer, at) {
            Ok(n) if n > 0 => at += n as u64,
            _ => return None,
        }
    }
    let seconds = time.elapsed().as_secs_f64();
    let from_device = fetched()?.checked_sub(before)?;
    (from_device >= SAMPLE / 10 * 9).then(|| SAMPLE as f64 / seconds)
}

/// Only Linux tells whether bytes came from a device.
#[cfg(not(target_os = "linux"))]
pub fn read_speed(_: &Path) -> Option<f64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_mount_table() {
        let line = r"36 35 98:0 /mnt1 /mnt/my\040disk rw,noatime master:1 - ext3 /dev/root rw,errors=continue";
        let mount = Mount::parse(line).unwrap();
        assert_eq!((mount.device.as_str(), mount.point.as_str()), ("98:0", "/mnt/my disk"));
        assert_eq!((mount.filesystem.as_str(), mount.source.as_str()), ("ext3", "/dev/root"));
        for nonsense in ["", "a b c", "36 35 98:0 / / rw", " - ", "36 35 98:0 / - x"] {
            assert!(Mount::parse(nonsense).is_none(), "{nonsense}");
        }
        assert_eq!(unescaped(r"a\134b\x\04"), r"a\b\x\04");
    }

    #[test]
    fn a_missing_directory_has_an_existing_parent() {
        let folder = tempfile::tempdir().unwrap();
        let real = fs::canonicalize(folder.path()).unwrap();
        assert_eq!(existing(&folder.path().join("a/b")), Some(real));
        assert!(free(folder.path()).is_some_and(|bytes| bytes > 0));
        assert_eq!(free(Path::new("/nonexistent")), None);
    }

    #[test]
    fn short_files_are_not_measured() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(read_speed(file.path()), None);
        assert_eq!(read_speed(Path::new("/nonexistent")), None);
        assert_eq!(read_speed(Path::new("/dev/zero")), None);
    }
}
