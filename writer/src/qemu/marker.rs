//! An object inside QEMU that says which run is at work, so that two never are, and so that the next one knows what a
//! dead one left.

use std::path::PathBuf;

use reseal_qmp::{Client, MonitorError};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::QemuError;
use super::leftovers::release;
use super::names::MARKER;
use crate::guardian::ProcessId;

/// A run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Marker {
    /// The guardian, which lives until all is cleaned up.
    pub(super) guardian: ProcessId,
    /// The socket of its NBD server.
    pub(super) server: PathBuf,
}

/// What the marker says, if there is one.
fn identity(client: &mut Client) -> Result<Option<String>, QemuError> {
    let arguments = json!({ "path": format!("/objects/{MARKER}"), "property": "identity" });
    match client.call("qom-get", arguments) {
        Ok(Value::String(identity)) => Ok(Some(identity)),
        Ok(_) | Err(MonitorError::Refused { .. }) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

impl Marker {
    /// The marker that is there.
    pub(super) fn read(client: &mut Client) -> Result<Option<Marker>, QemuError> {
        Ok(identity(client)?.and_then(|identity| serde_json::from_str(&identity).ok()))
    }

    /// Enters this run; the dead one whose marker was found, if so.
    pub(super) fn claim(&self, client: &mut Client) -> Result<Option<Marker>, QemuError> {
        let text = serde_json::to_string(self).map_err(|e| QemuError::host("describe this run", e))?;
        // An object of this type does nothing by itself.
        let object = json!({ "qom-type": "authz-simple", "id": MARKER, "identity": text });
        let refused = match client.call("object-add", object.clone()) {
            Ok(_) => return Ok(None),
            Err(e @ MonitorError::Refused { .. }) => e,
            Err(e) => return Err(e.into()),
        };
        let Some(found) = identity(client)? else { return Err(refused.into()) };
        let found: Option<Marker> = serde_json::from_str(&found).ok();
        if let Some(Marker { guardian, .. }) = found.as_ref().filter(|found| found.guardian.is_alive()) {
            return Err(QemuError::Unusable(format!(
                "another backup of this VM is at work or cleaning up (process {}); try again when it has ended",
                guardian.pid
            )));
        }
        release(client)?;
        client.call("object-add", object)?;
        Ok(found)
    }
}
