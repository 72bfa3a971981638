//! `gemrun doctor` on other people's computers: copies of the files their kernels show, made here, and what it makes of
//! them. Each is a sort of machine with a trouble of its own.

use std::fs;
use std::process::Command;

use gemrun_simd::{Format, Isa, select};
use serde_json::Value;
use tempfile::TempDir;

/// A directory with a `proc` and a `sys`.
struct Machine(TempDir);

impl Machine {
    fn new(files: &[(&str, &str)]) -> Machine {
        let machine = Machine(tempfile::tempdir().unwrap());
        files.iter().for_each(|(path, text)| machine.write(path, text));
        machine
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("{text}\n")).unwrap();
    }

    /// Files of each processor in a range: name below `cpuN`, and text.
    fn cpus(&self, cpus: impl IntoIterator<Item = usize>, files: &[(&str, &str)]) {
        for cpu in cpus {
            for (name, text) in files {
                self.write(&format!("sys/devices/system/cpu/cpu{cpu}/{name}"), &text.replace('#', &cpu.to_string()));
            }
        }
    }

    #[cfg(unix)]
    fn link(&self, path: &str, to: &str) {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(to, path).unwrap();
    }

    fn run(&self, arguments: &[&str]) -> String {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gemrun"));
        command.arg("doctor").arg("--root").arg(self.0.path()).args(arguments);
        for variable in ["GEMRUN_THREADS", "GEMRUN_KERNEL", "NO_COLOR"] {
            command.env_remove(variable);
        }
        let output = command.args(["-t", "1"]).env("GEMRUN_HOME", "/home/pi/.local/share/gemrun").output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// The text without what depends on the machine that runs the test.
    fn text(&self) -> String {
        let own = ["features", "isa", "kernels"];
        let text = self.run(&[]);
        let lines = text.lines().filter(|line| !own.iter().any(|name| line.starts_with(name)));
        lines
            .filter(|line| !line.contains("none of the instruction sets with fast kernels"))
            .collect::<Vec<_>>()
            .join("\n")
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.run(&["--json"])).unwrap()
    }
}

/// Blocks of `/proc/cpuinfo` for ARM processors with these part numbers.
fn arm(parts: &[&str]) -> String {
    let block =
        |(i, part): (usize, &&str)| format!("processor\t: {i}\nCPU implementer\t: 0x41\nCPU part\t: {part}\n\n");
    parts.iter().enumerate().map(block).collect()
}

fn raspberry_pi(model: &str, part: &str, max_khz: &str) -> Machine {
    let machine = Machine::new(&[
        ("proc/cpuinfo", &arm(&[part; 4])),
        ("proc/device-tree/model", &format!("{model}\0")),
        ("proc/sys/kernel/arch", "aarch64"),
        ("sys/devices/system/cpu/online", "0-3"),
        ("proc/self/status", "Name:\tgemrun\nCpus_allowed:\tf\nCpus_allowed_list:\t0-3"),
        ("sys/class/thermal/thermal_zone0/type", "cpu-thermal"),
        ("proc/self/mountinfo", "25 1 179:2 / / rw,noatime shared:1 - ext4 /dev/mmcblk0p2 rw"),
        ("sys/devices/platform/mmc/block/mmcblk0/device/type", "SD"),
        ("sys/devices/platform/mmc/block/mmcblk0/queue/rotational", "0"),
        ("sys/devices/platform/mmc/block/mmcblk0/mmcblk0p2/partition", "2"),
    ]);
    machine.cpus(
        0..4,
        &[
            ("topology/thread_siblings_list", "#"),
            ("cpu_capacity", "1024"),
            ("cpufreq/related_cpus", "0 1 2 3"),
            ("cpufreq/cpuinfo_max_freq", max_khz),
            ("cpufreq/scaling_max_freq", max_khz),
            ("cpufreq/scaling_governor", "ondemand"),
            ("cpufreq/scaling_driver", "cpufreq-dt"),
        ],
    );
    machine.link("sys/dev/block/179:2", "../../devices/platform/mmc/block/mmcblk0/mmcblk0p2");
    machine.link("sys/class/block/mmcblk0", "../../devices/platform/mmc/block/mmcblk0");
    machine
}

