//! Names of exports: <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md>.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::net::Ipv6Addr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode};
use reseal_proto::nbd::{DEFAULT_PORT, MAX_STRING};

use crate::NbdError;

/// What stands in a URI as it is (RFC 3986's unreserved characters, and the slash of paths).
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');

const SCHEMES: [(&str, bool, bool); 4] =
    [("nbd", false, false), ("nbds", true, false), ("nbd+unix", false, true), ("nbds+unix", true, true)];

/// An export of an NBD server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NbdUri {
    pub(crate) place: Place,
    pub(crate) export: String,
    tls: bool,
    tls_hostname: Option<String>,
}

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    Tcp { host: String, port: u16 },
    Unix(PathBuf),
}

/// Whether a text starts like the URI of an NBD export.
pub fn is_uri(text: &OsStr) -> bool {
    let bytes = text.as_bytes();
    let starts = |scheme: &str| {
        let rest =
            bytes.split_at_checked(scheme.len()).filter(|(start, _)| start.eq_ignore_ascii_case(scheme.as_bytes()));
        rest.is_some_and(|(_, rest)| rest.starts_with(b"://"))
    };
    SCHEMES.iter().any(|(scheme, ..)| starts(scheme))
}

impl NbdUri {
    /// An export on a Unix socket, without TLS.
    pub fn unix(socket: &Path, export: &str) -> NbdUri {
        let place = Place::Unix(socket.to_owned());
        NbdUri { place, export: export.to_owned(), tls: false, tls_hostname: None }
    }

    /// An export on TCP.
    pub fn tcp(host: &str, port: u16, tls: bool, export: &str) -> NbdUri {
        let place = Place::Tcp { host: host.to_owned(), port };
        NbdUri { place, export: export.to_owned(), tls, tls_hostname: None }
    }

    pub fn is_tls(&self) -> bool {
        self.tls
    }

    /// The name that the server's certificate must have.
    pub(crate) fn certificate_name(&self) -> &str {
        match (&self.tls_hostname, &self.place) {
            (Some(name), _) => name,
            (None, Place::Tcp { host, .. }) => host,
            (None, Place::Unix(_)) => "localhost",
        }
    }
}

impl FromStr for NbdUri {
    type Err = NbdError;

    fn from_str(text: &str) -> Result<NbdUri, NbdError> {
        parse(text).map_err(|wrong| {
            NbdError::Usage(format!(
                "{text}: {wrong}. An NBD URI is nbd://HOST[:PORT]/EXPORT, nbds://HOST[:PORT]/EXPORT, \
                 nbd+unix:///EXPORT?socket=PATH or nbds+unix:///EXPORT?socket=PATH"
            ))
        })
    }
}

fn parse(text: &str) -> Result<NbdUri, String> {
    let (scheme, rest) = text.split_once("://").ok_or("it has no scheme")?;
    let known = SCHEMES.iter().find(|(known, ..)| scheme.eq_ignore_ascii_case(known));
    let &(_, tls, unix) = known.ok_or_else(|| format!("{scheme} is no scheme of NBD"))?;
    if rest.contains('#') {
        return Err("a # must be written as %23".into());
    }
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let export = String::from_utf8(decode(path)?).map_err(|_| "the name of the export is not UTF-8")?;
    if export.contains('\0') || export.len() > MAX_STRING {
        return Err(format!("the name of the export has a NUL, or more than {MAX_STRING} bytes"));
    }
    let Parameters { socket, tls_hostname } = parameters(query)?;
    if tls_hostname.is_some() && !tls {
        return Err("tls-hostname is for nbds and nbds+unix only".into());
    }
    let place = match (unix, socket) {
        (true, None) => return Err("it does not say socket=PATH".into()),
        (true, Some(_)) if !authority.is_empty() => {
            return Err(format!(
                "{authority} is where a host would be; with a Unix socket there is none (three slashes)"
            ));
        }
        (true, Some(socket)) => Place::Unix(socket),
        (false, Some(_)) => return Err("socket is for nbd+unix and nbds+unix only".into()),
        (false, None) => host_and_port(authority)?,
    };
    Ok(NbdUri { place, export, tls, tls_hostname })
}

