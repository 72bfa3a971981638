//! `gemrun doctor`: what this computer is, what gemrun makes of it, and what stands in the way of speed.
//!
//! The one idea: facts first, each on a line, then advice, and only if something is wrong. Facts come from
//! `gemrun::machine`; here they are put into words, and [`advice`] says which of them are trouble. What is not known is
//! left out. Nothing is changed but a note of the measured speed in the store, and nothing is sent anywhere.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use gemrun::Kind;
use gemrun::machine::cooling::{Cooling, Throttled};
use gemrun::machine::cores::{Cluster, Cores};
use gemrun::machine::memory::Memory;
use gemrun::machine::speed::{self, Buffer, Measured};
use gemrun::machine::storage::{self, Storage};
use gemrun::machine::{Machine, Root, ranges};
use gemrun::pack;
use gemrun::registry::{self, store};
use gemrun_simd::{Choice, Format, Isa};
use serde_json::{Value, json};

use super::Result;
use super::open::{KernelName, Threads};
use super::terminal::Style;

/// Examine this computer: processor, kernels, memory, storage, cooling
#[derive(Args)]
#[command(
    after_help = "Takes about a second, most of it to measure how fast memory can be read. Advice comes last, and only if \
    something is wrong. Nothing is changed, but for a note of that speed in the store, or sent anywhere.\n\n\
    Example: gemrun doctor"
)]
pub struct Doctor {
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    threads: Threads,
    #[command(flatten)]
    kernel: KernelName,
    /// Read the kernel's files from a copy of another computer's /proc and /sys; nothing is measured
    #[arg(long, value_name = "DIR", hide = true)]
    root: Option<PathBuf>,
}

/// How long memory is read, for each number of threads.
const TIME: Duration = Duration::from_millis(350);

/// Memory and disk below which the smallest real model has no room: E2B reads 1.4 GB of weights a token, its file has
/// 3.35 GB.
const LITTLE_MEMORY: u64 = 2_000_000_000;
const LITTLE_DISK: u64 = 4_000_000_000;
/// Bytes of that model that are read before its first word.
const FIRST_READ: f64 = 1.4e9;
/// Seconds of reading them that a person may wonder about.
const LONG_START: f64 = 15.0;

/// All that is known.
struct Report {
    machine: Machine,
    choice: Choice,
    /// The kernel or instruction set that somebody asked for.
    asked: Option<String>,
    threads: usize,
    /// Processors that these threads may use, where they are this computer's.
    used: Option<Vec<usize>>,
    bandwidth: Option<Bandwidth>,
    /// Products of bytes a second, with all threads.
    int8: Option<f64>,
    place: Option<Place>,
    /// Packed copies of models.
    packed: Vec<pack::Entry>,
}

/// Bytes a second at which memory is read.
struct Bandwidth {
    one: f64,
    all: f64,
    buffer: usize,
}

/// Where models are kept.
struct Place {
    /// The directory, or the deepest above it that exists.
    path: PathBuf,
    storage: Option<Storage>,
    free: Option<u64>,
    /// Bytes a second, and the file that was read.
    speed: Option<f64>,
}

impl Doctor {
    pub fn run(self) -> Result {
        let allowed = Cores::read(&Root::system()).allowed;
        let (choice, threads) = (self.kernel.choice()?, self.threads.take()?);
        let directory = registry::home().map(|home| home.join("models"));
        let packed = match (&self.root, registry::home()) {
            (None, Some(home)) => pack::list(&home),
            _ => Vec::new(),
        };
        // Memory is read first, so that frequencies and temperatures are those of a machine at work.
        let (bandwidth, int8, root, place) = match &self.root {
            None => {
                let root = Root::system();
                let bandwidth = bandwidth(&root, threads)?;
                if let Some(home) = registry::home() {
                    Measured::save(&home, &[(1, bandwidth.one), (threads, bandwidth.all)]);
                }
                let place = directory.and_then(|directory| place(&root, &directory));
                (Some(bandwidth), speed::int8_products(choice.isa, threads, TIME / 4)?, root, place)
            }
            Some(copy) => {
                let root = Root::at(copy);
                let place =
                    directory.map(|path| Place { storage: Storage::of(&root, &path), path, free: None, speed: None });
                (None, None, root, place)
            }
        };
        let mut machine = Machine::read(&root);
        let used = self.root.is_none().then(|| std::mem::replace(&mut machine.cores.allowed, allowed));
        let report =
            Report { machine, choice, asked: self.kernel.asked(), threads, used, bandwidth, int8, place, packed };
        let mut out = std::io::stdout().lock();
        if self.json {
            writeln!(out, "{:#}", report.json())?;
        } else {
            report.text(Style::stdout(), &mut out)?;
        }
        Ok(out.flush()?)
    }
}