#[test]
fn a_raspberry_pi_5_that_is_well() {
    let machine = raspberry_pi("Raspberry Pi 5 Model B Rev 1.0", "0xd0b", "2400000");
    machine.cpus(0..4, &[("cpufreq/scaling_cur_freq", "1500000")]);
    machine.write("sys/class/thermal/thermal_zone0/temp", "48312");
    machine.write("sys/class/thermal/cooling_device0/type", "pwm-fan");
    machine.write("sys/class/thermal/cooling_device0/cur_state", "1");
    machine.write("sys/class/thermal/cooling_device0/max_state", "4");
    machine.write("sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled", "0");
    machine.write(
        "proc/meminfo",
        "MemTotal:        8255536 kB\nMemAvailable:    7230112 kB\nSwapTotal:       2097136 kB\nSwapFree:        2097136 kB",
    );
    machine.write("proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n/dev/zram0 partition 2097136 0 100");
    machine.write(
        "proc/self/smaps",
        "00400000-00500000 r-xp\nSize: 1024 kB\nKernelPageSize:       16 kB\nMMUPageSize: 16 kB",
    );
    machine.write("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never");
    let expected = "\
computer   Raspberry Pi 5 Model B Rev 1.0
cpu        Cortex-A76
cores      4 x Cortex-A76, up to 2.40 GHz, now 1.50 GHz, governor ondemand (cpus 0-3)
threads    1
memory     7.9 GiB, 6.9 GiB available; zram 2.0 GiB, 0.0 GiB in use
pages      16 KiB, transparent huge pages: madvise
storage    /home/pi/.local/share/gemrun/models: SD card mmcblk0, ext4
cooling    48 °C (cpu-thermal); pwm-fan 1 of 4; never throttled";
    assert_eq!(machine.text(), expected);
    let json = machine.json();
    assert_eq!(json["memory"]["usable_bytes"], 7_230_112_u64 * 1024);
    assert_eq!((&json["storage"]["kind"], &json["storage"]["device"]), (&"SD card".into(), &"mmcblk0".into()));
    assert_eq!((&json["board"], &json["bandwidth_gb_s"]), (&"Raspberry Pi 5 Model B Rev 1.0".into(), &Value::Null));
}

#[test]
fn a_raspberry_pi_4_that_throttles() {
    let machine = raspberry_pi("Raspberry Pi 4 Model B Rev 1.4", "0xd08", "1800000");
    machine.cpus(0..4, &[("cpufreq/scaling_cur_freq", "600000"), ("cpufreq/scaling_max_freq", "1000000")]);
    machine.write("sys/class/thermal/thermal_zone0/temp", "83700");
    machine.write("sys/class/thermal/thermal_zone0/trip_point_0_type", "critical");
    machine.write("sys/class/thermal/thermal_zone0/trip_point_0_temp", "110000");
    machine.write("sys/class/thermal/thermal_zone0/trip_point_1_type", "passive");
    machine.write("sys/class/thermal/thermal_zone0/trip_point_1_temp", "80000");
    machine.write("sys/class/thermal/cooling_device0/type", "cpufreq-cpu0");
    machine.write("sys/class/thermal/cooling_device0/cur_state", "2");
    machine.write("sys/class/thermal/cooling_device0/max_state", "6");
    machine.write("sys/devices/platform/soc/soc:firmware/get_throttled", "50005");
    machine.write(
        "proc/meminfo",
        "MemTotal:        3882072 kB\nMemAvailable:     812072 kB\nSwapTotal:        102396 kB\nSwapFree:          2396 kB",
    );
    machine.write("proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n/var/swap file 102396 100000 -2");
    let expected = "\
computer   Raspberry Pi 4 Model B Rev 1.4
cpu        Cortex-A72
cores      4 x Cortex-A72, up to 1.80 GHz, now 0.60 GHz, governor ondemand (cpus 0-3)
threads    1
memory     3.7 GiB, 0.8 GiB available; swap 0.1 GiB, 0.1 GiB in use
storage    /home/pi/.local/share/gemrun/models: SD card mmcblk0, ext4
cooling    84 °C (cpu-thermal); cpufreq-cpu0 2 of 6; now: under-voltage, throttled; since the start: under-voltage, throttled

* 0.8 GiB of memory are left: the smallest real model, e2b, wants about 1.9 GiB; close other programs
* 0.1 GiB of swap are in use and memory is short: generation may wait for the disk
* cpus 0-3 are limited to 1.00 GHz of 1.80 GHz: look for a power-saving mode, heat or a weak supply
* the power supply is too weak at this moment (under-voltage): use the official one and a short cable
* the processor is being slowed down at this moment: give it a heat sink or a fan
* cpu-thermal is at 84 °C, where the kernel begins to slow it down: cool it better
* the kernel is slowing down the processor (cpufreq-cpu0 2 of 6)";
    assert_eq!(machine.text(), expected);
    let json = machine.json();
    assert_eq!(json["cooling"]["raspberry_pi"]["now"], serde_json::json!(["under-voltage", "throttled"]));

    // What has been and is over is told as such.
    machine.write("sys/devices/platform/soc/soc:firmware/get_throttled", "80000");
    let text = machine.text();
    assert!(
        text.contains("since the start: soft temperature limit") && text.contains("has been slowed down"),
        "{text}"
    );
    assert!(!text.contains("power supply"), "{text}");
}

