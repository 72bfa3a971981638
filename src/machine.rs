//! The computer this runs on, as far as it decides how well a model runs.
//!
//! The one idea: what Linux knows of a computer stands in small text files below `/proc` and `/sys`, so all of it is read
//! through a [`Root`], which tests point at a directory of their own. A file that is missing or says something else than
//! expected is a fact nobody knows: `None` or an empty list, never an error; on other systems that is nearly all of them.
//! Text is made printable as it is read.
//!
//! | file | what is there |
//! |---|---|
//! | `machine/cores.rs` | clusters of alike cores, frequencies, what of them this process may use |
//! | `machine/memory.rs` | memory, limits, swap, pages |
//! | `machine/storage.rs` | the device a directory lies on |
//! | `machine/cooling.rs` | temperatures, and signs of throttling |
//! | `machine/speed.rs` | measured: read bandwidth and int8 arithmetic |

pub mod cooling;
pub mod cores;
pub mod memory;
pub mod speed;
pub mod storage;

use std::fs::{self, File};
use std::io::Read;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use crate::error::printable;
use cooling::Cooling;
use cores::Cores;
use memory::Memory;

/// Everything that is read without measuring.
#[derive(Debug, Clone, Default)]
pub struct Machine {
    /// The board or computer, where its firmware says so: `Raspberry Pi 5 Model B Rev 1.0`.
    pub board: Option<String>,
    /// The processor's name; of ARM processors the names of their cores.
    pub cpu: Option<String>,
    /// The architecture the kernel was built for: `x86_64`, `aarch64`.
    pub kernel_arch: Option<String>,
    /// Cores.
    pub cores: Cores,
    /// Memory; `None` where the system does not tell.
    pub memory: Option<Memory>,
    /// Temperatures and throttling.
    pub cooling: Cooling,
}

impl Machine {
    /// What can be read below `root`.
    pub fn read(root: &Root) -> Machine {
        let cores = Cores::read(root);
        Machine {
            board: root.line("proc/device-tree/model"),
            cpu: cpu(root, &cores),
            kernel_arch: root.line("proc/sys/kernel/arch"),
            memory: Memory::read(root),
            cooling: Cooling::read(root),
            cores,
        }
    }
}

/// The processor's name.
fn cpu(root: &Root, cores: &Cores) -> Option<String> {
    let info = root.text("proc/cpuinfo").unwrap_or_default();
    let name = field(&info, "model name").map(|name| printable(&name.split_whitespace().collect::<Vec<_>>().join(" ")));
    name.filter(|name| !name.is_empty()).or_else(|| {
        let mut names: Vec<&str> = cores.clusters.iter().filter_map(|cluster| cluster.name.as_deref()).collect();
        names.dedup();
        (!names.is_empty()).then(|| names.join(" + "))
    })
}

/// The processor's name; the architecture where nothing better is known.
pub fn cpu_name() -> String {
    let root = Root::system();
    cpu(&root, &Cores::read(&root)).unwrap_or_else(|| std::env::consts::ARCH.to_string())
}

/// Threads this process may run at once: what the affinity mask and container limits allow.
pub fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// Bytes a model can use: available to the system and left by every control group. `None` where the system does not tell.
pub fn usable_memory() -> Option<u64> {
    Memory::read(&Root::system()).map(|memory| memory.usable())
}

/// The most memory this process has had resident so far, in bytes.
pub fn peak_rss() -> Option<u64> {
    kilobytes(&Root::system().text("proc/self/status")?, "VmHWM")
}

/// Memory of this process that is resident now, in bytes.
pub fn rss() -> Option<u64> {
    kilobytes(&Root::system().text("proc/self/status")?, "VmRSS")
}

/// How often this process has waited for a page to be read from the disk.
pub fn major_faults() -> Option<u64> {
    major_faults_in(&Root::system().text("proc/self/stat")?)
}

/// The twelfth field of `/proc/PID/stat`. The second, the program's name in parentheses, may contain anything.
fn major_faults_in(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(9)?.parse().ok()
}

