//! Where `backup` takes disks from.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reseal_cli::{Failure, Opened, Status, parse_size};
use reseal_format::manifest::{MAX_DISKS, Tracking, method};
use reseal_format::names::{DiskName, VmName};
use reseal_nbd::{NbdUri, Options, TlsFiles};
use reseal_vault::{PointSpec, Points, Which};
use reseal_writer::BackupError;
use reseal_writer::backup::{Disks, Input, Live, Said, Since};
use reseal_writer::changes::Changes;
use reseal_writer::guardian::{Guardian, GuardianError, Plan, Undo};
use reseal_writer::image::{self, Image, ImageFormat};
use reseal_writer::libvirt::{Libvirt, LibvirtOptions};
use reseal_writer::live::Hypervisor;
use reseal_writer::qemu::{Qemu, QemuOptions};
use reseal_writer::source::{NbdSource, Source};

/// Name of a disk that is the only one and was given none.
const ONLY_DISK: &str = "disk-0";
/// What is read of what the user says is unchanged, in percent, unless told otherwise.
const CHECK_PERCENT: f64 = 1.0;

/// Arguments that say where disks are.
#[derive(clap::Args)]
pub(crate) struct SourceArgs {
    /// Files, block devices or NBD URIs (nbd://, nbds://, nbd+unix://, nbds+unix://); several must be named, as NAME=DISK
    #[arg(value_name = "[NAME=]DISK", required_unless_present_any = ["libvirt", "qmp"])]
    disks: Vec<OsString>,
    /// Takes the bytes of files as they are, even if they look like an image container
    #[arg(long, conflicts_with = "format")]
    raw: bool,
    /// Takes files as images of that format, whose guest-visible disk is read through qemu-nbd
    #[arg(long, value_name = "FORMAT")]
    format: Option<ImageFormat>,
    /// Reads the passphrase of encrypted images from the first line of a file
    #[arg(long, value_name = "FILE")]
    image_secret: Option<PathBuf>,

    /// The running VM that libvirt knows by that name or UUID (LIBVIRT_DEFAULT_URI)
    #[arg(long, value_name = "DOMAIN", conflicts_with_all = ["disks", "qmp", "qga"])]
    libvirt: Option<String>,
    /// The running VM whose QEMU has this QMP socket
    #[arg(long, value_name = "SOCKET", conflicts_with = "disks")]
    qmp: Option<PathBuf>,
    /// Freezes the guest's file systems for the moment, through its agent's socket
    #[arg(long, value_name = "SOCKET", requires = "qmp")]
    qga: Option<PathBuf>,
    /// Where a running VM's old blocks wait, encrypted, until they are read [default: in the state folder]
    #[arg(long, value_name = "FOLDER")]
    scratch: Option<PathBuf>,
    /// Space that is set aside there for each disk, as 10G
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    scratch_reserve: Option<u64>,

    /// Certificates of the authorities that may vouch for an NBD server, PEM
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// This side's certificate for an NBD server, PEM
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Its private key, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Connections to an NBD server, if it allows several
    #[arg(long, value_name = "NUMBER", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    connections: u16,
    /// Seconds of silence after which a connection to a source is given up and made again
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    source_timeout: u64,

    /// Reads only what a list of areas calls changed, as VMware's QueryChangedDiskAreas answers, JSON
    #[arg(long, value_name = "[NAME=]FILE", conflicts_with_all = ["libvirt", "qmp"])]
    changes: Vec<OsString>,
    /// Reads only what a dirty bitmap of the NBD export calls changed
    #[arg(long, value_name = "[NAME=]BITMAP", requires = "since", conflicts_with_all = ["libvirt", "qmp"])]
    bitmap: Vec<OsString>,
    /// The restore point since which --bitmap, or --changes without change ids, tells the changes
    #[arg(long, value_name = "POINT", conflicts_with_all = ["libvirt", "qmp"])]
    since: Option<String>,
    /// Reads that much of what is said to be unchanged, to see whether it is true [default: 1 where you say so, 0 where
    /// reseal itself had it recorded]
    #[arg(long, value_name = "PERCENT", value_parser = parse_percent)]
    check_unchanged: Option<f64>,
}

/// A disk as named on the command line.
pub(crate) struct Named {
    name: DiskName,
    place: OsString,
    changes: Option<PathBuf>,
    bitmap: Option<String>,
}