#[test]
fn an_rk3588_with_three_clusters() {
    let parts = ["0xd05", "0xd05", "0xd05", "0xd05", "0xd0b", "0xd0b", "0xd0b", "0xd0b"];
    let machine = Machine::new(&[
        ("proc/cpuinfo", &arm(&parts)),
        ("proc/device-tree/model", "Orange Pi 5\0"),
        ("sys/devices/system/cpu/online", "0-7"),
        ("proc/self/status", "Cpus_allowed_list:\t4-7"),
        ("proc/meminfo", "MemTotal: 16118184 kB\nMemAvailable: 15500000 kB"),
        ("sys/class/thermal/thermal_zone0/type", "soc-thermal"),
        ("sys/class/thermal/thermal_zone0/temp", "41615"),
        ("sys/class/thermal/thermal_zone1/type", "bigcore0-thermal"),
        ("sys/class/thermal/thermal_zone1/temp", "43461"),
        ("sys/class/thermal/thermal_zone2/type", "asleep"),
        ("sys/class/thermal/thermal_zone2/temp", "-274000"),
    ]);
    for (cpus, together, capacity, khz, governor) in [
        (0..4, "0 1 2 3", "530", "1800000", "ondemand"),
        (4..6, "4 5", "1024", "2352000", "performance"),
        (6..8, "6 7", "1016", "2304000", "powersave"),
    ] {
        machine.cpus(
            cpus,
            &[
                ("topology/thread_siblings_list", "#"),
                ("cpu_capacity", capacity),
                ("cpufreq/related_cpus", together),
                ("cpufreq/cpuinfo_max_freq", khz),
                ("cpufreq/scaling_governor", governor),
                ("cpufreq/scaling_driver", "cpufreq-dt"),
            ],
        );
    }
    let expected = "\
computer   Orange Pi 5
cpu        Cortex-A76 + Cortex-A55
cores      2 x Cortex-A76, up to 2.35 GHz, governor performance (cpus 4-5)
cores      2 x Cortex-A76, up to 2.30 GHz, governor powersave (cpus 6-7)
cores      4 x Cortex-A55, up to 1.80 GHz, governor ondemand (cpus 0-3)
threads    1; this process may use cpus 4-7
memory     15.4 GiB, 14.8 GiB available
storage    /home/pi/.local/share/gemrun/models
cooling    43 °C (bigcore0-thermal)

* cpus 6-7 stay at their lowest frequency (governor powersave): choose schedutil, ondemand or performance";
    assert_eq!(machine.text(), expected);
}

