//! Which object store an address means, and how the environment says to reach it.
//!
//! `s3://BUCKET/PREFIX` takes what AWS's own tools take: AWS_* variables and profiles, with endpoints and path style for those who are
//! like it. `az://CONTAINER/PREFIX` takes AZURE_* variables, `gs://BUCKET/PREFIX` those of Google.

use std::collections::BTreeMap;
use std::io;
use std::path::Path as FilePath;
use std::sync::Arc;

use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey, S3ConditionalPut};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::client::{HttpConnector, ReqwestConnector};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::path::Path;
use object_store::{Certificate, ClientOptions, ObjectStore, RetryConfig};

use super::signed::Signed;
use super::{past, profile};

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
    #[error("{0}: only a bucket of S3 that keeps versions can be shown as it was")]
    NoPast(String),
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

/// Opens what an address means. Nothing is asked yet.
pub(super) fn open(address: &str, variables: &Variables) -> Result<Place, AddressError> {
    let given = address;
    let (address, past) = past::split(given).map_err(|moment| AddressError::Moment(given.into(), moment.into()))?;
    let (scheme, rest) = address.split_once("://").unwrap_or(("", address));
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let setup = |source: io::Error| AddressError::Setup { address: address.into(), source };
    let what = match scheme {
        "s3" | "gs" => "bucket",
        "az" => "container",
        other => return Err(AddressError::Scheme(other.into())),
    };
    if past.is_some() && scheme != "s3" {
        return Err(AddressError::NoPast(given.into()));
    }
    if bucket.is_empty() {
        return Err(AddressError::NoBucket(address.into(), what));
    }
    let parsed = Path::parse(prefix).map_err(|_| AddressError::Prefix(address.into(), prefix.into()))?;
    let options = client_options(variables).map_err(setup)?;
    // Asking again is done by who knows what was asked for.
    let retry = RetryConfig { max_retries: 0, ..RetryConfig::default() };
    let mut signed = None;
    let store: Arc<dyn ObjectStore> = match scheme {
        "s3" => {
            let (store, options) = s3(bucket, options, retry, variables).map_err(setup)?;
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
) -> io::Result<(Arc<AmazonS3>, ClientOptions)> {
    use AmazonS3ConfigKey as Key;
    let profile = profile::named(variables)?;
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
    if !has(&builder, &Key::AccessKeyId) || variable("AWS_PROFILE").is_some() {
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

fn client_options(variables: &Variables) -> io::Result<ClientOptions> {
    let options = ClientOptions::new()
        // How long a request may take depends on what it moves: whoever makes it knows. (A limit for reads would count while a body is sent.)
        .with_timeout_disabled()
        .with_connect_timeout(CONNECT)
        .with_pool_max_idle_per_host(IDLE)
        .with_http1_only();
    match variables.get("AWS_CA_BUNDLE") {
        None => Ok(options),
        Some(path) => with_bundle(options, FilePath::new(path))
            .map_err(|e| io::Error::new(e.kind(), format!("AWS_CA_BUNDLE {path}: {e}"))),
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
