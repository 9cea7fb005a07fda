//! `nbd`.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use reseal_cli::{CommonArgs, Detach, Failure, Output, Status, finish, harden};
use reseal_format::names::{DiskName, VmName};
use reseal_mountfs::journal::Journal;
use reseal_mountfs::nbd::{Address, JournalOwner, ListenError, Listener, NbdServer};
use reseal_mountfs::record_watch;
use reseal_mountfs::signals::StopSignals;
use reseal_nbd::NbdUri;
use reseal_nbd::server::{Exports, Limits, PointExports, Scope, ServerTls, Service, StartTls, export_name};
use reseal_vault::disk::DiskReader;
use reseal_vault::{Point, PointSpec, Points, Tenant, VaultError};
use serde::Serialize;

use super::background::detached;
use super::cache_size::CacheArgs;
use super::writable::{WritableArgs, Written};
use crate::PROGRAM;

/// The port that is NBD's own.
const PORT: u16 = 10809;

#[derive(Args)]
#[command(group(clap::ArgGroup::new("where").required(true).args(["socket", "listen"])))]
pub(crate) struct NbdArgs {
    /// Serves only this VM, or only this restore point; without it, all restore points of the tenant
    #[arg(value_name = "VM|POINT")]
    only: Option<String>,
    /// Serves only this disk of the restore point
    #[arg(long, value_name = "NAME", requires = "only")]
    disk: Option<String>,
    /// A socket file, which is made for this user only
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// An address such as 127.0.0.1:10809; one that others can reach needs --tls-cert and --tls-key
    #[arg(long, value_name = "ADDRESS[:PORT]", value_parser = parse_address)]
    listen: Option<SocketAddr>,
    /// The server's certificate and its chain: clients must use TLS
    #[arg(long, value_name = "FILE", requires_all = ["tls_key", "listen"])]
    tls_cert: Option<PathBuf>,
    /// The private key of the certificate
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Takes only clients with a certificate of this authority
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_client_ca: Option<PathBuf>,
    /// Returns when clients can connect, and serves on in the background
    #[arg(long)]
    background: bool,
    /// Where a server in the background says what went wrong
    #[arg(long, value_name = "FILE", requires = "background")]
    log: Option<PathBuf>,
    #[command(flatten)]
    cache: CacheArgs,
    /// Requests that are worked on at once, of each client
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    threads: Option<u16>,
    #[command(flatten)]
    written: WritableArgs,
}

fn parse_address(text: &str) -> Result<SocketAddr, String> {
    let alone = |text: &str| text.trim_matches(['[', ']']).parse::<IpAddr>().map(|ip| SocketAddr::new(ip, PORT));
    text.parse().or_else(|_| alone(text)).map_err(|_| "it is no IP address, with or without a port".to_owned())
}

/// An export that is announced.
#[derive(Serialize)]
struct Announced {
    name: String,
    uri: String,
    length: u64,
}

/// What `--json` says when clients can connect.
#[derive(Serialize)]
struct Ready {
    /// Where to connect; the name of an export goes after the last slash.
    uri: String,
    /// The disks of the restore point; empty where all of a VM or a tenant is served.
    exports: Vec<Announced>,
    /// Whether clients may write.
    writable: bool,
    /// Where what is written is kept.
    overlay: Option<PathBuf>,
}

/// Serves until a signal ends it.
pub(crate) fn nbd(common: &CommonArgs, arguments: &NbdArgs) -> ExitCode {
    // A client's thread that hangs in a dead store does not hold up the end: with this thread the process ends.
    // SAFETY: nothing has started a thread yet.
    match unsafe { detached(arguments.background, arguments.log.as_deref()) } {
        Ok(detach) => finish(PROGRAM, serve(common, arguments, detach)),
        Err(code) => code,
    }
}

