//! From TOML to the configuration. An error says on which line, and repeats no value: one may be a secret in the
//! wrong place.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use toml::Spanned;

use super::{Choice, KEYRING, KmsSettings, VaultAuth, VaultConfig};
use crate::KeyName;
use crate::kmip::KmipConfig;
use crate::transit::{Address, ApiPath};

/// For one request, unless the file says otherwise.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Longest time that the file may give to one request, in seconds.
const MAX_TIMEOUT: u64 = 300;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFile {
    #[serde(default)]
    kms: BTreeMap<Spanned<String>, Spanned<RawKms>>,
    #[serde(default)]
    tenants: BTreeMap<Spanned<String>, RawChoice>,
}

/// The fields of all kinds; which of them a kind has is checked afterwards, so that the line is known.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawKms {
    kind: Spanned<String>,
    address: Spanned<String>,
    timeout: Option<Spanned<u64>>,
    ca: Option<Spanned<PathBuf>>,
    mount: Option<Spanned<String>>,
    namespace: Option<Spanned<String>>,
    auth: Option<Spanned<RawAuth>>,
    cert: Option<Spanned<PathBuf>>,
    key: Option<Spanned<PathBuf>>,
    allow_get: Option<Spanned<bool>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAuth {
    token_file: Option<Spanned<PathBuf>>,
    approle: Option<RawAppRole>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAppRole {
    role_id_file: Spanned<PathBuf>,
    secret_id_file: Spanned<PathBuf>,
    mount: Option<Spanned<String>>,
}

/// `"NAME"` or `{ kms = "NAME", key = "KEY" }`.
struct RawChoice {
    kms: Spanned<String>,
    key: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPinned {
    kms: String,
    key: Option<Spanned<String>>,
}

impl<'de> Deserialize<'de> for RawChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = RawPinned;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the name of a KMS, or { kms = …, key = … }")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<RawPinned, E> {
                Ok(RawPinned { kms: text.to_owned(), key: None })
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<RawPinned, A::Error> {
                RawPinned::deserialize(MapAccessDeserializer::new(map))
            }
        }

        struct Wanted(RawPinned);

        impl<'de> Deserialize<'de> for Wanted {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_any(Either).map(Wanted)
            }
        }

        let spanned = Spanned::<Wanted>::deserialize(deserializer)?;
        let span = spanned.span();
        let Wanted(RawPinned { kms, key }) = spanned.into_inner();
        Ok(Self { kms: Spanned::new(span, kms), key })
    }
}

/// What is wrong, and where in the text it begins.
struct Wrong {
    at: usize,
    what: String,
}

fn wrong<T>(at: &Spanned<T>, what: impl Into<String>) -> Wrong {
    Wrong { at: at.span().start, what: what.into() }
}

type Parsed = (BTreeMap<String, KmsSettings>, BTreeMap<String, Choice>);

/// The configuration of a file's text, or what is wrong with it.
pub(super) fn parse(text: &str) -> Result<Parsed, String> {
    let on_line = |at: usize, what: &str| {
        let line = text.bytes().take(at).filter(|b| *b == b'\n').count() + 1;
        format!("line {line}: {what}")
    };
    let raw: RawFile = toml::from_str(text)
        .map_err(|error| on_line(error.span().map_or(0, |span| span.start), &without_values(error.message())))?;
    check(raw).map_err(|Wrong { at, what }| on_line(at, &what))
}

fn check(raw: RawFile) -> Result<Parsed, Wrong> {
    let mut all = BTreeMap::new();
    for (name, settings) in raw.kms {
        if KeyName::parse(name.get_ref()).is_err() || name.get_ref() == KEYRING {
            let what =
                format!("{:?} can't name a KMS: use letters, digits, . _ - (and not {KEYRING:?})", name.get_ref());
            return Err(wrong(&name, what));
        }
        all.insert(name.into_inner(), kms(settings)?);
    }
    let mut tenants = BTreeMap::new();
    for (tenant, RawChoice { kms, key }) in raw.tenants {
        let name = kms.get_ref();
        if tenant.get_ref().is_empty() {
            return Err(wrong(&tenant, "a tenant without a name"));
        }
        if name != KEYRING && !all.contains_key(name) {
            return Err(wrong(&kms, format!("there is no [kms.{name}] for the tenant {:?}", tenant.get_ref())));
        }
        if name == KEYRING && key.is_some() {
            return Err(wrong(&kms, "a key can be named for a KMS, not for the keyring"));
        }
        let key =
            key.map(|key| KeyName::parse(key.get_ref()).map_err(|error| wrong(&key, error.to_string()))).transpose()?;
        tenants.insert(tenant.into_inner(), Choice { kms: kms.into_inner(), key });
    }
    Ok((all, tenants))
}

