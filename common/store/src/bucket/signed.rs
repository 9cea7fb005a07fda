//! Requests of S3 that `object_store` has no call for: objects that are locked, and the removal of one version. It signs them.
//!
//! Sources: the S3 API's PutObject, HeadObject, PutObjectRetention and DeleteObject. A body's SHA-256 is among the headers that are
//! signed, which S3 wants of whatever locks.

use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::digest::{Context, SHA256};
use base64ct::{Base64, Encoding};
use bytes::Bytes;
use futures_util::StreamExt;
use jiff::Timestamp;
use jiff::fmt::rfc2822;
use object_store::aws::AmazonS3;
use object_store::client::{HttpClient, HttpRequest, HttpRequestBody, HttpResponse};
use object_store::path::Path;
use object_store::signer::{HeaderName, HeaderValue, Method, SignedUrlOptions, Signer};
use object_store::{Error, HeaderMap, PutMode, PutPayload, UpdateVersion};

use super::attempts::status;
use crate::{Lock, LockMode};

/// How long a signature is good for.
const VALID: Duration = Duration::from_secs(900);
/// As much of what a store says of a refusal as is read.
const MAX_SAID: usize = 16 << 10;
const STORE: &str = "S3";

/// Longest answer that is read.
const MAX_ANSWER: usize = 16 << 20;

/// Makes such requests.
pub(super) struct Signed {
    pub signer: Arc<AmazonS3>,
    pub client: HttpClient,
}

/// What is sent beside method and path.
#[derive(Default)]
struct Parts {
    query: Vec<(&'static str, String)>,
    headers: Vec<(&'static str, String)>,
    body: PutPayload,
}

/// What a store says of an object's lock, and of its version.
pub(super) struct About {
    pub version: Option<String>,
    pub lock: Option<Lock>,
    /// When it was made or replaced, by the store's clock, in seconds.
    pub modified: i64,
}

fn name(mode: LockMode) -> &'static str {
    match mode {
        LockMode::Governance => "GOVERNANCE",
        LockMode::Compliance => "COMPLIANCE",
    }
}

fn date(lock: Lock) -> Result<String, Error> {
    Ok(Timestamp::from_second(lock.until).map_err(generic)?.to_string())
}

fn generic(source: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::Generic { store: STORE, source: Box::new(source) }
}

fn sha256(body: &PutPayload) -> String {
    let mut digest = Context::new(&SHA256);
    body.iter().for_each(|chunk| digest.update(chunk));
    Base64::encode_string(digest.finish().as_ref())
}

fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

impl Signed {
    async fn send(&self, method: Method, path: &Path, parts: Parts) -> Result<(HeaderMap, Vec<u8>), Error> {
        let mut options = SignedUrlOptions::new().with_query(parts.query);
        for (name, value) in parts.headers {
            let value = HeaderValue::from_str(&value).map_err(generic)?;
            options = options.with_signed_header(HeaderName::from_static(name), value);
        }
        let url = self.signer.signed_url_opts(method.clone(), path, VALID, &options).await?;
        let length = parts.body.content_length();
        let mut request = HttpRequest::new(HttpRequestBody::from(parts.body));
        *request.uri_mut() = url.as_str().parse().map_err(generic)?;
        *request.headers_mut() = options.signed_headers;
        if method == Method::PUT {
            request.headers_mut().insert("content-length", length.into());
        }
        *request.method_mut() = method;
        let response = self.client.execute(request).await.map_err(generic)?;
        answer(path, response).await
    }

    /// Makes or replaces an object that is locked from its beginning on.
    pub(super) async fn put(
        &self,
        path: &Path,
        body: PutPayload,
        mode: PutMode,
        lock: Lock,
    ) -> Result<UpdateVersion, Error> {
        let mut headers = vec![
            ("x-amz-checksum-sha256", sha256(&body)),
            ("x-amz-object-lock-mode", name(lock.mode).to_owned()),
            ("x-amz-object-lock-retain-until-date", date(lock)?),
        ];
        match &mode {
            PutMode::Create => headers.push(("if-none-match", "*".to_owned())),
            PutMode::Update(version) => headers.extend(version.e_tag.clone().map(|tag| ("if-match", tag))),
            PutMode::Overwrite => {}
        }
        let answered = self.send(Method::PUT, path, Parts { headers, body, ..Parts::default() }).await;
        let (headers, _) = answered.map_err(|error| match (error, &mode) {
            (Error::Precondition { path, source }, PutMode::Create) => Error::AlreadyExists { path, source },
            // Another one is about to make it.
            (error @ Error::Generic { .. }, PutMode::Create) if status(&error).as_deref() == Some("409") => {
                Error::AlreadyExists { path: path.to_string(), source: Box::new(error) }
            }
            (error, _) => error,
        })?;
        let value = |name| text(&headers, name).map(str::to_owned);
        Ok(UpdateVersion { e_tag: value("etag"), version: value("x-amz-version-id") })
    }