fn serve(common: &CommonArgs, arguments: &NbdArgs, detach: Option<Detach>) -> Result<(), Failure> {
    let (address, tls) = (address(arguments)?, tls(arguments)?);
    harden(common.allow_swap)?;
    let failed = |e: std::io::Error| Failure::new(Status::Failed, e.to_string());
    let signals = StopSignals::new().map_err(failed)?;
    let opened = common.open()?;
    let (tenant, heads, journal) = (opened.tenant, opened.heads, Arc::new(Journal::new()));
    let (scope, point) = scope(&tenant, arguments)?;
    let listener = Arc::new(Listener::new(&address).map_err(listen_failure)?);
    let base = uri(&listener.address().map_err(failed)?, arguments.tls_cert.is_some());
    let _lease = tenant.pin_point(point.as_ref(), format!("NBD server at {}", base("")))?;
    let reader = Arc::new(DiskReader::new(tenant.clone(), arguments.cache.bytes()));
    point.iter().flat_map(|point| &point.manifest.disks).for_each(|disk| reader.warm_later(disk));
    let mut limits = Limits::default();
    limits.threads = arguments.threads.map_or(limits.threads, usize::from);
    let points: Arc<dyn Exports> =
        Arc::new(PointExports::new(tenant.clone(), Some(heads.clone()), reader, scope.clone()));
    let written = match (arguments.written.writable, &scope, &point) {
        (false, ..) => None,
        (true, Scope::Point { disk, .. }, Some(point)) => {
            let state = &opened.paths.state;
            Some(arguments.written.open(Some(&tenant), state, &point.manifest, disk.as_ref(), &*points)?)
        }
        (true, ..) => {
            return Err(Failure::new(Status::Usage, "--writable needs one restore point, such as VM@latest"));
        }
    };
    let service = Service {
        exports: written.as_ref().map_or(points.clone(), |written| written.exports(points.clone())),
        owner: Arc::new(JournalOwner(journal.clone())),
        tls,
        limits,
    };
    let server = NbdServer::new(service, journal.clone());
    signals.on_signal(server.stopper()).map_err(failed)?;
    record_watch::watch("NBD server", tenant, heads, journal, server.stopper()).map_err(failed)?;
    announce(common.output(), &scope, point.as_ref(), &base, written.as_ref(), detach.is_some());
    if let Some(detach) = detach {
        detach.detach().map_err(failed)?;
    }
    server.run(&listener).map_err(failed)?;
    // The thread that accepts still holds the listener.
    listener.remove_file();
    written.map_or(Ok(()), |written| written.close())
}

fn address(arguments: &NbdArgs) -> Result<Address, Failure> {
    match (&arguments.socket, arguments.listen) {
        (Some(path), _) => {
            // A URI, and a process in the background, are independent of the folder that this one was started in.
            let path = std::path::absolute(path).map_err(|e| Failure::new(Status::Usage, e.to_string()))?;
            Ok(Address::Unix(path))
        }
        (None, Some(address)) if arguments.tls_cert.is_none() && !address.ip().is_loopback() => {
            let message = format!(
                "--listen {address} without TLS: others could read the disks, and the wire. Give --tls-cert and --tls-key, \
                 and --tls-client-ca to choose who may read; or listen at 127.0.0.1, or at a --socket"
            );
            Err(Failure::new(Status::Usage, message))
        }
        (None, Some(address)) => Ok(Address::Tcp(address)),
        (None, None) => Err(Failure::new(Status::Usage, "give --socket or --listen")),
    }
}

fn tls(arguments: &NbdArgs) -> Result<StartTls, Failure> {
    let (Some(cert), Some(key)) = (&arguments.tls_cert, &arguments.tls_key) else {
        return Ok(StartTls::Never);
    };
    let files = ServerTls { cert, key, client_ca: arguments.tls_client_ca.as_deref() };
    Ok(StartTls::Demanded(files.config()?))
}