#[test]
fn a_hybrid_laptop() {
    let machine = Machine::new(&[
        ("proc/cpuinfo", "processor\t: 0\nmodel name\t: 12th Gen Intel(R)  Core(TM) i7-1260P\nflags\t: fpu"),
        ("proc/sys/kernel/arch", "x86_64"),
        ("sys/devices/system/cpu/online", "0-15"),
        ("sys/devices/cpu_core/cpus", "0-7"),
        ("sys/devices/cpu_atom/cpus", "8-15"),
        ("proc/self/status", "Cpus_allowed_list:\t0-15"),
        (
            "proc/meminfo",
            "MemTotal: 16077816 kB\nMemAvailable: 11000000 kB\nSwapTotal: 8388604 kB\nSwapFree: 4194302 kB\n\
             HugePages_Total:    2048\nHugepagesize:       2048 kB",
        ),
        ("sys/class/thermal/thermal_zone0/type", "x86_pkg_temp"),
        ("sys/class/thermal/thermal_zone0/temp", "61000"),
        ("sys/class/thermal/cooling_device0/type", "Processor"),
        ("sys/class/thermal/cooling_device0/cur_state", "0"),
        ("sys/class/thermal/cooling_device0/max_state", "3"),
        ("sys/class/thermal/cooling_device1/type", "intel_powerclamp"),
        ("sys/class/thermal/cooling_device1/cur_state", "-1"),
        ("sys/class/thermal/cooling_device1/max_state", "100"),
        (
            "proc/self/mountinfo",
            "1 0 0:30 / / rw - btrfs /dev/mapper/luks rw\n2 1 0:44 / /home/pi/my\\040games rw - tmpfs tmpfs rw\n\
             3 1 0:31 /@home /home rw - btrfs /dev/mapper/luks rw",
        ),
        ("sys/devices/virtual/block/dm-0/queue/rotational", "0"),
        ("sys/devices/pci0000:00/nvme/nvme0/nvme0n1/device/model", "Samsung SSD 980 1TB  "),
        ("sys/devices/pci0000:00/nvme/nvme0/nvme0n1/nvme0n1p3/partition", "3"),
    ]);
    // Processors of a hyper-threaded core are neighbours. One core may run a little faster than the others.
    for cpu in 0..8 {
        let (khz, pair) = (if cpu < 2 { "4700000" } else { "4600000" }, format!("{}-{}", cpu / 2 * 2, cpu / 2 * 2 + 1));
        machine.cpus([cpu], &[("topology/thread_siblings_list", &pair), ("cpufreq/cpuinfo_max_freq", khz)]);
        machine.cpus([cpu], &[("thermal_throttle/core_throttle_count", "3")]);
    }
    machine.cpus(8..16, &[("topology/thread_siblings_list", "#"), ("cpufreq/cpuinfo_max_freq", "3400000")]);
    machine.cpus(
        0..16,
        &[
            ("cpufreq/related_cpus", "#"),
            ("cpufreq/scaling_governor", "powersave"),
            ("cpufreq/scaling_driver", "intel_pstate"),
            ("cpufreq/scaling_cur_freq", "2100000"),
        ],
    );
    machine.link("sys/class/block/mapper/luks", "../../../devices/virtual/block/dm-0");
    machine
        .link("sys/devices/virtual/block/dm-0/slaves/nvme0n1p3", "../../../../pci0000:00/nvme/nvme0/nvme0n1/nvme0n1p3");
    machine.link("sys/class/block/nvme0n1p3", "../../devices/pci0000:00/nvme/nvme0/nvme0n1/nvme0n1p3");
    machine.link("sys/class/block/nvme0n1", "../../devices/pci0000:00/nvme/nvme0/nvme0n1");
    let expected = "\
cpu        12th Gen Intel(R) Core(TM) i7-1260P
cores      4 x performance cores, 8 hardware threads, up to 4.70 GHz, now 2.10 GHz, governor powersave (cpus 0-7)
cores      8 x efficiency cores, up to 3.40 GHz, now 2.10 GHz, governor powersave (cpus 8-15)
threads    1
memory     15.3 GiB, 10.5 GiB available; swap 8.0 GiB, 4.0 GiB in use
pages      4.0 GiB reserved for huge pages
storage    /home/pi/.local/share/gemrun/models: NVMe nvme0n1 Samsung SSD 980 1TB, btrfs
cooling    61 °C (x86_pkg_temp); throttled 3 times since the start

* 4.0 GiB are reserved for huge pages, which gemrun cannot use
* the processor has slowed down for heat 3 times since the start";
    assert_eq!(machine.text(), expected);
    let json = machine.json();
    assert_eq!((&json["cores"]["cpus"], &json["cores"]["cores"]), (&16.into(), &12.into()));
}

