//! Cores: which are alike, how fast they may run, and which of them this process may use.
//!
//! The one idea: processors of the same design, frequency domain and speed form a [`Cluster`]. Speed is `cpu_capacity`
//! where the kernel gives it (ARM), else the highest frequency; x86 hybrids also say themselves which cores are which.
//! Nothing is pinned or chosen here.

use std::collections::{BTreeMap, BTreeSet};

use super::{Root, field, list};

/// The processors of a computer.
#[derive(Debug, Clone, Default)]
pub struct Cores {
    /// Groups of alike processors, fastest first.
    pub clusters: Vec<Cluster>,
    /// Processors this process may run on, by the affinity mask; empty if unknown.
    pub allowed: Vec<usize>,
    /// Processors' worth of time a container may use.
    pub quota: Option<f64>,
}

/// Alike processors.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Cluster {
    /// What they are called: `Cortex-A76`, `performance cores`.
    pub name: Option<String>,
    /// Numbers of the processors.
    pub cpus: Vec<usize>,
    /// Physical cores; fewer than processors where a core runs two threads.
    pub cores: usize,
    /// `cpu_capacity`: 1024 for the fastest processor of a computer.
    pub capacity: Option<u32>,
    /// Highest frequency of the hardware, in kHz.
    pub max_khz: Option<u64>,
    /// Highest frequency allowed at present.
    pub limit_khz: Option<u64>,
    /// Highest present frequency of a processor in the cluster.
    pub now_khz: Option<u64>,
    /// Who decides on the frequency, and through which driver.
    pub governor: Option<String>,
    /// See `governor`.
    pub driver: Option<String>,
}

/// One processor, before it is known what it is like.
struct Processor {
    number: usize,
    part: Option<String>,
    hybrid: Option<&'static str>,
    /// First processor of its frequency domain, where that is more than one core.
    domain: Option<usize>,
    /// First hardware thread of its core.
    core: usize,
    capacity: Option<u32>,
    max_khz: Option<u64>,
}

/// Speeds within this share of the fastest of a group count as the same: single cores of a desktop processor are often
/// allowed a little more than others.
const ALIKE: f64 = 0.85;

impl Cores {
    /// What can be read below `root`.
    pub fn read(root: &Root) -> Cores {
        let online = root.text("sys/devices/system/cpu/online").map(|text| list(&text)).unwrap_or_default();
        let parts = parts(&root.text("proc/cpuinfo").unwrap_or_default());
        let kind = |file: &str| root.text(file).map(|text| list(&text)).unwrap_or_default();
        let (fast, slow) = (kind("sys/devices/cpu_core/cpus"), kind("sys/devices/cpu_atom/cpus"));
        let processors: Vec<Processor> = online
            .into_iter()
            .map(|number| {
                let cpu = format!("sys/devices/system/cpu/cpu{number}");
                let cpus = |file: &str| root.text(format!("{cpu}/{file}")).map(|text| list(&text)).unwrap_or_default();
                let threads = cpus("topology/thread_siblings_list");
                let domain: Vec<usize> = cpus("cpufreq/related_cpus_list");
                let domain = if domain.is_empty() { spaced(root, &cpu) } else { domain };
                Processor {
                    number,
                    part: parts.get(&number).cloned(),
                    hybrid: if fast.contains(&number) {
                        Some("performance cores")
                    } else if slow.contains(&number) {
                        Some("efficiency cores")
                    } else {
                        None
                    },
                    domain: domain.iter().any(|cpu| *cpu != number && !threads.contains(cpu)).then(|| domain[0]),
                    core: threads.first().copied().unwrap_or(number),
                    capacity: root.number(format!("{cpu}/cpu_capacity")),
                    max_khz: root.number(format!("{cpu}/cpufreq/cpuinfo_max_freq")),
                }
            })
            .collect();
        let allowed = root.text("proc/self/status");
        let allowed =
            allowed.as_deref().and_then(|text| field(text, "Cpus_allowed_list")).map(list).unwrap_or_default();
        Cores { clusters: clusters(root, processors), allowed, quota: quota(root) }
    }

    /// Processors that are switched on.
    pub fn cpus(&self) -> usize {
        self.clusters.iter().map(|cluster| cluster.cpus.len()).sum()
    }

    /// Physical cores.
    pub fn cores(&self) -> usize {
        self.clusters.iter().map(|cluster| cluster.cores).sum()
    }
}

/// `related_cpus` separates by spaces what other lists separate by commas.
fn spaced(root: &Root, cpu: &str) -> Vec<usize> {
    let text = root.text(format!("{cpu}/cpufreq/related_cpus")).unwrap_or_default();
    list(&text.split_whitespace().collect::<Vec<_>>().join(","))
}

/// Groups what is alike.
fn clusters(root: &Root, processors: Vec<Processor>) -> Vec<Cluster> {
    // Capacities tell processors apart only if all have one.
    let by_capacity = processors.iter().all(|p| p.capacity.is_some());
    let speed = |p: &Processor| match by_capacity {
        true => p.capacity.map(f64::from),
        false => p.max_khz.map(|khz| khz as f64),
    };
    let mut speeds: Vec<f64> = processors.iter().filter_map(speed).collect();
    speeds.sort_by(|a, b| b.total_cmp(a));
    let mut tiers: Vec<f64> = Vec::new(); // the fastest of each group of alike speeds
    for speed in speeds {
        if tiers.last().is_none_or(|fastest| speed < ALIKE * fastest) {
            tiers.push(speed);
        }
    }
    let tier = |p: &Processor| tiers.iter().position(|fastest| speed(p).is_some_and(|speed| speed >= ALIKE * fastest));

    let mut groups = BTreeMap::<_, Vec<Processor>>::new();
    for processor in processors {
        // Efficiency cores sort behind performance cores, if no speed does it.
        let slow = processor.hybrid == Some("efficiency cores");
        let key = (tier(&processor), slow, processor.domain, processor.part.clone());
        groups.entry(key).or_default().push(processor);
    }
    groups.into_values().map(|group| cluster(root, &group)).collect()
}

