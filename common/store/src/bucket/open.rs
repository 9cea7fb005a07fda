//! Which object store an address means, and how the environment says to reach it.
//!
//! `s3://BUCKET/PREFIX` takes what AWS's own tools take: AWS_* variables and profiles, with endpoints and path style for those who are
//! like it, or only a profile's where the address names one. `az://CONTAINER/PREFIX` takes AZURE_* variables, `gs://BUCKET/PREFIX` those of
//! Google.

use std::collections::BTreeMap;
use std::io;
use std::path::Path as FilePath;
use std::sync::Arc;

use jiff::Timestamp;
use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey, S3ConditionalPut};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::client::{HttpConnector, ReqwestConnector};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::path::Path;
use object_store::{Certificate, ClientOptions, ObjectStore, RetryConfig};

use super::profile::{self, Profile};
use super::signed::Signed;

const CONNECT: std::time::Duration = std::time::Duration::from_secs(10);
/// Connections that are kept: as many as requests may be under way.
const IDLE: usize = 64;
/// Longest bundle of certificates that is read.
const MAX_BUNDLE: u64 = 4 << 20;

/// Why an address can't be used.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    #[error(
        "{0}:// is no place for a vault; give a folder, s3://BUCKET/PREFIX, az://CONTAINER/PREFIX or gs://BUCKET/PREFIX"
    )]
    Scheme(String),
    #[error("{0} names no {1}")]
    NoBucket(String, &'static str),
    #[error("{0}: {1} is not a legal prefix")]
    Prefix(String, String),
    #[error("{0}: {1:?} is no moment; give one as 2026-11-24T06:31:47Z")]
    Moment(String, String),
    #[error("{0}: only a bucket of S3 that keeps versions can be shown as it was, and only one of S3 has profiles")]
    NotS3(String),
    #[error(
        "{0}: {1:?} says nothing known; behind the `?` of an address may stand as-of=TIME and profile=NAME, each once, with & between them"
    )]
    Setting(String, String),
    #[error("RESEAL_LEASE_SECONDS must be a number from {0}")]
    LeaseSeconds(String),
    #[error("can't set up {address}: {source}")]
    Setup { address: String, source: io::Error },
}

/// Variables of an environment, by their names.
pub type Variables = BTreeMap<String, String>;

/// Those of this process that are text and say something.
pub(super) fn of_this_process() -> Variables {
    let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
        Some((name.into_string().ok()?, value.into_string().ok()?))
    };
    std::env::vars_os().filter_map(text).filter(|(_, value)| !value.is_empty()).collect()
}

/// Those that begin so and that a store's library knows.
fn known<'v, K: std::str::FromStr>(variables: &'v Variables, prefix: &'v str) -> impl Iterator<Item = (K, &'v str)> {
    let ours = variables.iter().filter(move |(name, _)| name.starts_with(prefix));
    ours.filter_map(|(name, value)| Some((name.to_ascii_lowercase().parse().ok()?, value.as_str())))
}

/// An object store, and what keys in it begin with.
pub(super) struct Place {
    pub store: Arc<dyn ObjectStore>,
    pub prefix: Path,
    /// Where it is one of S3.
    pub signed: Option<Signed>,
    /// As of which moment it is shown, in seconds since 1970.
    pub past: Option<i64>,
}

/// Whether this is the address of an object store.
pub fn is_address(repo: &str) -> bool {
    repo.contains("://")
}

/// What stands behind the `?` of an address.
#[derive(Debug, Default, PartialEq, Eq)]
struct Settings {
    /// Seconds since 1970.
    as_of: Option<i64>,
    profile: Option<String>,
}

impl Settings {
    fn of(given: &str, query: Option<&str>) -> Result<Settings, AddressError> {
        let mut settings = Settings::default();
        for part in query.into_iter().flat_map(|query| query.split('&')) {
            match part.split_once('=') {
                Some(("as-of", moment)) if settings.as_of.is_none() => {
                    let parsed = moment.parse::<Timestamp>();
                    let parsed = parsed.map_err(|_| AddressError::Moment(given.into(), moment.into()))?;
                    settings.as_of = Some(parsed.as_second());
                }
                Some(("profile", name)) if !name.is_empty() && settings.profile.is_none() => {
                    settings.profile = Some(name.into())
                }
                _ => return Err(AddressError::Setting(given.into(), part.into())),
            }
        }
        Ok(settings)
    }
}