#[test]
fn a_container_with_limits() {
    let machine = Machine::new(&[
        ("proc/cpuinfo", "processor\t: 0\nmodel name\t: AMD EPYC 7B13"),
        ("sys/devices/system/cpu/online", "0-63"),
        ("proc/self/status", "Cpus_allowed_list:\t0-63"),
        ("proc/self/cgroup", "0::/kubepods/pod7/box"),
        ("proc/meminfo", "MemTotal: 263845000 kB\nMemAvailable: 200000000 kB"),
        ("proc/self/mountinfo", "500 499 0:100 / / rw - overlay overlay rw,lowerdir=/a"),
        // The group itself has no limit, the one around it has, the outermost a larger one.
        ("sys/fs/cgroup/kubepods/pod7/box/memory.max", "max"),
        ("sys/fs/cgroup/kubepods/pod7/box/cpu.max", "max 100000"),
        ("sys/fs/cgroup/kubepods/pod7/memory.max", "2147483648"),
        ("sys/fs/cgroup/kubepods/pod7/memory.current", "1610612736"),
        ("sys/fs/cgroup/kubepods/pod7/memory.stat", "anon 1073741824\nfile 536870912\ninactive_file 536870912"),
        ("sys/fs/cgroup/kubepods/pod7/cpu.max", "50000 100000"),
        ("sys/fs/cgroup/kubepods/memory.max", "137438953472"),
        ("sys/fs/cgroup/kubepods/memory.current", "4294967296"),
    ]);
    let expected = "\
cpu        AMD EPYC 7B13
cores      64 (cpus 0-63)
threads    1; limited to the time of 0.5 processors by its cgroup
memory     251.6 GiB, 190.7 GiB available; limited to 2.0 GiB by its cgroup, 1.0 GiB left
storage    /home/pi/.local/share/gemrun/models: overlay

* gemrun is limited to 50 % of one processor (by its container or cgroup)
* 1.0 GiB of memory are left: the smallest real model, e2b, wants about 1.9 GiB; close other programs";
    assert_eq!(machine.text(), expected);
    let json = machine.json();
    assert_eq!((&json["memory"]["usable_bytes"], &json["cores"]["quota"]), (&(1_u64 << 30).into(), &0.5.into()));

    // Version 1 of control groups says the same in other words.
    machine.write("proc/self/cgroup", "9:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/");
    machine.write("sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", "1073741824");
    machine.write("sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes", "314572800");
    machine.write("sys/fs/cgroup/memory/docker/abc/memory.stat", "cache 1\ntotal_inactive_file 104857600");
    machine.write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712");
    machine.write("sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us", "150000");
    machine.write("sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us", "100000");
    let json = machine.json();
    assert_eq!(
        (&json["memory"]["usable_bytes"], &json["cores"]["quota"]),
        (&(1_073_741_824_u64 - 200 * 1_048_576).into(), &1.5.into())
    );
}

