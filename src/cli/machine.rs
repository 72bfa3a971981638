//! The computer this runs on, as far as it concerns people: processor, threads, memory.
//!
//! Figures come from Linux's `/proc`; elsewhere they are absent, and nothing depends on them.

use std::fs;

/// The processor's name.
pub fn cpu() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = info.lines().find(|line| line.starts_with(name))?;
        let (_, value) = line.split_once(':')?;
        Some(value.split_whitespace().collect::<Vec<_>>().join(" "))
    };
    let name = field("model name").or_else(|| field("Model")).unwrap_or_else(|| std::env::consts::ARCH.to_string());
    gemrun::error::printable(&name)
}

/// Threads this process may run at once: what the affinity mask and container limits allow.
pub fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// Total and available memory in bytes.
pub fn memory() -> Option<(u64, u64)> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    Some((kilobytes(&info, "MemTotal:")?, kilobytes(&info, "MemAvailable:")?))
}

/// The most memory this process has had resident so far, in bytes.
pub fn peak_rss() -> Option<u64> {
    kilobytes(&fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

/// The value of a `NAME:  123 kB` line, in bytes.
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    let value: u64 = rest.trim().strip_suffix("kB")?.trim().parse().ok()?;
    value.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_proc_lines() {
        let text = "VmPeak:\t  99 kB\nVmHWM:\t   1234 kB\n";
        assert_eq!(kilobytes(text, "VmHWM:"), Some(1234 * 1024));
        assert_eq!(kilobytes(text, "VmRSS:"), None);
        assert_eq!(kilobytes("VmHWM: x kB", "VmHWM:"), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn linux_has_all_figures() {
        let (total, available) = memory().unwrap();
        assert!(total >= available && total > 0);
        assert!(peak_rss().unwrap() > 0);
        assert!(threads() > 0 && !cpu().is_empty());
    }
}
