//! Memory: how much there is, how much a control group leaves of it, swap, and the pages it comes in.
//!
//! The one idea: what a model can use is the smaller of what the system has available and of what each enclosing control
//! group has left. File pages that a group could drop count as left, as they do in the system's own figure.

use super::{Root, field, kilobytes};

/// Sizes in bytes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Memory {
    /// Memory of the computer that the kernel manages.
    pub total: u64,
    /// What new programs could have without swapping.
    pub available: u64,
    /// Swap space, and how much of it is used.
    pub swap: u64,
    /// See `swap`.
    pub swap_used: u64,
    /// All swap is compressed memory.
    pub swap_is_zram: bool,
    /// The limit of a control group that leaves least.
    pub limit: Option<Limit>,
    /// Size of a page.
    pub page: Option<u64>,
    /// When the kernel makes huge pages of its own accord: `always`, `madvise`, `never`.
    pub transparent_huge_pages: Option<String>,
    /// Memory set aside for huge pages, which nothing else can use.
    pub reserved_huge_pages: u64,
}

/// What a control group allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// Most memory its processes may have.
    pub bytes: u64,
    /// What of it they have not yet, or could drop.
    pub left: u64,
}

impl Memory {
    /// What can be read below `root`; `None` without the totals.
    pub fn read(root: &Root) -> Option<Memory> {
        let info = root.text("proc/meminfo")?;
        let (total, available) = (kilobytes(&info, "MemTotal")?, kilobytes(&info, "MemAvailable")?);
        let swap = kilobytes(&info, "SwapTotal").unwrap_or(0);
        let huge_pages: u64 = field(&info, "HugePages_Total").and_then(|n| n.parse().ok()).unwrap_or(0);
        let swaps = root.text("proc/swaps").unwrap_or_default();
        let mut swaps = swaps.lines().skip(1).filter(|line| !line.trim().is_empty()).peekable();
        Some(Memory {
            total,
            available,
            swap,
            swap_used: swap.saturating_sub(kilobytes(&info, "SwapFree").unwrap_or(swap)),
            swap_is_zram: swaps.peek().is_some() && swaps.all(|line| line.starts_with("/dev/zram")),
            // A limit above what there is limits nothing; version 1 writes "none" as a huge number.
            limit: limits(root).filter(|limit| limit.bytes < total).min_by_key(|limit| limit.left),
            page: root.text("proc/self/smaps").and_then(|text| kilobytes(&text, "KernelPageSize")),
            transparent_huge_pages: transparent_huge_pages(root),
            reserved_huge_pages: huge_pages.saturating_mul(kilobytes(&info, "Hugepagesize").unwrap_or(0)),
        })
    }

    /// What a model can use: available to the system and left by every control group.
    pub fn usable(&self) -> u64 {
        self.limit.map_or(self.available, |limit| limit.left.min(self.available))
    }
}

/// The word in brackets of `always [madvise] never`.
fn transparent_huge_pages(root: &Root) -> Option<String> {
    let line = root.line("sys/kernel/mm/transparent_hugepage/enabled")?;
    let (_, rest) = line.split_once('[')?;
    Some(rest.split_once(']')?.0.to_string())
}

fn limits(root: &Root) -> impl Iterator<Item = Limit> {
    root.cgroups("memory").into_iter().filter_map(|(directory, unified)| {
        let (limit, used, cache) = match unified {
            true => ("memory.max", "memory.current", "inactive_file"),
            false => ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        };
        let bytes: u64 = root.number(directory.join(limit))?;
        let used: u64 = root.number(directory.join(used)).unwrap_or(0);
        let stat = root.text(directory.join("memory.stat")).unwrap_or_default();
        let cache = stat.lines().find_map(|line| line.strip_prefix(cache)?.trim().parse::<u64>().ok()).unwrap_or(0);
        Some(Limit { bytes, left: bytes.saturating_sub(used.saturating_sub(cache)) })
    })
}
