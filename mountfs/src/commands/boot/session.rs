//! A VM from its start, or from where it was left, to its end.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use reseal_cli::{CommonArgs, Detach, Failure, Opened, Output, Status, harden};
use reseal_format::manifest::Manifest;
use reseal_mountfs::boot::{
    BootError, Console, DiskAt, Happened, Host, Machine, Qemu, RECORD_VERSION, Record, RecordDisk, RunFolder, RunState,
    Tie, device, node,
};
use reseal_mountfs::boot_reads::BootReading;
use reseal_mountfs::journal::Journal;
use reseal_mountfs::nbd::{Address, JournalOwner, Listener, NbdServer};
use reseal_mountfs::overlay::Unflushed;
use reseal_mountfs::record_watch;
use reseal_mountfs::signals::StopSignals;
use reseal_mountfs::writable::Moved;
use reseal_nbd::server::{Exports, Limits, PointExports, Scope, Service, StartTls};
use reseal_qmp::Line;
use reseal_store::Lease;
use reseal_vault::Point;
use reseal_vault::disk::DiskReader;
use serde::Serialize;

use super::arguments::{BootArgs, failure};
use super::promotion::{Moving, Promotion, Started, say_free};
use crate::commands::nbd::listen_failure;
use crate::commands::writable::Written;

/// How often signals and the like are looked at.
const LOOK: Duration = Duration::from_millis(250);
/// How long a guest that was paused because its disks were gone is let go again and again: QEMU tries to connect at growing intervals.
const RESUMING: Duration = Duration::from_secs(60);
/// A pause before it is.
const AGAIN: Duration = Duration::from_millis(500);
/// How long QEMU may take to end when it was told to.
const QUITTING: Duration = Duration::from_secs(20);

/// What `--json` says when the VM runs.
#[derive(Serialize)]
struct Ready<'a> {
    event: &'static str,
    point: String,
    /// Where what the guest writes is kept.
    overlay: Option<&'a PathBuf>,
    /// Whether a VM that ran already was taken up.
    resumed: bool,
    run_folder: PathBuf,
    pid: u32,
    qmp: PathBuf,
    qmp_promote: PathBuf,
    agent: PathBuf,
    /// None where it is elsewhere.
    console: Option<PathBuf>,
    nbd: PathBuf,
}

/// What it says at the end.
#[derive(Serialize)]
struct Ended {
    event: &'static str,
    how: &'static str,
}

/// How a VM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The guest switched itself off, or somebody did it by its monitor.
    Off,
    /// This process was asked to end, and the guest shut down.
    Asked,
    /// The guest did not shut down in time, and was switched off.
    Switched,
    /// The tenant is gone.
    Erased,
    /// QEMU was killed.
    Died,
    /// No disk is on the overlay any more: the VM runs on without this process.
    Moved,
}

impl End {
    fn name(self) -> &'static str {
        match self {
            End::Off => "off",
            End::Asked => "shut-down",
            End::Switched => "switched-off",
            End::Erased => "erased",
            End::Died => "died",
            End::Moved => "promoted",
        }
    }
}

/// What other threads want.
#[derive(Default)]
pub(super) struct Wanted {
    /// Signals that have come.
    pub(super) end: AtomicUsize,
    /// Whether all of those were a terminal's interrupt.
    pub(super) is_interrupt_only: AtomicBool,
    pub(super) is_erased: AtomicBool,
}

/// A restore point that nobody takes away meanwhile.
pub(super) struct Attended {
    pub(super) opened: Opened,
    pub(super) point: Point,
    _lease: Option<Box<dyn Lease>>,
}

/// Disks that are served.
pub(super) struct Served {
    pub(super) written: Written,
    /// What the guest reads of the restore point.
    pub(super) reading: BootReading,
    listener: Arc<Listener>,
    server: Box<dyn Fn() + Send>,
    thread: JoinHandle<std::io::Result<()>>,
}