/// The environment as it is for a profile that an address names: two addresses of one command may be those of two accounts, so what this
/// process's variables say is of neither.
fn for_profile(name: String, variables: &Variables) -> Variables {
    let of_aws = |variable: &str| variable.starts_with("AWS_") && !profile::FILES.contains(&variable);
    let rest =
        variables.iter().filter(|(variable, _)| !of_aws(variable)).map(|(name, value)| (name.clone(), value.clone()));
    rest.chain([(profile::NAME.to_owned(), name)]).collect()
}

/// Opens what an address means. Nothing is asked yet.
pub(super) fn open(address: &str, variables: &Variables) -> Result<Place, AddressError> {
    let given = address;
    let (address, query) = given.split_once('?').map_or((given, None), |(address, query)| (address, Some(query)));
    let Settings { as_of: past, profile: named } = Settings::of(given, query)?;
    let (scheme, rest) = address.split_once("://").unwrap_or(("", address));
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let setup = |source: io::Error| AddressError::Setup { address: address.into(), source };
    let what = match scheme {
        "s3" | "gs" => "bucket",
        "az" => "container",
        other => return Err(AddressError::Scheme(other.into())),
    };
    if query.is_some() && scheme != "s3" {
        return Err(AddressError::NotS3(given.into()));
    }
    if bucket.is_empty() {
        return Err(AddressError::NoBucket(address.into(), what));
    }
    let parsed = Path::parse(prefix).map_err(|_| AddressError::Prefix(address.into(), prefix.into()))?;
    let owned = named.map(|name| for_profile(name, variables));
    let variables = owned.as_ref().unwrap_or(variables);
    let profile = if scheme == "s3" { profile::named(variables).map_err(setup)? } else { Profile::new() };
    let options = client_options(variables, &profile).map_err(setup)?;
    // Asking again is done by who knows what was asked for.
    let retry = RetryConfig { max_retries: 0, ..RetryConfig::default() };
    let mut signed = None;
    let store: Arc<dyn ObjectStore> = match scheme {
        "s3" => {
            let (store, options) = s3(bucket, options, retry, variables, &profile).map_err(setup)?;
            let client = ReqwestConnector::default().connect(&options);
            let client = client.map_err(|e| setup(io::Error::other(e.to_string())))?;
            signed = Some(Signed { signer: store.clone(), client });
            store
        }
        "az" => Arc::new(azure(bucket, options, retry, variables).map_err(setup)?),
        _ => {
            let settings = known::<GoogleConfigKey>(variables, "GOOGLE_");
            let builder = settings
                .fold(GoogleCloudStorageBuilder::new(), |builder, (key, value)| builder.with_config(key, value));
            let built = builder.with_bucket_name(bucket).with_client_options(options).with_retry(retry).build();
            Arc::new(built.map_err(|e| setup(io::Error::other(e.to_string())))?)
        }
    };
    Ok(Place { store, prefix: parsed, signed, past })
}

fn is_plain(endpoint: Option<&String>) -> bool {
    endpoint.is_some_and(|endpoint| endpoint.starts_with("http://"))
}

/// Whether nobody can be on the way there: it goes over TLS, or does not leave this machine.
fn is_private(endpoint: &str) -> bool {
    let Some((scheme, rest)) = endpoint.split_once("://") else { return false };
    let host = rest.split('/').next().unwrap_or_default();
    let host = host
        .rsplit_once(':')
        .filter(|(_, port)| port.bytes().all(|b| b.is_ascii_digit()))
        .map_or(host, |(host, _)| host);
    scheme == "https" || matches!(host, "localhost" | "127.0.0.1" | "[::1]")
}

fn azure(
    container: &str,
    options: ClientOptions,
    retry: RetryConfig,
    variables: &Variables,
) -> io::Result<impl ObjectStore + use<>> {
    let settings = known::<AzureConfigKey>(variables, "AZURE_");
    let builder = settings.fold(MicrosoftAzureBuilder::new(), |builder, (key, value)| builder.with_config(key, value));
    // The emulator speaks no TLS.
    let is_plain = variables.contains_key("AZURE_STORAGE_USE_EMULATOR")
        || ["AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"].iter().any(|name| is_plain(variables.get(*name)));
    let builder = builder.with_container_name(container).with_client_options(options.with_allow_http(is_plain));
    builder.with_retry(retry).build().map_err(|e| io::Error::other(e.to_string()))
}

