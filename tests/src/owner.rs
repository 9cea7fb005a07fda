//! Who has the keys of a bucket of S3, and does with its objects as he likes: an administrator, or a thief.

use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::path::Path;
use object_store::signer::{HeaderName, HeaderValue, Method, SignedUrlOptions, Signer};
use reseal_store::Variables;
use std::time::Duration;

/// His access to one bucket.
pub struct Owner {
    bucket: AmazonS3,
}

/// One version of an object, or what hides those before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    pub key: String,
    pub id: String,
    pub is_latest: bool,
    pub is_marker: bool,
}

impl Owner {
    pub fn of(bucket: &str, variables: &Variables) -> Owner {
        let variable = |name: &str| variables[name].as_str();
        let builder = AmazonS3Builder::new()
            .with_bucket_name(bucket)
            .with_endpoint(variable("AWS_ENDPOINT_URL"))
            .with_allow_http(true)
            .with_access_key_id(variable("AWS_ACCESS_KEY_ID"))
            .with_secret_access_key(variable("AWS_SECRET_ACCESS_KEY"));
        Owner { bucket: builder.build().unwrap() }
    }

    /// What the store answers: its status, and the body.
    fn ask(
        &self,
        method: Method,
        key: &str,
        query: &[(&str, &str)],
        headers: &[(&'static str, &str)],
        body: &[u8],
    ) -> (u16, String) {
        let mut options = SignedUrlOptions::new().with_query(query.iter().copied());
        for (name, value) in headers {
            options = options.with_signed_header(HeaderName::from_static(name), HeaderValue::from_str(value).unwrap());
        }
        let path = Path::parse(key).unwrap();
        let signed = self.bucket.signed_url_opts(method.clone(), &path, Duration::from_secs(60), &options);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let url = runtime.block_on(signed).unwrap();
        let agent = ureq::Agent::new_with_config(ureq::Agent::config_builder().http_status_as_error(false).build());
        let mut request = ureq::http::Request::builder().method(method.as_str()).uri(url.as_str());
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut response = agent.run(request.body(body).unwrap()).unwrap();
        (response.status().as_u16(), response.body_mut().read_to_string().unwrap())
    }

    /// Makes the bucket.
    pub fn make_bucket(&self) {
        let (status, said) = self.ask(Method::PUT, "", &[], &[], b"");
        assert_eq!(status, 200, "{said}");
    }

    /// Makes the bucket, with Object Lock.
    pub fn make_bucket_with_locks(&self) {
        let header = [("x-amz-bucket-object-lock-enabled", "true")];
        let (status, said) = self.ask(Method::PUT, "", &[], &header, b"");
        assert_eq!(status, 200, "{said}");
    }

    /// All versions of what has that in the beginning of its key.
    pub fn versions(&self, prefix: &str) -> Vec<Version> {
        let query = [("versions", ""), ("prefix", prefix), ("max-keys", "1000")];
        let (status, said) = self.ask(Method::GET, "", &query, &[], b"");
        assert_eq!(status, 200, "{said}");
        let document = roxmltree::Document::parse(&said).unwrap();
        let text = |node: roxmltree::Node<'_, '_>, name: &str| {
            let child = node.children().find(|child| child.tag_name().name() == name);
            child.and_then(|child| child.text()).unwrap_or_default().to_owned()
        };
        assert_ne!(text(document.root_element(), "IsTruncated"), "true", "more versions than are asked for");
        let version = |node: roxmltree::Node<'_, '_>| {
            let is_marker = node.tag_name().name() == "DeleteMarker";
            (is_marker || node.tag_name().name() == "Version").then(|| Version {
                key: text(node, "Key"),
                id: text(node, "VersionId"),
                is_latest: text(node, "IsLatest") == "true",
                is_marker,
            })
        };
        document.root_element().children().filter_map(version).collect()
    }

    /// Puts other bytes in the place of an object, whatever it is; whether he may.
    pub fn put(&self, key: &str, bytes: &[u8]) -> bool {
        self.ask(Method::PUT, key, &[], &[], bytes).0 == 200
    }

    /// Removes an object, or one version of it for good; whether he may.
    pub fn delete(&self, key: &str, version: Option<&str>) -> bool {
        let query: Vec<_> = version.map(|id| ("versionId", id)).into_iter().collect();
        self.ask(Method::DELETE, key, &query, &[], b"").0 == 204
    }

    /// Until when a version is locked, as it is told.
    pub fn locked_until(&self, version: &Version) -> Option<String> {
        let query = [("retention", ""), ("versionId", version.id.as_str())];
        let (status, said) = self.ask(Method::GET, &version.key, &query, &[], b"");
        let (_, rest) = said.split_once("<RetainUntilDate>").filter(|_| status == 200)?;
        Some(rest.split_once('<')?.0.to_owned())
    }

    /// Has a lock end at that moment, although it would last longer; whether he may. `bypass` says that he has the right to.
    pub fn shorten(&self, version: &Version, mode: &str, until: &str, bypass: bool) -> bool {
        let body = format!("<Retention><Mode>{mode}</Mode><RetainUntilDate>{until}</RetainUntilDate></Retention>");
        let query = [("retention", ""), ("versionId", version.id.as_str())];
        let bypass = [("x-amz-bypass-governance-retention", "true")].into_iter().filter(|_| bypass).collect::<Vec<_>>();
        self.ask(Method::PUT, &version.key, &query, &bypass, body.as_bytes()).0 == 200
    }
}
