//! Keys and plaintext live in this process's memory: they stay out of core dumps, debuggers and swap.

use std::fs;

use rustix::mm::{MapFlags, MlockAllFlags, ProtFlags, mlockall, mmap_anonymous, munlockall, munmap};
use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};

use crate::{Failure, Status};

/// Makes the process non-dumpable and locks its memory. Where memory can't be locked and there is swap that is not
/// encrypted, it refuses, unless `allow_swap`.
pub fn harden(allow_swap: bool) -> Result<(), Failure> {
    let failed = |what: &str, e: rustix::io::Errno| Failure::new(Status::Failed, format!("can't {what}: {e}"));
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(|e| failed("forbid core dumps", e))?;
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    setrlimit(Resource::Core, none).map_err(|e| failed("forbid core dumps", e))?;
    // Packs are kept open while they are read; the usual limit is for programs that use select().
    let files = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: files.maximum, maximum: files.maximum });
    // On fault: memory is locked as it is used, not for whole mappings at once.
    let flags = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    if mlockall(flags).is_ok() && unlimited() {
        return Ok(());
    }
    // With a limit, what is mapped later would fail instead of being locked.
    let _ = munlockall();
    if allow_swap {
        return Ok(());
    }
    match found_open_swap("memory")? {
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

/// A swap that is neither encrypted nor in memory, if this machine has one: what another program has in memory may reach it.
pub fn swap_in_the_clear() -> Option<String> {
    open_swap(&fs::read_to_string("/proc/swaps").unwrap_or_default(), &is_encrypted)
}

/// Refuses swap that is not encrypted, unless `allow_swap`: for `who`, another program, holds disk contents and does not lock
/// its memory.
pub fn no_open_swap(allow_swap: bool, who: &str) -> Result<(), Failure> {
    let found = if allow_swap { None } else { found_open_swap(&format!("memory of {who},"))? };
    found.map_or(Ok(()), |swap| {
        let message = format!(
            "memory of {who}, is not locked, and the swap {swap} is not encrypted: disk contents could reach it. Encrypt or \
             disable swap, or accept it with --allow-swap"
        );
        Err(Failure::new(Status::Failed, message))
    })
}

/// The first swap that is not encrypted, for memory that can't be locked.
fn found_open_swap(memory: &str) -> Result<Option<String>, Failure> {
    match fs::read_to_string("/proc/swaps") {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Failure::new(
            Status::Failed,
            format!("{memory} can't be locked, and /proc/swaps can't be read ({e}); accept swap with --allow-swap"),
        )),
        other => Ok(open_swap(&other.unwrap_or_default(), &is_encrypted)),
    }
}

/// Whether any amount of memory may be locked.
fn unlimited() -> bool {
    const MUCH: usize = 64 << 30;
    // SAFETY: a new mapping at an address that the kernel chooses touches nothing that exists.
    let mapped =
        unsafe { mmap_anonymous(std::ptr::null_mut(), MUCH, ProtFlags::READ, MapFlags::PRIVATE | MapFlags::NORESERVE) };
    let Ok(address) = mapped else { return false };
    // SAFETY: the mapping was made above, with this length, and nothing points into it.
    unsafe { munmap(address, MUCH) }.is_ok()
}

/// Runs `f`, which maps something that holds neither keys nor plaintext, so that it is not locked in memory.
pub fn unlocked<T>(f: impl FnOnce() -> T) -> T {
    // Locking what is there already keeps it locked, and ends the locking of what comes; the second call begins it anew.
    let was_locked = fs::read_to_string("/proc/self/status").is_ok_and(|status| locked_now(&status));
    if was_locked {
        let _ = mlockall(MlockAllFlags::CURRENT | MlockAllFlags::ONFAULT);
    }
    let result = f();
    if was_locked {
        let _ = mlockall(MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT);
    }
    result
}

/// Whether `/proc/PID/status` shows locked memory.
fn locked_now(status: &str) -> bool {
    status.lines().any(|line| line.strip_prefix("VmLck:").is_some_and(|size| size.trim() != "0 kB"))
}

/// Whether a block device is encrypted, itself or through all that it stands on (a volume in an encrypted container).
fn is_encrypted(device: &str) -> bool {
    fn below(name: &str, depth: u8) -> bool {
        let uuid = fs::read_to_string(format!("/sys/class/block/{name}/dm/uuid")).unwrap_or_default();
        if uuid.starts_with("CRYPT-") {
            return true;
        }
        let slaves = fs::read_dir(format!("/sys/class/block/{name}/slaves"));
        let names: Vec<_> = slaves.into_iter().flatten().flatten().map(|entry| entry.file_name()).collect();
        depth > 0 && !names.is_empty() && names.iter().all(|name| below(&name.to_string_lossy(), depth - 1))
    }
    // Deeper stacks of devices are not built.
    device.strip_prefix("/dev/").is_some_and(|name| below(name, 8))
}

/// The first swap of `/proc/swaps` that is neither encrypted nor in memory.
fn open_swap(swaps: &str, encrypted: &dyn Fn(&str) -> bool) -> Option<String> {
    swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next()).find_map(|device| {
        let in_memory = device.starts_with("/dev/zram");
        (!in_memory && !encrypted(device)).then(|| device.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_swap_in_the_clear_counts() {
        let table = |device: &str| format!("Filename Type Size Used Priority\n{device} partition 1 0 -2\n");
        let encrypted = |device: &str| device == "/dev/dm-1";
        assert_eq!(open_swap("Filename Type\n", &encrypted), None);
        assert_eq!(open_swap(&table("/dev/zram0"), &encrypted), None);
        assert_eq!(open_swap(&table("/dev/dm-1"), &encrypted), None);
        assert_eq!(open_swap(&table("/dev/dm-2"), &encrypted).as_deref(), Some("/dev/dm-2"));
        assert_eq!(open_swap(&table("/swapfile"), &encrypted).as_deref(), Some("/swapfile"));
    }
}
