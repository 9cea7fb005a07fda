//! `boot --define`: the VM as a domain of libvirt, which the operator starts, on disks that this process serves.

use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use reseal_cli::{CommonArgs, Detach, Failure, Status, harden};
use reseal_mountfs::boot::{
    BootError, DomainSetup, DomainState, Host, Machine, RunFolder, Virsh, domain_xml, refuse_network,
};
use reseal_mountfs::journal::Journal;
use reseal_mountfs::overlay::Unflushed;
use serde::Serialize;

use super::RECONNECT;
use super::arguments::{BootArgs, failure};
use super::session::{Served, Wanted, attend, failed};

/// How often signals and the like are looked at, and a domain that is shutting down.
const LOOK: Duration = Duration::from_millis(250);
const LOOK_AT_DOMAIN: Duration = Duration::from_secs(1);
/// How long a domain that was paused because its disks were gone is let go again and again.
const RESUMING: Duration = Duration::from_secs(60);

/// What `--json` says when the domain can be started.
#[derive(Serialize)]
struct Ready<'a> {
    event: &'static str,
    point: String,
    overlay: Option<&'a PathBuf>,
    run_folder: &'a Path,
    domain: &'a str,
    /// Whether it was there already.
    resumed: bool,
    nbd: PathBuf,
}

/// The domain's name: as given, or after the VM.
pub(super) fn name(given: &str, machine: &Machine) -> Result<String, Failure> {
    let name = if given.is_empty() { format!("{}-recovered", machine.name) } else { given.to_owned() };
    match name.contains('/') || name.chars().any(char::is_control) {
        true => Err(Failure::new(Status::Usage, format!("{name:?} can't be the name of a domain"))),
        false => Ok(name),
    }
}

/// Its XML.
pub(super) fn xml(
    arguments: &BootArgs,
    name: &str,
    machine: &Machine,
    host: &Host,
    folder: &RunFolder,
) -> Result<String, Failure> {
    refuse_network(arguments.network()).map_err(|why| Failure::new(Status::Usage, why))?;
    let reconnect = RECONNECT.as_secs();
    let setup = DomainSetup { name, machine, host, network: arguments.network(), socket: &folder.nbd(), reconnect };
    Ok(domain_xml(&setup))
}

/// Defines the domain, and serves its disks until a signal ends that.
pub(super) fn run(
    common: &CommonArgs,
    arguments: &BootArgs,
    given: &str,
    detach: Option<Detach>,
) -> Result<(), Failure> {
    harden(common.allow_swap)?;
    let output = common.output();
    let journal = Arc::new(Journal::new());
    let (attended, wanted) = attend(common, arguments, &journal)?;
    let (machine, host) = arguments.machine(&attended.point, output)?;
    let name = name(given, &machine)?;
    // A guest that still runs was told that things are written.
    let socket = arguments.overlay_id().map(|id| RunFolder::of(&id).nbd());
    let lives = match socket {
        Some(socket) => {
            Virsh.has(&name, &socket.to_string_lossy()).map_err(|e| failure(&e))? == Some(true) && !is_off(&name)
        }
        None => false,
    };
    let unflushed = if lives { Unflushed::TakenUp } else { Unflushed::Kept };
    let (served, folder) = Served::keeping(&attended.opened, &attended.point, arguments, &journal, unflushed)?;
    let defined = xml(arguments, &name, &machine, &host, &folder).and_then(|xml| define(&name, &xml, &folder));
    let resumed = match defined {
        Ok(resumed) => resumed,
        Err(failure) => {
            served.end()?;
            let _ = folder.remove();
            return Err(failure);
        }
    };
    let end = if detach.is_some() { "SIGTERM shuts it down" } else { "Ctrl-C shuts it down" };
    output.say(match resumed {
        true => format!("the domain {name} is there already, and has its disks again"),
        false => format!("the domain {name} is defined: `virsh start {name}` starts it"),
    });
    served.written.say(output, end);
    output.json(&Ready {
        event: "ready",
        point: attended.name(),
        overlay: served.written.folder.as_ref(),
        run_folder: folder.path(),
        domain: &name,
        resumed,
        nbd: folder.nbd(),
    });
    if let Some(detach) = detach {
        detach.detach().map_err(failed)?;
    }
    attend_domain(&name, resumed, &wanted, &journal, arguments.patience());
    served.end()?;
    let _ = folder.remove();
    if wanted.is_erased.load(Ordering::Relaxed) {
        return Err(Failure::new(Status::Damaged, "the tenant was erased, so the domain was switched off"));
    }
    output.say(format!(
        "the domain {name} stays defined, without its disks: serve them again with the same command, or `virsh undefine --nvram {name}`"
    ));
    output.json(&serde_json::json!({ "event": "ended", "how": "asked", "domain": name }));
    Ok(())
}

