//! One connection: from the first message to the restore point.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use reseal_format::ids::PointId;
use reseal_format::manifest::{Definition, MAX_DISKS, Manifest, Tracking};
use reseal_format::names::{DiskName, VmName};
use reseal_proto::wire::{
    self, Begin, Begun, Commit, Committed, DiskReady, FromSource, FromTarget, MAX_AREAS, Newest, NewestDisk, Renewed,
    Trouble, TroubleCode, VERSION, Welcome,
};
use reseal_vault::{Class, VaultError};
use tracing::{info, warn};

use super::Client;
use super::desk::Desk;
use super::landed::{Landed, Places};
use super::receive::{Own, Receiver, broken};
use super::renewal::renew;
use super::tenants::OpenTenant;
use crate::BackupError;
use crate::draft::Draft;
use crate::link::{Ended, Inbox, Outbox};
use crate::target::{Asked, DiskFacts, Ending, Start, Target};
use reseal_site::RemoteError;
use reseal_site::certificate::now;

/// Where what has landed is kept, in the tenant's folder of the state.
const LANDED: &str = "landed";

/// A connection whose client is known.
pub(super) struct Session<'a> {
    pub inbox: &'a mut Inbox<FromSource>,
    pub outbox: &'a Outbox,
    pub client: &'a Client,
    pub desk: &'a Desk,
    /// Whether what still comes of a disk is of one that was distrusted.
    pub passes_over: bool,
}

/// What is refused, and what to say of it.
pub(super) fn refuse(code: TroubleCode, message: impl Into<String>) -> BackupError {
    let trouble = Trouble { code, message: message.into() };
    RemoteError::Trouble { peer: "this site".into(), trouble }.into()
}

/// What the other side is told of an error; nothing where it is gone. The log has the error itself, which may name what is not
/// the client's to know.
pub(super) fn trouble(error: &BackupError) -> Option<Trouble> {
    let of = |code, message: &str| Some(Trouble { code, message: message.to_owned() });
    let class = match error {
        BackupError::Remote(RemoteError::Trouble { trouble, .. }) => return Some(trouble.clone()),
        BackupError::Remote(RemoteError::Lost { .. }) => return None,
        BackupError::Remote(RemoteError::Broken { source, .. }) => {
            return of(TroubleCode::Protocol, &source.to_string());
        }
        BackupError::Remote(RemoteError::Unexpected { what, .. }) => return of(TroubleCode::Protocol, what),
        BackupError::Vault(VaultError::OverQuota { .. }) => {
            return of(
                TroubleCode::Quota,
                "the tenant may store no more: its quota is reached, and nothing was committed. Whoever runs this site can raise it",
            );
        }
        BackupError::Vault(VaultError::LostRace { vm, number }) => {
            let lost = VaultError::LostRace { vm: vm.clone(), number: *number };
            return of(TroubleCode::LostRace, &lost.to_string());
        }
        BackupError::Vault(VaultError::Fenced { .. }) => {
            let message = "this restore point took so long that the site gave it up, to free space; run it again";
            return of(TroubleCode::LostRace, message);
        }
        BackupError::Vault(VaultError::NoPoint { point, .. }) => {
            return of(TroubleCode::Failed, &format!("there is no restore point {point}"));
        }
        BackupError::Vault(source) | BackupError::Newest { source } => source.class(),
        _ => Class::Failed,
    };
    match class {
        Class::Unreachable => of(
            TroubleCode::Unavailable,
            "the vault of this site or its KMS does not answer: nothing was committed; its log says which",
        ),
        Class::Damaged => of(
            TroubleCode::Damaged,
            "the vault of this site has damaged or missing data: nothing was committed; its log says which",
        ),
        Class::Failed | Class::Usage => {
            of(TroubleCode::Failed, "this site could not make the restore point; its log says why")
        }
    }
}

