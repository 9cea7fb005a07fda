//! What `boot` is told, and the machine that it means.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use reseal_cli::{Failure, Output, Status, parse_size, swap_in_the_clear};
use reseal_format::ids::OverlayId;
use reseal_mountfs::boot::{
    AccelChoice, BootError, Bus, Console, Described, Firmware, Forward, Host, MAX_CPUS, Machine, Network, Overrides,
    RunFolder, ScsiModel, Setup, command, host_size,
};
use reseal_mountfs::writable::Folder;
use reseal_vault::{Point, PointSpec, Points, Tenant, Which};

use super::check::CheckArgs;
use super::promotion::PromoteArgs;
use crate::commands::cache_size::CacheArgs;
use crate::commands::writable::{WritableArgs, parse_limit};

#[derive(Args)]
pub(crate) struct BootArgs {
    /// VM@latest, VM@NUMBER or VM@TIME
    pub(super) point: String,
    /// Folder of the overlay that takes what the guest writes: one that it holds already is gone on with, and a QEMU that still runs on
    /// it is served again [default: a new one in the state folder]
    #[arg(long, value_name = "DIR")]
    overlay: Option<PathBuf>,
    /// Most that the overlay of each disk may take, such as 20G: beyond it the guest is paused
    #[arg(long, value_name = "SIZE", value_parser = parse_limit)]
    overlay_limit: Option<u64>,
    /// Keeps the overlay's key in memory only: what the guest wrote, and the guest, are gone with this process
    #[arg(long)]
    pub(super) one_time: bool,
    /// Memory, such as 4G [default: as captured]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<u64>,
    /// Processors [default: as captured, but no more than there are]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_CPUS)))]
    cpus: Option<u32>,
    /// bios or uefi [default: as captured]
    #[arg(long, value_name = "KIND", value_parser = parse_firmware)]
    firmware: Option<Firmware>,
    /// What all disks are attached to: virtio, sata, scsi or ide [default: as captured]
    #[arg(long, value_name = "BUS", value_parser = parse_bus)]
    bus: Option<Bus>,
    /// auto, kvm or tcg, which is emulation: slow, and works everywhere
    #[arg(long, value_name = "KIND", default_value = "auto", value_parser = parse_accel)]
    accel: AccelChoice,
    /// none; restricted, where the guest reaches nothing; user, behind address translation; bridge=NAME; tap=NAME
    #[arg(long, value_name = "KIND", default_value = "none", value_parser = Network::parse)]
    network: Network,
    /// A port of this machine that leads to one of the guest's, such as 2222:22; with --network restricted or user
    #[arg(long, value_name = "[ADDRESS:]PORT:PORT", value_parser = Forward::parse)]
    forward: Vec<Forward>,
    /// The serial console: socket, in the run folder; stdio, where Ctrl-a x ends the VM; a file; none. Or vnc=ADDRESS:DISPLAY for the screen
    #[arg(long, value_name = "PLACE", default_value = "socket", value_parser = Console::parse)]
    pub(super) console: Console,
    /// Defines a libvirt domain of that name [default: VM-recovered], which you start; serves its disks
    #[arg(long, value_name = "NAME", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    pub(super) define: Option<String>,
    /// Prints what would be served, and the command line of QEMU; starts nothing
    #[arg(long, conflicts_with = "background")]
    pub(super) print: bool,
    /// Returns when the VM runs, and serves on in the background
    #[arg(long)]
    pub(super) background: bool,
    /// Where a process in the background says what went wrong
    #[arg(long, value_name = "FILE", requires = "background")]
    pub(super) log: Option<PathBuf>,
    /// How long the guest may take to shut down when this is ended, before it is switched off
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u32).range(0..=86_400))]
    shutdown_timeout: u32,
    // What the last boot read is fetched ahead into three eighths of it.
    #[command(flatten)]
    pub(super) cache: CacheArgs,
    #[command(flatten)]
    pub(super) check: CheckArgs,
    #[command(flatten)]
    pub(super) promote: PromoteArgs,
    /// Further arguments of QEMU
    #[arg(last = true, value_name = "QEMU ARGUMENTS")]
    extra: Vec<OsString>,
}

fn parse_firmware(text: &str) -> Result<Firmware, String> {
    match text {
        "bios" => Ok(Firmware::Bios),
        "uefi" => Ok(Firmware::Uefi),
        _ => Err("it is bios or uefi".into()),
    }
}

fn parse_bus(text: &str) -> Result<Bus, String> {
    match text {
        "virtio" => Ok(Bus::Virtio),
        "sata" => Ok(Bus::Sata),
        "scsi" => Ok(Bus::Scsi(ScsiModel::Virtio)),
        "ide" => Ok(Bus::Ide),
        _ => Err("it is virtio, sata, scsi or ide".into()),
    }
}

