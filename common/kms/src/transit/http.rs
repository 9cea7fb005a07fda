//! One request to the server and its answer: over TLS, within a time, of a bounded size, tried again where that may
//! help.
//!
//! Nothing leaves for another place than the configured address: redirects are not followed, and no proxy is used,
//! whatever the environment says.
//!
//! What is sent and received lies in buffers that are wiped. Copies in the buffers of the HTTP and TLS libraries are
//! freed with the connection, which serves one request, but not wiped.

use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde::Deserialize;
use ureq::http::{HeaderValue, Method, Request, StatusCode};
use ureq::tls::{PemItem, RootCerts, TlsConfig};
use zeroize::Zeroizing;

use super::address::{Address, ApiPath};
use crate::base64::SecretText;
use crate::{KmsError, Secret, private_file};

/// Longest answer. A key with 10,000 versions takes 200 KB.
const MAX_ANSWER: usize = 256 * 1024;

/// Most bytes of status line and headers.
const MAX_HEAD: usize = 16 * 1024;

/// Longest file with CA certificates: a whole system's fit.
const MAX_CA: u64 = 4 << 20;

/// Attempts at one request.
const TRIES: u32 = 3;

/// Pause before the second attempt; before the third it is four times as long.
const PAUSE: Duration = Duration::from_millis(250);

/// Most of a server's explanation that an error shows.
const MAX_REASON: usize = 160;

/// A token as the server gave it, or as it stands in its file.
pub(super) type Token = Arc<SecretText>;

/// What comes instead of an answer with status 2xx.
#[derive(Debug)]
pub(super) enum Fault {
    /// No answer, or one that says to come back later.
    NotReached(String),
    /// The server is sealed.
    Sealed,
    /// An answer that such a server does not give.
    BadAnswer(String),
    /// A refusal, with what the server says about it.
    Refused { status: u16, reason: String },
}

/// One request.
pub(super) struct Call<'a> {
    pub(super) method: Method,
    /// Below `/v1/`; of checked names only.
    pub(super) path: &'a str,
    pub(super) token: Option<&'a Token>,
    pub(super) body: &'a [u8],
    /// What no error may repeat, beside the token.
    pub(super) secrets: &'a [&'a str],
}

/// The way to one server.
pub(super) struct Client {
    address: Address,
    namespace: Option<ApiPath>,
    agent: ureq::Agent,
    timeout: Duration,
}

impl Client {
    /// `ca` is the file with the certificates that are trusted; there is none where the address is `http`.
    pub(super) fn new(
        address: Address,
        namespace: Option<ApiPath>,
        ca: Option<&Path>,
        timeout: Duration,
    ) -> Result<Self, KmsError> {
        let roots = match ca {
            Some(ca) => read_certificates(ca)?,
            None => Vec::new(),
        };
        let tls = TlsConfig::builder()
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .root_certs(RootCerts::Specific(Arc::new(roots)))
            .build();
        let config = ureq::Agent::config_builder()
            .tls_config(tls)
            .https_only(address.is_https())
            .proxy(None)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .max_idle_connections(0)
            .max_response_header_size(MAX_HEAD)
            .timeout_global(Some(timeout))
            .user_agent(concat!("reseal/", env!("CARGO_PKG_VERSION")))
            .build();
        Ok(Self { address, namespace, agent: config.new_agent(), timeout })
    }

    /// The answer's body. Tries again, with pauses, while the server can't be reached or says that it is busy, until
    /// `deadline`; the last try may take the configured time beyond it.
    pub(super) fn send(&self, call: &Call<'_>, deadline: Instant) -> Result<Secret, Fault> {
        let mut pause = PAUSE;
        for _ in 1..TRIES {
            let (fault, again) = match self.send_once(call, self.timeout) {
                Ok(answer) => return Ok(answer),
                Err(failed) => failed,
            };
            let pause_now = jittered(pause);
            if !again || Instant::now() + pause_now >= deadline {
                return Err(fault);
            }
            thread::sleep(pause_now);
            pause *= 4;
        }
        self.send_once(call, self.timeout).map_err(|(fault, _)| fault)
    }