fn bandwidth(root: &Root, threads: usize) -> gemrun::Result<Bandwidth> {
    let buffer = Buffer::new(root, Memory::read(root).map(|memory| memory.usable()));
    let one = buffer.read_bandwidth(1, TIME)?;
    let all = if threads == 1 { one } else { buffer.read_bandwidth(threads, TIME)? };
    Ok(Bandwidth { one, all, buffer: buffer.bytes() })
}

fn place(root: &Root, directory: &Path) -> Option<Place> {
    let path = storage::existing(&std::path::absolute(directory).ok()?)?;
    let largest = store::list(directory).into_iter().filter(|stored| stored.whole).max_by_key(|stored| stored.bytes);
    let speed = largest.and_then(|stored| storage::read_speed(&stored.path));
    Some(Place { storage: Storage::of(root, &path), free: storage::free(&path), speed, path })
}

impl Report {
    /// The kernel of each format, by the format's name.
    fn kernels(&self) -> BTreeMap<&'static str, &'static str> {
        Format::ALL.into_iter().map(|format| (format.name(), self.choice.kernel(format).name())).collect()
    }

    /// Why no better instruction set is used, for each that is better.
    fn better(&self) -> Vec<(Isa, String)> {
        let why = |isa: Isa| {
            let missing: Vec<&str> = isa.features().iter().filter(|(_, has)| !has()).map(|(name, _)| *name).collect();
            match (missing.is_empty(), &self.asked) {
                (false, _) => format!("this CPU has no {}", missing.join(", ")),
                (true, Some(asked)) => format!("{asked} was asked for"),
                (true, None) => "not the best".to_string(),
            }
        };
        Isa::ALL
            .into_iter()
            .filter(|isa| *isa > self.choice.isa && isa.of_this_architecture())
            .map(|isa| (isa, why(isa)))
            .collect()
    }

    fn advice(&self) -> Vec<String> {
        advice(self, usize::BITS)
    }

    fn text(&self, style: Style, out: &mut impl Write) -> std::io::Result<()> {
        let (bold, plain) = (style.bold(), style.plain());
        let mut line = |name: &str, text: String| match text.is_empty() {
            true => Ok(()),
            false => writeln!(out, "{bold}{name:<10}{plain} {text}"),
        };
        let machine = &self.machine;
        line("computer", machine.board.clone().unwrap_or_default())?;
        let name = machine.cpu.clone().unwrap_or_else(|| std::env::consts::ARCH.to_string());
        line("cpu", name)?;
        for cluster in &machine.cores.clusters {
            line("cores", cluster_text(cluster))?;
        }
        let used = self.used.as_ref().filter(|used| used.len() < machine.cores.cpus());
        let used = used.map(|used| format!(" on cpus {}", ranges(used))).unwrap_or_default();
        line("threads", format!("{}{used}{}", self.threads, allowance(&machine.cores)))?;
        let features: Vec<&str> = found_features().collect();
        line("features", features.join(" "))?;
        let better: Vec<String> = self.better().iter().map(|(isa, why)| format!("not {}: {why}", isa.name())).collect();
        line("isa", [vec![self.choice.isa.name().to_string()], better].concat().join("; "))?;
        for (isa, formats) in self.by_isa() {
            line("kernels", format!("{}: {}{}", isa.name(), formats.join(" "), self.why(isa, &formats)))?;
        }
        if let Some(memory) = &machine.memory {
            line("memory", memory_text(memory))?;
            line("pages", pages_text(memory))?;
        }
        if let Some(bandwidth) = &self.bandwidth {
            let one = format!("{:.1} GB/s with 1 thread", bandwidth.one / 1e9);
            let all = match self.threads {
                1 => String::new(),
                n => format!(", {:.1} GB/s with {n}", bandwidth.all / 1e9),
            };
            line("bandwidth", format!("{one}{all} (best of several passes over {} MB)", bandwidth.buffer >> 20))?;
        }
        if let Some(products) = self.int8 {
            let threads = if self.threads == 1 { "1 thread".to_string() } else { format!("{} threads", self.threads) };
            line("int8", format!("{:.0} G products/s with {threads}", products / 1e9))?;
        }
        if let Some(place) = &self.place {
            line("storage", place_text(place))?;
        }
        for copy in &self.packed {
            line("packed", packed_text(copy))?;
        }
        line("cooling", cooling_text(&machine.cooling))?;

        let advice = self.advice();
        if !advice.is_empty() {
            writeln!(out)?;
        }
        advice.iter().try_for_each(|line| writeln!(out, "* {line}"))
    }

