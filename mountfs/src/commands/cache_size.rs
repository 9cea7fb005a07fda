//! How much memory opened data may take.

use clap::Args;
use reseal_cli::parse_size;

/// What a mount takes: the kernel keeps pages of its files, too.
pub(crate) const MOUNT: &str = "256M";
/// What an export takes of the memory that is available when it begins, and the least and the most of it. Its clients' reads come to
/// it each time, no page cache is between.
const SHARE: usize = 16;
const LEAST: usize = 256 << 20;
const MOST: usize = 1 << 30;

/// The option of an export.
#[derive(Args)]
pub(crate) struct CacheArgs {
    /// Memory for opened data, such as 256M or 1G [default: a sixteenth of what is available, from 256M to 1G]
    #[arg(long, value_name = "SIZE", value_parser = parse)]
    cache_size: Option<usize>,
}

impl CacheArgs {
    /// What was asked for, or what suits this machine.
    pub(crate) fn bytes(&self) -> usize {
        self.cache_size.unwrap_or_else(|| share(&std::fs::read_to_string("/proc/meminfo").unwrap_or_default()))
    }
}

/// What suits a machine that says this of its memory.
fn share(meminfo: &str) -> usize {
    let available = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = available.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok());
    (kib.unwrap_or(0).saturating_mul(1 << 10) / SHARE).clamp(LEAST, MOST)
}

pub(crate) fn parse(text: &str) -> Result<usize, String> {
    usize::try_from(parse_size(text)?).map_err(|_| "out of range".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_is_of_what_is_available_within_bounds() {
        let of = |kib: u64| share(&format!("MemTotal:       99999999 kB\nMemAvailable:   {kib} kB\nBuffers: 1 kB\n"));
        assert_eq!(of(8 << 20), 512 << 20);
        assert_eq!(of(1 << 20), LEAST);
        assert_eq!(of(64 << 20), MOST);
        assert_eq!(of(u64::MAX), MOST);
        assert_eq!(share("MemAvailable: none"), LEAST);
        assert_eq!(share(""), LEAST);
    }
}
