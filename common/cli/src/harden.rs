//! Keys and plaintext live in this process's memory: they stay out of core dumps, debuggers and swap.

use std::fs;

use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

use crate::{Failure, Status};

/// Makes the process non-dumpable and locks its memory. Where memory can't be locked and there is swap that is not
/// encrypted, it refuses, unless `allow_swap`.
pub fn harden(allow_swap: bool) -> Result<(), Failure> {
    let failed = |what: &str, e: rustix::io::Errno| Failure::new(Status::Failed, format!("can't {what}: {e}"));
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(|e| failed("forbid core dumps", e))?;
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    setrlimit(Resource::Core, none).map_err(|e| failed("forbid core dumps", e))?;
    // On fault: memory is locked as it is used, not for whole mappings at once.
    let flags = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    if mlockall(flags).is_ok() || allow_swap {
        return Ok(());
    }
    match open_swap(&fs::read_to_string("/proc/swaps").unwrap_or_default(), &device_mapper_uuid) {
        None => Ok(()),
        Some(swap) => Err(Failure::new(
            Status::Failed,
            format!(
                "memory can't be locked, and the swap {swap} is not encrypted: disk contents could reach it. Raise the \
                 limit (ulimit -l unlimited, or LimitMEMLOCK=infinity), encrypt or disable swap, or accept it with --allow-swap"
            ),
        )),
    }
}

/// The uuid that the device mapper gives to `/dev/dm-N`.
fn device_mapper_uuid(device: &str) -> Option<String> {
    let name = device.strip_prefix("/dev/")?;
    fs::read_to_string(format!("/sys/class/block/{name}/dm/uuid")).ok()
}

/// The first swap of `/proc/swaps` that is neither encrypted nor in memory.
fn open_swap(swaps: &str, uuid: &dyn Fn(&str) -> Option<String>) -> Option<String> {
    swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next()).find_map(|device| {
        let in_memory = device.starts_with("/dev/zram");
        let encrypted = uuid(device).is_some_and(|uuid| uuid.starts_with("CRYPT-"));
        (!in_memory && !encrypted).then(|| device.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_swap_in_the_clear_counts() {
        let table = |device: &str| format!("Filename Type Size Used Priority\n{device} partition 1 0 -2\n");
        let uuid = |device: &str| (device == "/dev/dm-1").then(|| "CRYPT-PLAIN-swap".to_owned());
        assert_eq!(open_swap("Filename Type\n", &uuid), None);
        assert_eq!(open_swap(&table("/dev/zram0"), &uuid), None);
        assert_eq!(open_swap(&table("/dev/dm-1"), &uuid), None);
        assert_eq!(open_swap(&table("/dev/dm-2"), &uuid).as_deref(), Some("/dev/dm-2"));
        assert_eq!(open_swap(&table("/swapfile"), &uuid).as_deref(), Some("/swapfile"));
    }
}