pub(super) fn failed(error: std::io::Error) -> Failure {
    Failure::new(Status::Failed, error.to_string())
}

impl Served {
    /// Opens the overlays of a point, and serves them to whoever gets into the run folder.
    pub(super) fn start(
        opened: &Opened,
        point: &Point,
        arguments: &BootArgs,
        journal: &Arc<Journal>,
    ) -> Result<(Served, RunFolder), Failure> {
        // A guest that still runs was told that things are written.
        let lives = arguments.overlay_id().is_some_and(|id| RunFolder::of(&id).is_held());
        let unflushed = if lives { Unflushed::TakenUp } else { Unflushed::Kept };
        Served::keeping(opened, point, arguments, journal, unflushed)
    }

    /// The same where it is known whether a guest lives.
    pub(super) fn keeping(
        opened: &Opened,
        point: &Point,
        arguments: &BootArgs,
        journal: &Arc<Journal>,
        unflushed: Unflushed,
    ) -> Result<(Served, RunFolder), Failure> {
        let tenant = &opened.tenant;
        let (vm, number) = (point.manifest.vm.clone(), point.manifest.number);
        let reader = Arc::new(DiskReader::new(tenant.clone(), arguments.cache.bytes()));
        point.manifest.disks.iter().for_each(|disk| reader.warm_later(disk));
        let scope = Scope::Point { vm, number, disk: None };
        let points: Arc<dyn Exports> =
            Arc::new(PointExports::new(tenant.clone(), Some(opened.heads.clone()), reader.clone(), scope));
        let reading = BootReading::begin(tenant, &reader, &Arc::new(point.clone()), journal);
        let points = reading.exports(points);
        let written = arguments.written().keeping(unflushed).open(
            Some(tenant),
            &opened.paths.state,
            &point.manifest,
            None,
            &*points,
        )?;
        let folder = RunFolder::of(&written.id);
        folder.make().map_err(|e| failure(&e))?;
        let listener = Arc::new(Listener::new(&Address::Unix(folder.nbd())).map_err(listen_failure)?);
        let service = Service {
            exports: written.exports(points),
            owner: Arc::new(JournalOwner(journal.clone())),
            tls: StartTls::Never,
            limits: Limits::default(),
        };
        let server = NbdServer::new(service, journal.clone());
        let stopper = Box::new(server.stopper());
        let thread = {
            let listener = listener.clone();
            thread::Builder::new().name("serve".into()).spawn(move || server.run(&listener)).map_err(failed)?
        };
        Ok((Served { written, reading, listener, server: stopper, thread }, folder))
    }

    /// Ends it, with all durable.
    pub(super) fn end(self) -> Result<(), Failure> {
        self.reading.end();
        (self.server)();
        // A thread that hangs in a dead store is left behind.
        let _ = self.thread.join();
        self.listener.remove_file();
        self.written.close()
    }
}

impl Attended {
    /// For people.
    pub(super) fn name(&self) -> String {
        format!("{}@{}", self.point.manifest.vm, self.point.manifest.number)
    }
}

/// Opens the vault and takes a lease on the point; from then on signals, and the end of the tenant, are noticed.
pub(super) fn attend(
    common: &CommonArgs,
    arguments: &BootArgs,
    journal: &Arc<Journal>,
) -> Result<(Attended, Arc<Wanted>), Failure> {
    let signals = StopSignals::new().map_err(failed)?;
    let opened = common.open()?;
    let point = arguments.point(&opened.tenant)?;
    let what = format!("boot of {}@{}", point.manifest.vm, point.manifest.number);
    let lease = opened.tenant.pin_point(Some(&point), what)?;
    let wanted = Arc::new(Wanted::default());
    let (on_signal, on_erased) = (wanted.clone(), wanted.clone());
    wanted.is_interrupt_only.store(true, Ordering::Relaxed);
    let signalled = move |is_interrupt| {
        on_signal.is_interrupt_only.fetch_and(is_interrupt, Ordering::Relaxed);
        on_signal.end.fetch_add(1, Ordering::Relaxed);
    };
    signals.on_each(signalled).map_err(failed)?;
    let erased = move || on_erased.is_erased.store(true, Ordering::Relaxed);
    record_watch::watch("VM", opened.tenant.clone(), opened.heads.clone(), journal.clone(), erased).map_err(failed)?;
    Ok((Attended { opened, point, _lease: lease }, wanted))
}

