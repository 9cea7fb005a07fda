//! Another certificate for a client whose own ends before long.

use reseal_format::time::Timestamp;
use reseal_proto::wire::Renewed;

use super::Client;
use super::authority::Authority;
use super::site::Site;
use crate::BackupError;
use reseal_site::certificate::Validity;

/// Answers a request of a client that came with `certificate`. What is answered is registered durably before.
pub(super) fn renew(
    site: &Site,
    client: &Client,
    certificate: &[u8],
    request: &[u8],
    now: Timestamp,
) -> Result<Renewed, BackupError> {
    let refused = |why: &str| Ok(Renewed::Refused(why.to_owned()));
    let Some(enrolled) = &client.enrolled else { return Ok(Renewed::Elsewhere) };
    let validity = Validity::of(certificate).map_err(BackupError::Usage)?;
    if !validity.renewal_is_due(now) {
        return refused("it is early: a certificate is renewed when two thirds of its life are over");
    }
    let config = site.config();
    let settings = config.settings();
    let folder = settings.authority();
    let Some(authority) = Authority::open(folder)? else { return Ok(Renewed::Elsewhere) };
    let issued = match authority.renew(request, &enrolled.name, enrolled.days, now)? {
        Ok(issued) => issued,
        Err(why) => return refused(&why),
    };
    let taken = settings.registry().change(&enrolled.tenant, &enrolled.name, |enrolled| {
        let mut own = enrolled.certificates.iter().filter(|own| own.sha256 == *client.certificate());
        let good = enrolled.revoked.is_none() && own.any(|own| own.superseded.is_none());
        if good {
            enrolled.issue(client.certificate(), issued.certificate.clone());
        }
        Ok(good)
    })?;
    site.look();
    match taken {
        true => Ok(Renewed::Issued(issued.der.to_vec())),
        false => refused("the certificate was revoked or renewed meanwhile"),
    }
}
