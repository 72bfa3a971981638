//! Temperatures, fans, and whether the processor is, or has been, slowed down.
//!
//! The one idea: a slow run has a cause that the kernel or the firmware knows. Thermal zones and cooling devices say what
//! is hot and what is done about it now; the counters of x86 and the flags of a Raspberry Pi also say what has happened
//! since the start. Frequencies are in `cores.rs`.

use super::Root;

/// All that is known.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Cooling {
    /// Temperatures.
    pub zones: Vec<Zone>,
    /// What is used for cooling: fans, and slower processors.
    pub devices: Vec<Device>,
    /// A Raspberry Pi's own record.
    pub raspberry_pi: Option<Throttled>,
    /// How often the x86 core that had to most has slowed down for heat since the start.
    pub throttle_count: Option<u64>,
}

/// A temperature.
#[derive(Debug, Clone, PartialEq)]
pub struct Zone {
    /// The kernel's name: `cpu-thermal`, `x86_pkg_temp`.
    pub name: String,
    /// Degrees now.
    pub celsius: f64,
    /// Where the kernel begins to slow down what heats this zone.
    pub passive: Option<f64>,
}

/// Something that cools.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// The kernel's name: `pwm-fan`, `cpufreq-cpu0`, `Processor`.
    pub name: String,
    /// How much it does now, from 0 to `max`.
    pub state: u32,
    /// See `state`.
    pub max: u32,
}

impl Device {
    /// Whether it cools by making a processor slower.
    pub fn slows(&self) -> bool {
        let name = self.name.to_lowercase();
        ["cpufreq", "processor", "cpuidle", "intel_powerclamp"].iter().any(|word| name.contains(word))
    }
}

/// What the firmware of a Raspberry Pi reports as `get_throttled`: four conditions, now and since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Throttled(pub u32);

impl Throttled {
    /// Bits of the conditions; 16 higher the same since the start. Source: the documentation of `vcgencmd`.
    const CONDITIONS: [(u32, &str); 4] =
        [(0, "under-voltage"), (1, "frequency capped"), (2, "throttled"), (3, "soft temperature limit")];

    /// Conditions that hold now.
    pub fn now(self) -> Vec<&'static str> {
        self.conditions(0)
    }

    /// Conditions that have held since the start.
    pub fn ever(self) -> Vec<&'static str> {
        self.conditions(16)
    }

    fn conditions(self, shift: u32) -> Vec<&'static str> {
        let set = Throttled::CONDITIONS.iter().filter(|(bit, _)| self.0 >> (bit + shift) & 1 == 1);
        set.map(|(_, name)| *name).collect()
    }
}

impl Cooling {
    /// What can be read below `root`.
    pub fn read(root: &Root) -> Cooling {
        const THERMAL: &str = "sys/class/thermal";
        let mut zones: Vec<Zone> = root
            .numbered(THERMAL, "thermal_zone")
            .iter()
            .filter_map(|z| zone(root, &format!("{THERMAL}/{z}")))
            .collect();
        if zones.is_empty() {
            zones = sensors(root);
        }
        let devices = root.numbered(THERMAL, "cooling_device").into_iter().filter_map(|name| {
            let of = |file: &str| format!("{THERMAL}/{name}/{file}");
            let (state, max) = (root.number(of("cur_state"))?, root.number(of("max_state"))?);
            Some(Device { name: root.line(of("type"))?, state, max })
        });
        Cooling {
            zones,
            devices: devices.collect(),
            raspberry_pi: raspberry_pi(root),
            throttle_count: throttle_count(root),
        }
    }

    /// The hottest zone.
    pub fn hottest(&self) -> Option<&Zone> {
        self.zones.iter().max_by(|a, b| a.celsius.total_cmp(&b.celsius))
    }
}

/// Degrees from thousandths. Some zones report nonsense while their sensor sleeps.
fn degrees(root: &Root, file: String) -> Option<f64> {
    let celsius = root.number::<i64>(file)? as f64 / 1000.0;
    (-60.0..=200.0).contains(&celsius).then_some(celsius)
}

fn zone(root: &Root, path: &str) -> Option<Zone> {
    let trips = (0..16).map_while(|i| root.line(format!("{path}/trip_point_{i}_type")).map(|kind| (i, kind)));
    let mut passive = trips.filter(|(_, kind)| kind == "passive");
    let passive = passive.find_map(|(i, _)| degrees(root, format!("{path}/trip_point_{i}_temp")));
    Some(Zone {
        name: root.line(format!("{path}/type"))?,
        celsius: degrees(root, format!("{path}/temp"))?,
        passive: passive.filter(|celsius| *celsius > 0.0),
    })
}

/// The processor's sensors, for computers without thermal zones.
fn sensors(root: &Root) -> Vec<Zone> {
    const HWMON: &str = "sys/class/hwmon";
    let sensor = |directory: String| {
        let name = root.line(format!("{HWMON}/{directory}/name"))?;
        let celsius = degrees(root, format!("{HWMON}/{directory}/temp1_input"))?;
        let known = ["coretemp", "k10temp", "zenpower", "cpu_thermal"].contains(&name.as_str());
        known.then_some(Zone { name, celsius, passive: None })
    };
    root.numbered(HWMON, "hwmon").into_iter().filter_map(sensor).collect()
}

/// The flags of a Raspberry Pi's firmware, a hexadecimal number. Where its directory lies depends on the model.
fn raspberry_pi(root: &Root) -> Option<Throttled> {
    const PLATFORM: &str = "sys/devices/platform";
    let socs = root.names(PLATFORM).into_iter().filter(|name| name.starts_with("soc"));
    let inside = socs.flat_map(|soc| {
        let names = root.names(format!("{PLATFORM}/{soc}")).into_iter();
        names.map(move |name| format!("{PLATFORM}/{soc}/{name}"))
    });
    let beside = root.names(PLATFORM).into_iter().map(|name| format!("{PLATFORM}/{name}"));
    let mut firmware = inside.chain(beside).filter(|path| path.ends_with(":firmware"));
    firmware.find_map(|path| {
        let flags = root.line(format!("{path}/get_throttled"))?;
        u32::from_str_radix(flags.trim_start_matches("0x"), 16).ok().map(Throttled)
    })
}

fn throttle_count(root: &Root) -> Option<u64> {
    const CPUS: &str = "sys/devices/system/cpu";
    let counts = root
        .numbered(CPUS, "cpu")
        .into_iter()
        .filter_map(|cpu| root.number::<u64>(format!("{CPUS}/{cpu}/thermal_throttle/core_throttle_count")));
    counts.max()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_of_a_raspberry_pi() {
        let flags = Throttled(0x50005);
        assert_eq!(flags.now(), ["under-voltage", "throttled"]);
        assert_eq!(flags.ever(), ["under-voltage", "throttled"]);
        assert_eq!((Throttled(0xe0008).now(), Throttled(0).ever()), (vec!["soft temperature limit"], vec![]));
        assert_eq!(Throttled(0xe0000).ever(), ["frequency capped", "throttled", "soft temperature limit"]);
    }
}