    /// Locks what an object is now until then, which must not be earlier than it is locked until.
    pub(super) async fn lock(&self, path: &Path, lock: Lock) -> Result<(), Error> {
        let body = format!(
            "<Retention xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Mode>{}</Mode><RetainUntilDate>{}</RetainUntilDate></Retention>",
            name(lock.mode),
            date(lock)?
        );
        let body = PutPayload::from(body.into_bytes());
        let headers = vec![("x-amz-checksum-sha256", sha256(&body)), ("content-type", "application/xml".to_owned())];
        let query = vec![("retention", String::new())];
        self.send(Method::PUT, path, Parts { query, headers, body }).await.map(drop)
    }

    /// What is known of an object's lock.
    pub(super) async fn about(&self, path: &Path) -> Result<About, Error> {
        let (headers, _) = self.send(Method::HEAD, path, Parts::default()).await?;
        let is_held = text(&headers, "x-amz-object-lock-legal-hold").is_some_and(|hold| hold == "ON");
        let mode = match text(&headers, "x-amz-object-lock-mode") {
            Some("GOVERNANCE") => LockMode::Governance,
            _ => LockMode::Compliance,
        };
        let until =
            text(&headers, "x-amz-object-lock-retain-until-date").and_then(|date| date.parse::<Timestamp>().ok());
        let until = if is_held { Some(i64::MAX) } else { until.map(Timestamp::as_second) };
        let modified = text(&headers, "last-modified").and_then(|date| rfc2822::parse(date).ok());
        Ok(About {
            version: text(&headers, "x-amz-version-id").map(str::to_owned),
            lock: until.map(|until| Lock { until, mode }),
            modified: modified.map_or(0, |date| date.timestamp().as_second()),
        })
    }

    /// Removes one version of an object for good; the one before it is there again, if there is one.
    pub(super) async fn delete_version(&self, path: &Path, version: &str) -> Result<(), Error> {
        let query = vec![("versionId", version.to_owned())];
        self.send(Method::DELETE, path, Parts { query, ..Parts::default() }).await.map(drop)
    }
}

/// One version of an object, or what hides those before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Version {
    pub id: String,
    /// When it was made, by the store's clock, in seconds since 1970.
    pub modified: i64,
    pub length: u64,
    pub is_marker: bool,
}

/// A page of a listing of versions.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Listed {
    /// By path; of one path the newest first.
    pub versions: Vec<(String, Version)>,
    pub folders: Vec<String>,
    /// Where the next page begins, if there is one.
    pub next: Option<Next>,
}

/// Path and version after which a page begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Next {
    path: String,
    version: String,
}

impl Signed {
    /// The versions of what begins so, up to the delimiter.
    pub(super) async fn versions(
        &self,
        prefix: &str,
        delimiter: Option<&str>,
        from: Option<&Next>,
    ) -> Result<Listed, Error> {
        let mut query = vec![("versions", String::new()), ("prefix", prefix.to_owned())];
        query.extend(delimiter.map(|delimiter| ("delimiter", delimiter.to_owned())));
        if let Some(Next { path, version }) = from {
            query.push(("key-marker", path.clone()));
            // An empty one is refused.
            if !version.is_empty() {
                query.push(("version-id-marker", version.clone()));
            }
        }
        let (_, said) = self.send(Method::GET, &Path::default(), Parts { query, ..Parts::default() }).await?;
        listed(&said).ok_or_else(|| {
            let source = "its list of versions can't be read".into();
            Error::NotSupported { source }
        })
    }
}

