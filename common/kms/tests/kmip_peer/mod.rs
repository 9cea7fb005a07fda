//! KMIP servers for tests: the real PyKMIP, and one that does what a test says.

#![allow(dead_code, reason = "each test uses a part")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

pub(crate) mod answer;
pub(crate) mod peer;
pub(crate) mod pki;
pub(crate) mod pykmip;

use reseal_kms::Kms;

use self::peer::{Act, Peer};
use self::pki::Pki;
use self::pykmip::PyKmip;
pub(crate) use crate::ports::free_port;

/// Runs `check` over PyKMIP: as it is, then as one of KMIP 1.2, which hands the key out. Each has nothing in it.
pub(crate) fn each(check: impl Fn(&dyn Kms)) {
    let pki = Pki::new();
    let server = PyKmip::start(&pki);
    check(&server.kms());
    let server = PyKmip::start(&pki);
    check(&limited(&pki, &server, (1, 2)).kms(true));
}

/// PyKMIP, behind something that lets no version above `version` be agreed on.
pub(crate) fn limited(pki: &Pki, server: &PyKmip, version: (i32, i32)) -> Peer {
    Peer::before(pki, server.port(), move |request| match request.operation {
        answer::DISCOVER_VERSIONS => Act::Answer(answer::versions(request, &[version, (1, 0)])),
        _ => Act::Forward,
    })
}