    /// One try within `timeout`, for what may fail without harm.
    pub(super) fn send_quickly(&self, call: &Call<'_>, timeout: Duration) -> Result<Secret, Fault> {
        self.send_once(call, timeout.min(self.timeout)).map_err(|(fault, _)| fault)
    }

    /// A failure comes with whether another try may help.
    fn send_once(&self, call: &Call<'_>, timeout: Duration) -> Result<Secret, (Fault, bool)> {
        let request = self.request(call).map_err(|fault| (fault, false))?;
        let answered = if timeout < self.timeout {
            self.agent.run(self.agent.configure_request(request).timeout_global(Some(timeout)).build())
        } else {
            self.agent.run(request)
        };
        let mut answer = answered.map_err(|error| self.failed(error))?;
        let status = answer.status();
        let body = self.read_body(answer.body_mut().as_reader())?;
        if status.is_success() { Ok(body) } else { Err(refused(status, &body, call)) }
    }

    fn request<'a>(&self, call: &Call<'a>) -> Result<Request<&'a [u8]>, Fault> {
        let wrong = |_| Fault::BadAnswer("the request can't be put into HTTP".into());
        let mut request = Request::builder()
            .method(call.method.clone())
            .uri(format!("{}/v1/{}", self.address, call.path))
            .header("Accept", "application/json")
            .header("X-Vault-Request", "true");
        if let Some(namespace) = &self.namespace {
            request = request.header("X-Vault-Namespace", namespace.to_string());
        }
        if !call.body.is_empty() {
            request = request.header("Content-Type", "application/json");
        }
        if let Some(token) = call.token {
            let mut value = HeaderValue::from_str(token)
                .map_err(|_| Fault::BadAnswer("its token can't be put into a header".into()))?;
            value.set_sensitive(true);
            request = request.header("X-Vault-Token", value);
        }
        request.body(call.body).map_err(wrong)
    }

    /// The body whole, into a buffer that never moves.
    fn read_body(&self, reader: impl Read) -> Result<Secret, (Fault, bool)> {
        let mut body = Zeroizing::new(Vec::with_capacity(MAX_ANSWER + 2));
        match reader.take(MAX_ANSWER as u64 + 1).read_to_end(&mut body) {
            Ok(len) if len <= MAX_ANSWER => Ok(body),
            Ok(_) => Err((Fault::BadAnswer(format!("more than {MAX_ANSWER} bytes")), false)),
            Err(error) => Err(match ureq::Error::from(error) {
                ureq::Error::Io(error) if error.kind() != io::ErrorKind::TimedOut => {
                    (Fault::BadAnswer(format!("it is cut short: {}", printable(&error.to_string()))), false)
                }
                other => self.failed(other),
            }),
        }
    }

    /// What a failed exchange means, and whether another try may help.
    fn failed(&self, error: ureq::Error) -> (Fault, bool) {
        let late = || Fault::NotReached(format!("no answer within {} s", self.timeout.as_secs_f32()));
        match error {
            ureq::Error::Timeout(_) => (late(), false),
            ureq::Error::Io(error) if error.kind() == io::ErrorKind::TimedOut => (late(), false),
            ureq::Error::Io(error) => match tls_fault(&error) {
                Some(what) => (Fault::NotReached(what), false),
                None => (Fault::NotReached(printable(&error.to_string())), true),
            },
            ureq::Error::Rustls(error) => (Fault::NotReached(no_tls(&error)), false),
            ureq::Error::HostNotFound => (Fault::NotReached("its name is not known".into()), true),
            ureq::Error::ConnectionFailed => (Fault::NotReached("no connection".into()), true),
            ureq::Error::Protocol(error) => {
                (Fault::BadAnswer(format!("it is not HTTP: {}", printable(&error.to_string()))), false)
            }
            ureq::Error::LargeResponseHeader(..) => {
                (Fault::BadAnswer(format!("more than {MAX_HEAD} bytes of headers")), false)
            }
            other => (Fault::BadAnswer(printable(&other.to_string())), false),
        }
    }
}

