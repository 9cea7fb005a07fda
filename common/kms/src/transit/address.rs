//! The address of a server, from the operator's configuration and from nowhere else.

use std::fmt;
use std::net::IpAddr;

use ureq::http::Uri;

use crate::KeyName;

/// `https://HOST[:PORT]`, or `http://` to this machine itself, where nobody listens in between.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    text: String,
    https: bool,
}

impl Address {
    /// Checks an address; says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = |what: &str| Err(format!("the address {text:?} {what}: write it as https://HOST:PORT"));
        let Ok(uri) = text.parse::<Uri>() else {
            return wrong("is none");
        };
        let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
            return wrong("has no scheme or no host");
        };
        if authority.as_str().contains('@') {
            return Err("the address holds a user name: credentials are read from the files that `auth` names".into());
        }
        let port_is_none = authority.as_str() != authority.host() && authority.port_u16().is_none_or(|port| port == 0);
        if port_is_none {
            return wrong("has a port that is none");
        }
        if authority.host().is_empty() || uri.path() != "/" || uri.query().is_some() || text.contains('#') {
            return wrong("is more than scheme, host and port");
        }
        let https = match scheme {
            "https" => true,
            "http" if is_loopback(authority.host()) => false,
            "http" => return wrong("is not encrypted, which is for this machine alone"),
            _ => return wrong("is not HTTPS"),
        };
        Ok(Self { text: format!("{scheme}://{authority}"), https })
    }

    pub(crate) fn is_https(&self) -> bool {
        self.https
    }
}

fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Where something is mounted below `/v1/`, or a namespace: names as of keys, with `/` between them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiPath(String);

impl ApiPath {
    /// Checks a path; says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let path = text.trim_end_matches('/');
        if path.split('/').all(|name| KeyName::parse(name).is_ok()) {
            Ok(Self(path.to_owned()))
        } else {
            Err(format!("{text:?} is no path of names with / between them"))
        }
    }
}

impl fmt::Display for ApiPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_https_or_this_machine() {
        for (good, https) in [
            ("https://bao.example:8200", true),
            ("https://bao.example", true),
            ("https://10.0.0.1:8200/", true),
            ("https://[2001:db8::1]:8200", true),
            ("http://127.0.0.1:8200", false),
            ("http://127.8.8.8", false),
            ("http://[::1]:8200", false),
            ("http://localhost:8200", false),
        ] {
            let address = Address::parse(good).unwrap();
            assert_eq!((address.to_string().as_str(), address.is_https()), (good.trim_end_matches('/'), https));
        }
        for bad in [
            "",
            "bao.example:8200",
            "bao.example",
            "//bao.example",
            "ftp://bao.example",
            "http://bao.example",
            "http://10.0.0.1:8200",
            "http://localhost.example",
            "http://[2001:db8::1]",
            "http://0.0.0.0:8200",
            "https://",
            "https://:8200",
            "https://bao.example/v1",
            "https://bao.example/?a",
            "https://bao.example/#a",
            "https://bao.example:8200:1",
            "https://bao example",
            "https://a\nb",
            "https://bao.example:99999",
            "https://bao.example:0",
            "https://bao.example:",
        ] {
            assert!(Address::parse(bad).is_err(), "{bad}");
        }
        let error = Address::parse("https://root:s3cret@bao.example").unwrap_err();
        assert!(!error.contains("s3cret"), "{error}");
    }

    #[test]
    fn a_path_leads_nowhere_else() {
        for good in ["transit", "teams/acme/transit", "a_b-c.d/"] {
            assert_eq!(ApiPath::parse(good).unwrap().to_string(), good.trim_end_matches('/'));
        }
        for bad in ["", "/", "/transit", "../sys", "a/../b", "a//b", "a b", "a?b", "a%2fb", "a\nb"] {
            assert!(ApiPath::parse(bad).is_err(), "{bad}");
        }
    }
}