/// [`peak_rss`] of another process that still runs.
pub fn peak_rss_of(process: u32) -> Option<u64> {
    kilobytes(&Root::system().text(format!("proc/{process}/status"))?, "VmHWM")
}

/// Processes that ran or wanted to run, on average over the last minute.
pub fn load_average() -> Option<f64> {
    Root::system().text("proc/loadavg")?.split_whitespace().next()?.parse().ok()
}

/// A name of this start of the computer, another after each, where the system tells.
pub fn boot_id() -> Option<String> {
    Root::system().line("proc/sys/kernel/random/boot_id")
}

/// Where the kernel's files are looked for.
#[derive(Debug, Clone)]
pub struct Root(PathBuf);

/// Bytes of a file that are read: the longest, `/proc/cpuinfo` of a server, needs less.
const LONGEST: u64 = 4 << 20;

impl Root {
    /// This computer.
    pub fn system() -> Root {
        Root("/".into())
    }

    /// A directory that holds a `proc` and a `sys`.
    pub fn at(path: impl Into<PathBuf>) -> Root {
        Root(path.into())
    }

    fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        // A path such as a mount point may be absolute or try to climb.
        let below = path.as_ref().components().filter(|part| matches!(part, Component::Normal(_)));
        self.0.join(below.collect::<PathBuf>())
    }

    /// The content of a file. What is not UTF-8 is replaced.
    fn text(&self, path: impl AsRef<Path>) -> Option<String> {
        let mut bytes = Vec::new();
        File::open(self.path(path)).ok()?.take(LONGEST).read_to_end(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The first line of a file, printable and not longer than a line is. The device tree's strings end with a zero.
    fn line(&self, path: impl AsRef<Path>) -> Option<String> {
        let text = self.text(path)?;
        let line = text.lines().next()?.trim_end_matches('\0').trim();
        (!line.is_empty()).then(|| printable(&line.chars().take(120).collect::<String>()))
    }

    /// The number a file consists of.
    fn number<T: FromStr>(&self, path: impl AsRef<Path>) -> Option<T> {
        self.text(path)?.trim().parse().ok()
    }

    /// The names in a directory that are `prefix` and a number, in the order of the numbers.
    fn numbered(&self, directory: impl AsRef<Path>, prefix: &str) -> Vec<String> {
        let number = |name: &String| name.strip_prefix(prefix)?.parse::<u32>().ok();
        let mut names: Vec<_> = self.names(directory).into_iter().filter_map(|n| Some((number(&n)?, n))).collect();
        names.sort();
        names.into_iter().map(|(_, name)| name).collect()
    }

    /// The names in a directory, sorted.
    fn names(&self, directory: impl AsRef<Path>) -> Vec<String> {
        let entries = fs::read_dir(self.path(directory)).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names
    }

    /// The directories that hold this process's limits of `controller`, innermost first, each with whether it is of
    /// cgroup version 2. A limit of any of them holds.
    fn cgroups(&self, controller: &str) -> Vec<(PathBuf, bool)> {
        let mut directories = Vec::new();
        for line in self.text("proc/self/cgroup").unwrap_or_default().lines() {
            let mut parts = line.splitn(3, ':');
            let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
            let (mount, unified) = match controllers {
                "" => (PathBuf::from("sys/fs/cgroup"), true),
                list if list.split(',').any(|name| name == controller) => {
                    (Path::new("sys/fs/cgroup").join(list), false)
                }
                _ => continue,
            };
            let group: PathBuf = Path::new(path).components().filter(|p| matches!(p, Component::Normal(_))).collect();
            directories.extend(group.ancestors().map(|group| (mount.join(group), unified)));
        }
        directories
    }
}

/// The value of the first `NAME : VALUE` line.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let mut pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim())
}

/// The value of a `NAME:  123 kB` line, in bytes.
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let value: u64 = field(text, name)?.strip_suffix("kB")?.trim().parse().ok()?;
    value.checked_mul(1024)
}

