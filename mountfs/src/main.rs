//! `reseal-mount`: what `reseal` starts for restore points that are read.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use reseal_cli::{CommonArgs, Failure, Status, finish};

mod commands;

use commands::boot::{BootArgs, boot};
use commands::mount::{MountArgs, mount, unmount};
use commands::nbd::{NbdArgs, nbd};
use commands::overlay::{OverlayArgs, overlay};
use commands::restore::{RestoreArgs, restore};

const PROGRAM: &str = "reseal-mount";
/// Set by `reseal` to its own version: two that differ must not work on one vault together.
const EXPECTED_VERSION: &str = "RESEAL_EXPECT_VERSION";

#[derive(Parser)]
#[command(name = PROGRAM, bin_name = "reseal", version, about = "Mounts and restores the restore points of a reseal vault")]
struct Cli {
    #[command(flatten)]
    common: CommonArgs,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Shows restore points as files: /VM/TIME/DISK.raw, decrypted as they are read
    Mount(MountArgs),
    /// Ends a mount and waits until its process is gone
    Umount {
        /// Where it is mounted
        mountpoint: PathBuf,
    },
    /// Writes disks of a restore point to files or a block device, in the clear
    Restore(RestoreArgs),
    /// Serves disks of restore points over NBD, decrypted as they are read; they can be written to, too
    Nbd(NbdArgs),
    /// Runs a VM from a restore point, on an overlay that takes what it writes
    Boot(Box<BootArgs>),
    /// What was written to restore points: lists and drops it
    Overlay(OverlayArgs),
}

fn main() -> ExitCode {
    if let Err(failure) = check_version() {
        return finish(PROGRAM, Err(failure));
    }
    let Cli { mut common, verb } = Cli::parse();
    // A restore reads all of a disk once: it would only push out what the others come back for.
    common.is_reader = matches!(verb, Verb::Mount(_) | Verb::Nbd(_) | Verb::Boot(_));
    match verb {
        Verb::Mount(arguments) => mount(&common, &arguments),
        Verb::Umount { mountpoint } => finish(PROGRAM, unmount(&mountpoint)),
        Verb::Restore(arguments) => finish(PROGRAM, restore(&common, &arguments)),
        Verb::Nbd(arguments) => nbd(&common, &arguments),
        Verb::Boot(arguments) => boot(&common, &arguments),
        Verb::Overlay(arguments) => finish(PROGRAM, overlay(&common, &arguments)),
    }
}

fn check_version() -> Result<(), Failure> {
    let own = env!("CARGO_PKG_VERSION");
    match std::env::var(EXPECTED_VERSION) {
        Ok(expected) if expected != own => Err(Failure::new(
            Status::Failed,
            format!(
                "this is version {own}, but the reseal that started it is {expected}; install both from one release"
            ),
        )),
        _ => Ok(()),
    }
}
