//! Who we are to the server: a token from a file, or one that an AppRole logs in for, kept alive while it is used.
//!
//! - At two thirds of its lease a token is renewed. When the answer shows that the maximum is near, an AppRole logs
//!   in again at two thirds of what is left.
//! - A token that the server refuses is given up at once: an AppRole logs in again, a file is read again. Credentials
//!   are read when they are needed, so new ones count without a restart.
//! - A token from a file is renewed while the KMS is open, used or not: nobody logs in for the next one. A token of
//!   an AppRole is renewed when it is used, and revoked when the KMS is closed.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, OnceLock, Weak};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use ureq::http::Method;
use zeroize::Zeroizing;

use super::Task;
use super::address::ApiPath;
use super::forms::{self, Auth, Granted, Looked};
use super::http::{Call, Client, Fault, Token, said};
use crate::base64::SecretText;
use crate::config::VaultAuth;
use crate::{KmsError, private_file};

/// Longest token, role id or secret id. Batch tokens have some hundred bytes.
const MAX_CREDENTIAL: u64 = 8 * 1024;

/// How long closing the KMS may take for the sake of revoking the token.
const FAREWELL: Duration = Duration::from_secs(2);

/// Pause of the keeper after a renewal that failed, or while there is nothing to renew.
const KEEPER_PAUSE: Duration = Duration::from_secs(5);

/// What a server told about how long a token lives.
struct Lease {
    /// As it was at first: a renewal that gives less says that the maximum is near.
    first: Duration,
    renewable: bool,
    renew_at: Instant,
    ends_at: Instant,
}

impl Lease {
    /// None for a token that never ends.
    fn starting_now(first: Duration, left: Duration, renewable: bool) -> Option<Self> {
        let now = Instant::now();
        let renewable = renewable && left >= first;
        (!left.is_zero()).then(|| Self { first, renewable, renew_at: now + left * 2 / 3, ends_at: now + left })
    }
}

/// A token and its lease; none where it never ends, or where nobody may tell.
struct Session {
    token: Token,
    lease: Option<Lease>,
}

/// The session that all threads of one open KMS share.
pub(super) struct Sessions {
    pub(super) client: Client,
    auth: VaultAuth,
    session: Mutex<Option<Session>>,
    /// Ends the thread that keeps a token from a file alive, when it is dropped.
    keeper: OnceLock<Sender<()>>,
}

impl Sessions {
    pub(super) fn new(client: Client, auth: VaultAuth) -> Arc<Self> {
        Arc::new(Self { client, auth, session: Mutex::new(None), keeper: OnceLock::new() })
    }

    /// A token that is good as far as is known here.
    pub(super) fn token(self: &Arc<Self>, task: &Task<'_>) -> Result<Token, KmsError> {
        let mut session = self.lock(task)?;
        if let Some(current) = session.as_mut() {
            if self.tend(current) {
                return Ok(current.token.clone());
            }
            *session = None;
        }
        self.open(&mut session, task)
    }

    /// Another token for one that the server has refused; none if there is no other and the refusal is meant.
    pub(super) fn instead_of(self: &Arc<Self>, refused: &Token, task: &Task<'_>) -> Result<Option<Token>, KmsError> {
        let mut session = self.lock(task)?;
        match session.as_ref() {
            // Another thread was faster.
            Some(current) if current.token != *refused => return Ok(Some(current.token.clone())),
            Some(current) if matches!(self.look_up(&current.token, task.deadline), Ok(Some(_))) => return Ok(None),
            _ => *session = None,
        }
        let token = self.open(&mut session, task)?;
        Ok((token != *refused).then_some(token))
    }

