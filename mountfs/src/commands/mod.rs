//! What each verb does.

mod background;
pub(crate) mod boot;
pub(crate) mod cache_size;
pub(crate) mod mount;
pub(crate) mod nbd;
pub(crate) mod overlay;
pub(crate) mod restore;
pub(crate) mod writable;