impl Session<'_> {
    pub(super) fn next(&mut self) -> Result<FromSource, BackupError> {
        // What still waits to be taken is nothing to wait for.
        self.desk.check()?;
        let lost = |why: String| RemoteError::Lost { peer: self.client.name.clone(), why };
        Err(match self.inbox.next() {
            Ok(FromSource::Trouble(trouble)) => lost(format!("it ended: {}", trouble.message)).into(),
            Ok(message) => return Ok(message),
            Err(Ended::Lost(e)) => lost(e.to_string()).into(),
            Err(Ended::Broken(source)) => RemoteError::Broken { peer: self.client.name.clone(), source }.into(),
            Err(Ended::Told(why)) => self.desk.ended(why),
        })
    }

    pub(super) fn send(&mut self, message: &FromTarget) -> Result<(), BackupError> {
        let message = message.encode();
        let (bytes, is_over) = (message.len() as u64, || self.desk.check().is_err());
        match self.client.reads() {
            true => self.desk.sending.pace(bytes, is_over),
            // What is answered to data is next to nothing.
            false => self.desk.sending.count(bytes),
        }
        let lost = |_| RemoteError::Lost { peer: self.client.name.clone(), why: "it takes nothing".into() }.into();
        self.outbox.blocking_send(message).map_err(lost)
    }

    /// Both name their version.
    pub(super) fn hello(&mut self) -> Result<(), BackupError> {
        let FromSource::Hello(hello) = self.next()? else { return Err(broken("it does not say its version first")) };
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let time = u64::try_from(time).unwrap_or(0);
        let software = concat!("reseal ", env!("CARGO_PKG_VERSION")).to_owned();
        self.send(&FromTarget::Welcome(Welcome { version: VERSION, software, time, window: self.desk.window.offers }))?;
        match hello.version {
            VERSION => Ok(()),
            other => {
                let message =
                    format!("this site speaks version {VERSION} of the protocol, and not {other}; use the same reseal");
                Err(refuse(TroubleCode::Version, message))
            }
        }
    }

    /// Answers one who asks for another certificate. That it can't be had is no reason to make no restore point.
    pub(super) fn renew(&self, request: &[u8]) -> Renewed {
        let name = &self.client.name;
        let renewed = renew(&self.desk.site, self.client, &self.desk.certificate, request, now());
        let noted = renewed.and_then(|renewed| {
            match &renewed {
                Renewed::Issued(_) => {
                    self.desk.renewed()?;
                    info!("{name} has a new certificate");
                }
                Renewed::Refused(why) => warn!("{name} gets no new certificate: {why}"),
                Renewed::Elsewhere => {}
            }
            Ok(renewed)
        });
        match noted {
            Ok(renewed) => renewed,
            Err(e) => {
                let why = reseal_cli::Failure::of(reseal_cli::Status::Failed, &e).message;
                warn!("{name} gets no new certificate: {why}");
                Renewed::Refused("this site could not issue it; its log says why".into())
            }
        }
    }

    /// What the client wants to begin, if it may.
    pub(super) fn begin(&mut self) -> Result<(VmName, Option<PointId>), BackupError> {
        let mut next = self.next()?;
        if let FromSource::Renew(asked) = &next {
            let renewed = self.renew(&asked.request);
            self.send(&FromTarget::Renewed(renewed))?;
            next = self.next()?;
        }
        let Begin { vm, resume } = match next {
            FromSource::Begin(begin) => begin,
            FromSource::ListVms(_) | FromSource::ListPoints(_) | FromSource::Show(_) => {
                let message = format!(
                    "{} may add restore points and not read them; whoever runs this site can enrol a client for that",
                    self.client.name
                );
                return Err(refuse(TroubleCode::NotAllowed, message));
            }
            _ => return Err(broken("it does not say what it begins")),
        };
        let vm = VmName::new(&vm).map_err(|e| broken(e.to_string()))?;
        if !self.client.may_append(&vm) {
            let message =
                format!("{} may not add restore points of {vm}; whoever runs this site can allow it", self.client.name);
            return Err(refuse(TroubleCode::NotAllowed, message));
        }
        Ok((vm, resume.map(PointId::from_bytes)))
    }

    /// Makes a restore point. What has arrived lands, whatever comes of it.
    pub(super) fn make(
        &mut self,
        access: &OpenTenant,
        vm: VmName,
        resume: Option<PointId>,
    ) -> Result<u32, BackupError> {
        let folder = access.folder().join(LANDED);
        let mut places = Places::default();
        let mut landed = lock(&folder, &vm, &mut places)?;
        let what = format!("backup of {vm} by {}", self.client.name);
        let tenant = access.tenant.clone();
        let (heads, state) = (access.heads.clone(), &access.state);
        let mut draft = Draft::with_caches(tenant, access.caches(), heads, state, vm.clone(), what)?;
        if let Some(resume) = resume {
            if let Some(newest) = draft.newest().filter(|newest| newest.point_id == resume) {
                // It was made; the answer was lost.
                let number = newest.number;
                let committed = committed(newest);
                let _ = landed.clear();
                self.desk.committed(newest)?;
                self.send(&committed)?;
                return Ok(number);
            }
            if landed.point() != Some(resume) {
                let message = format!("the restore point of {vm} that was begun is not known any more; begin it anew");
                return Err(refuse(TroubleCode::Unknown, message));
            }
            draft.go_on_with(resume);
        }
        let failed =
            |path: &Path, source| BackupError::Source { path: path.display().to_string(), action: "write", source };
        landed.begin(draft.point()).map_err(|e| failed(landed.path(), e))?;
        let mut own = Own::new(landed, places, draft.newest().cloned());
        let made = self.fill(&mut draft, &mut own);
        if made.is_ok() {
            own.committed();
        } else if self.desk.may_land() {
            own.land(&mut draft);
        }
        made
    }

    fn fill(&mut self, draft: &mut Draft, own: &mut Own) -> Result<u32, BackupError> {
        self.send(&FromTarget::Begun(Begun { point: *draft.point().as_bytes(), newest: draft.newest().map(newest) }))?;
        let mut names: Vec<DiskName> = Vec::new();
        let mut next = self.next()?;
        loop {
            next = match next {
                FromSource::Disk(disk) => {
                    let facts = facts(&disk)?;
                    if names.contains(&facts.name) || names.len() >= MAX_DISKS {
                        return Err(broken(format!("the disk {} comes twice, or there are too many", facts.name)));
                    }
                    let name = facts.name.clone();
                    match self.disk(draft, own, facts, disk.said)? {
                        None => names.push(name),
                        Some(why) => self.send(&FromTarget::Distrusted(why))?,
                    }
                    self.after_disk()?
                }
                FromSource::Close if !names.is_empty() => break,
                _ => return Err(broken("it sends something else than a disk or the end")),
            }
        }
        {
            let _turn = self.desk.turn();
            draft.close()?;
        }
        self.send(&FromTarget::Closed)?;
        let FromSource::Commit(commit) = self.next()? else { return Err(broken("it does not commit after the end")) };
        let Commit { duration_ms, definition, warnings } = commit;
        let definition =
            definition.map(|definition| Definition { file_name: definition.file_name, text: definition.text });
        self.desk.check()?;
        draft.commit(Ending { definition, warnings, duration_ms })?;
        let Some(made) = draft.made() else { return Err(BackupError::Thread) };
        let number = made.manifest.number;
        self.desk.site.metrics.committed(&self.client.tenant, made.manifest.stats.stored);
        self.desk.committed(&made.manifest)?;
        let answer = committed(&made.manifest);
        // It exists, whether or not this is heard.
        let _ = self.send(&answer);
        Ok(number)
    }

    /// What comes after a disk: what was sent of a disk that was distrusted is passed over.
    fn after_disk(&mut self) -> Result<FromSource, BackupError> {
        loop {
            match self.next()? {
                FromSource::Offer(_) | FromSource::Data(_) | FromSource::DiskEnd(_) if self.passes_over => {}
                other => return Ok(other),
            }
        }
    }

    /// Takes one disk; why what was said of its changes is wrong, if it is.
    fn disk(
        &mut self,
        draft: &mut Draft,
        own: &mut Own,
        facts: DiskFacts,
        said: Option<wire::Said>,
    ) -> Result<Option<String>, BackupError> {
        let asked = said.map(|wire::Said { method, id, since }| Asked { method, id, since });
        let since = asked.as_ref().and_then(|asked| asked.since);
        let newest = draft.newest().map_or(0, |newest| newest.number);
        let is_asked = asked.is_some();
        let mut start = draft.begin(facts.clone(), asked)?;
        if let Start::Since { always } = &start
            && always.len() > MAX_AREAS
        {
            draft.begin(facts, None)?;
            start = Start::Whole(Some("too much of it was found damaged".into()));
        }
        let start = match start {
            Start::Whole(why) => wire::Start::Whole(why.filter(|_| is_asked).unwrap_or_default()),
            Start::Since { always } => wire::Start::Since { number: since.unwrap_or(newest), always },
        };
        self.send(&FromTarget::DiskReady(DiskReady { start }))?;
        let window = self.desk.window.offers;
        let filled = draft.fill(|filling| {
            let mut receiver = Receiver::new(filling, own, window)?;
            let received = self.receive(&mut receiver);
            if received.is_err() && self.desk.may_land() {
                // What can't be kept is sent again.
                let _ = receiver.salvage();
            }
            received
        });
        self.passes_over = matches!(filled, Err(BackupError::Distrusted { .. }));
        match filled {
            Ok(()) => self.send(&FromTarget::DiskDone).map(|()| None),
            Err(BackupError::Distrusted { why }) => Ok(Some(why)),
            Err(e) => Err(e),
        }
    }
}

