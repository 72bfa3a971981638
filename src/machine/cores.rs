//! Cores: which are alike, how fast they may run, and which of them this process may use.
//!
//! The one idea: processors of the same design, frequency domain and speed form a [`Cluster`]. Speed is `cpu_capacity`
//! where the kernel gives it (ARM), else the highest frequency; x86 hybrids also say themselves which cores are which.
//! [`Cores::choose`] picks the processors to compute on, [`confine`] keeps the calling thread and those it will start to them.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use super::{Root, field, list, ranges};
use crate::{Error, Result};

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
    /// The first processor of the core that each of `cpus` belongs to.
    pub core_of: Vec<usize>,
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

/// Which processors to compute on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Which {
    /// Those of the fastest cores; see [`Cores::choose`].
    #[default]
    Big,
    /// All that this process may use.
    All,
    /// These.
    List(Vec<usize>),
}

impl FromStr for Which {
    type Err = String;

    /// `big`, `all`, or numbers such as `0-3,6`.
    fn from_str(text: &str) -> std::result::Result<Which, String> {
        match (text.trim(), list(text)) {
            ("big", _) => Ok(Which::Big),
            ("all", _) => Ok(Which::All),
            (_, cpus) if !cpus.is_empty() => {
                Ok(Which::List(cpus.into_iter().collect::<BTreeSet<_>>().into_iter().collect()))
            }
            _ => Err("expected big, all, or processors such as 0-3,6".into()),
        }
    }
}

/// Processors to compute on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chosen {
    /// Their numbers; empty where nobody knows them.
    pub cpus: Vec<usize>,
    /// As many threads as make use of them: one a physical core, and no more than the time a container may use.
    pub threads: usize,
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
/// Cores of this share of the fastest one's speed help it; see [`Cores::choose`].
const NEAR: f64 = 0.6;
/// Cores that need no help of slower ones.
const ENOUGH: usize = 4;