    /// Why formats are not computed with the instruction set in use, if they are not.
    fn why(&self, isa: Isa, formats: &[&str]) -> String {
        match self.choice.only {
            _ if isa == self.choice.isa => String::new(),
            Some(only) if formats == [only.format().name()] => " (asked for)".to_string(),
            _ => format!(" (no kernels of these for {})", self.choice.isa.name()),
        }
    }

    /// Formats by the instruction set of their kernel, best first.
    fn by_isa(&self) -> Vec<(Isa, Vec<&'static str>)> {
        let mut groups: BTreeMap<Isa, Vec<&'static str>> = BTreeMap::new();
        for format in Format::ALL {
            groups.entry(self.choice.kernel(format).isa()).or_default().push(format.name());
        }
        groups.into_iter().rev().collect()
    }

    fn json(&self) -> Value {
        let machine = &self.machine;
        let cluster = |c: &Cluster| {
            json!({
                "name": c.name, "cpus": c.cpus, "cores": c.cores, "capacity": c.capacity, "max_khz": c.max_khz,
                "limit_khz": c.limit_khz, "now_khz": c.now_khz, "governor": c.governor, "driver": c.driver,
            })
        };
        let isa = |isa: Isa| {
            let missing: Vec<&str> = isa.features().iter().filter(|(_, has)| !has()).map(|(name, _)| *name).collect();
            json!({"name": isa.name(), "supported": isa.supported(), "missing": missing})
        };
        let better: Vec<Value> =
            self.better().iter().map(|(isa, why)| json!({"isa": isa.name(), "why": why})).collect();
        let isas = Isa::ALL.into_iter().filter(|isa| isa.of_this_architecture());
        json!({
            "isa": self.choice.isa.name(),
            "kernels": self.kernels(),
            "memory": machine.memory.as_ref().map(memory_json),
            "bandwidth_gb_s": self.bandwidth.as_ref().map(|b| rounded(b.all / 1e9)),
            "bandwidth": self.bandwidth.as_ref().map(|b| json!({
                "threads": self.threads,
                "gb_s": rounded(b.all / 1e9),
                "gb_s_1_thread": rounded(b.one / 1e9),
                "buffer_bytes": b.buffer,
            })),
            "int8_products_per_s": self.int8.map(f64::round),
            "version": env!("CARGO_PKG_VERSION"),
            "arch": std::env::consts::ARCH,
            "kernel_arch": machine.kernel_arch,
            "board": machine.board,
            "cpu": machine.cpu,
            "features": found_features().collect::<Vec<_>>(),
            "isas": isas.map(isa).collect::<Vec<_>>(),
            "asked_for": self.asked,
            "better_isas_not_used": better,
            "threads": self.threads,
            "used_cpus": self.used,
            "cores": {
                "cpus": machine.cores.cpus(),
                "cores": machine.cores.cores(),
                "allowed": machine.cores.allowed,
                "quota": machine.cores.quota,
                "clusters": machine.cores.clusters.iter().map(cluster).collect::<Vec<_>>(),
            },
            "storage": self.place.as_ref().map(place_json),
            "packed": self.packed.iter().map(packed_json).collect::<Vec<_>>(),
            "cooling": cooling_json(&machine.cooling),
            "advice": self.advice(),
        })
    }
}