impl SourceArgs {
    /// The disks by name, with what is said of each.
    pub(crate) fn named(&self) -> Result<Vec<Named>, Failure> {
        let usage = |message: String| Failure::new(Status::Usage, message);
        let mut named: Vec<Named> = name_disks(&self.disks)
            .map_err(usage)?
            .into_iter()
            .map(|(name, place)| Named { name, place, changes: None, bitmap: None })
            .collect();
        for text in &self.changes {
            let (disk, file) = find(&mut named, text, "--changes").map_err(usage)?;
            if disk.changes.replace(file.into()).is_some() {
                return Err(usage(format!("--changes is given twice for {}", disk.name)));
            }
        }
        for text in &self.bitmap {
            let (disk, bitmap) = find(&mut named, text, "--bitmap").map_err(usage)?;
            if !reseal_nbd::is_uri(&disk.place) {
                return Err(usage(format!("--bitmap: {} is no NBD URI, so it has no bitmaps", disk.name)));
            }
            if disk.changes.is_some() {
                return Err(usage(format!("{}: either --changes or --bitmap can tell what changed", disk.name)));
            }
            let bitmap = bitmap.into_string();
            let bitmap = bitmap.map_err(|_| usage(format!("--bitmap: the name for {} is not UTF-8", disk.name)))?;
            if disk.bitmap.replace(bitmap).is_some() {
                return Err(usage(format!("--bitmap is given twice for {}", disk.name)));
            }
        }
        Ok(named)
    }

    fn options(&self) -> Options {
        Options {
            tls: TlsFiles { ca: self.tls_ca.clone(), cert: self.tls_cert.clone(), key: self.tls_key.clone() },
            connections: usize::from(self.connections),
            timeout: Duration::from_secs(self.source_timeout),
            give_up: Duration::from_secs(self.source_timeout * 2),
            ..Options::default()
        }
    }

    /// Opens the disks.
    pub(crate) fn open(
        &self,
        named: Vec<Named>,
        state: &Path,
        number: &dyn Fn(&str) -> Result<u32, Failure>,
    ) -> Result<Disks, Failure> {
        let hypervisor: Box<dyn Hypervisor> = match (&self.libvirt, &self.qmp) {
            (Some(domain), _) => {
                let options = LibvirtOptions { scratch: self.scratch.clone(), ..LibvirtOptions::new(domain) };
                Box::new(guarded(Libvirt::new(options)).map_err(BackupError::from)?)
            }
            (None, Some(qmp)) => {
                let scratch = match &self.scratch {
                    Some(folder) => folder.clone(),
                    None => own_scratch(state)?,
                };
                Box::new(Qemu::new(QemuOptions {
                    qga: self.qga.clone(),
                    scratch_reserve: self.scratch_reserve,
                    ..QemuOptions::new(qmp.clone(), scratch)
                }))
            }
            (None, None) => return Ok(Disks::Given(self.inputs(named, number)?)),
        };
        let check_percent = self.check_unchanged.unwrap_or(0.0);
        Ok(Disks::Live(Live { hypervisor, options: self.options(), check_percent }))
    }

    fn inputs(&self, named: Vec<Named>, number: &dyn Fn(&str) -> Result<u32, Failure>) -> Result<Vec<Input>, Failure> {
        let since = self.since.as_deref().map(number).transpose()?.map(Since::Number);
        let check_percent = self.check_unchanged.unwrap_or(CHECK_PERCENT);
        let mut inputs = Vec::with_capacity(named.len());
        for Named { name, place, changes, bitmap } in named {
            let (mut said, mut tracking) = (None, None);
            if let (Some(bitmap), Some(since)) = (&bitmap, since) {
                let id = bitmap.clone();
                said = Some(Said { method: method::USER_BITMAP.into(), id, since, changes: None, check_percent });
            }
            if let Some(file) = &changes {
                let list = Changes::read(file)?;
                let method = method::VMWARE_CHANGE_ID;
                tracking = list.now.clone().map(|id| Tracking { method: method.into(), id, scope: String::new() });
                let (id, since) = match (&list.since, since) {
                    (Some(id), None) => (id.clone(), Since::Tracked),
                    (id, Some(since)) => (id.clone().unwrap_or_default(), since),
                    (None, None) => {
                        let message = format!(
                            "--changes {}: it has no changeId, so --since must say since which restore point it tells \
                             the changes",
                            file.display()
                        );
                        return Err(Failure::new(Status::Usage, message));
                    }
                };
                said = Some(Said { method: method.into(), id, since, changes: Some(list), check_percent });
            }
            let source = self.source(&name, &place, bitmap.as_deref())?;
            // Whether it is so, and since which restore point, is looked up before anything is made of it.
            if let (None, Some(since)) = (&said, source.changed_since()) {
                let (method, id) = (method::OVERLAY.into(), since.to_string());
                let (since, check_percent) = (Since::Number(since.number), self.check_unchanged.unwrap_or(0.0));
                said = Some(Said { method, id, since, changes: None, check_percent });
            }
            inputs.push(Input { name, source, said, tracking });
        }
        Ok(inputs)
    }