/// The numbers of a list such as `0-3,8`; of one that makes no sense, none.
fn list(text: &str) -> Vec<usize> {
    /// More processors than any kernel is built for.
    const MOST: usize = 1 << 14;
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        (last < MOST).then_some(first..=last)
    };
    let ranges: Option<Vec<_>> = text.trim().split(',').map(range).collect();
    ranges.into_iter().flatten().flatten().collect()
}

/// The same, written short: `0-3,8`.
pub fn ranges(numbers: &[usize]) -> String {
    let mut parts: Vec<(usize, usize)> = Vec::new();
    for &n in numbers {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 == n => *last = n,
            _ => parts.push((n, n)),
        }
    }
    let part =
        |(first, last): &(usize, usize)| if first == last { first.to_string() } else { format!("{first}-{last}") };
    parts.iter().map(part).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_proc() {
        let text = "VmPeak:\t  99 kB\nVmHWM:\t   1234 kB\n";
        assert_eq!(kilobytes(text, "VmHWM"), Some(1234 * 1024));
        assert_eq!(kilobytes(text, "VmRSS"), None);
        assert_eq!(kilobytes("VmHWM: x kB", "VmHWM"), None);
        let stat = "1234 (a) b (c) S 1 2 3 4 5 6 7 8 99 10 11\n";
        assert_eq!((major_faults_in(stat), major_faults_in("1 (x) S 1")), (Some(99), None));
        assert_eq!(field("processor\t: 0\nmodel name\t: A: b\n", "model name"), Some("A: b"));
    }

    #[test]
    fn lists_of_processors() {
        assert_eq!(list("0-3,8,10-11\n"), [0, 1, 2, 3, 8, 10, 11]);
        assert_eq!(ranges(&list("0-3,8,10-11")), "0-3,8,10-11");
        for nonsense in ["", "x", "0-", "3-1", "0-99999999999", "1,,2"] {
            assert!(list(nonsense).is_empty(), "{nonsense}");
        }
    }

    #[test]
    fn a_path_stays_below_its_root() {
        assert_eq!(Root::at("/fake").path("/proc/../../etc/./passwd"), Path::new("/fake/proc/etc/passwd"));
    }

    #[test]
    fn groups_of_both_versions() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("proc/self")).unwrap();
        let write = |text: &str| fs::write(root.path().join("proc/self/cgroup"), text).unwrap();
        let found = || -> Vec<String> {
            let groups = Root::at(root.path()).cgroups("memory");
            groups.iter().map(|(path, v2)| format!("{} {v2}", path.display()).replace("sys/fs/cgroup", "*")).collect()
        };
        write("0::/a/b\n");
        assert_eq!(found(), ["*/a/b true", "*/a true", "*/ true"]);
        write("5:cpu,cpuacct:/\n7:memory:/docker/x\nnonsense\n0::/\n");
        assert_eq!(found(), ["*/memory/docker/x false", "*/memory/docker false", "*/memory/ false", "*/ true"]);
        write("0::/../../up\n");
        assert_eq!(found(), ["*/up true", "*/ true"]);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn linux_tells_all_this() {
        let machine = Machine::read(&Root::system());
        let memory = machine.memory.unwrap();
        assert!(memory.total >= memory.available && memory.available > 0);
        assert!(peak_rss_of(std::process::id()).unwrap() > 0 && load_average().unwrap() >= 0.0);
        assert!(peak_rss().unwrap() > 0 && threads() > 0 && !cpu_name().is_empty());
        assert!(!machine.cores.clusters.is_empty());
    }

    /// Not one file there: everything is unknown, and nothing fails.
    #[test]
    fn an_empty_root_is_no_error() {
        let root = tempfile::tempdir().unwrap();
        let machine = Machine::read(&Root::at(root.path()));
        assert!(machine.cpu.is_none() && machine.memory.is_none() && machine.cores.clusters.is_empty());
    }
}