/// What x86 hybrids call their slow cores, and the fast ones.
const EFFICIENT: &str = "efficiency cores";
const PERFORMANCE: &str = "performance cores";

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
                        Some(PERFORMANCE)
                    } else if slow.contains(&number) {
                        Some(EFFICIENT)
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

impl Cores {
    /// The processors to compute on. Big ones are the fastest clusters and, while those have fewer than four cores, the next
    /// ones if they are at least [`NEAR`] as fast: a phone's single prime core is no team, and a slower core that claims fewer
    /// parts of the work still helps; one of a third of the speed is what the others end up waiting for.
    ///
    /// # Errors
    /// If a list names a processor that this process may not use.
    pub fn choose(&self, which: &Which) -> Result<Chosen> {
        let may = |cpu: &usize| self.allowed.is_empty() || self.allowed.contains(cpu);
        // Processors of a cluster that may be used, and how many cores those are.
        let usable = |cluster: &Cluster| {
            let pairs = cluster.cpus.iter().zip(&cluster.core_of).filter(|(cpu, _)| may(cpu));
            let (cpus, cores): (Vec<usize>, BTreeSet<usize>) = pairs.unzip();
            (cpus, cores.len())
        };
        let clusters = self.clusters.iter().map(|cluster| (cluster, usable(cluster)));
        let clusters: Vec<_> = clusters.filter(|(_, (cpus, _))| !cpus.is_empty()).collect();
        let all: Vec<usize> = clusters.iter().flat_map(|(_, (cpus, _))| cpus.clone()).collect();
        let (mut cpus, cores) = match which {
            Which::List(list) => {
                if let Some(cpu) = list.iter().find(|cpu| !may(cpu) || !all.is_empty() && !all.contains(cpu)) {
                    let expected = if all.is_empty() { ranges(&self.allowed) } else { ranges(&sorted(all)) };
                    return Err(Error::usage(format!("cores: {cpu}: expected some of {expected}")));
                }
                (list.clone(), list.len())
            }
            Which::All => (all, clusters.iter().map(|(_, (_, cores))| cores).sum()),
            Which::Big => {
                let (mut cpus, mut cores) = (Vec::new(), 0);
                for (cluster, (its_cpus, its_cores)) in &clusters {
                    let speed = cluster.speed_beside(clusters[0].0);
                    if speed >= ALIKE || speed >= NEAR && cores < ENOUGH {
                        cpus.extend(its_cpus);
                        cores += its_cores;
                    }
                }
                (cpus, cores)
            }
        };
        cpus.sort_unstable();
        let cores = if cores == 0 { super::threads() } else { cores };
        let quota = self.quota.map_or(usize::MAX, |quota| (quota as usize).max(1));
        Ok(Chosen { cpus, threads: cores.min(quota) })
    }
}

fn sorted(mut numbers: Vec<usize>) -> Vec<usize> {
    numbers.sort_unstable();
    numbers
}

impl Cluster {
    /// How fast its cores are beside those of `other`: 1 is as fast. What nobody tells apart is as fast, but for efficiency
    /// cores.
    fn speed_beside(&self, other: &Cluster) -> f64 {
        let ratio = |mine: Option<f64>, its: Option<f64>| Some(mine? / its?);
        let capacity = |c: &Cluster| c.capacity.map(f64::from);
        let frequency = |c: &Cluster| c.max_khz.map(|khz| khz as f64);
        let ratio = ratio(capacity(self), capacity(other)).or_else(|| ratio(frequency(self), frequency(other)));
        // A hybrid's frequencies lie closer together than its speeds.
        let slower = self.is_efficient() && !other.is_efficient();
        ratio.unwrap_or(1.0).min(if slower { ALIKE - f64::EPSILON } else { f64::INFINITY })
    }

    fn is_efficient(&self) -> bool {
        self.name.as_deref() == Some(EFFICIENT)
    }
}

/// Confines the calling thread, and the threads that it will start, to `cpus`. Nothing happens where that is not possible: it
/// is a matter of speed alone.
pub fn confine(cpus: &[usize]) {
    #[cfg(target_os = "linux")]
    {
        let mut set = rustix::thread::CpuSet::new();
        let fits = cpus.iter().filter(|cpu| **cpu < rustix::thread::CpuSet::MAX_CPU);
        fits.for_each(|cpu| set.set(*cpu));
        if set.count() > 0 {
            let _ = rustix::thread::sched_setaffinity(None, &set);
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = cpus;
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
        let slow = processor.hybrid == Some(EFFICIENT);
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
        core_of: group.iter().map(|p| p.core).collect(),
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

    /// Name, processors, capacity, highest frequency.
    type Group = (&'static str, std::ops::Range<usize>, Option<u32>, Option<u64>);

    /// Clusters of cores with so many hardware threads each.
    fn cores(clusters: &[Group], threads: usize) -> Cores {
        let cluster = |(name, cpus, capacity, khz): &Group| Cluster {
            name: Some(name.to_string()),
            cpus: cpus.clone().collect(),
            cores: cpus.len() / threads,
            core_of: cpus.clone().map(|cpu| cpu / threads * threads).collect(),
            capacity: *capacity,
            max_khz: *khz,
            ..Cluster::default()
        };
        Cores { clusters: clusters.iter().map(cluster).collect(), ..Cores::default() }
    }

    fn big(cores: &Cores) -> (String, usize) {
        let chosen = cores.choose(&Which::Big).unwrap();
        (ranges(&chosen.cpus), chosen.threads)
    }

    #[test]
    fn the_fastest_cores_are_chosen() {
        let rk3588 = cores(
            &[
                ("Cortex-A76", 4..6, Some(1024), None),
                ("Cortex-A76", 6..8, Some(1010), None),
                ("Cortex-A55", 0..4, Some(390), None),
            ],
            1,
        );
        assert_eq!(big(&rk3588), ("4-7".into(), 4));
        // One prime core, three fast ones, four small ones.
        let phone = cores(
            &[
                ("Cortex-X1", 7..8, Some(1024), None),
                ("Cortex-A78", 4..7, Some(800), None),
                ("Cortex-A55", 0..4, Some(250), None),
            ],
            1,
        );
        assert_eq!(big(&phone), ("4-7".into(), 4));
        // Two fast cores of two threads each; eight slower ones, which two are too few without.
        let hybrid = |fast: usize| {
            let mut hybrid = cores(&[(PERFORMANCE, 0..2 * fast, None, Some(4_800_000))], 2);
            hybrid.clusters.extend(cores(&[(EFFICIENT, 2 * fast..2 * fast + 8, None, Some(4_500_000))], 1).clusters);
            hybrid
        };
        assert_eq!(big(&hybrid(2)), ("0-11".into(), 10));
        assert_eq!(big(&hybrid(6)), ("0-11".into(), 6));
        assert_eq!(hybrid(6).choose(&Which::All).unwrap().threads, 14);
        // Nobody knows anything.
        let unknown = Cores::default();
        assert_eq!(big(&unknown), (String::new(), super::super::threads()));
    }

    #[test]
    fn what_a_process_may_use_is_all_there_is() {
        let mut laptop = cores(&[("x", 0..8, None, None)], 2);
        assert_eq!(big(&laptop), ("0-7".into(), 4));
        laptop.allowed = vec![0, 1, 5];
        assert_eq!(big(&laptop), ("0-1,5".into(), 2));
        laptop.quota = Some(1.5);
        assert_eq!(big(&laptop), ("0-1,5".into(), 1));
        laptop.quota = Some(0.5);
        assert_eq!(laptop.choose(&Which::All).unwrap().threads, 1);
        let listed = laptop.choose(&"5,0".parse().unwrap()).unwrap();
        assert_eq!((listed.cpus.as_slice(), listed.threads), ([0, 5].as_slice(), 1));
        let error = laptop.choose(&Which::List(vec![0, 3])).unwrap_err().to_string();
        assert_eq!(error, "cores: 3: expected some of 0-1,5");
        assert_eq!(("big".parse(), "all".parse()), (Ok(Which::Big), Ok(Which::All)));
        for nonsense in ["", "small", "0-", "3-1"] {
            assert!(nonsense.parse::<Which>().is_err(), "{nonsense}");
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_thread_stays_where_it_was_confined_to() {
        std::thread::spawn(|| {
            let first = rustix::thread::sched_getaffinity(None).unwrap();
            let cpu = (0..rustix::thread::CpuSet::MAX_CPU).find(|cpu| first.is_set(*cpu)).unwrap();
            confine(&[]);
            assert_eq!(rustix::thread::sched_getaffinity(None).unwrap(), first);
            confine(&[cpu]);
            let now = std::thread::spawn(|| rustix::thread::sched_getaffinity(None).unwrap()).join().unwrap();
            assert!(now.is_set(cpu) && now.count() == 1);
        })
        .join()
        .unwrap();
    }
}