    fn source(&self, name: &DiskName, place: &OsStr, bitmap: Option<&str>) -> Result<Source, Failure> {
        if reseal_nbd::is_uri(place) {
            let text = place.to_str();
            let text = text.ok_or_else(|| Failure::new(Status::Usage, format!("{name}: the URI is not UTF-8")))?;
            let uri: NbdUri = text.parse().map_err(BackupError::Nbd)?;
            let source = match bitmap {
                Some(_) => NbdSource::open(&uri, &self.options(), bitmap),
                None => NbdSource::open_asking_since(&uri, &self.options()),
            };
            return Ok(Source::Nbd(Box::new(source.map_err(BackupError::Nbd)?)));
        }
        let path = Path::new(place);
        let format = match self.raw {
            true => None,
            false => image::decide(path, self.format).map_err(BackupError::from)?,
        };
        let Some(format) = format else { return Ok(Source::open(path)?) };
        let image = Image::serve(path, format, self.image_secret.as_deref()).map_err(BackupError::from)?;
        let uri = NbdUri::unix(image.socket(), image.export());
        let source = NbdSource::open(&uri, &self.options(), None).map_err(BackupError::Nbd)?;
        Ok(Source::Nbd(Box::new(source.named(path.display().to_string()).with_server(image))))
    }
}

/// The restore point that --since names, which has to be one of this VM.
fn of_vm(text: &str, vm: &VmName) -> Result<PointSpec, Failure> {
    let spec = PointSpec::parse(text)?;
    if spec.vm != *vm {
        let message = format!("--since {text}: it has to be a restore point of {vm}");
        return Err(Failure::new(Status::Usage, message));
    }
    Ok(spec)
}

/// Its number, looked up in the vault.
pub(crate) fn number_of(text: &str, vm: &VmName, opened: &Opened) -> Result<u32, Failure> {
    let spec = of_vm(text, vm)?;
    opened.chain(&spec.vm)?;
    Ok(opened.tenant.resolve(&spec)?.manifest.number)
}

/// Its number, where the vault is at another site.
pub(crate) fn given_number(text: &str, vm: &VmName) -> Result<u32, Failure> {
    match of_vm(text, vm)?.which {
        Which::Number(number) => Ok(number),
        _ => {
            let message = format!("--since {text}: a backup to another site takes numbers only, as {vm}@NUMBER");
            Err(Failure::new(Status::Usage, message))
        }
    }
}

/// The folder for scratch in the state folder.
fn own_scratch(state: &Path) -> Result<PathBuf, Failure> {
    let folder = state.join("scratch");
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder);
    made.map_err(|e| Failure::new(Status::Failed, format!("can't make the folder {}: {e}", folder.display())))?;
    Ok(folder)
}

/// Has a process beside this one undo what is done in libvirt, should this one die.
fn guarded(libvirt: Libvirt) -> Result<Libvirt, GuardianError> {
    let mut guardian = Some(Guardian::start(Path::new("/proc/self/exe"))?);
    Ok(libvirt.guarded(Box::new(move |commands| {
        let undo = commands.iter().map(|command| Undo::Run(command.clone())).collect::<Vec<_>>();
        match undo.is_empty() {
            false => guardian.as_mut().map_or(Ok(()), |guardian| guardian.plan(Plan { undo })),
            true => guardian.take().map_or(Ok(()), Guardian::done),
        }
        // The backup itself goes on: it undoes what it did when it ends.
        .unwrap_or_default();
    })))
}

