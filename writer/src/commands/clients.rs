//! `reseal tenant enroll`, `clients` and `revoke`: the sites that may send to this one, and read from it.

use std::path::PathBuf;

use reseal_cli::{CommonArgs, Failure, Status, serve_config};
use reseal_format::names::{ClientName, TenantName, VmName};
use reseal_format::time::Timestamp;
use reseal_writer::serve::{Enrolled, MAX_DAYS, NewClient, Role, Settings, clients, enrol, revoke};
use serde_json::{Value, json};

/// Which server.
#[derive(clap::Args)]
pub(crate) struct ServerArgs {
    /// The server's configuration [default: /etc/reseal/serve.toml for root, otherwise in the user's configuration]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl ServerArgs {
    fn settings(&self) -> Result<Settings, Failure> {
        Ok(Settings::read(&serve_config(self.config.as_deref())?)?)
    }
}

/// Arguments of `tenant enroll`.
#[derive(clap::Args)]
pub(crate) struct EnrollArgs {
    /// What it may do: append adds restore points, restore reads them, admin looks after them
    #[arg(long, value_parser = parse_role, value_name = "append|restore|admin")]
    role: Role,
    /// A VM that it may do that for; can be repeated [default: any VM of the tenant]
    #[arg(long = "vm", value_name = "NAME")]
    vms: Vec<String>,
    /// Its name at this site [default: that of the file]
    #[arg(long, value_name = "CLIENT")]
    name: Option<String>,
    /// How long its certificates are valid; they renew themselves from two thirds of that time on
    #[arg(long, value_name = "DAYS", default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_DAYS)))]
    valid: u32,
    /// Where it reaches the server [default: the address of the configuration]
    #[arg(long, value_name = "HOST:PORT")]
    address: Option<String>,
    #[command(flatten)]
    server: ServerArgs,
    /// The enrolment file to make, with its key; an existing file is never overwritten
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
}

fn parse_role(text: &str) -> Result<Role, String> {
    [Role::Append, Role::Restore, Role::Admin]
        .into_iter()
        .find(|role| role.to_string() == text)
        .ok_or_else(|| "one of append, restore, admin".to_owned())
}

fn client_name(name: &str) -> Result<ClientName, Failure> {
    ClientName::new(name).map_err(|e| Failure::of(Status::Usage, &e))
}

pub(crate) fn enroll(common: &CommonArgs, tenant: TenantName, args: EnrollArgs) -> Result<(), Failure> {
    let settings = args.server.settings()?;
    let vms: Result<Vec<_>, _> = args.vms.iter().map(|vm| VmName::new(vm)).collect();
    let vms = vms.map_err(|e| Failure::of(Status::Usage, &e))?;
    let name = args.name.as_deref().map(client_name).transpose()?;
    let mut there = common.clone();
    there.repo = settings.repo.clone().or(there.repo);
    if let Some(when) = there.find(&tenant)?.record.erased() {
        return Err(Failure::new(
            Status::Usage,
            format!("tenant {tenant} was erased at {when}: nobody can send to it"),
        ));
    }
    let (days, address, output) = (args.valid, args.address, args.output.as_path());
    let (enrolled, address) =
        enrol(&settings, NewClient { tenant, name, role: args.role, vms, days, address, output })?;
    let out = common.output();
    let mut document = document(&enrolled);
    document["address"] = json!(address);
    document["file"] = json!(output);
    out.json(&document);
    let Enrolled { name, tenant, role, .. } = &enrolled;
    let vms = shown_vms(&enrolled);
    out.say(format!("enrolled    {name} of tenant {tenant}: {role}, {vms}"));
    out.say(format!("address     {address}"));
    if let Some(newest) = enrolled.newest() {
        out.say(format!("valid until {}; it renews itself", newest.expires));
    }
    out.say(format!("file        {}", output.display()));
    out.say(
        "\nThis file is all that the site needs, and whoever has it can do the same. Move it there on a way that nobody else reads, \
         mode 0600, and keep no copy.",
    );
    out.say(match role {
        Role::Append => format!("There: reseal --repo {} backup VM DISK…", output.display()),
        Role::Restore | Role::Admin => format!("There: reseal --repo {} list", output.display()),
    });
    Ok(())
}

fn shown_vms(enrolled: &Enrolled) -> String {
    match enrolled.vms.iter().any(|vm| vm == "*") {
        true => "any VM".to_owned(),
        false => enrolled.vms.join(", "),
    }
}

fn document(enrolled: &Enrolled) -> Value {
    let time = |time: Timestamp| time.to_rfc3339();
    let certificates = enrolled.certificates.iter().map(|certificate| {
        json!({
            "sha256": hex::encode(certificate.sha256), "serial": certificate.serial, "issued": time(certificate.issued),
            "expires": time(certificate.expires), "superseded": certificate.superseded.map(time),
        })
    });
    json!({
        "tenant": enrolled.tenant, "client": enrolled.name, "role": enrolled.role, "vms": enrolled.vms,
        "expires": enrolled.newest().map(|newest| time(newest.expires)), "revoked": enrolled.revoked.map(time),
        "certificates": Vec::from_iter(certificates), "enrolled": true,
    })
}

pub(crate) fn list(common: &CommonArgs, tenant: Option<&TenantName>, server: &ServerArgs) -> Result<(), Failure> {
    let settings = server.settings()?;
    let output = common.output();
    let (enrolled, faults) = clients(&settings)?;
    let is_wanted = |of: &TenantName| tenant.is_none_or(|tenant| tenant == of);
    let row = |tenant: &str, name: &str, role: Role, until: &str, vms: &str| {
        output.say(format!("{tenant:<24} {name:<24} {role:<8} {until:<33} {vms}", role = role.to_string()));
    };
    output.say(format!("{:<24} {:<24} {:<8} {:<33} {}", "TENANT", "CLIENT", "ROLE", "VALID UNTIL", "VMS"));
    for enrolled in enrolled.iter().filter(|enrolled| is_wanted(&enrolled.tenant)) {
        output.json(&document(enrolled));
        let until = match (enrolled.revoked, enrolled.newest()) {
            (Some(when), _) => format!("revoked {when}"),
            (None, Some(newest)) => newest.expires.to_string(),
            (None, None) => String::new(),
        };
        row(enrolled.tenant.as_str(), enrolled.name.as_str(), enrolled.role, &until, &shown_vms(enrolled));
    }
    for client in settings.named().iter().filter(|client| is_wanted(&client.tenant)) {
        output.json(&json!({
            "tenant": client.tenant, "client": client.name, "role": client.role, "vms": client.vms(),
            "enrolled": false,
        }));
        row(client.tenant.as_str(), &client.name, client.role, "as its own PKI says", &client.vms().join(", "));
    }
    match faults.split_last() {
        None => Ok(()),
        Some((last, others)) => {
            others.iter().for_each(|fault| output.warn(fault));
            Err(Failure::new(Status::Failed, last))
        }
    }
}

pub(crate) fn take_away(
    common: &CommonArgs,
    tenant: &TenantName,
    name: &str,
    server: &ServerArgs,
) -> Result<(), Failure> {
    let settings = server.settings()?;
    let name = client_name(name)?;
    let is_new = revoke(&settings, tenant, &name)?;
    let output = common.output();
    output.json(&json!({ "tenant": tenant, "client": name, "revoked_before": !is_new }));
    output.say(match is_new {
        true => {
            format!("revoked {name} of tenant {tenant}: a server that runs ends its connections within two seconds")
        }
        false => format!("{name} of tenant {tenant} was revoked before"),
    });
    Ok(())
}