/// Features of this CPU that some kernel asks for.
fn found_features() -> impl Iterator<Item = &'static str> {
    let mut names = Vec::new();
    for (name, has) in Isa::ALL.into_iter().filter(|isa| isa.of_this_architecture()).flat_map(|isa| isa.features()) {
        if has() && !names.contains(name) {
            names.push(*name);
        }
    }
    names.into_iter()
}

fn rounded(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / (1_u64 << 30) as f64)
}

fn ghz(khz: u64) -> String {
    format!("{:.2} GHz", khz as f64 / 1e6)
}

/// `4 x Cortex-A76, up to 2.40 GHz, now 1.50 GHz, governor ondemand (cpus 0-3)`.
fn cluster_text(c: &Cluster) -> String {
    let mut parts = vec![match &c.name {
        Some(name) => format!("{} x {name}", c.cores),
        None => c.cores.to_string(),
    }];
    if c.cpus.len() > c.cores {
        parts.push(format!("{} hardware threads", c.cpus.len()));
    }
    parts.extend(c.max_khz.map(|khz| format!("up to {}", ghz(khz))));
    parts.extend(c.now_khz.map(|khz| format!("now {}", ghz(khz))));
    parts.extend(c.governor.as_ref().map(|governor| format!("governor {governor}")));
    format!("{} (cpus {})", parts.join(", "), ranges(&c.cpus))
}

/// What keeps this process from using all processors, if anything does.
fn allowance(cores: &Cores) -> String {
    let mut text = String::new();
    if !cores.allowed.is_empty() && cores.allowed.len() < cores.cpus() {
        text += &format!("; this process may use cpus {}", ranges(&cores.allowed));
    }
    if let Some(quota) = cores.quota {
        text += &format!("; limited to the time of {} processors by its cgroup", rounded(quota));
    }
    text
}

fn memory_text(m: &Memory) -> String {
    let mut text = format!("{}, {} available", gib(m.total), gib(m.available));
    if let Some(limit) = m.limit {
        text += &format!("; limited to {} by its cgroup, {} left", gib(limit.bytes), gib(limit.left));
    }
    if m.swap > 0 {
        let kind = if m.swap_is_zram { "zram" } else { "swap" };
        text += &format!("; {kind} {}, {} in use", gib(m.swap), gib(m.swap_used));
    }
    text
}

fn pages_text(m: &Memory) -> String {
    let mut parts = Vec::new();
    parts.extend(m.page.map(|bytes| format!("{} KiB", bytes >> 10)));
    parts.extend(m.transparent_huge_pages.as_ref().map(|when| format!("transparent huge pages: {when}")));
    if m.reserved_huge_pages > 0 {
        parts.push(format!("{} reserved for huge pages", gib(m.reserved_huge_pages)));
    }
    parts.join(", ")
}

fn memory_json(m: &Memory) -> Value {
    json!({
        "total_bytes": m.total,
        "available_bytes": m.available,
        "usable_bytes": m.usable(),
        "limit_bytes": m.limit.map(|limit| limit.bytes),
        "limit_left_bytes": m.limit.map(|limit| limit.left),
        "swap_bytes": m.swap,
        "swap_used_bytes": m.swap_used,
        "swap_is_zram": m.swap_is_zram,
        "page_bytes": m.page,
        "transparent_huge_pages": m.transparent_huge_pages,
        "reserved_huge_pages_bytes": m.reserved_huge_pages,
    })
}

fn place_text(place: &Place) -> String {
    let mut parts = Vec::new();
    if let Some(storage) = &place.storage {
        let known = [storage.kind.map(|kind| kind.name()), storage.device.as_deref(), storage.model.as_deref()];
        parts.push(known.into_iter().flatten().collect::<Vec<_>>().join(" "));
        parts.push(storage.filesystem.clone());
    }
    parts.extend(place.free.map(|bytes| format!("{:.1} GB free", bytes as f64 / 1e9)));
    parts.extend(place.speed.map(|speed| format!("reads {:.0} MB/s", speed / 1e6)));
    parts.retain(|part| !part.is_empty());
    let path = gemrun::error::printable(&place.path.display().to_string());
    if parts.is_empty() { path } else { format!("{path}: {}", parts.join(", ")) }
}

