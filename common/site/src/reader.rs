//! Restore points that another site has, and opens.
//!
//! One connection is kept for questions, and made again once if it ended while nobody used it; each disk that is read has
//! connections of its own, on which NBD is spoken. What comes is checked as what a vault holds is: names and numbers are those that
//! were asked for, and every length has its limit.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use reseal_cli::Status;
use reseal_format::manifest::{Manifest, Tombstone};
use reseal_format::names::{DiskName, VmName};
use reseal_format::seal::MAX_PLAINTEXT;
use reseal_nbd::{Export, NbdError, Options, Refusal, TlsFirst};
use reseal_proto::wire::{
    FromSource, FromTarget, ListPoints, ListVms, MAX_SHOWN, NBD_ALPN, PointState, Show, Shown, Trouble, TroubleCode,
};
use reseal_vault::{Chain, Class, Point, Points, State, VaultError};

use crate::certificate::now;
use crate::{Enrolment, Line, RemoteError, renew};

/// How long an answer is waited for.
const PATIENCE: Duration = Duration::from_secs(30);
/// The other site ends a connection that was silent for a minute: one that is nearly so is not used any more.
const IDLE: Duration = Duration::from_secs(45);
/// Questions under way: enough that a long way costs little, and so few that they always fit into the sockets' buffers. Otherwise
/// either side could wait for the other to read.
const AHEAD: usize = 64;
/// Most VMs that are listed. A site that names more and more would otherwise take all memory.
const MAX_VMS: usize = 1 << 20;
/// Most numbers of a chain that are listed.
const MAX_NUMBERS: usize = 4 << 20;
/// How a disk is read. The mount has a patience of its own; here a server that is away must not be waited for without end.
const DISK: Duration = Duration::from_secs(20);
/// How often a renewal that failed is tried again.
const RENEW_AGAIN: Duration = Duration::from_secs(3600);

const _: () = assert!(MAX_SHOWN == MAX_PLAINTEXT, "what a vault may hold can be shown");

/// Told what whoever looks after this site should know.
pub type Say = Box<dyn Fn(&str) + Send + Sync>;

/// The connection for questions.
#[derive(Default)]
struct Kept {
    line: Option<(Line, Instant)>,
    /// When a renewal was tried last.
    renewed: Option<Instant>,
}

/// Reads what another site has, under an enrolment that may.
pub struct SiteReader {
    /// As the file was when it was read last: it may be renewed.
    enrolment: Mutex<Enrolment>,
    kept: Mutex<Kept>,
    say: Say,
}

/// What the other site could not do, for whoever reads restore points.
fn elsewhere(error: &RemoteError) -> VaultError {
    let class = match error.status() {
        Status::Failed => Class::Failed,
        Status::Usage => Class::Usage,
        Status::Damaged => Class::Damaged,
        Status::Unreachable => Class::Unreachable,
    };
    VaultError::Elsewhere { message: error.to_string(), class }
}

fn disk_failed(error: &NbdError) -> VaultError {
    let class = match error {
        NbdError::Unreachable { .. } | NbdError::Refused { refusal: Refusal::ShuttingDown, .. } => Class::Unreachable,
        NbdError::Usage(_) => Class::Usage,
        NbdError::Failed { .. }
        | NbdError::Refused { .. }
        | NbdError::Protocol { .. }
        | NbdError::Changed { .. }
        | NbdError::Tls { .. } => Class::Failed,
    };
    VaultError::Elsewhere { message: error.to_string(), class }
}

/// Whether another certificate may be taken where this one was not.
fn is_of_certificate(error: &NbdError) -> bool {
    matches!(error, NbdError::Tls { .. } | NbdError::Refused { refusal: Refusal::Other { .. }, .. })
}

impl SiteReader {
    /// Connects when it is asked for something first.
    pub fn new(enrolment: Enrolment) -> SiteReader {
        SiteReader::telling(enrolment, Box::new(|_| {}))
    }

    /// The same, and tells of a certificate that could not be renewed.
    pub fn telling(enrolment: Enrolment, say: Say) -> SiteReader {
        SiteReader { enrolment: Mutex::new(enrolment), kept: Mutex::default(), say }
    }

    /// Where the other site is.
    pub fn address(&self) -> String {
        self.enrolment.lock().address().to_owned()
    }

    fn unexpected(&self, what: impl Into<String>) -> RemoteError {
        RemoteError::Unexpected { peer: self.address(), what: what.into() }
    }

    /// Takes the certificate with which the file was renewed, if it was.
    fn reread(&self) -> bool {
        let mut enrolment = self.enrolment.lock();
        let Ok(now) = Enrolment::read(enrolment.path()) else { return false };
        let is_renewed = now.tenant() == enrolment.tenant() && !now.is_same(&enrolment);
        if is_renewed {
            *enrolment = now;
        }
        is_renewed
    }

