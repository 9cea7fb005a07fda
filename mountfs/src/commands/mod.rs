//! What each verb does.

pub(crate) mod mount;
pub(crate) mod restore;