/// Runs a VM to its end.
pub(super) fn run(common: &CommonArgs, arguments: &BootArgs, detach: Option<Detach>) -> Result<(), Failure> {
    harden(common.allow_swap)?;
    let output = common.output();
    let journal = Arc::new(Journal::new());
    let (attended, wanted) = attend(common, arguments, &journal)?;
    let Attended { opened, point, .. } = &attended;
    let (machine, host) = arguments.machine(point, output)?;
    arguments.promote.check(&point.manifest)?;
    let (mut served, folder) = Served::start(opened, point, arguments, &journal)?;
    let begun = begin(common, arguments, &machine, &host, &point.manifest, &served.written, &folder);
    let (mut qemu, is_found) = match begun {
        Ok(begun) => begun,
        Err(error) => {
            served.end()?;
            // A VM that runs keeps what is its own.
            if !matches!(error, BootError::Moved { .. } | BootError::Unknown(_) | BootError::Monitor(_)) {
                folder.remove().map_err(|e| failure(&e))?;
            }
            return Err(failure(&error));
        }
    };
    announce(output, &point.manifest, &served.written, &folder, &qemu, is_found, detach.is_some());
    if let Some(detach) = detach {
        detach.detach().map_err(failed)?;
    }
    let started = arguments.promote.is_wanted().then(|| {
        let promotion = Promotion::of(&arguments.promote, &folder)?;
        let promotion = if is_found { promotion.trying_for(RESUMING) } else { promotion };
        promotion.start(output).map_err(failed)
    });
    let started = started.map(|started| started.unwrap_or_else(Started::not));
    // It can't live on without this process where that is its terminal, or has what it wrote.
    let is_tied = arguments.console == Console::Stdio || served.written.folder.is_none();
    let mut watch = Watch {
        folder: &folder,
        moving: Moving::new(&folder, started, is_tied),
        agent: None,
        qemu: &mut qemu,
        reading: &mut served.reading,
        wanted: &wanted,
        journal: &journal,
        output,
        asked: None,
        resuming: None,
    };
    if is_found {
        watch.reading.forget();
        watch.resuming = Some(Instant::now() + RESUMING);
    }
    let end = watch.until_end(arguments.patience());
    let not_moved = watch.moving.end();
    let said = folder.said();
    let kept = served.written.folder.clone();
    let record = folder.record().ok().flatten();
    served.end()?;
    if end == End::Moved {
        output.json(&Ended { event: "ended", how: end.name() });
        record.iter().for_each(|record| say_free(output, record, &folder));
        return Ok(());
    }
    folder.remove().map_err(|e| failure(&e))?;
    output.json(&Ended { event: "ended", how: end.name() });
    finish(end, &said, &point.manifest, kept.as_ref(), output)?;
    not_moved.map_or(Ok(()), Err)
}