    /// A connection, with the certificate that there is now, which is renewed if it is time.
    fn connect(&self, renewed: &mut Option<Instant>) -> Result<Line, RemoteError> {
        let connect = || {
            let enrolment = self.enrolment.lock().clone();
            Line::connect(&enrolment, PATIENCE)
        };
        let mut line = match connect() {
            Err(e) if e.is_of_certificate() && self.reread() => connect()?,
            other => other?,
        };
        let (enrolment, time) = (self.enrolment.lock().clone(), line.time());
        let is_due = enrolment.validity().renewal_is_due(time);
        if is_due && renewed.is_none_or(|when| when.elapsed() > RENEW_AGAIN) {
            *renewed = Some(Instant::now());
            let done: Result<(), RemoteError> = renew(&enrolment, time, &*self.say, |message| line.ask(message));
            self.reread();
            if done.is_err() {
                // Whatever came of the renewal, reading goes on without.
                line = connect()?;
            }
        }
        Ok(line)
    }

    /// Has a conversation, on the connection that there is, or on another. It may be begun again in its middle.
    fn converse(&self, mut run: impl FnMut(&mut Line) -> Result<(), RemoteError>) -> Result<(), RemoteError> {
        let mut kept = self.kept.lock();
        let Kept { line, renewed } = &mut *kept;
        if let Some((mut used, when)) = line.take()
            && when.elapsed() < IDLE
        {
            match run(&mut used) {
                Ok(()) => {
                    *line = Some((used, Instant::now()));
                    return Ok(());
                }
                // It may have ended before it was used; so may it if the certificate was revoked, which another one tells.
                Err(e) if e.may_pass() || e.is_of_certificate() => {}
                Err(e) => return Err(e),
            }
        }
        let mut new = self.connect(renewed)?;
        run(&mut new)?;
        *line = Some((new, Instant::now()));
        Ok(())
    }

    /// Asks, with many questions under way; each answer is given to `take` with the number of its question.
    fn ask_all(
        &self,
        questions: &[FromSource],
        mut take: impl FnMut(FromTarget) -> Result<(), RemoteError>,
    ) -> Result<(), RemoteError> {
        let mut answered = 0;
        self.converse(|line| {
            let mut sent = answered;
            while answered < questions.len() {
                while sent < questions.len().min(answered + AHEAD) {
                    line.send(&questions[sent])?;
                    sent += 1;
                }
                let answer = line.answer()?;
                answered += 1;
                take(answer)?;
            }
            Ok(())
        })
    }

    /// Asks one question.
    fn ask(&self, question: FromSource) -> Result<FromTarget, VaultError> {
        let mut answer = None;
        let asked = self.ask_all(&[question], |message| {
            answer = Some(message);
            Ok(())
        });
        asked.map_err(|e| elsewhere(&e))?;
        answer.ok_or_else(|| elsewhere(&self.unexpected("it does not answer")))
    }

    /// Asks for what was sealed about several points, which `read` decodes.
    fn show<T>(
        &self,
        vm: &VmName,
        numbers: &[u32],
        read: impl Fn(u32, Shown) -> Result<T, VaultError>,
    ) -> Vec<Result<T, VaultError>> {
        let ask = |&number: &u32| FromSource::Show(Show { vm: vm.as_str().to_owned(), number });
        let questions: Vec<_> = numbers.iter().map(ask).collect();
        let mut results = Vec::with_capacity(numbers.len());
        let asked = self.ask_all(&questions, |answer| {
            let FromTarget::Shown(shown) = answer else {
                return Err(self.unexpected("it does not show what it was asked for"));
            };
            if let Some(&number) = numbers.get(results.len()) {
                results.push(read(number, shown));
            }
            Ok(())
        });
        if let Err(e) = asked {
            results.resize_with(numbers.len(), || Err(elsewhere(&e)));
        }
        results
    }

    fn refused(&self, vm: &VmName, number: u32, trouble: Trouble) -> VaultError {
        match trouble.code {
            TroubleCode::Unknown => VaultError::NoPoint { vm: vm.clone(), point: format!("{vm}@{number}") },
            _ => elsewhere(&RemoteError::Trouble { peer: self.address(), trouble }),
        }
    }

    /// What it showed is not what was asked for.
    fn wrong(&self, vm: &VmName, number: u32, why: impl std::fmt::Display) -> VaultError {
        elsewhere(&self.unexpected(format!("what it shows as {vm}@{number} {why}")))
    }

    /// Opens a disk of a restore point.
    pub fn disk(&self, vm: &VmName, number: u32, disk: &DiskName) -> Result<Export, VaultError> {
        self.disk_with(vm, number, disk, &Options { timeout: DISK, give_up: DISK, ..Options::default() })
    }