/// Defines it unless it is there; whether it was. QEMU, which may be another user, gets to the socket.
fn define(name: &str, xml: &str, folder: &RunFolder) -> Result<bool, Failure> {
    let socket = folder.nbd();
    let admitted = |e: BootError| failure(&e);
    admit(folder, Virsh.qemu_user().map_err(admitted)?).map_err(failed)?;
    match Virsh.has(name, &socket.to_string_lossy()).map_err(admitted)? {
        Some(true) => Ok(true),
        Some(false) => {
            let message = format!("there is a domain {name} with other disks; choose another name: --define=NAME");
            Err(Failure::new(Status::Usage, message))
        }
        None => Virsh.define(xml).map(|()| false).map_err(admitted),
    }
}

/// Gives the folder and the socket to the user that QEMU runs as. Those above it may be passed through, and not listed.
fn admit(folder: &RunFolder, user: Option<(u32, u32)>) -> std::io::Result<()> {
    let Some((user, group)) = user.filter(|_| rustix::process::geteuid().is_root()) else { return Ok(()) };
    if let Some(base) = folder.path().parent() {
        std::fs::set_permissions(base, std::fs::Permissions::from_mode(0o711))?;
    }
    chown(folder.path(), None, Some(group))?;
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o710))?;
    chown(folder.nbd(), Some(user), Some(group))
}

/// Whether it does not run; one that nobody can ask counts so.
fn is_off(name: &str) -> bool {
    matches!(Virsh.state(name), Ok(DomainState::Off) | Err(_))
}

/// Serves until somebody wants the end; then the domain is shut down, if it runs.
fn attend_domain(name: &str, resumed: bool, wanted: &Wanted, journal: &Journal, patience: Duration) {
    let mut resuming = resumed.then(|| Instant::now() + RESUMING);
    let mut looked: Option<Instant> = None;
    while wanted.end.load(Ordering::Relaxed) == 0 && !wanted.is_erased.load(Ordering::Relaxed) {
        thread::sleep(LOOK);
        if let Some(until) = resuming.filter(|_| looked.is_none_or(|at| at.elapsed() > LOOK * 2)) {
            looked = Some(Instant::now());
            match Virsh.state(name) {
                Ok(DomainState::IoError) => drop(Virsh.tell("resume", name)),
                _ if Instant::now() > until => resuming = None,
                _ => {}
            }
        }
    }
    let is_off = || is_off(name);
    if is_off() {
        return;
    }
    let began = Instant::now();
    if !wanted.is_erased.load(Ordering::Relaxed) && matches!(Virsh.state(name), Ok(DomainState::Running)) {
        if let Err(e) = Virsh.tell("shutdown", name) {
            journal.say(&e.to_string());
        }
        while began.elapsed() < patience && wanted.end.load(Ordering::Relaxed) < 2 && !is_off() {
            thread::sleep(LOOK_AT_DOMAIN);
        }
    }
    if !is_off()
        && let Err(e) = Virsh.tell("destroy", name)
    {
        journal.say(&e.to_string());
    }
}