fn kms(raw: Spanned<RawKms>) -> Result<KmsSettings, Wrong> {
    let begin = raw.span();
    let raw = raw.into_inner();
    let timeout = match &raw.timeout {
        None => TIMEOUT,
        Some(seconds) if (1..=MAX_TIMEOUT).contains(seconds.get_ref()) => Duration::from_secs(*seconds.get_ref()),
        Some(seconds) => return Err(wrong(seconds, format!("the timeout is 1 to {MAX_TIMEOUT} seconds"))),
    };
    let begin = Spanned::new(begin, ());
    match raw.kind.get_ref().as_str() {
        "vault" => vault(raw, &begin, timeout).map(KmsSettings::Vault),
        "kmip" => kmip(raw, &begin, timeout).map(KmsSettings::Kmip),
        _ => Err(wrong(&raw.kind, "the kind of a KMS is \"vault\" or \"kmip\"")),
    }
}

fn vault(raw: RawKms, begin: &Spanned<()>, timeout: Duration) -> Result<VaultConfig, Wrong> {
    let RawKms { kind: _, address, timeout: _, ca, mount, namespace, auth, cert, key, allow_get } = raw;
    none_of("vault", [("cert", span(&cert)), ("key", span(&key)), ("allow_get", span(&allow_get))])?;
    let parsed = Address::parse(address.get_ref()).map_err(|what| wrong(&address, what))?;
    let ca = ca.map(path).transpose()?;
    match (parsed.is_https(), &ca) {
        (true, None) => {
            return Err(wrong(
                begin,
                "`ca` is missing: the file with the CA certificates that this server is known by",
            ));
        }
        (false, Some(_)) => return Err(wrong(&address, "`ca` is given, but the address is not https")),
        _ => {}
    }
    let auth = auth.ok_or_else(|| wrong(begin, "`auth` is missing: { token_file = … } or { approle = … }"))?;
    let auth = match auth.get_ref() {
        RawAuth { token_file: Some(_), approle: None } | RawAuth { token_file: None, approle: Some(_) } => {
            auth.into_inner()
        }
        _ => return Err(wrong(&auth, "`auth` is one of { token_file = … } and { approle = … }")),
    };
    let auth = match auth {
        RawAuth { approle: Some(RawAppRole { role_id_file, secret_id_file, mount }), .. } => VaultAuth::AppRole {
            role_id_file: path(role_id_file)?,
            secret_id_file: path(secret_id_file)?,
            mount: api_path(mount, "approle")?,
        },
        RawAuth { token_file: Some(file), .. } => VaultAuth::TokenFile(path(file)?),
        RawAuth { .. } => return Err(wrong(begin, "`auth` is empty")),
    };
    let namespace = match namespace {
        None => None,
        given => Some(api_path(given, "")?),
    };
    Ok(VaultConfig { address: parsed, mount: api_path(mount, "transit")?, ca, auth, namespace, timeout })
}

fn kmip(raw: RawKms, begin: &Spanned<()>, timeout: Duration) -> Result<KmipConfig, Wrong> {
    let RawKms { kind: _, address, timeout: _, ca, mount, namespace, auth, cert, key, allow_get } = raw;
    none_of("kmip", [("mount", span(&mount)), ("namespace", span(&namespace)), ("auth", span(&auth))])?;
    let host_port = address.get_ref().rsplit_once(':');
    if !host_port.is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0)) {
        return Err(wrong(&address, "the address of a KMIP server is HOST:PORT, and the port commonly 5696"));
    }
    let file = |given: Option<Spanned<PathBuf>>, name: &str| match given {
        Some(given) => path(given),
        None => Err(wrong(begin, format!("`{name}` is missing: a file with certificates or a key"))),
    };
    Ok(KmipConfig {
        address: address.into_inner(),
        ca: file(ca, "ca")?,
        cert: file(cert, "cert")?,
        key: file(key, "key")?,
        allow_get: allow_get.is_some_and(Spanned::into_inner),
        timeout,
    })
}

fn span<T>(field: &Option<Spanned<T>>) -> Option<Spanned<()>> {
    field.as_ref().map(|field| Spanned::new(field.span(), ()))
}

fn none_of<const N: usize>(kind: &str, fields: [(&str, Option<Spanned<()>>); N]) -> Result<(), Wrong> {
    for (name, field) in fields {
        if let Some(field) = field {
            return Err(wrong(&field, format!("`{name}` means nothing for a KMS of kind {kind}")));
        }
    }
    Ok(())
}

/// A path that means the same wherever the program is started.
fn path(given: Spanned<PathBuf>) -> Result<PathBuf, Wrong> {
    if given.get_ref().is_absolute() {
        Ok(given.into_inner())
    } else {
        Err(wrong(&given, "give the whole path of the file, from / on"))
    }
}

fn api_path(given: Option<Spanned<String>>, default: &str) -> Result<ApiPath, Wrong> {
    match given {
        Some(given) => ApiPath::parse(given.get_ref()).map_err(|what| wrong(&given, what)),
        None => ApiPath::parse(default).map_err(|what| Wrong { at: 0, what }),
    }
}

/// A message of the parser without the texts of the file that it quotes as values: `invalid type: string "…",
/// expected …`.
fn without_values(message: &str) -> String {
    let message = message.split_whitespace().collect::<Vec<_>>().join(" ");
    match (message.find("string \""), message.rfind('"')) {
        (Some(from), Some(to)) => format!("{}{}", &message[..from + "string".len()], &message[to + 1..]),
        _ => message,
    }
}