fn parse_accel(text: &str) -> Result<AccelChoice, String> {
    match text {
        "auto" => Ok(AccelChoice::Auto),
        "kvm" => Ok(AccelChoice::Kvm),
        "tcg" => Ok(AccelChoice::Tcg),
        _ => Err("it is auto, kvm or tcg".into()),
    }
}

pub(super) fn failure(error: &BootError) -> Failure {
    Failure::of(error.class().into(), error)
}

impl BootArgs {
    /// Refuses what makes no sense together.
    pub(super) fn refuse(&self, output: Output) -> Result<(), Failure> {
        let refused = |what: &str| Err(Failure::new(Status::Usage, what));
        match (&self.console, &self.network) {
            _ if self.promote.is_wanted() && (self.print || self.define.is_some() || self.check.check) => refused(
                "--promote moves disks of a VM that runs here: it takes neither --print nor --define nor --check",
            ),
            _ if self.define.is_some() && self.one_time => refused(
                "--define needs an overlay that is kept: a domain may outlive this process, and --one-time does not",
            ),
            _ if self.define.is_some()
                && !(self.forward.is_empty() && self.extra.is_empty() && self.console == Console::Socket) =>
            {
                refused("--define takes no --forward, --console or arguments of QEMU: `virsh edit` changes a domain")
            }
            (Console::Stdio, _) if self.background => {
                refused("--console stdio needs a terminal, which --background leaves")
            }
            (Console::Stdio, _) if output.json => {
                refused("--console stdio and --json would both write to standard output")
            }
            (_, Network::None | Network::Bridge(_) | Network::Tap(_)) if !self.forward.is_empty() => {
                refused("--forward needs --network restricted or user")
            }
            _ => Ok(()),
        }
    }

    /// How long a guest may take to shut down.
    pub(super) fn patience(&self) -> Duration {
        Duration::from_secs(self.shutdown_timeout.into())
    }

    pub(super) fn network(&self) -> &Network {
        &self.network
    }

    /// The overlay's options.
    pub(super) fn written(&self) -> WritableArgs {
        let one_time = self.one_time || self.check.check;
        WritableArgs::of(self.overlay.clone(), self.overlay_limit, one_time).left()
    }

    /// The overlay's folder, where it is named.
    pub(super) fn overlay(&self) -> Option<&Path> {
        self.overlay.as_deref()
    }

    /// The overlay's id, where it is there.
    pub(super) fn overlay_id(&self) -> Option<OverlayId> {
        Some(Folder::document(self.overlay()?).ok()??.id)
    }

    /// The restore point. The latest, where an overlay is gone on with, is the one that was the latest then.
    pub(super) fn point(&self, tenant: &Tenant) -> Result<Point, Failure> {
        let mut spec = PointSpec::parse(&self.point)?;
        if let (Which::Latest, Some(folder)) = (&spec.which, &self.overlay)
            && let Ok(Some(document)) = Folder::document(folder)
            && document.vm == spec.vm
        {
            spec.which = Which::Number(document.number);
        }
        Ok(tenant.resolve(&spec)?)
    }

    /// The machine, and what it is run with.
    pub(super) fn machine(&self, point: &Point, output: Output) -> Result<(Machine, Host), Failure> {
        let described = point.manifest.definition.as_ref().and_then(Described::of);
        let overrides = Overrides { memory: self.memory, cpus: self.cpus, firmware: self.firmware, bus: self.bus };
        let machine = Machine::of(&point.manifest, described.as_ref(), &overrides, &host_size());
        let (machine, warnings) = machine.map_err(|e| failure(&e))?;
        warnings.iter().for_each(|warning| output.warn(warning));
        let host = Host::find(&machine, self.accel).map_err(|e| failure(&e))?;
        Ok((machine, host))
    }

    /// QEMU's command line. Where swap is in the clear the guest's memory stays out of it.
    pub(super) fn command(
        &self,
        machine: &Machine,
        host: &Host,
        folder: &RunFolder,
        allow_swap: bool,
    ) -> Result<Vec<OsString>, BootError> {
        let (isolated, forwards) = self.check.network();
        let setup = Setup {
            machine,
            host,
            folder,
            network: if self.check.check { &isolated } else { &self.network },
            forwards: if self.check.check { &forwards } else { &self.forward },
            console: &self.console,
            reconnect: super::RECONNECT,
            lock_memory: !allow_swap && swap_in_the_clear().is_some(),
            // Until somebody watches.
            paused: self.check.check,
            extra: &self.extra,
        };
        command(&setup)
    }
}
