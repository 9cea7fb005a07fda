//! What each verb does.

pub(crate) mod mount;
pub(crate) mod nbd;
pub(crate) mod restore;