/// Percent-decodes; a percent sign without two hexadecimal digits is refused.
fn decode(text: &str) -> Result<Vec<u8>, String> {
    let hex = |at: usize| text.as_bytes().get(at).is_some_and(u8::is_ascii_hexdigit);
    match text.match_indices('%').find(|(at, _)| !hex(at + 1) || !hex(at + 2)) {
        Some((at, _)) => Err(format!("{} is not percent-encoded right", &text[at..])),
        None => Ok(percent_decode_str(text).collect()),
    }
}

#[derive(Default)]
struct Parameters {
    socket: Option<PathBuf>,
    tls_hostname: Option<String>,
}

fn parameters(query: &str) -> Result<Parameters, String> {
    let mut known = Parameters::default();
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let (name, value) =
            parameter.split_once('=').ok_or_else(|| format!("the parameter {parameter} has no value"))?;
        let value = decode(value)?;
        if value.is_empty() {
            return Err(format!("the parameter {name} is empty"));
        }
        let again = match name {
            "socket" => known.socket.replace(OsString::from_vec(value).into()).is_some(),
            "tls-hostname" => {
                let value = String::from_utf8(value).map_err(|_| "tls-hostname is not UTF-8")?;
                known.tls_hostname.replace(value).is_some()
            }
            _ => return Err(format!("the parameter {name} is not known (known are socket and tls-hostname)")),
        };
        if again {
            return Err(format!("the parameter {name} is there twice"));
        }
    }
    Ok(known)
}

