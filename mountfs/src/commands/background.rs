//! Going to the background, for the commands that serve.

use std::path::Path;
use std::process::ExitCode;

use reseal_cli::{Detach, Failure, Side, Status, finish, split};

use crate::PROGRAM;

/// Splits off the process that serves, if one is wanted. The exit code of the process that is not to serve, or could not split.
///
/// # Safety
/// Nothing may have started a thread.
pub(super) unsafe fn detached(wanted: bool, log: Option<&Path>) -> Result<Option<Detach>, ExitCode> {
    if !wanted {
        return Ok(None);
    }
    // SAFETY: as the caller says.
    match unsafe { split(log) } {
        Ok(Side::Command(status)) => Err(ExitCode::from(status)),
        Ok(Side::Server(detach)) => Ok(Some(detach)),
        Err(error) => {
            let message = format!("can't go to the background: {error}");
            Err(finish(PROGRAM, Err(Failure::new(Status::Failed, message))))
        }
    }
}
