//! How a store is told which version is to be replaced. An entity tag has quotes (RFC 9110, 8.8.3), and so nearly all want it; Ceph's gateway
//! compares what it is told with the tag without them, so that none that has them fits there.

use std::sync::atomic::{AtomicBool, Ordering};

use object_store::UpdateVersion;

/// What was found out of a store.
#[derive(Debug, Default)]
pub(super) struct Tags {
    are_bare: AtomicBool,
}

impl Tags {
    /// A version as the store is told it.
    pub(super) fn told(&self, version: &UpdateVersion) -> UpdateVersion {
        let bare = self.are_bare.load(Ordering::Relaxed).then(|| bare(version)).flatten();
        bare.unwrap_or_else(|| version.clone())
    }

    /// The same without quotes, if it would be told with them.
    pub(super) fn without_quotes(&self, version: &UpdateVersion) -> Option<UpdateVersion> {
        (!self.are_bare.load(Ordering::Relaxed)).then(|| bare(version)).flatten()
    }

    /// From now on, no version is told with quotes.
    pub(super) fn leave_quotes_out(&self) {
        self.are_bare.store(true, Ordering::Relaxed);
    }
}

fn bare(version: &UpdateVersion) -> Option<UpdateVersion> {
    let tag = version.e_tag.as_deref()?.strip_prefix('"')?.strip_suffix('"')?;
    Some(UpdateVersion { e_tag: Some(tag.to_owned()), version: version.version.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(tag: &str) -> UpdateVersion {
        UpdateVersion { e_tag: Some(tag.to_owned()), version: None }
    }

    #[test]
    fn quotes_are_left_out_once_that_is_known_and_only_where_there_are_any() {
        let tags = Tags::default();
        assert_eq!(tags.told(&version("\"a\"")), version("\"a\""));
        assert_eq!(tags.without_quotes(&version("\"a\"")), Some(version("a")));
        for other in ["a", "\"", "W/\"a\"", ""] {
            assert_eq!(tags.without_quotes(&version(other)), None, "{other}");
        }
        tags.leave_quotes_out();
        assert_eq!(tags.told(&version("\"a\"")), version("a"));
        assert_eq!(tags.told(&version("W/\"a\"")), version("W/\"a\""));
        assert_eq!(tags.without_quotes(&version("\"a\"")), None, "told so already");
    }
}