impl Session<'_> {
    fn count(&self, offer: &wire::Offer, answer: &FromTarget) {
        if let FromTarget::Need(need) = answer {
            let needed = u64::from(need.clusters.count_ones());
            let offered = offer.clusters.iter().flatten().count() as u64;
            self.desk.site.metrics.answered(&self.client.tenant, needed, offered.saturating_sub(needed));
        }
    }

    fn receive(&mut self, receiver: &mut Receiver<'_, '_>) -> Result<(), BackupError> {
        loop {
            match self.next()? {
                FromSource::Offer(offer) => {
                    let answer = {
                        let _turn = self.desk.turn();
                        receiver.offer(&offer)?
                    };
                    if let Some(answer) = answer {
                        self.count(&offer, &answer);
                        self.send(&answer)?;
                    }
                }
                FromSource::Data(data) => {
                    let _turn = self.desk.turn();
                    receiver.data(data)?;
                }
                FromSource::DiskEnd(end) => return receiver.end(end.offers),
                _ => return Err(broken("it sends something else than the disk that it began")),
            }
        }
    }
}

fn lock(folder: &Path, vm: &VmName, places: &mut Places) -> Result<Landed, BackupError> {
    let failed = |source| BackupError::Source { path: folder.display().to_string(), action: "use", source };
    Landed::open(folder, &vm.to_key(), places).map_err(failed)?.ok_or_else(|| {
        let message = format!("another session is at work on {vm}; wait for its end, or for the silence that ends it");
        refuse(TroubleCode::Busy, message)
    })
}