/// Files that lie: numbers that are none, lists without end, names that would command a terminal.
#[test]
fn nonsense_and_escape_sequences_are_harmless() {
    let machine = Machine::new(&[
        ("proc/cpuinfo", "model name\t: evil \x1b]0;title\x07 name\nprocessor\t: 99999999999999999999"),
        ("proc/device-tree/model", "\x1b[2J\u{202e}board\0"),
        ("sys/devices/system/cpu/online", "0-1,4"),
        ("proc/self/status", "Cpus_allowed_list:\t0-4294967295"),
        ("proc/self/cgroup", "0::/../../../../etc\n:::\n\n1:memory:relative"),
        ("proc/meminfo", "MemTotal: 18446744073709551615 kB\nMemAvailable: 7 kB"),
        ("proc/self/mountinfo", "1 0 8:1 / / rw - \x1b[31mext4 /dev/../../../etc/passwd rw"),
        ("proc/swaps", ""),
        ("sys/class/thermal/thermal_zone0/type", "\x1b[5mzone"),
        ("sys/class/thermal/thermal_zone0/temp", "50000"),
        ("sys/class/thermal/cooling_device0/type", ""),
        ("sys/class/thermal/thermal_zonex/temp", "1"),
        ("sys/devices/platform/soc/soc:firmware/get_throttled", "0xzz"),
        ("sys/kernel/mm/transparent_hugepage/enabled", "]["),
    ]);
    machine.cpus(0..2, &[("topology/thread_siblings_list", "9-3"), ("cpu_capacity", "-5")]);
    machine
        .cpus(0..2, &[("cpufreq/cpuinfo_max_freq", "99999999999999999999"), ("cpufreq/scaling_governor", "\x1b[31m")]);
    let text = machine.text();
    let harmful = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
    assert!(!text.contains(harmful), "{text:?}");
    assert!(text.contains("evil \\u{1b}]0;title\\u{7} name") && text.contains("50 °C (\\u{1b}[5mzone)"), "{text}");
    machine.json();

    let empty = Machine::new(&[("proc/x", "")]);
    assert!(empty.text().starts_with("cpu ") && empty.text().contains("threads    1"), "{}", empty.text());
    assert_eq!(empty.json()["memory"], Value::Null);
}

/// What is measured, and what depends on this computer.
#[test]
fn this_computer() {
    let run = |arguments: &[&str]| -> Value {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gemrun"));
        command.args(["doctor", "--json"]).args(arguments).env_remove("GEMRUN_THREADS").env_remove("GEMRUN_KERNEL");
        let output = command.env("GEMRUN_HOME", "/nonexistent/gemrun").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let best = run(&["-t", "2"]);
    assert_eq!(best["isa"], Isa::best().name());
    let kernels = best["kernels"].as_object().unwrap();
    assert_eq!(kernels.len(), Format::ALL.len());
    for format in Format::ALL {
        assert_eq!(kernels[format.name()], select(format, Isa::best()).name());
    }
    for speed in [&best["bandwidth_gb_s"], &best["bandwidth"]["gb_s_1_thread"]] {
        assert!(speed.as_f64().is_some_and(|speed| speed > 0.01), "{best}");
    }
    assert_eq!((&best["threads"], &best["bandwidth"]["threads"]), (&2.into(), &2.into()));
    #[cfg(target_os = "linux")]
    {
        let memory = |name: &str| best["memory"][name].as_u64().unwrap();
        assert!(memory("total_bytes") >= memory("usable_bytes") && memory("page_bytes").is_power_of_two(), "{best}");
        assert!(best["storage"]["filesystem"].is_string() && best["storage"]["path"] == "/", "{best}");
    }
    assert!(!best["advice"].to_string().contains("--kernel"), "{best}");

    let scalar = run(&["-t", "1", "--kernel", "scalar"]);
    assert_eq!((&scalar["isa"], &scalar["kernels"]["Q4_0"]), (&"scalar".into(), &"q4_0/scalar".into()));
    let asked = scalar["advice"].to_string().contains("scalar was asked for, but this CPU also has");
    assert_eq!(asked, Isa::best() != Isa::Scalar, "{scalar}");

    let machine = Machine::new(&[]);
    let text = machine.run(&["--kernel", "q4_0/scalar"]);
    let asked = text.contains("kernels    scalar: Q4_0 (asked for)");
    assert_eq!(asked, Isa::best() != Isa::Scalar, "{text}");
}