/// What the argument names, and the point if it is one. A VM's name may hold an `@`, so a VM of that name goes first.
fn scope(tenant: &Tenant, arguments: &NbdArgs) -> Result<(Scope, Option<Point>), Failure> {
    let Some(text) = arguments.only.as_deref() else { return Ok((Scope::All, None)) };
    let disk = arguments.disk.as_deref().map(DiskName::new).transpose().map_err(|e| Failure::of(Status::Usage, &e))?;
    if let Ok(vm) = VmName::new(text)
        && tenant.chain(&vm)?.last() > 0
    {
        return match disk {
            None => Ok((Scope::Vms(vec![vm]), None)),
            Some(_) => Err(Failure::new(Status::Usage, format!("--disk needs a restore point, such as {vm}@latest"))),
        };
    }
    if !text.contains('@') {
        let vm = VmName::new(text).map_err(|e| Failure::of(Status::Usage, &e))?;
        return Err(VaultError::NoVm { vm }.into());
    }
    let point = tenant.resolve(&PointSpec::parse(text)?)?;
    let (vm, number) = (point.manifest.vm.clone(), point.manifest.number);
    if let Some(disk) = disk.as_ref().filter(|disk| point.manifest.disks.iter().all(|known| known.name != **disk)) {
        let names: Vec<&str> = point.manifest.disks.iter().map(|disk| disk.name.as_str()).collect();
        let message = format!("{vm}@{number} has no disk {disk}; it has {}", names.join(", "));
        return Err(Failure::new(Status::Usage, message));
    }
    Ok((Scope::Point { vm, number, disk }, Some(point)))
}

/// Makes the URI of an export from its name.
fn uri(address: &Address, tls: bool) -> impl Fn(&str) -> NbdUri + use<> {
    let address = address.clone();
    move |export| match &address {
        Address::Unix(path) => NbdUri::unix(path, export),
        Address::Tcp(address) => NbdUri::tcp(&host(address.ip()), address.port(), tls, export),
    }
}

/// What others reach an address by: this machine's name, where it listens at all that it has.
fn host(address: IpAddr) -> String {
    match address.is_unspecified() {
        true => rustix::system::uname().nodename().to_string_lossy().into_owned(),
        false => address.to_string(),
    }
}

fn announce(
    output: Output,
    scope: &Scope,
    point: Option<&Point>,
    uri: &impl Fn(&str) -> NbdUri,
    written: Option<&Written>,
    in_background: bool,
) {
    let mut exports = Vec::new();
    if let (Scope::Point { disk: only, .. }, Some(Point { manifest, .. })) = (scope, point) {
        for disk in manifest.disks.iter().filter(|disk| only.as_ref().is_none_or(|only| *only == disk.name)) {
            let name = export_name(&manifest.vm, manifest.number, &disk.name);
            exports.push(Announced { uri: uri(&name).to_string(), name, length: disk.length });
        }
    }
    let end = if in_background { "SIGTERM ends it" } else { "Ctrl-C ends it" };
    match exports.is_empty() {
        false => exports.iter().for_each(|export| output.say(format!("{} is served at {}", export.name, export.uri))),
        true => output.say(format!("served at {}; exports are named VM@POINT/DISK", uri(""))),
    }
    match written {
        None => output.say(format!("read-only, decrypted as it is read; {end}")),
        Some(written) => written.say(output, end),
    }
    let overlay = written.and_then(|written| written.folder.clone());
    output.json(&Ready { uri: uri("").to_string(), exports, writable: written.is_some(), overlay });
}

pub(super) fn listen_failure(error: ListenError) -> Failure {
    let status = match &error {
        ListenError::Taken(_) | ListenError::NoSocket(_) => Status::Usage,
        ListenError::Unix { .. } | ListenError::Tcp { .. } => Status::Failed,
    };
    Failure::of(status, &error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_a_port_or_get_nbds_own() {
        for (text, address) in [
            ("127.0.0.1", "127.0.0.1:10809"),
            ("127.0.0.1:7", "127.0.0.1:7"),
            ("::1", "[::1]:10809"),
            ("[::1]", "[::1]:10809"),
            ("[::]:9", "[::]:9"),
        ] {
            assert_eq!(parse_address(text), Ok(address.parse().unwrap()), "{text}");
        }
        for bad in ["", "localhost", "1.2.3", "127.0.0.1:99999"] {
            assert!(parse_address(bad).is_err(), "{bad}");
        }
    }
}