fn cluster(root: &Root, group: &[Processor]) -> Cluster {
    let cpus: Vec<usize> = group.iter().map(|p| p.number).collect();
    let frequency = |cpu: usize, file: &str| format!("sys/devices/system/cpu/cpu{cpu}/cpufreq/{file}");
    let highest = |file: &str| cpus.iter().filter_map(|cpu| root.number::<u64>(frequency(*cpu, file))).max();
    let first = |file: &str| root.line(frequency(cpus[0], file));
    Cluster {
        name: group[0].hybrid.map(str::to_string).or_else(|| group[0].part.clone()),
        cores: group.iter().map(|p| p.core).collect::<BTreeSet<_>>().len(),
        capacity: group.iter().filter_map(|p| p.capacity).max(),
        max_khz: group.iter().filter_map(|p| p.max_khz).max(),
        limit_khz: highest("scaling_max_freq"),
        now_khz: highest("scaling_cur_freq"),
        governor: first("scaling_governor"),
        driver: first("scaling_driver"),
        cpus,
    }
}

/// The smallest share of processor time that a control group allows.
fn quota(root: &Root) -> Option<f64> {
    let quotas = root.cgroups("cpu").into_iter().filter_map(|(directory, unified)| {
        let (quota, period): (f64, f64) = if unified {
            let text = root.text(directory.join("cpu.max"))?;
            let (quota, period) = text.trim().split_once(' ')?;
            (quota.parse().ok()?, period.parse().ok()?)
        } else {
            (root.number(directory.join("cpu.cfs_quota_us"))?, root.number(directory.join("cpu.cfs_period_us"))?)
        };
        (quota > 0.0 && period > 0.0).then(|| quota / period)
    });
    quotas.min_by(f64::total_cmp)
}

/// The design of each ARM processor, by its number, from the blocks of `/proc/cpuinfo`.
fn parts(info: &str) -> BTreeMap<usize, String> {
    let mut parts = BTreeMap::new();
    for block in info.split("\n\n") {
        let number = |name: &str| u32::from_str_radix(field(block, name)?.strip_prefix("0x")?, 16).ok();
        let processor = field(block, "processor").and_then(|text| text.parse().ok());
        if let (Some(processor), Some(implementer), Some(part)) =
            (processor, number("CPU implementer"), number("CPU part"))
        {
            parts.insert(processor, part_name(implementer, part));
        }
    }
    parts
}

/// The name of an ARM core: implementer and part number of the Main ID Register, as ARM's reference manuals give them.
fn part_name(implementer: u32, part: u32) -> String {
    let name = match (implementer, part) {
        (0x41, 0xd02) => "Cortex-A34",
        (0x41, 0xd03) => "Cortex-A53",
        (0x41, 0xd04) => "Cortex-A35",
        (0x41, 0xd05) => "Cortex-A55",
        (0x41, 0xd06) => "Cortex-A65",
        (0x41, 0xd07) => "Cortex-A57",
        (0x41, 0xd08) => "Cortex-A72",
        (0x41, 0xd09) => "Cortex-A73",
        (0x41, 0xd0a) => "Cortex-A75",
        (0x41, 0xd0b) => "Cortex-A76",
        (0x41, 0xd0c) => "Neoverse-N1",
        (0x41, 0xd0d) => "Cortex-A77",
        (0x41, 0xd0e) => "Cortex-A76AE",
        (0x41, 0xd40) => "Neoverse-V1",
        (0x41, 0xd41) => "Cortex-A78",
        (0x41, 0xd42) => "Cortex-A78AE",
        (0x41, 0xd44) => "Cortex-X1",
        (0x41, 0xd46) => "Cortex-A510",
        (0x41, 0xd47) => "Cortex-A710",
        (0x41, 0xd48) => "Cortex-X2",
        (0x41, 0xd49) => "Neoverse-N2",
        (0x41, 0xd4b) => "Cortex-A78C",
        (0x41, 0xd4c) => "Cortex-X1C",
        (0x41, 0xd4d) => "Cortex-A715",
        (0x41, 0xd4e) => "Cortex-X3",
        (0x41, 0xd4f) => "Neoverse-V2",
        (0x41, 0xd80) => "Cortex-A520",
        (0x41, 0xd81) => "Cortex-A720",
        (0x41, 0xd82) => "Cortex-X4",
        _ => return format!("ARM core {implementer:#x}/{part:#x}"),
    };
    name.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_parts() {
        let info = "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n\nprocessor\t: 1\nCPU implementer\t: \
                    0x61\nCPU part\t: 0x22\n\nprocessor\t: 2\nCPU part\t: x\n\nHardware\t: BCM2835\n";
        let parts = parts(info);
        assert_eq!((parts.len(), parts[&0].as_str(), parts[&1].as_str()), (2, "Cortex-A76", "ARM core 0x61/0x22"));
    }
}