/// Splits NAME=TEXT of an option and finds the disk; of one disk the name may be left out.
fn find<'a>(named: &'a mut [Named], text: &OsStr, option: &str) -> Result<(&'a mut Named, OsString), String> {
    let (name, rest) = split(text);
    let disk = match name {
        Some(name) => named.iter_mut().find(|disk| disk.name.as_str().as_bytes() == name),
        None if named.len() == 1 => named.first_mut(),
        None => return Err(format!("{option} {}: of several disks each needs a name, as NAME=…", text.display())),
    };
    match disk {
        Some(disk) => Ok((disk, rest)),
        None => Err(format!("{option} {}: no disk has that name", text.display())),
    }
}

/// Splits at the first `=`, unless a slash or a URI's scheme stands before it: `./a=b.raw` is one way to write such a path.
fn split(text: &OsStr) -> (Option<&[u8]>, OsString) {
    let bytes = text.as_bytes();
    match bytes.iter().position(|&b| b == b'=').filter(|&at| !bytes[..at].contains(&b'/')) {
        Some(at) => (Some(&bytes[..at]), OsString::from_vec(bytes[at + 1..].to_vec())),
        None => (None, text.to_owned()),
    }
}

/// The disks by name.
fn name_disks(disks: &[OsString]) -> Result<Vec<(DiskName, OsString)>, String> {
    if disks.len() > MAX_DISKS {
        return Err(format!("a VM has at most {MAX_DISKS} disks"));
    }
    let mut named: Vec<(DiskName, OsString)> = Vec::new();
    for disk in disks {
        let (name, place) = match split(disk) {
            (Some(name), place) => (name, place),
            (None, place) if disks.len() == 1 => (ONLY_DISK.as_bytes(), place),
            (None, _) => {
                return Err(format!("{}: of several disks each needs a name, as NAME=DISK", disk.display()));
            }
        };
        let name = str::from_utf8(name).map_err(|_| format!("{}: its name is not UTF-8", disk.display()))?;
        let name = DiskName::new(name).map_err(|e| e.to_string())?;
        if named.iter().any(|(other, _)| *other == name) {
            return Err(format!("two disks are named {name}"));
        }
        named.push((name, place));
    }
    Ok(named)
}

fn parse_percent(text: &str) -> Result<f64, String> {
    let percent: f64 =
        text.trim_end_matches('%').parse().map_err(|_| "a number from 0 to 100 is expected".to_owned())?;
    (0.0..=100.0).contains(&percent).then_some(percent).ok_or_else(|| "it must be from 0 to 100".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(disks: &[&str]) -> Result<Vec<(String, String)>, String> {
        let disks: Vec<OsString> = disks.iter().map(OsString::from).collect();
        let named = name_disks(&disks)?;
        Ok(named.into_iter().map(|(n, p)| (n.to_string(), p.into_string().unwrap())).collect())
    }

    #[test]
    fn names_are_taken_from_in_front_of_the_equals_sign() {
        assert_eq!(names(&["x.raw"]).unwrap(), [("disk-0".into(), "x.raw".into())]);
        assert_eq!(names(&["a=x.raw"]).unwrap(), [("a".into(), "x.raw".into())]);
        assert_eq!(names(&["./a=x.raw"]).unwrap(), [("disk-0".into(), "./a=x.raw".into())]);
        assert_eq!(names(&["a=/x=y"]).unwrap(), [("a".into(), "/x=y".into())]);
        for wrong in [&["x", "y"][..], &["a=x", "a=y"], &["=x"], &["..=x"]] {
            assert!(names(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_uri_is_no_name() {
        assert_eq!(names(&["nbd+unix:///x?socket=/a"]).unwrap()[0].0, "disk-0");
        assert_eq!(names(&["a=nbd://h/x", "b=nbd://h/y"]).unwrap()[1], ("b".into(), "nbd://h/y".into()));
    }

    #[test]
    fn percentages_are_checked() {
        assert_eq!(parse_percent("0.5%"), Ok(0.5));
        for wrong in ["", "101", "-1", "NaN"] {
            assert!(parse_percent(wrong).is_err(), "{wrong}");
        }
    }
}