/// The VM that runs on the overlay, or a new one; and whether it ran already.
fn begin(
    common: &CommonArgs,
    arguments: &BootArgs,
    machine: &Machine,
    host: &Host,
    point: &Manifest,
    written: &Written,
    folder: &RunFolder,
) -> Result<(Qemu, bool), BootError> {
    if let Some(qemu) = Qemu::found(folder)? {
        if folder.record()?.is_none() {
            folder.put(&record(machine, point, written, &qemu))?;
        }
        return Ok((qemu, true));
    }
    if let Some(record) = folder.record()?
        && let Some((disk, target)) = record.moved()
    {
        return Err(BootError::Moved { disk: disk.to_string(), target: target.to_owned() });
    }
    if let Some(overlay) = &written.folder
        && let Some(moved) = Moved::read(overlay).map_err(BootError::from)?.disks.first()
    {
        return Err(BootError::Moved { disk: moved.name.to_string(), target: moved.target.clone() });
    }
    let command = arguments.command(machine, host, folder, common.allow_swap)?;
    let tie = Tie { terminal: arguments.console == Console::Stdio, life: written.folder.is_none() };
    let mut qemu = Qemu::start(&command, folder, host.firmware.as_ref(), tie)?;
    if let Err(e) = folder.put(&record(machine, point, written, &qemu)) {
        qemu.kill();
        return Err(e);
    }
    Ok((qemu, false))
}

fn record(machine: &Machine, point: &Manifest, written: &Written, qemu: &Qemu) -> Record {
    let disks = machine.disks.iter().enumerate().map(|(nth, disk)| RecordDisk {
        name: disk.name.clone(),
        node: node(nth),
        device: device(nth),
        at: DiskAt::Overlay,
    });
    Record {
        version: RECORD_VERSION,
        overlay: written.id,
        overlay_folder: written.folder.clone(),
        vm: point.vm.clone(),
        number: point.number,
        point_id: point.point_id,
        qemu: qemu.process().clone(),
        disks: disks.collect(),
    }
}

fn announce(
    output: Output,
    point: &Manifest,
    written: &Written,
    folder: &RunFolder,
    qemu: &Qemu,
    resumed: bool,
    in_background: bool,
) {
    let name = format!("{}@{}", point.vm, point.number);
    let pid = qemu.process().pid;
    output.say(match resumed {
        true => format!(
            "{name} still runs (QEMU {pid}), and has its disks again; its sockets are in {}",
            folder.path().display()
        ),
        false => format!("{name} runs (QEMU {pid}); its sockets are in {}", folder.path().display()),
    });
    let console = Some(folder.console()).filter(|socket| socket.exists());
    if let Some(console) = &console {
        output.say(format!("console: socat -,raw,echo=0,escape=0x1d UNIX-CONNECT:{}", console.display()));
    }
    let end = if in_background { "SIGTERM shuts it down" } else { "Ctrl-C shuts it down" };
    written.say(output, end);
    output.json(&Ready {
        event: "ready",
        point: name,
        overlay: written.folder.as_ref(),
        resumed,
        run_folder: folder.path().to_owned(),
        pid,
        qmp: folder.qmp(),
        qmp_promote: folder.qmp_promote(),
        agent: folder.agent(),
        console,
        nbd: folder.nbd(),
    });
}

/// Whoever looks after a VM that runs.
struct Watch<'a> {
    qemu: &'a mut Qemu,
    reading: &'a mut BootReading,
    wanted: &'a Wanted,
    journal: &'a Journal,
    output: Output,
    folder: &'a RunFolder,
    moving: Moving<'a>,
    /// When the guest was asked to shut down.
    asked: Option<Instant>,
    /// Its agent, which was asked, too.
    agent: Option<Line>,
    /// Until when a guest that was paused for an error is let go.
    resuming: Option<Instant>,
}