/// Whether an error of a connection comes from TLS, which another try does not mend.
fn tls_fault(error: &io::Error) -> Option<String> {
    let inner = error.get_ref()?;
    let inner = inner.downcast_ref::<rustls::Error>().or_else(|| inner.source()?.downcast_ref::<rustls::Error>());
    inner.map(no_tls)
}

fn no_tls(error: &rustls::Error) -> String {
    match error {
        rustls::Error::InvalidCertificate(_) => {
            format!("its certificate is not valid by the CA in the configuration: {}", printable(&error.to_string()))
        }
        _ => format!("no TLS: {}", printable(&error.to_string())),
    }
}

/// What a server writes when it refuses.
#[derive(Deserialize)]
struct Refusal {
    errors: Vec<String>,
}

/// Sorts an answer with another status than 2xx.
fn refused(status: StatusCode, body: &[u8], call: &Call<'_>) -> (Fault, bool) {
    let code = status.as_u16();
    let parsed = serde_json::from_slice::<Refusal>(body).ok();
    let reason = parsed.as_ref().map(|refusal| reason(&refusal.errors, call));
    match (code, reason) {
        (503, Some(reason)) if reason.contains("is sealed") => (Fault::Sealed, true),
        (429 | 500..=599, Some(reason)) => (Fault::NotReached(said(code, &reason)), true),
        (429 | 500..=599, None) => (Fault::NotReached(said(code, "")), true),
        (300..=399, _) => (Fault::BadAnswer(format!("HTTP {code}: it sends elsewhere, which is not followed")), false),
        (_, Some(reason)) => (Fault::Refused { status: code, reason }, false),
        (_, None) => (Fault::BadAnswer(format!("HTTP {code} without a reason in JSON")), false),
    }
}

/// Status and reason, for an error.
pub(super) fn said(status: u16, reason: &str) -> String {
    if reason.is_empty() { format!("HTTP {status}") } else { format!("HTTP {status}: {reason}") }
}

/// A server's explanation, unless it repeats a secret of the request.
fn reason(errors: &[String], call: &Call<'_>) -> String {
    let told = errors.join("; ");
    let mut secrets = call.secrets.iter().copied().chain(call.token.map(|token| token.as_str()));
    if secrets.any(|secret| !secret.is_empty() && told.contains(secret)) {
        return "its explanation repeats a secret".into();
    }
    printable(&told)
}

/// Text from outside: short, and without what a terminal obeys.
fn printable(text: &str) -> String {
    let clean: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_REASON).collect();
    clean.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A pause, up to twice as long: so that not all clients of a server that restarts come at once.
fn jittered(pause: Duration) -> Duration {
    let mut byte = [0];
    // Without randomness the pause is as it was.
    let _ = getrandom::fill(&mut byte);
    pause + pause * u32::from(byte[0]) / 256
}

fn read_certificates(path: &Path) -> Result<Vec<ureq::tls::Certificate<'static>>, KmsError> {
    let wrong = |what: &str| KmsError::ConfigNames { path: path.to_owned(), what: what.to_owned() };
    let pem = private_file::read(path, MAX_CA)?.ok_or_else(|| wrong("there is no such file with CA certificates"))?;
    let mut certificates = Vec::new();
    for item in ureq::tls::parse_pem(&pem) {
        match item {
            Ok(PemItem::Certificate(certificate)) => certificates.push(certificate),
            Ok(_) => {}
            Err(_) => return Err(wrong("this is no PEM file with CA certificates")),
        }
    }
    if certificates.is_empty() { Err(wrong("there is no CA certificate in it")) } else { Ok(certificates) }
}