    /// The same, read as these options say. Those for TLS are not used.
    pub fn disk_with(
        &self,
        vm: &VmName,
        number: u32,
        disk: &DiskName,
        options: &Options,
    ) -> Result<Export, VaultError> {
        self.renew_if_due();
        let export = format!("{vm}@{number}/{disk}");
        let open = || {
            let (address, server, config) = {
                let enrolment = self.enrolment.lock();
                (enrolment.address().to_owned(), enrolment.server(), enrolment.tls())
            };
            let mut config = (*config).clone();
            config.alpn_protocols = vec![NBD_ALPN.to_vec()];
            Export::open_tls(&TlsFirst { address, server, config: config.into(), export: export.clone() }, options)
        };
        let opened = match open() {
            Err(e) if is_of_certificate(&e) && self.reread() => open(),
            other => other,
        };
        opened.map_err(|e| match e {
            NbdError::Refused { refusal: Refusal::NoSuchExport { .. }, .. } => {
                VaultError::NoPoint { vm: vm.clone(), point: export }
            }
            other => disk_failed(&other),
        })
    }

    /// Who only reads disks has no other occasion. What stands in the way is told, and reading goes on.
    fn renew_if_due(&self) {
        if self.enrolment.lock().validity().renewal_is_due(now()) {
            let mut kept = self.kept.lock();
            if kept.renewed.is_none_or(|when| when.elapsed() > RENEW_AGAIN) {
                kept.line = self.connect(&mut kept.renewed).ok().map(|line| (line, Instant::now()));
            }
        }
    }
}

impl Points for SiteReader {
    fn vms(&self) -> Result<Vec<VmName>, VaultError> {
        let mut names: Vec<VmName> = Vec::new();
        loop {
            let after = names.last().map(|name| name.as_str().to_owned());
            let FromTarget::Vms(page) = self.ask(FromSource::ListVms(ListVms { after }))? else {
                return Err(elsewhere(&self.unexpected("it does not say which VMs it has")));
            };
            for name in page.names {
                let name = VmName::new(&name).map_err(|e| elsewhere(&self.unexpected(e.to_string())))?;
                if names.last().is_some_and(|last| *last >= name) || names.len() >= MAX_VMS {
                    return Err(elsewhere(&self.unexpected("it names VMs twice, or more than there can be")));
                }
                names.push(name);
            }
            if !page.more {
                return Ok(names);
            }
        }
    }

    fn chain(&self, vm: &VmName) -> Result<Chain, VaultError> {
        let mut numbers: Vec<(u32, State)> = Vec::new();
        let wrong = || elsewhere(&self.unexpected(format!("the restore points that it lists of {vm} are no chain")));
        loop {
            let after = numbers.last().map_or(0, |(number, _)| *number);
            let question = FromSource::ListPoints(ListPoints { vm: vm.as_str().to_owned(), after });
            let FromTarget::Points(page) = self.ask(question)? else {
                return Err(elsewhere(&self.unexpected("it does not say which restore points it has")));
            };
            numbers.extend(page.numbers.into_iter().map(|(number, state)| match state {
                PointState::Live => (number, State::Live),
                PointState::Forgotten => (number, State::Forgotten),
                PointState::Missing => (number, State::Missing),
            }));
            if numbers.len() > MAX_NUMBERS {
                return Err(wrong());
            }
            if !page.more {
                return Chain::of_numbers(numbers).ok_or_else(wrong);
            }
            if numbers.last().is_none_or(|(number, _)| *number <= after) {
                return Err(wrong());
            }
        }
    }

    fn point(&self, vm: &VmName, number: u32) -> Result<Point, VaultError> {
        self.points(vm, &[number]).pop().unwrap_or_else(|| Err(self.wrong(vm, number, "does not come")))
    }

    fn tombstone(&self, vm: &VmName, number: u32) -> Result<Tombstone, VaultError> {
        self.tombstones(vm, &[number]).pop().unwrap_or_else(|| Err(self.wrong(vm, number, "does not come")))
    }

    fn points(&self, vm: &VmName, numbers: &[u32]) -> Vec<Result<Point, VaultError>> {
        self.show(vm, numbers, |number, shown| match shown {
            Shown::Manifest(plain) => match Manifest::decode(vm, number, &plain.0) {
                Ok((manifest, digest)) => Ok(Point { manifest, digest }),
                Err(e) => Err(self.wrong(vm, number, e)),
            },
            Shown::Tombstone(_) => Err(VaultError::NoPoint { vm: vm.clone(), point: format!("{vm}@{number}") }),
            Shown::Refused(trouble) => Err(self.refused(vm, number, trouble)),
        })
    }

    fn tombstones(&self, vm: &VmName, numbers: &[u32]) -> Vec<Result<Tombstone, VaultError>> {
        self.show(vm, numbers, |number, shown| match shown {
            Shown::Tombstone(plain) => Tombstone::decode(vm, number, &plain.0).map_err(|e| self.wrong(vm, number, e)),
            Shown::Manifest(_) => Err(self.wrong(vm, number, "was said to be forgotten, and is not")),
            Shown::Refused(trouble) => Err(self.refused(vm, number, trouble)),
        })
    }
}