fn committed(manifest: &Manifest) -> FromTarget {
    FromTarget::Committed(Committed {
        number: manifest.number,
        point: *manifest.point_id.as_bytes(),
        created: u64::try_from(manifest.created.0).unwrap_or(0),
        warnings: manifest.warnings.clone(),
    })
}

fn newest(manifest: &Manifest) -> Newest {
    let tracking = |tracking: &Tracking| wire::Tracking {
        method: tracking.method.clone(),
        id: tracking.id.clone(),
        scope: tracking.scope.clone(),
    };
    let disks = manifest.disks.iter().map(|disk| NewestDisk {
        name: disk.name.as_str().to_owned(),
        length: disk.length,
        tracking: disk.tracking.as_ref().map(tracking),
    });
    Newest { number: manifest.number, point: *manifest.point_id.as_bytes(), disks: disks.collect() }
}

fn facts(disk: &wire::Disk) -> Result<DiskFacts, BackupError> {
    let name = DiskName::new(&disk.name).map_err(|e| broken(e.to_string()))?;
    if disk.length > reseal_format::geometry::MAX_DISK {
        return Err(broken(format!("the disk {name} is longer than any disk of a vault")));
    }
    let tracking = disk.tracking.clone();
    let tracking = tracking.map(|wire::Tracking { method, id, scope }| Tracking { method, id, scope });
    Ok(DiskFacts { name, length: disk.length, source: disk.source.clone(), tracking })
}