/// Reads a `ListVersionsResult`.
fn listed(said: &[u8]) -> Option<Listed> {
    let document = roxmltree::Document::parse(std::str::from_utf8(said).ok()?).ok()?;
    let root = document.root_element();
    let text = |node: roxmltree::Node<'_, '_>, name: &str| {
        let child = node.children().find(|child| child.tag_name().name() == name)?;
        Some(child.text().unwrap_or_default().to_owned())
    };
    let (mut listed, mut found) = (Listed::default(), Vec::new());
    for node in root.children() {
        match node.tag_name().name() {
            "CommonPrefixes" => listed.folders.push(text(node, "Prefix")?),
            name @ ("Version" | "DeleteMarker") => {
                let version = Version {
                    id: text(node, "VersionId")?,
                    modified: text(node, "LastModified")?.parse::<Timestamp>().ok()?.as_second(),
                    length: text(node, "Size").and_then(|size| size.parse().ok()).unwrap_or(0),
                    is_marker: name == "DeleteMarker",
                };
                // Some list markers apart from the rest.
                let is_older = text(node, "IsLatest").is_none_or(|latest| latest != "true");
                found.push((text(node, "Key")?, version, is_older));
            }
            _ => {}
        }
    }
    found.sort_by(|(path, one, is_older), (than, other, is_oldest)| {
        (path, other.modified, is_older).cmp(&(than, one.modified, is_oldest))
    });
    listed.versions = found.into_iter().map(|(path, version, _)| (path, version)).collect();
    if text(root, "IsTruncated").as_deref() == Some("true") {
        let version = text(root, "NextVersionIdMarker").unwrap_or_default();
        listed.next = Some(Next { path: text(root, "NextKeyMarker")?, version });
    }
    Some(listed)
}

/// An answer's headers and body; an error as `object_store` itself tells one.
async fn answer(path: &Path, response: HttpResponse) -> Result<(HeaderMap, Vec<u8>), Error> {
    let (parts, body) = response.into_parts();
    let is_success = parts.status.is_success();
    let most = if is_success { MAX_ANSWER } else { MAX_SAID };
    let mut said = Vec::new();
    let mut stream = body.bytes_stream();
    while let Some(chunk) = stream.next().await {
        let chunk: Bytes = chunk.map_err(generic)?;
        said.extend_from_slice(&chunk[..chunk.len().min(most - said.len())]);
        if said.len() == most {
            break;
        }
    }
    if is_success {
        return Ok((parts.headers, said));
    }
    let code = parts.status.as_u16();
    // Whether it is worth asking again is read from this text: see `attempts.rs`.
    let source = format!("status code: {code}: {}", String::from_utf8_lossy(&said)).into();
    let path = path.to_string();
    Err(match code {
        304 | 412 => Error::Precondition { path, source },
        404 => Error::NotFound { path, source },
        401 | 403 => Error::PermissionDenied { path, source },
        _ => Error::Generic { store: STORE, source },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_versions_is_read_the_newest_first() {
        let one = |name: &str, key: &str, id: &str, time: &str, latest: bool| {
            format!(
                "<{name}><Key>{key}</Key><VersionId>{id}</VersionId><IsLatest>{latest}</IsLatest><LastModified>2026-11-24T06:31:{time}Z</LastModified><Size>7</Size></{name}>"
            )
        };
        let text = [
            "<?xml version=\"1.0\"?><ListVersionsResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><IsTruncated>true</IsTruncated><NextKeyMarker>k</NextKeyMarker>".to_owned(),
            one("Version", "k", "b", "40.000", false),
            one("Version", "k", "a", "39.000", false),
            one("DeleteMarker", "k", "c", "40.900", true),
            "<CommonPrefixes><Prefix>k/x/</Prefix></CommonPrefixes></ListVersionsResult>".to_owned(),
        ];
        let listed = listed(text.concat().as_bytes()).unwrap();
        let found: Vec<_> =
            listed.versions.iter().map(|(_, version)| (version.id.as_str(), version.is_marker)).collect();
        assert_eq!(found, [("c", true), ("b", false), ("a", false)]);
        assert_eq!((listed.versions[1].1.length, listed.folders), (7, vec!["k/x/".to_owned()]));
        assert_eq!(listed.next, Some(Next { path: "k".into(), version: String::new() }));
        for wrong in [&b""[..], b"<a>", b"<a><Version><Key>k</Key></Version></a>", b"\xff"] {
            assert_eq!(super::listed(wrong), None);
        }
    }
}