fn place_json(place: &Place) -> Value {
    let storage = place.storage.as_ref();
    json!({
        "path": place.path.to_string_lossy(),
        "mount": storage.map(|s| &s.mount),
        "filesystem": storage.map(|s| &s.filesystem),
        "device": storage.and_then(|s| s.device.as_ref()),
        "kind": storage.and_then(|s| s.kind).map(|kind| kind.name()),
        "model": storage.and_then(|s| s.model.as_ref()),
        "free_bytes": place.free,
        "read_mb_s": place.speed.map(|speed| rounded(speed / 1e6)),
    })
}

/// `/models/x.gguf: 1.38 GB`.
fn packed_text(copy: &pack::Entry) -> String {
    let of = copy.source.as_ref().unwrap_or(&copy.path).display().to_string();
    let (of, size) = (gemrun::error::printable(&of), copy.bytes as f64 / 1e9);
    let trouble = copy.trouble.as_ref().map(|why| format!(", not used: {why}")).unwrap_or_default();
    format!("{of}: {size:.2} GB{trouble}")
}

fn packed_json(copy: &pack::Entry) -> Value {
    json!({
        "path": copy.path.to_string_lossy(),
        "bytes": copy.bytes,
        "source": copy.source.as_ref().map(|path| path.to_string_lossy()),
        "usable": copy.trouble.is_none(),
        "trouble": copy.trouble.as_ref().map(ToString::to_string),
    })
}

fn cooling_text(cooling: &Cooling) -> String {
    let mut parts = Vec::new();
    parts.extend(cooling.hottest().map(|zone| format!("{:.0} °C ({})", zone.celsius, zone.name)));
    for device in cooling.devices.iter().filter(|device| device.state > 0) {
        parts.push(format!("{} {} of {}", device.name, device.state, device.max));
    }
    match cooling.raspberry_pi {
        Some(Throttled(0)) => parts.push("never throttled".to_string()),
        Some(flags) => {
            let say = |when: &str, what: Vec<&str>| (!what.is_empty()).then(|| format!("{when}: {}", what.join(", ")));
            parts.extend(say("now", flags.now()));
            parts.extend(say("since the start", flags.ever()));
        }
        None => {}
    }
    parts.extend(cooling.throttle_count.map(|n| format!("throttled {n} times since the start")));
    parts.join("; ")
}

fn cooling_json(cooling: &Cooling) -> Value {
    let zones =
        cooling.zones.iter().map(|z| json!({"name": z.name, "celsius": z.celsius, "passive_celsius": z.passive}));
    let devices = cooling.devices.iter().map(|d| json!({"name": d.name, "state": d.state, "max": d.max}));
    json!({
        "zones": zones.collect::<Vec<_>>(),
        "devices": devices.collect::<Vec<_>>(),
        "raspberry_pi": cooling.raspberry_pi.map(|flags| json!({"now": flags.now(), "since_start": flags.ever()})),
        "throttle_count": cooling.throttle_count,
    })
}

