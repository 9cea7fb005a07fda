//! Where a command reads restore points from: a vault, or another site.

use std::path::Path;
use std::sync::Arc;

use reseal_cli::{CommonArgs, DEFAULT_TENANT, Failure, Opened, Status};
use reseal_vault::heads::Heads;
use reseal_vault::{Points, Tenant};

use crate::{Enrolment, SiteReader};

/// What is read from.
pub enum Reading {
    /// A vault whose keys this process has.
    Here(Opened),
    /// A site that has the keys, and what was seen of it before.
    There(Arc<SiteReader>, Heads),
}

impl Reading {
    /// Opens what --repo names.
    pub fn open(common: &CommonArgs) -> Result<Reading, Failure> {
        match enrolment(common)? {
            None => Ok(Reading::Here(common.open()?)),
            Some(enrolment) => {
                let folder = enrolment.folder(&common.paths()?.state);
                let heads = Heads::at(folder, common.accept_rollback);
                let output = common.output();
                let reader = SiteReader::telling(enrolment, Box::new(move |what| output.warn(what)));
                Ok(Reading::There(Arc::new(reader), heads))
            }
        }
    }

    /// Its restore points.
    pub fn points(&self) -> Arc<dyn Points> {
        match self {
            Reading::Here(opened) => opened.tenant.clone(),
            Reading::There(reader, _) => reader.clone(),
        }
    }

    /// The tenant, where this process has its keys.
    pub fn tenant(&self) -> Option<&Tenant> {
        match self {
            Reading::Here(opened) => Some(&opened.tenant),
            Reading::There(..) => None,
        }
    }

    /// The generation of the tenant record that its keys came from; 0 where another site has the keys.
    pub fn record_generation(&self) -> u64 {
        match self {
            Reading::Here(opened) => opened.tenant.record_generation(),
            Reading::There(..) => 0,
        }
    }

    /// What was seen of it before.
    pub fn heads(&self) -> &Heads {
        match self {
            Reading::Here(opened) => &opened.heads,
            Reading::There(_, heads) => heads,
        }
    }
}

/// The enrolment file, if --repo names one.
pub fn enrolment(common: &CommonArgs) -> Result<Option<Enrolment>, Failure> {
    let repo = common.repo()?;
    let path = Path::new(&repo);
    if !path.is_file() {
        return Ok(None);
    }
    let enrolment = Enrolment::read(path)?;
    let given = common.tenant()?;
    if given != *enrolment.tenant() && common.tenant != DEFAULT_TENANT {
        let message = format!("--tenant {given}: the enrolment file {repo} is of tenant {}", enrolment.tenant());
        return Err(Failure::new(Status::Usage, message));
    }
    Ok(Some(enrolment))
}