/// S3, as variables say, and as the profile says where they don't.
fn s3(
    bucket: &str,
    options: ClientOptions,
    retry: RetryConfig,
    variables: &Variables,
    profile: &Profile,
) -> io::Result<(Arc<AmazonS3>, ClientOptions)> {
    use AmazonS3ConfigKey as Key;
    let variable = |name: &str| variables.get(name).cloned();
    let settings = known::<Key>(variables, "AWS_");
    let builder = settings.fold(AmazonS3Builder::new(), |builder, (key, value)| builder.with_config(key, value));
    let mut builder = builder.with_bucket_name(bucket);
    let has = |builder: &AmazonS3Builder, key: &Key| builder.get_config_value(key).is_some();
    // One who gives a key in variables means that key, with no session of the profile's.
    let credentials = [
        ("aws_access_key_id", Key::AccessKeyId),
        ("aws_secret_access_key", Key::SecretAccessKey),
        ("aws_session_token", Key::Token),
    ];
    let roles =
        ["AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"];
    if !has(&builder, &Key::AccessKeyId) {
        if !roles.iter().any(|role| variables.contains_key(*role)) {
            profile::check(profile)?;
        }
        for (name, key) in credentials {
            if let Some(value) = profile.get(name) {
                builder = builder.with_config(key, value);
            }
        }
    }
    if !has(&builder, &Key::Region)
        && let Some(region) = profile.get("region")
    {
        builder = builder.with_region(region);
    }
    let endpoint = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"].iter().find_map(|name| variable(name));
    let endpoint = endpoint.or_else(|| profile.get("s3.endpoint_url").or(profile.get("endpoint_url")).cloned());
    let style = profile.get("s3.addressing_style").map(String::as_str);
    let virtual_style = match variable("AWS_VIRTUAL_HOSTED_STYLE_REQUEST") {
        Some(value) => value.eq_ignore_ascii_case("true"),
        // Those who are like S3 mostly have no names for buckets; S3 itself wants them.
        None => style == Some("virtual") || (style != Some("path") && endpoint.is_none()),
    };
    let mut options = options;
    // Where nobody is on the line who could change it, signing what goes over it only takes time: it is authenticated when it is read.
    if variable("AWS_UNSIGNED_PAYLOAD").is_none() && endpoint.as_deref().is_none_or(is_private) {
        builder = builder.with_unsigned_payload(true);
    }
    if let Some(endpoint) = endpoint {
        options = options.with_allow_http(is_plain(Some(&endpoint)));
        // With the bucket in the name, the endpoint has to have it.
        let endpoint = match (virtual_style, endpoint.split_once("://")) {
            (true, Some((scheme, host))) if !host.starts_with(&format!("{bucket}.")) => {
                format!("{scheme}://{bucket}.{host}")
            }
            _ => endpoint,
        };
        builder = builder.with_endpoint(endpoint);
    }
    let built = builder
        .with_virtual_hosted_style_request(virtual_style)
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        .with_client_options(options.clone())
        .with_retry(retry)
        .build();
    Ok((Arc::new(built.map_err(|e| io::Error::other(e.to_string()))?), options))
}

fn client_options(variables: &Variables, profile: &Profile) -> io::Result<ClientOptions> {
    let options = ClientOptions::new()
        // How long a request may take depends on what it moves: whoever makes it knows. (A limit for reads would count while a body is sent.)
        .with_timeout_disabled()
        .with_connect_timeout(CONNECT)
        .with_pool_max_idle_per_host(IDLE)
        .with_http1_only();
    match variables.get("AWS_CA_BUNDLE").or_else(|| profile.get("ca_bundle")) {
        None => Ok(options),
        Some(path) => with_bundle(options, FilePath::new(path))
            .map_err(|e| io::Error::new(e.kind(), format!("the bundle of certificates {path}: {e}"))),
    }
}