/// What is wrong, and what helps; `bits` is the width of this program's addresses.
fn advice(report: &Report, bits: u32) -> Vec<String> {
    let mut advice = Vec::new();
    let mut say = |line: String| advice.push(line);
    let machine = &report.machine;

    if let Some(arch) = machine.kernel_arch.as_ref().filter(|arch| arch.contains("64") && bits == 32) {
        say(format!(
            "this gemrun is a 32-bit program on a 64-bit kernel ({arch}): the 64-bit one has faster kernels and can map large files"
        ));
    }
    for (isa, why) in report.better().into_iter().filter(|(isa, _)| isa.supported()) {
        say(format!(
            "{why}, but this CPU also has {}: without --kernel and GEMRUN_KERNEL it would be used",
            isa.name()
        ));
    }
    if Isa::best() == Isa::Scalar {
        say("this CPU has none of the instruction sets with fast kernels: results are right, but slow".to_string());
    }
    if report.threads > machine.cores.cpus() && machine.cores.cpus() > 0 {
        say(format!(
            "{} threads on {} processors wait for each other: ask for fewer",
            report.threads,
            machine.cores.cpus()
        ));
    }
    if let Some(quota) = machine.cores.quota.filter(|quota| *quota < 1.0) {
        say(format!("gemrun is limited to {:.0} % of one processor (by its container or cgroup)", quota * 100.0));
    }

    if let Some(memory) = &machine.memory {
        let tight = memory.usable() < LITTLE_MEMORY;
        if tight {
            say(format!(
                "{} of memory are left: the smallest real model, e2b, wants about {}; close other programs",
                gib(memory.usable()),
                gib(LITTLE_MEMORY)
            ));
        }
        if memory.swap_used > memory.swap / 4 && memory.usable() < memory.total / 4 {
            say(format!(
                "{} of swap are in use and memory is short: generation may wait for the disk",
                gib(memory.swap_used)
            ));
        }
        if memory.reserved_huge_pages > memory.total / 8 {
            say(format!("{} are reserved for huge pages, which gemrun cannot use", gib(memory.reserved_huge_pages)));
        }
    }

    for cluster in &machine.cores.clusters {
        let cpus = ranges(&cluster.cpus);
        if let (Some(max), Some(limit)) = (cluster.max_khz, cluster.limit_khz)
            && (limit as f64) < 0.9 * max as f64
        {
            say(format!(
                "cpus {cpus} are limited to {} of {}: look for a power-saving mode, heat or a weak supply",
                ghz(limit),
                ghz(max)
            ));
        }
        // The drivers of recent x86 processors call their usual mode `powersave`.
        let own_mode = cluster.driver.as_ref().is_some_and(|driver| driver.contains("pstate"));
        if cluster.governor.as_deref() == Some("powersave") && !own_mode {
            say(format!(
                "cpus {cpus} stay at their lowest frequency (governor powersave): choose schedutil, ondemand or performance"
            ));
        }
    }

    let cooling = &machine.cooling;
    if let Some(flags) = cooling.raspberry_pi {
        let (now, ever) = (flags.now(), flags.ever());
        if now.contains(&"under-voltage") {
            say("the power supply is too weak at this moment (under-voltage): use the official one and a short cable"
                .to_string());
        } else if ever.contains(&"under-voltage") {
            say("the power supply has been too weak since the start (under-voltage): use the official one".to_string());
        }
        let slowed = |conditions: &[&str]| conditions.iter().any(|condition| *condition != "under-voltage");
        if slowed(&now) {
            say("the processor is being slowed down at this moment: give it a heat sink or a fan".to_string());
        } else if slowed(&ever) {
            say("the processor has been slowed down since the start: give it a heat sink or a fan".to_string());
        }
    }
    for zone in cooling.zones.iter().filter(|zone| zone.passive.is_some_and(|limit| zone.celsius >= limit)) {
        say(format!(
            "{} is at {:.0} °C, where the kernel begins to slow it down: cool it better",
            zone.name, zone.celsius
        ));
    }
    let slowing: Vec<_> = cooling.devices.iter().filter(|device| device.slows() && device.state > 0).collect();
    if let Some(device) = slowing.first() {
        say(format!("the kernel is slowing down the processor ({} {} of {})", device.name, device.state, device.max));
    }
    if let Some(count) = cooling.throttle_count.filter(|count| *count > 0) {
        say(format!("the processor has slowed down for heat {count} times since the start"));
    }

    for copy in &report.packed {
        let Some(trouble) = &copy.trouble else { continue };
        let size = copy.bytes as f64 / 1e9;
        let source = copy.source.as_ref().map(|path| gemrun::error::printable(&path.display().to_string()));
        say(match source {
            Some(source) if trouble.kind() == Kind::NotFound => {
                format!(
                    "the model of a packed copy of {size:.2} GB is gone: gemrun pack {source} --drop removes the copy"
                )
            }
            Some(source) => format!(
                "a packed copy of {size:.2} GB is not used: gemrun pack {source} renews it, and with --drop removes it"
            ),
            None => {
                let path = gemrun::error::printable(&copy.path.display().to_string());
                format!("{path} takes {size:.2} GB and is no packed copy: remove it")
            }
        });
    }
    if let Some(place) = &report.place {
        if let Some(free) = place.free.filter(|free| *free < LITTLE_DISK) {
            say(format!("{:.1} GB are free where models are kept: e2b has 3.35 GB", free as f64 / 1e9));
        }
        if let Some(speed) = place.speed.filter(|speed| FIRST_READ / speed > LONG_START) {
            let seconds = FIRST_READ / speed;
            say(format!(
                "models are read at {:.0} MB/s: the first words of e2b take {seconds:.0} s after a restart",
                speed / 1e6
            ));
        }
    }
    advice
}
