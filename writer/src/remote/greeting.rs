//! Whether the other site is there, and takes this one's certificate: both name their version, and that is all.

use std::time::Duration;

use reseal_proto::wire::{FromSource, FromTarget, HEADER_LENGTH, Header, Hello, Side, VERSION};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Builder;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::{Enrolment, RemoteError};
use crate::BackupError;

/// How long all of it may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Longest answer that makes sense: a message of what is wrong.
const MAX_ANSWER: usize = 8 << 10;

/// Asks.
pub fn greet(enrolment: &Enrolment) -> Result<(), BackupError> {
    let runtime = Builder::new_current_thread().enable_all().build();
    let failed = |source| BackupError::Source { path: "the network".into(), action: "set up", source };
    let asked = runtime.map_err(failed)?.block_on(async { timeout(PATIENCE, ask(enrolment)).await });
    let silent = |_| Err(RemoteError::Lost { peer: enrolment.address.clone(), why: "nobody answers".into() });
    Ok(asked.unwrap_or_else(silent)?)
}

async fn ask(enrolment: &Enrolment) -> Result<(), RemoteError> {
    let peer = || enrolment.address.clone();
    let unexpected = |what: String| RemoteError::Unexpected { peer: peer(), what };
    let lost = |e: std::io::Error| {
        let why = e.to_string();
        match e.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) {
            Some(rustls::Error::AlertReceived(_)) => RemoteError::Refused { peer: peer(), why },
            Some(_) => RemoteError::Usage(format!(
                "{} can't be trusted: {why}. Compare the enrolment file {} with what runs there",
                peer(),
                enrolment.path.display()
            )),
            None => RemoteError::Lost { peer: peer(), why },
        }
    };
    let stream = TcpStream::connect(&enrolment.address).await.map_err(lost)?;
    let connector = TlsConnector::from(enrolment.tls.clone());
    let mut stream = connector.connect(enrolment.server.clone(), stream).await.map_err(lost)?;
    let software = concat!("reseal ", env!("CARGO_PKG_VERSION")).to_owned();
    let hello = FromSource::Hello(Hello { version: VERSION, software }).encode();
    stream.write_all(&hello).await.map_err(lost)?;
    stream.flush().await.map_err(lost)?;
    let mut header = [0; HEADER_LENGTH];
    stream.read_exact(&mut header).await.map_err(lost)?;
    let broken = |source| RemoteError::Broken { peer: peer(), source };
    let header = Header::decode(Side::Target, header).map_err(broken)?;
    if header.payload() > MAX_ANSWER {
        return Err(unexpected("it does not say its version first".into()));
    }
    let mut payload = vec![0; header.payload()];
    stream.read_exact(&mut payload).await.map_err(lost)?;
    let answer = FromTarget::decode(header, &payload).map_err(broken)?;
    let _ = stream.shutdown().await;
    match answer {
        FromTarget::Welcome(welcome) if welcome.version == VERSION => Ok(()),
        FromTarget::Welcome(other) => {
            Err(unexpected(format!("it speaks version {}, this program {VERSION}", other.version)))
        }
        FromTarget::Trouble(trouble) => Err(RemoteError::Trouble { peer: peer(), trouble }),
        _ => Err(unexpected("it does not say its version first".into())),
    }
}