fn host_and_port(authority: &str) -> Result<Place, String> {
    if authority.contains('@') {
        return Err("user names are not supported".into());
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').ok_or("the bracket of the IPv6 address is not closed")?;
            host.parse::<Ipv6Addr>().map_err(|_| format!("{host} is not an IPv6 address"))?;
            let port = match port {
                "" => None,
                port => Some(port.strip_prefix(':').ok_or_else(|| format!("{port} is not a port"))?),
            };
            (host.to_owned(), port)
        }
        None => {
            let (host, port) = match authority.split_once(':') {
                Some((_, port)) if port.contains(':') => return Err("an IPv6 address must stand in brackets".into()),
                Some((host, port)) => (host, Some(port)),
                None => (authority, None),
            };
            (String::from_utf8(decode(host)?).map_err(|_| "the host is not UTF-8")?, port)
        }
    };
    if host.is_empty() {
        return Err("it names no host".into());
    }
    let port = match port {
        None | Some("") => DEFAULT_PORT,
        Some(port) => {
            let number = port.bytes().all(|c| c.is_ascii_digit()).then(|| port.parse().ok()).flatten();
            number.filter(|port| *port != 0).ok_or_else(|| format!("{port} is not a port"))?
        }
    };
    Ok(Place::Tcp { host, port })
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.tls { "nbds" } else { "nbd" })?;
        let export = percent_encode(self.export.as_bytes(), ENCODED);
        let mut separator = '?';
        match &self.place {
            Place::Tcp { host, port } => {
                match host.contains(':') {
                    true => write!(f, "://[{host}]")?,
                    false => write!(f, "://{}", percent_encode(host.as_bytes(), ENCODED))?,
                }
                if *port != DEFAULT_PORT {
                    write!(f, ":{port}")?;
                }
                write!(f, "/{export}")?;
            }
            Place::Unix(socket) => {
                let socket = percent_encode(socket.as_os_str().as_bytes(), ENCODED);
                write!(f, "+unix:///{export}?socket={socket}")?;
                separator = '&';
            }
        }
        match &self.tls_hostname {
            Some(name) => write!(f, "{separator}tls-hostname={}", percent_encode(name.as_bytes(), ENCODED)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(text: &str) -> (String, u16, String) {
        match text.parse().unwrap() {
            NbdUri { place: Place::Tcp { host, port }, export, .. } => (host, port, export),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn uris_are_read_as_the_specification_says() {
        assert_eq!(tcp("nbd://example.com:1234/disk"), ("example.com".into(), 1234, "disk".into()));
        assert_eq!(tcp("NBD://example.com/"), ("example.com".into(), 10809, String::new()));
        assert_eq!(tcp("nbd://example.com"), ("example.com".into(), 10809, String::new()));
        assert_eq!(tcp("nbd://example.com//disk"), ("example.com".into(), 10809, "/disk".into()));
        assert_eq!(tcp("nbds://example.com/hello%20world").2, "hello world");
        assert_eq!(tcp("nbd://[::1]:99/a/b"), ("::1".into(), 99, "a/b".into()));
        assert_eq!(tcp("nbd://[fe80::1]/"), ("fe80::1".into(), 10809, String::new()));
        let uri: NbdUri = "nbds+unix:///a?socket=/tmp/a%20b&tls-hostname=web".parse().unwrap();
        assert_eq!(uri.place, Place::Unix("/tmp/a b".into()));
        assert_eq!((uri.export.as_str(), uri.certificate_name(), uri.is_tls()), ("a", "web", true));
        assert_eq!("nbds+unix:///?socket=x".parse::<NbdUri>().unwrap().certificate_name(), "localhost");
        assert_eq!("nbds://web/?tls-hostname=db".parse::<NbdUri>().unwrap().certificate_name(), "db");
        let uri: NbdUri = "nbd+unix:///?socket=%00/abstract".parse().unwrap();
        assert_eq!(uri.place, Place::Unix("\0/abstract".into()));
    }

    #[test]
    fn what_is_wrong_with_a_uri_is_said() {
        for (text, wrong) in [
            ("nbdx://a/b", "nbdx is no scheme"),
            ("nbd:a", "no scheme"),
            ("nbd:///b", "names no host"),
            ("nbd://a:0/b", "0 is not a port"),
            ("nbd://a:65536/b", "65536 is not a port"),
            ("nbd://a:+1/b", "+1 is not a port"),
            ("nbd://::1/b", "brackets"),
            ("nbd://[::1/b", "not closed"),
            ("nbd://[web]/b", "web is not an IPv6"),
            ("nbd://root@a/b", "user names"),
            ("nbd://a/b%2", "%2 is not percent-encoded"),
            ("nbd://a/%ff", "not UTF-8"),
            ("nbd://a/%00", "NUL"),
            ("nbd://a/b#c", "%23"),
            ("nbd://a/b?socket=c", "nbd+unix and nbds+unix only"),
            ("nbd://a/b?tls-hostname=c", "nbds and nbds+unix only"),
            ("nbds://a/b?tls-verify-peer=0", "tls-verify-peer is not known"),
            ("nbds://a/b?tls-hostname=a&tls-hostname=b", "twice"),
            ("nbd+unix:///b", "socket=PATH"),
            ("nbd+unix:///b?socket=", "empty"),
            ("nbd+unix:///b?socket", "has no value"),
            ("nbd+unix://a/b?socket=c", "three slashes"),
        ] {
            let error = text.parse::<NbdUri>().unwrap_err();
            assert!(matches!(error, NbdError::Usage(_)));
            let said = error.to_string();
            assert!(said.starts_with(text) && said.contains(wrong), "{said}");
        }
    }

    #[test]
    fn a_uri_that_is_shown_is_the_same_uri() {
        for text in [
            "nbd://example.com/disk",
            "nbds://[::1]:7/a/b%20c?tls-hostname=web",
            "nbd+unix:///?socket=/run/x.sock",
            "nbds+unix:///%C3%A4?socket=/run/%25&tls-hostname=h",
            "nbd+unix:///?socket=%00abstract",
        ] {
            let uri: NbdUri = text.parse().unwrap();
            assert_eq!(uri.to_string(), text);
        }
        let uri = NbdUri::unix(Path::new("/run/a b"), "x?y");
        assert_eq!(uri.to_string().parse::<NbdUri>().unwrap(), uri);
    }

    #[test]
    fn only_uris_look_like_uris() {
        for text in ["nbd://a", "NBDS://", "nbd+unix:///x?socket=y", "nbds+unix://"] {
            assert!(is_uri(OsStr::new(text)), "{text}");
        }
        for text in ["nbd:a", "/nbd://a", "nbd", "http://a", "", "nbdx://a"] {
            assert!(!is_uri(OsStr::new(text)), "{text}");
        }
    }
}