impl Watch<'_> {
    fn until_end(&mut self, patience: Duration) -> End {
        loop {
            match self.qemu.next(LOOK) {
                Happened::Off if self.asked.is_some() => return End::Asked,
                Happened::Off => return End::Off,
                Happened::Died => return End::Died,
                Happened::Paused { device, is_full, reason } => self.say_paused(&device, is_full, &reason),
                Happened::Nothing => {}
            }
            if self.wanted.is_erased.load(Ordering::Relaxed) {
                self.qemu.kill();
                return End::Erased;
            }
            self.resume();
            self.reading.look();
            if self.moving.look(self.qemu, self.journal, self.output) {
                return End::Moved;
            }
            self.stop_moving();
            if let Some(end) = self.shut_down(patience) {
                return end;
            }
        }
    }

    /// The first interrupt ends the move of disks only; any other signal, all.
    fn stop_moving(&mut self) {
        if self.wanted.end.load(Ordering::Relaxed) == 0 || !self.moving.stop() {
            return;
        }
        if self.wanted.is_interrupt_only.load(Ordering::Relaxed) {
            self.wanted.end.store(0, Ordering::Relaxed);
            self.output.say("the disks stay; another Ctrl-C shuts the guest down");
        }
    }

    fn say_paused(&self, device: &str, is_full: bool, reason: &str) {
        if self.resuming.is_some() {
            return;
        }
        self.journal.say(&match is_full {
            true => format!(
                "the VM is paused: {device} has no space left. Make room, or end this process (kill -9 leaves the VM as it is) and go on \
                 with a higher --overlay-limit"
            ),
            false => format!(
                "the VM is paused for an error of {device} ({reason}); when that is put right, `cont` on qmp-promote.sock lets it go on"
            ),
        });
    }

    /// Lets a guest go on that was paused because nobody served its disks.
    fn resume(&mut self) {
        let Some(until) = self.resuming else { return };
        match self.qemu.state() {
            Ok(RunState::IoError) if Instant::now() < until => {
                let _ = self.qemu.go_on();
                thread::sleep(AGAIN);
            }
            Ok(RunState::IoError) => {
                self.resuming = None;
                self.journal.say("the VM is still paused for an error of its disks");
            }
            _ if Instant::now() >= until => self.resuming = None,
            _ => {}
        }
    }

    /// Shuts the guest down if somebody wants that; the end, if it did not come by itself.
    fn shut_down(&mut self, patience: Duration) -> Option<End> {
        let signals = self.wanted.end.load(Ordering::Relaxed);
        let asked = match (signals, self.asked) {
            (0, _) => return None,
            (_, Some(asked)) => asked,
            (_, None) => {
                let now = Instant::now();
                self.asked = Some(now);
                // A guest that does not run does not see the button.
                let runs = matches!(self.qemu.state(), Ok(RunState::Running));
                if runs && let Ok(agent) = self.qemu.ask_to_shut_down(self.folder) {
                    self.agent = agent;
                    self.output.say(format!(
                        "the guest is asked to shut down, and switched off after {} s, or at the next signal",
                        patience.as_secs()
                    ));
                    now
                } else {
                    now.checked_sub(patience).unwrap_or(now)
                }
            }
        };
        if signals < 2 && asked.elapsed() < patience {
            return None;
        }
        let _ = self.qemu.quit();
        if !self.qemu.has_gone_within(QUITTING) {
            self.qemu.kill();
        }
        Some(End::Switched)
    }
}

fn finish(end: End, said: &str, point: &Manifest, kept: Option<&PathBuf>, output: Output) -> Result<(), Failure> {
    let go_on = match kept {
        Some(folder) => format!(
            "what it wrote is in {0}: `reseal boot {1}@{2} --overlay {0}` goes on with it, `reseal overlay drop {0}` removes it",
            folder.display(),
            point.vm,
            point.number
        ),
        None => "what it wrote is gone".to_owned(),
    };
    match end {
        End::Off | End::Asked | End::Switched => {
            let how = if end == End::Switched { "was switched off" } else { "is off" };
            output.say(format!("the VM {how}; {go_on}"));
            Ok(())
        }
        End::Moved => Ok(()),
        End::Erased => Err(Failure::new(Status::Damaged, "the tenant was erased, so the VM was ended")),
        End::Died => {
            let said = if said.is_empty() { String::new() } else { format!(" ({said})") };
            let error = BootError::Died { said: format!("{said}; what the guest flushed is safe. {go_on}") };
            Err(failure(&error))
        }
    }
}
