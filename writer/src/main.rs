//! `reseal`: back up, list, verify; and `reseal-mount`, which it starts for all that reads disks.

mod commands;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use reseal_cli::{CommonArgs, Detach, Failure, Side, finish, harden};

use commands::{
    backup, copy, delegate, forget, hold, init, key, list, prune, rekey, run as jobs, serve, show, status, tenant,
    verify,
};

/// Backs up virtual machines so that whoever holds the backup can't read it without its keys
#[derive(Parser)]
#[command(name = "reseal", version, propagate_version = true)]
struct Cli {
    #[command(flatten)]
    common: CommonArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Makes a vault, the keyring if there is none, the tenant, and a recovery kit
    Init(init::Args),
    /// Makes a restore point of a VM
    Backup(Box<backup::Args>),
    /// Backs up as a file of jobs says
    Run(jobs::Args),
    /// How things stand: restore points against their objectives, last results, keys, sizes; exit status 1 if something is late or
    /// has failed
    Status(status::Args),
    /// Lists restore points
    List(list::Args),
    /// Shows what a restore point holds
    Show(show::Args),
    /// Reads everything back and authenticates it; exit status 3 if something is damaged
    Verify(verify::Args),
    /// Forgets restore points: those that are named, or all of a VM that no --keep option keeps
    Forget(forget::Args),
    /// Holds a restore point, so that nothing forgets it
    Hold(hold::Args),
    /// Gives back the space of what no restore point needs any more
    Prune(prune::Args),
    /// Copies restore points to another vault, sealed under its own keys: what is missing there
    Copy(copy::Args),
    /// The recovery kit: written, printed, and used where a keyring or a KMS is lost
    Key(key::Args),
    /// The customers of a vault, each with a key of its own: add, list, show, set, remove, erase; and the
    /// sites that may send to them: enroll, clients, revoke
    Tenant(tenant::Args),
    /// Other keys for the same data
    Rekey(Box<rekey::Args>),
    /// Takes restore points from other sites, over TLS with client certificates
    Serve(serve::Args),
    /// Shows restore points as files: every disk, decrypted, under VM/TIME/
    Mount(delegate::Args),
    /// Ends a mount
    Umount(delegate::Args),
    /// Writes a disk of a restore point to a file or block device
    Restore(delegate::Args),
    /// Serves disks of restore points over NBD, decrypted as they are read; they can be written to, too
    Nbd(delegate::Args),
    /// Runs a VM from a restore point, on an overlay that takes what it writes
    Boot(delegate::Args),
    /// What was written to restore points: lists and drops it
    Overlay(delegate::Args),
    /// Undoes what a backup of a running VM began if the backup dies; started by it
    #[command(hide = true)]
    Guardian,
}

fn run(cli: Cli, detach: Option<Detach>) -> Result<(), Failure> {
    let common = &cli.common;
    match cli.command {
        Command::Mount(_) => return delegate::run("mount"),
        Command::Umount(_) => return delegate::run("umount"),
        Command::Restore(_) => return delegate::run("restore"),
        Command::Nbd(_) => return delegate::run("nbd"),
        Command::Boot(_) => return delegate::run("boot"),
        Command::Overlay(_) => return delegate::run("overlay"),
        _ => harden(common.allow_swap)?,
    }
    match cli.command {
        Command::Init(args) => init::run(common, args),
        Command::Backup(args) => backup::run(common, *args),
        Command::Run(args) => jobs::run(common, &args),
        Command::Status(args) => status::run(common, &args),
        Command::List(args) => list::run(common, args),
        Command::Show(args) => show::run(common, args),
        Command::Verify(args) => verify::run(common, &args),
        Command::Forget(args) => forget::run(common, &args),
        Command::Hold(args) => hold::run(common, &args),
        Command::Prune(args) => prune::run(common, &args),
        Command::Copy(args) => copy::run(common, &args),
        Command::Guardian => reseal_writer::guardian::run(),
        Command::Key(args) => key::run(common, args),
        Command::Tenant(args) => tenant::run(common, args),
        Command::Rekey(args) => rekey::run(common, &args, detach),
        Command::Serve(args) => serve::run(common, &args),
        Command::Mount(_)
        | Command::Umount(_)
        | Command::Restore(_)
        | Command::Nbd(_)
        | Command::Boot(_)
        | Command::Overlay(_) => Ok(()),
    }
}

fn main() -> ExitCode {
    // Arguments of the commands that are passed on are not ours to judge, so they go as they are.
    if let Some(result) = delegate::early(std::env::args_os()) {
        return finish("reseal", result);
    }
    let cli = Cli::parse();
    let side = match &cli.command {
        Command::Rekey(args) if args.background => rekey::split_off(args).map(Some),
        _ => Ok(None),
    };
    match side {
        Ok(Some(Side::Command(status))) => ExitCode::from(status),
        Ok(Some(Side::Server(detach))) => finish("reseal", run(cli, Some(detach))),
        Ok(None) => finish("reseal", run(cli, None)),
        Err(failure) => finish("reseal", Err(failure)),
    }
}