    /// Waits for another thread that logs in, within the time of the task.
    fn lock(&self, task: &Task<'_>) -> Result<parking_lot::MutexGuard<'_, Option<Session>>, KmsError> {
        self.session
            .try_lock_until(task.deadline)
            .ok_or_else(|| task.fault(Fault::NotReached("another thread waits for it to log in".into())))
    }

    fn open(self: &Arc<Self>, session: &mut Option<Session>, task: &Task<'_>) -> Result<Token, KmsError> {
        let opened = match &self.auth {
            VaultAuth::TokenFile(path) => self.take_up(path, task)?,
            VaultAuth::AppRole { role_id_file, secret_id_file, mount } => {
                self.log_in(role_id_file, secret_id_file, mount, task)?
            }
        };
        let token = opened.token.clone();
        let renewable = opened.lease.as_ref().is_some_and(|lease| lease.renewable);
        *session = Some(opened);
        if renewable && matches!(self.auth, VaultAuth::TokenFile(_)) {
            self.keeper.get_or_init(|| keep(Arc::downgrade(self)));
        }
        Ok(token)
    }

    /// The token of a file, with what the server tells about it.
    fn take_up(&self, path: &Path, task: &Task<'_>) -> Result<Session, KmsError> {
        let token: Token = Arc::new(read_credential(path)?);
        let lease = match self.look_up(&token, task.deadline) {
            Ok(Some(Looked { ttl, renewable })) => {
                let left = Duration::from_secs(ttl);
                Lease::starting_now(left, left, renewable)
            }
            // A token need not be allowed to look at itself. If it is not valid, what it is wanted for shows that.
            Ok(None) => None,
            Err(fault) => return Err(task.fault(fault)),
        };
        Ok(Session { token, lease })
    }

    fn log_in(&self, role: &Path, secret: &Path, mount: &ApiPath, task: &Task<'_>) -> Result<Session, KmsError> {
        let (role_id, secret_id) = (read_credential(role)?, read_credential(secret)?);
        let body = forms::to_json(&[("role_id", &role_id), ("secret_id", &secret_id)]);
        let path = format!("auth/{mount}/login");
        let secrets = [role_id.as_str(), secret_id.as_str()];
        let call = Call { method: Method::POST, path: &path, token: None, body: &body, secrets: &secrets };
        let answer = self.client.send(&call, task.deadline).map_err(|fault| match fault {
            Fault::Refused { status: status @ (400 | 401 | 403), reason } => KmsError::Denied {
                kms: task.kms.to_owned(),
                key: task.key.to_owned(),
                action: "log in, to work",
                what: said(status, &reason),
            },
            Fault::Refused { status, reason } => {
                task.fault(Fault::BadAnswer(format!("{} at {path}", said(status, &reason))))
            }
            other => task.fault(other),
        })?;
        let Granted { auth: Auth { client_token, lease_duration, renewable } } =
            forms::parse(&answer).map_err(|fault| task.fault(fault))?;
        let token = client_token.map(|token| token.0).filter(|token| is_credential(token));
        let Some(token) = token else {
            return Err(task.fault(Fault::BadAnswer("it logs in without giving a token".into())));
        };
        let left = Duration::from_secs(lease_duration);
        Ok(Session { token: Arc::new(token), lease: Lease::starting_now(left, left, renewable) })
    }

    /// What the server tells about a token; none if it does not let it ask.
    fn look_up(&self, token: &Token, deadline: Instant) -> Result<Option<Looked>, Fault> {
        let call =
            Call { method: Method::GET, path: "auth/token/lookup-self", token: Some(token), body: &[], secrets: &[] };
        match self.client.send(&call, deadline) {
            Ok(answer) => Ok(Some(forms::parse::<forms::Data<Looked>>(&answer)?.data)),
            Err(Fault::Refused { .. }) => Ok(None),
            Err(fault) => Err(fault),
        }
    }

    /// Renews the session's token if that is due. False if it is of no more use.
    fn tend(&self, session: &mut Session) -> bool {
        let Some(lease) = &session.lease else {
            return true;
        };
        let now = Instant::now();
        if now < lease.renew_at {
            return true;
        }
        let logs_in = matches!(self.auth, VaultAuth::AppRole { .. });
        if now >= lease.ends_at || (logs_in && !lease.renewable) {
            return false;
        }
        if !lease.renewable {
            return true;
        }
        let first = lease.first;
        let call = Call {
            method: Method::POST,
            path: "auth/token/renew-self",
            token: Some(&session.token),
            body: b"{}",
            secrets: &[],
        };
        let renewed =
            self.client.send_quickly(&call, Duration::MAX).and_then(|answer| forms::parse::<Granted>(&answer));
        match renewed {
            Ok(Granted { auth }) => {
                let left = Duration::from_secs(auth.lease_duration);
                session.lease = Lease::starting_now(first, left, auth.renewable);
                true
            }
            Err(Fault::Refused { .. }) => false,
            // It is still valid for a third of its lease; whoever needs it now sees for himself that the server is
            // away.
            Err(_) => true,
        }
    }

    /// Renews if that is due, for the keeper; and when to look again.
    fn tend_unused(&self) -> Duration {
        let mut session = self.session.lock();
        if session.as_mut().is_some_and(|current| !self.tend(current)) {
            *session = None;
        }
        let due = session.as_ref().and_then(|session| session.lease.as_ref()).map(|lease| lease.renew_at);
        // What is overdue has just failed.
        let left = due.map_or(Duration::ZERO, |due| due.saturating_duration_since(Instant::now()));
        if left.is_zero() { KEEPER_PAUSE } else { left }
    }
}

impl Drop for Sessions {
    /// A token that was made for this process alone does not outlive it, as far as that can be had in a short time.
    fn drop(&mut self) {
        let session = self.session.get_mut().take();
        if let (VaultAuth::AppRole { .. }, Some(Session { token, .. })) = (&self.auth, session) {
            let call = Call {
                method: Method::POST,
                path: "auth/token/revoke-self",
                token: Some(&token),
                body: b"{}",
                secrets: &[],
            };
            // Its lease ends it otherwise.
            let _ = self.client.send_quickly(&call, FAREWELL);
        }
    }
}

/// Keeps the token alive, until the KMS is closed.
fn keep(sessions: Weak<Sessions>) -> Sender<()> {
    let (open, closed) = mpsc::channel();
    // Without this thread the token is still renewed when it is used.
    let _ = thread::Builder::new().name("kms-token".into()).spawn(move || {
        loop {
            let Some(pause) = sessions.upgrade().map(|sessions| sessions.tend_unused()) else {
                return;
            };
            if closed.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
                return;
            }
        }
    });
    open
}

/// A token or id from a file that only its owner may read, without the line's end.
fn read_credential(path: &Path) -> Result<SecretText, KmsError> {
    let wrong = |what: &str| KmsError::ConfigNames { path: PathBuf::from(path), what: what.to_owned() };
    let bytes = match private_file::read_private(path, MAX_CREDENTIAL) {
        Ok(Some(bytes)) => bytes,
        Ok(None) => return Err(wrong("there is no such file with credentials")),
        Err(KmsError::TooLarge { .. }) => return Err(wrong("it is too long to be a token or an id")),
        Err(other) => return Err(other),
    };
    let text = std::str::from_utf8(&bytes).map(str::trim_ascii).ok().filter(|text| is_credential(text));
    text.map(|text| Zeroizing::new(text.to_owned()))
        .ok_or_else(|| wrong("it holds no token or id: one word on one line"))
}

/// Whether it can be a token or an id: visible ASCII without blanks, which fits a header and JSON as it is.
fn is_credential(text: &str) -> bool {
    !text.is_empty() && text.len() as u64 <= MAX_CREDENTIAL && text.bytes().all(|b| b.is_ascii_graphic())
}