fn with_bundle(options: ClientOptions, path: &FilePath) -> io::Result<ClientOptions> {
    use std::io::Read;
    let mut pem = Vec::new();
    std::fs::File::open(path)?.take(MAX_BUNDLE).read_to_end(&mut pem)?;
    let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    let certificates = Certificate::from_pem_bundle(&pem).map_err(|e| invalid(e.to_string()))?;
    match certificates.is_empty() {
        true => Err(invalid("no certificate is in it".into())),
        false => Ok(certificates.into_iter().fold(options, ClientOptions::with_root_certificate)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_mean_nothing_are_refused() {
        for address in ["ftp://x/y", "s3://", "s3:///x", "s3://b/a//b", "s3://b/../x", "az://", "http://b/x"] {
            assert!(open(address, &Variables::new()).is_err(), "{address}");
        }
        let place = open("s3://bucket/a/b/", &Variables::new()).unwrap();
        assert_eq!(place.prefix.as_ref(), "a/b");
        assert_eq!(open("s3://bucket", &Variables::new()).unwrap().prefix.as_ref(), "");
        for wrong in ["s3://b/x?as-of=yesterday", "az://b/x?as-of=2026-11-24T06:31:47Z"] {
            assert!(open(wrong, &Variables::new()).is_err(), "{wrong}");
        }
        assert!(is_address("s3://x") && !is_address("/srv/vault") && !is_address("s3:/x"));
    }

    #[test]
    fn an_address_may_say_a_moment_and_a_profile() {
        let of = |query| Settings::of("s3://b", Some(query));
        let said = of("as-of=2026-11-24T06:31:47Z&profile=vault two").unwrap();
        assert_eq!(said, Settings { as_of: Some(1_795_501_907), profile: Some("vault two".into()) });
        assert_eq!(of("as-of=2026-11-24T08:31:47.9+02:00").unwrap().as_of, Some(1_795_501_907));
        assert_eq!(Settings::of("s3://b", None).unwrap(), Settings::default());
        for wrong in [
            "",
            "as-of=",
            "as-of=2026-11-24",
            "as-of=2026-11-24T06:31:47",
            "profile=",
            "profile",
            "x=y",
            "profile=a&",
            "profile=a&profile=b",
        ] {
            assert!(of(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_profile_that_an_address_names_is_all_that_counts() {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("config");
        let text = "[profile there]\nregion = there-1\nendpoint_url = http://127.0.0.1:9\naws_access_key_id = A\naws_secret_access_key = B\n\
                    [profile sso]\nsso_session = x\n";
        std::fs::write(&config, text).unwrap();
        let of = |pairs: &[(&str, &str)]| -> Variables {
            pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
        };
        let variables = of(&[
            ("AWS_CONFIG_FILE", config.to_str().unwrap()),
            ("AWS_SHARED_CREDENTIALS_FILE", "/nowhere/credentials"),
            ("AWS_ACCESS_KEY_ID", "OTHER"),
            ("AWS_CA_BUNDLE", "/nowhere/bundle"),
            ("HOME", "/home/x"),
        ]);
        let left = for_profile("there".into(), &variables);
        let names: Vec<_> = left.keys().map(String::as_str).collect();
        assert_eq!(names, ["AWS_CONFIG_FILE", "AWS_PROFILE", "AWS_SHARED_CREDENTIALS_FILE", "HOME"]);
        assert!(open("s3://b/x?profile=there", &variables).is_ok());
        assert!(open("s3://b/x", &variables).is_err(), "the bundle of certificates is not there");
        let said = |address: &str, variables: &Variables| open(address, variables).err().unwrap().to_string();
        assert!(said("s3://b/x?profile=none", &variables).contains("\"none\""));
        let said = said("s3://b/x?profile=sso", &variables);
        assert!(said.contains("sso_session") && said.contains("export-credentials"), "{said}");
        // Keys in variables count before those of a profile that a variable names, as they do for AWS's own tools.
        let mut keys = of(&[("AWS_PROFILE", "sso"), ("AWS_CONFIG_FILE", config.to_str().unwrap())]);
        assert!(open("s3://b/x", &keys).is_err());
        keys.extend(of(&[("AWS_ACCESS_KEY_ID", "A"), ("AWS_SECRET_ACCESS_KEY", "B")]));
        assert!(open("s3://b/x", &keys).is_ok());
    }

    #[test]
    fn a_line_is_private_where_nobody_can_be_on_it() {
        for private in ["https://s3.example.org", "http://127.0.0.1:8333", "http://localhost/x", "http://[::1]:1"] {
            assert!(is_private(private), "{private}");
        }
        for open in [
            "http://s3.example.org",
            "http://127.0.0.1.example.org",
            "http://localhost@example.org:80",
            "http://10.0.0.1:80",
            "x",
        ] {
            assert!(!is_private(open), "{open}");
        }
    }
}
