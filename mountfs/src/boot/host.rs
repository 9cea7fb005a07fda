//! What this host has to run a VM with: QEMU, its firmware, an accelerator, memory.

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use super::BootError;
use super::machine::{Arch, Firmware, HostSize, Machine};

/// Where distributions put a QEMU that is not in PATH.
const ELSEWHERE: &str = "/usr/libexec/qemu-kvm";
const KVM: &str = "/dev/kvm";
/// `KVM_GET_API_VERSION`, and what it has answered since 2007.
const KVM_GET_API_VERSION: libc::Ioctl = 0xAE00;
const KVM_API_VERSION: i32 = 12;

/// UEFI firmware and a template of its variables: Debian and Ubuntu, Fedora and RHEL, Arch, openSUSE.
const OVMF: [(&str, &str); 7] = [
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
    ("/usr/share/edk2-ovmf/x64/OVMF_CODE.fd", "/usr/share/edk2-ovmf/x64/OVMF_VARS.fd"),
    ("/usr/share/qemu/ovmf-x86_64-4m-code.bin", "/usr/share/qemu/ovmf-x86_64-4m-vars.bin"),
    ("/usr/share/qemu/ovmf-x86_64-code.bin", "/usr/share/qemu/ovmf-x86_64-vars.bin"),
];
const AAVMF: [(&str, &str); 3] = [
    ("/usr/share/AAVMF/AAVMF_CODE.fd", "/usr/share/AAVMF/AAVMF_VARS.fd"),
    ("/usr/share/edk2/aarch64/QEMU_EFI-pflash.raw", "/usr/share/edk2/aarch64/vars-template-pflash.raw"),
    ("/usr/share/qemu/aavmf-aarch64-code.bin", "/usr/share/qemu/aavmf-aarch64-vars.bin"),
];

/// How a guest's code is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    Kvm,
    Tcg,
}

/// What the operator wants of that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AccelChoice {
    Auto,
    Kvm,
    Tcg,
}

/// A firmware's code, which all share, and what a VM's own variables begin as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirmwareFiles {
    pub code: PathBuf,
    pub variables: PathBuf,
}

/// What a machine is run with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    pub qemu: PathBuf,
    pub accel: Accel,
    /// None for BIOS, which QEMU brings along.
    pub firmware: Option<FirmwareFiles>,
}

/// This host's architecture, memory and processors.
pub fn host_size() -> HostSize {
    let arch = if cfg!(target_arch = "aarch64") { Arch::Aarch64 } else { Arch::X86_64 };
    let info = rustix::system::sysinfo();
    let memory = u64::from(info.mem_unit.max(1)).saturating_mul(info.totalram as u64);
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    HostSize { arch, memory, cpus: u32::try_from(cpus).unwrap_or(u32::MAX) }
}

impl Host {
    /// Finds what this machine needs.
    pub fn find(machine: &Machine, choice: AccelChoice) -> Result<Host, BootError> {
        let is_native = machine.arch == host_size().arch;
        let accel = match (choice, is_native) {
            (AccelChoice::Tcg, _) | (AccelChoice::Auto, false) => Accel::Tcg,
            (AccelChoice::Kvm, false) => {
                return Err(BootError::NoKvm(format!("the VM is of another architecture, {}", machine.arch.name())));
            }
            (AccelChoice::Kvm, true) => kvm().map(|()| Accel::Kvm).map_err(BootError::NoKvm)?,
            (AccelChoice::Auto, true) => kvm().map_or(Accel::Tcg, |()| Accel::Kvm),
        };
        let firmware = match machine.firmware {
            Firmware::Bios => None,
            Firmware::Uefi => Some(firmware(machine.arch)?),
        };
        Ok(Host { qemu: qemu(machine.arch, is_native)?, accel, firmware })
    }
}

/// Whether KVM is there for this user.
fn kvm() -> Result<(), String> {
    let device = OpenOptions::new().read(true).write(true).open(KVM).map_err(|e| format!("{KVM}: {e}"))?;
    // SAFETY: this request takes no argument, and the descriptor is open.
    match unsafe { libc::ioctl(device.as_raw_fd(), KVM_GET_API_VERSION, 0) } {
        KVM_API_VERSION => Ok(()),
        -1 => Err(format!("{KVM}: {}", std::io::Error::last_os_error())),
        version => Err(format!("{KVM} has version {version}")),
    }
}

fn qemu(arch: Arch, is_native: bool) -> Result<PathBuf, BootError> {
    let (program, package) = match arch {
        Arch::X86_64 => {
            ("qemu-system-x86_64", "qemu-system-x86 (Debian, Ubuntu), qemu-system-x86-core (Fedora) or qemu-kvm (RHEL)")
        }
        Arch::Aarch64 => (
            "qemu-system-aarch64",
            "qemu-system-arm (Debian, Ubuntu), qemu-system-aarch64-core (Fedora) or qemu-kvm (RHEL)",
        ),
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).filter(|folder| folder.is_absolute()).map(|folder| folder.join(program));
    found
        .chain(is_native.then(|| PathBuf::from(ELSEWHERE)))
        .find(|path| path.is_file())
        .ok_or(BootError::Missing { program, package })
}

fn firmware(arch: Arch) -> Result<FirmwareFiles, BootError> {
    let (known, package): (&[(&str, &str)], _) = match arch {
        Arch::X86_64 => (&OVMF, "ovmf (Debian, Ubuntu) or edk2-ovmf (Fedora, RHEL, Arch)"),
        Arch::Aarch64 => (&AAVMF, "qemu-efi-aarch64 (Debian, Ubuntu) or edk2-aarch64 (Fedora, RHEL)"),
    };
    let found = known.iter().find(|(code, variables)| Path::new(code).is_file() && Path::new(variables).is_file());
    let (code, variables) = found.ok_or(BootError::NoFirmware { arch: arch.name(), package })?;
    Ok(FirmwareFiles { code: code.into(), variables: variables.into() })
}
